//! A service's configuration: a few keys, in the part of TOML that Qubes reads.
//!
//! Form: lines of `KEY = VALUE`, blank lines, comments. A key has letters, digits, `.`, `-` and `_`, and stands at the line's beginning; a
//! value is `true`, `false`, a decimal number without needless zeros, or a text in single quotes. What follows a value is blanks and a comment.
//! Unknown keys are told of and count for nothing, but their values must be values; known ones may stand once.

use std::fmt;

/// Of a file; Qubes' own have some dozen.
pub const CONFIG_BYTES_MAX: usize = 64 << 10;

/// What a configuration says; without a file, all is as by default.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Config {
    /// Whether somebody has to be logged in first; `0` and `1` are how R4.0 wrote it.
    pub wait_for_session: bool,
    /// Who runs it, whoever the caller's side says.
    pub force_user: Option<String>,
    /// Whether a socket is not told what is called, and by whom.
    pub skip_service_descriptor: bool,
    /// Whether the end of the caller's bytes ends the call.
    pub exit_on_client_eof: bool,
    /// Whether the end of a socket's bytes ends the call.
    pub exit_on_service_eof: bool,
    /// Keys that mean nothing.
    pub unknown: Vec<String>,
}

/// What is wrong with a configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConfigError {
    /// In this line, from 1 on.
    pub line: usize,
    /// What, in words.
    pub what: &'static str,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.line, self.what)
    }
}

impl std::error::Error for ConfigError {}

enum Value<'a> {
    Flag(bool),
    Number(u64),
    Text(&'a str),
}

impl Config {
    /// Reads a file's text.
    pub fn parse(text: &[u8]) -> Result<Config, ConfigError> {
        let text = std::str::from_utf8(text).map_err(|error| ConfigError {
            line: 1 + text.iter().take(error.valid_up_to()).filter(|byte| **byte == b'\n').count(),
            what: "not UTF-8",
        })?;
        let mut config = Config::default();
        let mut seen = Vec::new();
        for (at, line) in text.split('\n').enumerate() {
            let wrong = |what| ConfigError { line: at + 1, what };
            let line = line.strip_suffix('\r').unwrap_or(line).trim_end_matches([' ', '\t']);
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let (key, value) = split(line).map_err(wrong)?;
            let value = Value::parse(value).map_err(wrong)?;
            if config.take(key, &value).map_err(wrong)? && std::mem::replace(seen_flag(&mut seen, key), true)
            {
                return Err(wrong("the key stands there for the second time"));
            }
        }
        Ok(config)
    }

    /// Whether it has what means something to a service behind a socket alone.
    pub fn is_for_a_socket(&self) -> bool {
        self.skip_service_descriptor || self.exit_on_client_eof || self.exit_on_service_eof
    }

    /// Takes a key's value. `Ok(false)`: nobody knows the key.
    fn take(&mut self, key: &str, value: &Value<'_>) -> Result<bool, &'static str> {
        match (key, value) {
            ("wait-for-session", Value::Flag(flag)) => self.wait_for_session = *flag,
            ("wait-for-session", Value::Number(number @ (0 | 1))) => self.wait_for_session = *number == 1,
            ("force-user", Value::Text(user)) => self.force_user = Some((*user).to_owned()),
            ("skip-service-descriptor", Value::Flag(flag)) => self.skip_service_descriptor = *flag,
            ("exit-on-client-eof", Value::Flag(flag)) => self.exit_on_client_eof = *flag,
            ("exit-on-service-eof", Value::Flag(flag)) => self.exit_on_service_eof = *flag,
            ("force-user", _) => return Err("a user's name is a text"),
            (
                "wait-for-session" | "skip-service-descriptor" | "exit-on-client-eof" | "exit-on-service-eof",
                _,
            ) => return Err("it is either true or false"),
            _ => {
                self.unknown.push(key.to_owned());
                return Ok(false);
            }
        }
        Ok(true)
    }
}

fn seen_flag<'a, 'b>(seen: &'b mut Vec<(&'a str, bool)>, key: &'a str) -> &'b mut bool {
    let at = seen.iter().position(|(other, _)| *other == key).unwrap_or_else(|| {
        seen.push((key, false));
        seen.len() - 1
    });
    &mut seen[at].1
}

/// The key and what follows its `=`.
fn split(line: &str) -> Result<(&str, &str), &'static str> {
    match line.as_bytes().first() {
        Some(b'[') => return Err("there are no tables"),
        Some(first) if first.is_ascii_alphabetic() => {}
        _ => return Err("a key begins with a letter, at the line's beginning"),
    }
    let in_key = |letter: char| letter.is_ascii_alphanumeric() || matches!(letter, '.' | '-' | '_');
    let (key, rest) = line.split_at(line.find(|letter| !in_key(letter)).unwrap_or(line.len()));
    let value = rest.trim_start_matches([' ', '\t']).strip_prefix('=').ok_or("no `=` after the key")?;
    Ok((key, value.trim_start_matches([' ', '\t'])))
}

impl<'a> Value<'a> {
    fn parse(text: &'a str) -> Result<Value<'a>, &'static str> {
        let (value, rest) = Value::begin(text)?;
        let rest = rest.trim_start_matches([' ', '\t']);
        match rest.is_empty() || rest.starts_with('#') {
            true if !text.contains('\0') => Ok(value),
            true => Err("a NUL"),
            false => Err("something follows the value"),
        }
    }

    /// The value at the beginning, and what follows.
    fn begin(text: &'a str) -> Result<(Value<'a>, &'a str), &'static str> {
        if let Some(rest) = text.strip_prefix("true") {
            return Ok((Value::Flag(true), rest));
        }
        if let Some(rest) = text.strip_prefix("false") {
            return Ok((Value::Flag(false), rest));
        }
        if text.starts_with("'''") || text.starts_with('"') {
            return Err("a text stands in single quotes");
        }
        if let Some(quoted) = text.strip_prefix('\'') {
            let (text, rest) = quoted.split_once('\'').ok_or("the text's quote is not closed")?;
            return Ok((Value::Text(text), rest));
        }
        let digits = text.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(text.len());
        let (number, rest) = text.split_at(digits);
        match number.parse() {
            Ok(value) if number == "0" || !number.starts_with('0') => Ok((Value::Number(value), rest)),
            _ => Err("no value: true, false, a number, or a text in single quotes"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_qubes_reads_is_read() {
        let text = b"# a comment\r\n\nwait-for-session = 1 # as R4.0 had it\nforce-user='root'\n\
                     skip-service-descriptor=true\nexit-on-client-eof = false\nexit-on-service-eof\t=\ttrue  \nother.key-1 = 42";
        let expected = Config {
            wait_for_session: true,
            force_user: Some("root".into()),
            skip_service_descriptor: true,
            exit_on_service_eof: true,
            unknown: vec!["other.key-1".into()],
            ..Config::default()
        };
        assert_eq!(Config::parse(text), Ok(expected));
        assert_eq!(Config::parse(b""), Ok(Config::default()));
        assert_eq!(Config::parse(b"wait-for-session=0\n"), Ok(Config::default()));
    }

    #[test]
    fn what_qubes_refuses_is_refused_with_its_line() {
        for wrong in [
            "wait-for-session = 00",
            "wait-for-session = 01",
            "wait-for-session = 2",
            "wait-for-session = ",
            "wait-for-session = \"a\"",
            "wait-for-session = 'true'",
            "wait-for-session",
            "wait-for-session = true yes",
            "wait-for-session = truely",
            "wait-for-session = 1\nwait-for-session = 1",
            "force-user = root",
            "force-user = \"root\"",
            "force-user = '''root'''",
            "force-user = 'root",
            "force-user = 1",
            "force-user = true",
            "skip-service-descriptor = 1",
            "exit-on-client-eof = 'x'",
            "[table]",
            " wait-for-session = 1",
            "_key = 1",
            "unknown = maybe",
            "unknown = 99999999999999999999999",
            "force-user = 'a\0b'",
            "f\u{e4}rbung = 1",
        ] {
            let line = 1 + wrong.matches('\n').count();
            let refused = Config::parse(format!("\n{wrong}\n").as_bytes()).unwrap_err();
            assert_eq!(refused.line, 1 + line, "{wrong:?}: {refused}");
        }
        assert_eq!(Config::parse(b"a=1\n\xff").unwrap_err().line, 2);
    }
}
