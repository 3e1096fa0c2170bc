//! What is to be run, and the ways to say it.

use std::fmt;

use super::Options;
use crate::outcome::{Failure, Outcome};

/// What is to be run.
pub enum What {
    /// A line for a shell.
    Shell(String),
    /// A program and its arguments.
    Argv(Vec<String>),
    /// A qrexec service, with its argument.
    Service(String),
}

impl What {
    /// One word is a line for a shell; more are a program and its arguments, as in R4.1 and later.
    pub fn new(options: &Options, words: Vec<String>) -> Outcome<What> {
        match (&words[..], options.service) {
            ([], _) => Err(Failure::Usage("a command is required".into())),
            ([service], true) => Ok(What::Service(service.clone())),
            (_, true) => {
                Err(Failure::Usage("a service takes its argument after a '+', and no others".into()))
            }
            ([line], false) if !options.no_shell => Ok(What::Shell(line.clone())),
            _ => Ok(What::Argv(words)),
        }
    }

    /// The same as a line for a shell.
    pub fn shell_line(&self) -> String {
        match self {
            What::Shell(line) | What::Service(line) => line.trim_end_matches('\n').to_owned(),
            What::Argv(words) => words.iter().map(|word| shell_quoted(word)).collect::<Vec<_>>().join(" "),
        }
    }
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            What::Shell(text) | What::Service(text) => f.write_str(text),
            What::Argv(words) => f.write_str(&words.join(" ")),
        }
    }
}

/// A word as a shell reads it.
pub fn shell_quoted(word: &str) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"@%+=:,./-_".contains(&byte);
    match !word.is_empty() && word.bytes().all(is_plain) {
        true => word.to_owned(),
        false => format!("'{}'", word.replace('\'', r#"'"'"'"#)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_reach_the_shell_whole() {
        let words = ["ls", "a b", "it's", "", "é-x"].map(String::from);
        let line = What::Argv(words.to_vec()).shell_line();
        assert_eq!(line, r#"ls 'a b' 'it'"'"'s' '' 'é-x'"#);
        let printed =
            std::process::Command::new("sh").args(["-c", &format!("printf '%s|' {line}")]).output().unwrap();
        assert_eq!(String::from_utf8(printed.stdout).unwrap(), "ls|a b|it's||é-x|");
    }
}
