//! What to run. Payload: user u8 (0 user, 1 root), zero u8, argc u16, envc u16, has_cwd u16 (0 or 1), then argc + envc + has_cwd
//! strings, each ended by a NUL: the arguments, the variables as KEY=VALUE, the folder.
//!
//! Invariants: strings are any bytes but NUL, so nothing is lost or escaped; one frame holds all of it.

use crate::{ProtocolError, PAYLOAD_BYTES_MAX};

/// Arguments of a command, its name included.
pub const ARGV_COUNT_MAX: usize = 4096;
/// Variables on top of the session's.
pub const ENV_COUNT_MAX: usize = 1024;

const FIXED_BYTES: usize = 8;
const FRAME: &str = "Exec";

/// Who a command runs as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum User {
    /// The session's user, uid 1000.
    User,
    /// The administrator.
    Root,
}

/// A command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exec {
    /// The command's name, looked up in PATH when it has no slash, and its arguments.
    pub argv: Vec<Vec<u8>>,
    /// Who runs it.
    pub user: User,
    /// Variables to set on top of the session's.
    pub env: Vec<(Vec<u8>, Vec<u8>)>,
    /// Where it starts; without it, in the user's home.
    pub cwd: Option<Vec<u8>>,
}

impl Exec {
    /// `argv` as the session's user, at home, with the session's environment.
    pub fn user<A: Into<Vec<u8>>>(argv: impl IntoIterator<Item = A>) -> Self {
        Self {
            argv: argv.into_iter().map(Into::into).collect(),
            user: User::User,
            env: Vec::new(),
            cwd: None,
        }
    }

    /// Whether a frame can carry it: counts, total size, NULs, names of variables. Parsed commands always pass.
    pub fn validate(&self) -> Result<(), ProtocolError> {
        let malformed = |what| Err(ProtocolError::malformed(FRAME, what));
        if self.argv.is_empty() || self.argv[0].is_empty() {
            return malformed("no command");
        }
        if self.argv.len() > ARGV_COUNT_MAX {
            return malformed("more than 4096 arguments");
        }
        if self.env.len() > ENV_COUNT_MAX {
            return malformed("more than 1024 variables");
        }
        if self.env.iter().any(|(key, _)| key.is_empty() || key.contains(&b'=')) {
            return malformed("a variable's name is empty or contains `=`");
        }
        if self.cwd.as_ref().is_some_and(Vec::is_empty) {
            return malformed("the folder's name is empty");
        }
        if self.strings().any(|string| string.contains(&0)) {
            return malformed("a string contains a NUL byte");
        }
        if self.encoded_bytes() > PAYLOAD_BYTES_MAX {
            return malformed("arguments and environment exceed 64 KiB");
        }
        Ok(())
    }

    pub(crate) fn encode(&self) -> Result<Vec<u8>, ProtocolError> {
        self.validate()?;
        let mut out = Vec::with_capacity(self.encoded_bytes());
        out.extend_from_slice(&[matches!(self.user, User::Root) as u8, 0]);
        out.extend_from_slice(&(self.argv.len() as u16).to_le_bytes());
        out.extend_from_slice(&(self.env.len() as u16).to_le_bytes());
        out.extend_from_slice(&u16::from(self.cwd.is_some()).to_le_bytes());
        for arg in &self.argv {
            put_string(&mut out, &[arg]);
        }
        for (key, value) in &self.env {
            put_string(&mut out, &[key, b"=", value]);
        }
        if let Some(cwd) = &self.cwd {
            put_string(&mut out, &[cwd]);
        }
        Ok(out)
    }

    pub(crate) fn parse(payload: &[u8]) -> Result<Self, ProtocolError> {
        let malformed = |what| ProtocolError::malformed(FRAME, what);
        let Some((fixed, text)) = payload.split_first_chunk::<FIXED_BYTES>() else {
            return Err(malformed("too short"));
        };
        let user = match fixed[0..2] {
            [0, 0] => User::User,
            [1, 0] => User::Root,
            _ => return Err(malformed("unknown user")),
        };
        let count = |at: usize| usize::from(u16::from_le_bytes([fixed[at], fixed[at + 1]]));
        let (argc, envc, has_cwd) = (count(2), count(4), count(6));
        if argc > ARGV_COUNT_MAX || envc > ENV_COUNT_MAX || has_cwd > 1 {
            return Err(malformed("counts are over their limits"));
        }
        let Some(text) = text.strip_suffix(&[0]) else { return Err(malformed("last string has no end")) };
        let mut strings = text.split(|byte| *byte == 0);
        let mut next = || strings.next().ok_or(malformed("fewer strings than counted"));

        let mut exec = Self { argv: Vec::new(), user, env: Vec::new(), cwd: None };
        for _ in 0..argc {
            exec.argv.push(next()?.to_vec());
        }
        for _ in 0..envc {
            exec.env.push(split_variable(next()?).ok_or(malformed("a variable without `=`"))?);
        }
        if has_cwd == 1 {
            exec.cwd = Some(next()?.to_vec());
        }
        if strings.next().is_some() {
            return Err(malformed("more strings than counted"));
        }
        exec.validate()?;
        Ok(exec)
    }

    fn strings(&self) -> impl Iterator<Item = &Vec<u8>> {
        self.argv.iter().chain(self.env.iter().flat_map(|(key, value)| [key, value])).chain(&self.cwd)
    }

    fn encoded_bytes(&self) -> usize {
        FIXED_BYTES + self.strings().map(|string| string.len() + 1).sum::<usize>()
    }
}

fn put_string(out: &mut Vec<u8>, parts: &[&[u8]]) {
    for part in parts {
        out.extend_from_slice(part);
    }
    out.push(0);
}

fn split_variable(variable: &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
    let equals = variable.iter().position(|byte| *byte == b'=')?;
    Some((variable[..equals].to_vec(), variable[equals + 1..].to_vec()))
}
