//! What can be wrong with a policy, and where.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use crate::token::Role;

/// Where a rule or an error stands. Line 0 is the file itself, or the rules that follow its last line by implication.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The file, as it was opened.
    pub file: Arc<Path>,
    /// The line, from 1.
    pub line: u32,
}

impl Place {
    pub(crate) fn file(path: &Path) -> Place {
        Place { file: path.into(), line: 0 }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => write!(f, "{}", self.file.display()),
            line => write!(f, "{}:{line}", self.file.display()),
        }
    }
}

/// A policy that cannot be read. Every call is refused until it can.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{place}: {what}")]
pub struct PolicyError {
    /// Where.
    pub place: Place,
    /// What.
    pub what: What,
}

/// What is wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // each variant's text says what it is
pub enum What {
    #[error("{0}: a policy file's name has only a-z, 0-9, '_', '.' and '-'. Without the ending .policy it is ignored")]
    FileName(String),
    #[error("cannot read it: {0}")]
    Unreadable(String),
    #[error("cannot read {path}: {cause}")]
    IncludeUnreadable { path: String, cause: String },
    #[error("{0} is not a file")]
    NotAFile(String),
    #[error("{0} is not a folder")]
    NotAFolder(String),
    #[error("not UTF-8")]
    Encoding,
    #[error("a control character outside a comment")]
    ControlCharacter,
    #[error("more than {max} {what}")]
    Limit { what: &'static str, max: u64 },
    #[error("wrong number of fields. A rule is: {form}")]
    Fields { form: &'static str },
    #[error("service {service:?} has invalid characters: {characters}")]
    ServiceCharacters { service: String, characters: String },
    #[error("argument {argument:?} has invalid characters: {characters}")]
    ArgumentCharacters { argument: String, characters: String },
    #[error("argument {0:?} does not start with '+'")]
    ArgumentStart(String),
    #[error("with service * the argument can only be *")]
    ArgumentOfAnyService,
    #[error("invalid {role}: {token:?}")]
    Token { role: Role, token: String },
    #[error("invalid action: {0:?}. It is allow, deny or ask")]
    Action(String),
    #[error("invalid parameter: {0:?}. It is KEY=VALUE")]
    ParameterForm(String),
    #[error("parameter given twice: {0:?}")]
    ParameterTwice(String),
    #[error("{action} takes no parameter {key:?}")]
    ParameterUnknown { action: &'static str, key: String },
    #[error("{key} is {value:?}, but can be only 'yes' or 'no'")]
    ParameterBool { key: &'static str, value: String },
    #[error("allow for @default must specify target=")]
    AllowDefault,
    #[error("invalid directive: {0:?}")]
    Directive(String),
    #[error("wrong number of parameters: {form}")]
    DirectiveForm { form: &'static str },
    #[error("nothing can be included here")]
    NothingToInclude,
}
