//! The texts of qrexec: names of services, qubes and targets, and command lines.
//!
//! Invariants: a [`Service`]'s name is one component of a path and no option; a [`QubeName`] is 1 to 31 letters, digits, `_` and `-`,
//! beginning with a letter. So both may stand in a path, in a policy and in an argument as they are. The stock daemon turns a byte it
//! does not allow into `_` (daemon/qrexec-daemon.c, `sanitize_name`); we refuse it, so that no two names become one.
//!
//! Forms as in QubesOS/qubes-core-qrexec (libqrexec/exec.c 036a808a, lib/qubes-rpc-multiplexer 121c1dff, daemon/qrexec-daemon.c),
//! and qubes-core-admin (qubes/vm/__init__.py, `validate_name`).

use std::fmt;

use thiserror::Error;

/// qrexec itself failed.
pub const EXIT_PROBLEM: u8 = 125;
/// Policy refused the call.
pub const EXIT_REFUSED: u8 = 126;
/// There is no such service.
pub const EXIT_NOT_FOUND: u8 = 127;

/// Bytes of a service's name and argument: with its NUL, what a v3 message carries.
pub const DESCRIPTOR_BYTES_MAX: usize = crate::stock::message::SERVICE_BYTES_MAX - 1;
/// Bytes of a service's name alone: it is a file's name.
pub const SERVICE_NAME_BYTES_MAX: usize = 255;
/// Bytes of a qube's name.
pub const QUBE_NAME_BYTES_MAX: usize = 31;
/// Bytes of a target: with its NUL, the field of a v3 message.
pub const TARGET_BYTES_MAX: usize = 63;
/// Bytes of a user's name, as useradd has it.
pub const USER_BYTES_MAX: usize = 32;

/// A text that isn't what it should be; whose call it is gets refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("{text}: {what}")]
pub struct SyntaxError {
    /// Which text.
    pub text: &'static str,
    /// What is wrong, in words.
    pub what: &'static str,
}

fn wrong<T>(text: &'static str, what: &'static str) -> Result<T, SyntaxError> {
    Err(SyntaxError { text, what })
}

/// The text of `bytes`, when there are at most `bytes_max` and every one is an ASCII letter, a digit or one of `extra`.
fn plain(text: &'static str, bytes: &[u8], bytes_max: usize, extra: &[u8]) -> Result<String, SyntaxError> {
    if bytes.len() > bytes_max {
        return wrong(text, "too long");
    }
    if !bytes.iter().all(|byte| byte.is_ascii_alphanumeric() || extra.contains(byte)) {
        return wrong(text, "a character that is not allowed");
    }
    Ok(bytes.iter().copied().map(char::from).collect())
}

/// A qube's name, dom0's among them.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct QubeName(String);

impl QubeName {
    /// Checks a name.
    pub fn parse(bytes: &[u8]) -> Result<Self, SyntaxError> {
        let name = plain("qube's name", bytes, QUBE_NAME_BYTES_MAX, b"_-")?;
        if !bytes.first().is_some_and(u8::is_ascii_alphabetic) {
            return wrong("qube's name", "it must begin with a letter");
        }
        Ok(Self(name))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A service and perhaps its argument: `NAME` or `NAME+ARGUMENT`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Service {
    name: String,
    argument: Option<String>,
}

impl Service {
    /// Checks name and argument.
    pub fn parse(bytes: &[u8]) -> Result<Self, SyntaxError> {
        let descriptor = plain("service", bytes, DESCRIPTOR_BYTES_MAX, b"_-.+")?;
        let (name, argument) = match descriptor.split_once('+') {
            Some((name, argument)) => (name.to_owned(), Some(argument.to_owned())),
            None => (descriptor, None),
        };
        if name.is_empty() || name.len() > SERVICE_NAME_BYTES_MAX {
            return wrong("service", "a name has 1 to 255 characters");
        }
        if name.starts_with(['-', '.']) {
            return wrong("service", "a name must not begin with `-` or `.`");
        }
        Ok(Self { name, argument })
    }

    /// The name, what the file in /etc/qubes-rpc is called.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What follows the first `+`. An empty one is not the same as none on the wire, but is in a policy.
    pub fn argument(&self) -> Option<&str> {
        self.argument.as_deref()
    }
}

impl fmt::Display for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.argument {
            Some(argument) => write!(f, "{}+{argument}", self.name),
            None => f.write_str(&self.name),
        }
    }
}

/// Whom a call is for, as its caller put it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Target {
    /// A qube by its name, or by `uuid:` and its UUID.
    Name(String),
    /// `@` and this: `default`, `adminvm`, `dispvm`, `dispvm:NAME`; which there are, policy knows.
    Keyword(String),
}

impl Target {
    /// Checks a target. None is `@default`; `$` for `@` is how it was written up to R3.2.
    pub fn parse(bytes: &[u8]) -> Result<Self, SyntaxError> {
        match bytes {
            [] => Ok(Self::Keyword("default".to_owned())),
            [b'@' | b'$', keyword @ ..] => Self::keyword(keyword),
            name => Self::name(name),
        }
    }

    fn keyword(bytes: &[u8]) -> Result<Self, SyntaxError> {
        let keyword = plain("target", bytes, TARGET_BYTES_MAX - 1, b"_-:.@")?;
        if !bytes.first().is_some_and(u8::is_ascii_alphabetic) {
            return wrong("target", "a keyword must begin with a letter");
        }
        Ok(Self::Keyword(keyword))
    }

    fn name(bytes: &[u8]) -> Result<Self, SyntaxError> {
        match bytes.strip_prefix(b"uuid:") {
            Some(uuid) => {
                let dashes = |at: usize| matches!(at, 8 | 13 | 18 | 23);
                let fits = |(at, byte): (usize, &u8)| {
                    if dashes(at) {
                        *byte == b'-'
                    } else {
                        byte.is_ascii_hexdigit()
                    }
                };
                if uuid.len() != 36 || !uuid.iter().enumerate().all(fits) {
                    return wrong("target", "`uuid:` is not followed by a UUID");
                }
                plain("target", bytes, TARGET_BYTES_MAX, b":-").map(Self::Name)
            }
            None => QubeName::parse(bytes).map(|name| Self::Name(name.0)),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => f.write_str(name),
            Self::Keyword(keyword) => write!(f, "@{keyword}"),
        }
    }
}

/// What is to run: `COMMAND`, without the user before it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// A line for the user's shell; `nogui:` before it, if any, is part of it.
    Shell(Vec<u8>),
    /// `QUBESRPC SERVICE SOURCE [name|keyword TARGET]`.
    Rpc {
        /// What is called.
        service: Service,
        /// Who calls.
        source: QubeName,
        /// Whom the caller asked for; said to dom0 alone.
        target: Option<Target>,
    },
}

impl Command {
    /// Reads what follows the user. Words stand one space apart.
    pub fn parse(line: &[u8]) -> Result<Self, SyntaxError> {
        if line.is_empty() || line.len() >= crate::stock::message::COMMAND_BYTES_MAX || line.contains(&0) {
            return wrong("command line", "it is empty, too long or has a NUL");
        }
        let without_gui = line.strip_prefix(b"nogui:").unwrap_or(line);
        let Some(call) = without_gui.strip_prefix(b"QUBESRPC ") else {
            return Ok(Self::Shell(line.to_vec()));
        };
        let mut words = call.split(|byte| *byte == b' ');
        let service = Service::parse(words.next().unwrap_or_default())?;
        let Some(source) = words.next() else { return wrong("command line", "no calling qube") };
        let source = QubeName::parse(source)?;
        let target = match (words.next(), words.next(), words.next()) {
            (None, ..) => None,
            (Some(b"name"), Some(name), None) => Some(Target::name(name)?),
            (Some(b"keyword"), Some(keyword), None) => Some(Target::keyword(keyword)?),
            _ => return wrong("command line", "the target must be `name NAME` or `keyword KEYWORD`"),
        };
        Ok(Self::Rpc { service, source, target })
    }

    /// The line.
    pub fn to_bytes(&self) -> Vec<u8> {
        match self {
            Self::Shell(line) => line.clone(),
            Self::Rpc { service, source, target } => {
                let target = match target {
                    None => String::new(),
                    Some(Target::Name(name)) => format!(" name {name}"),
                    Some(Target::Keyword(keyword)) => format!(" keyword {keyword}"),
                };
                format!("QUBESRPC {service} {}{target}", source.0).into_bytes()
            }
        }
    }
}

/// A command and who runs it: `USER:COMMAND`, the user `DEFAULT` being the qube's own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommandLine {
    /// A user's name.
    pub user: String,
    /// What runs.
    pub command: Command,
}

impl CommandLine {
    /// Reads a line.
    pub fn parse(line: &[u8]) -> Result<Self, SyntaxError> {
        if line.len() >= crate::stock::message::COMMAND_BYTES_MAX {
            return wrong("command line", "too long");
        }
        let Some(colon) = line.iter().position(|byte| *byte == b':') else {
            return wrong("command line", "no user before it");
        };
        let (user, command) = line.split_at(colon);
        let user_name = plain("user", user, USER_BYTES_MAX, b"_-.")?;
        if user.is_empty() || user.starts_with(b"-") {
            return wrong("user", "empty, or begins with `-`");
        }
        Ok(Self { user: user_name, command: Command::parse(command.get(1..).unwrap_or_default())? })
    }

    /// The line.
    pub fn to_bytes(&self) -> Vec<u8> {
        [self.user.as_bytes(), b":", &self.command.to_bytes()].concat()
    }
}
