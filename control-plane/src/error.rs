//! The one error of the control plane: a kind that decides the exit status, a message that names step and place, and a
//! hint with the next command to type.

use std::fmt;
use std::io;
use std::path::Path;

/// What an error means to the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// It did not work.
    Failed,
    /// Policy, a limit or the machine refuses.
    Refused,
    /// The command line is wrong, or names something that is not there.
    Usage,
    /// A savefile is corrupt or stale.
    Unusable,
}

/// An error with its hint. Its sources are printed once, by the binary.
#[derive(Debug)]
pub struct Error {
    /// What it means.
    pub kind: Kind,
    message: String,
    hint: Option<String>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// The control plane's result.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error with a message.
    pub fn new(kind: Kind, message: impl Into<String>) -> Error {
        Error { kind, message: message.into(), hint: None, source: None }
    }

    /// Adds the next command to type.
    pub fn hint(mut self, hint: impl Into<String>) -> Error {
        self.hint = Some(hint.into());
        self
    }

    /// Adds what was behind it.
    pub fn because(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
        self.source = Some(source.into());
        self
    }

    /// For `map_err`: a system error while doing `step` with the file at `path`.
    pub fn io<'a>(step: &'a str, path: &'a Path) -> impl FnOnce(io::Error) -> Error + 'a {
        move |source| Error::new(Kind::Failed, format!("cannot {step} {}", path.display())).because(source)
    }

    /// For `map_err`: anything that failed in `step`.
    pub fn failed<E>(step: &str) -> impl FnOnce(E) -> Error + '_
    where
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        move |source| Error::new(Kind::Failed, format!("cannot {step}")).because(source)
    }

    /// The next command to type, if one is known.
    pub fn hint_text(&self) -> Option<&str> {
        self.hint.as_deref()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}
