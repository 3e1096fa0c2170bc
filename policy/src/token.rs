//! Words that name qubes: in a rule's columns, in its `target=`, and in what a caller asks for.
//!
//! Which word may stand where is qrexec's table (QubesOS/qubes-core-qrexec, doc/multifile-policy.markdown, "Qube specification").

use std::fmt;

use crate::error::What;
use crate::system::System;

/// How `uuid:` names dom0: its UUID is zero (QubesOS/qubes-core-admin, `qubes/vm/adminvm.py`).
const DOM0_UUID: &str = "uuid:00000000-0000-0000-0000-000000000000";

/// A word of a policy.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Token {
    /// `*`: anything, dom0 too.
    Any,
    /// `@anyvm`: anything but dom0.
    AnyVm,
    /// `@adminvm` or `dom0`.
    AdminVm,
    /// `@default`: the caller named no target.
    Default,
    /// `@dispvm`: a new disposable of the caller's default template.
    DispVm,
    /// `@dispvm:NAME`: a new disposable of that template.
    DispVmOf(String),
    /// `@dispvm:@tag:TAG`: a new disposable of any template with that tag.
    DispVmTag(String),
    /// `@tag:TAG`: qubes with that tag.
    Tag(String),
    /// `@type:CLASS`: qubes of that class.
    Type(String),
    /// A qube's name, or `uuid:UUID`.
    Qube(String),
}

/// Where a word stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A rule's third column.
    Source,
    /// A rule's fourth column.
    Target,
    /// `target=` and `default_target=`.
    Redirect,
    /// What a caller asks for.
    Requested,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::Source => "source",
            Role::Target => "target",
            Role::Redirect => "redirect target",
            Role::Requested => "requested target",
        })
    }
}

impl Role {
    fn takes(self, token: &Token) -> bool {
        use Token::*;
        match token {
            AdminVm | DispVmOf(_) | Qube(_) => true,
            DispVm => self != Role::Source,
            Default => matches!(self, Role::Target | Role::Requested),
            Any | AnyVm | DispVmTag(_) | Tag(_) | Type(_) => matches!(self, Role::Source | Role::Target),
        }
    }
}

impl Token {
    /// Reads a word that stands in this role.
    pub fn parse(text: &str, role: Role) -> Result<Token, What> {
        Token::read(text)
            .filter(|token| role.takes(token))
            .ok_or_else(|| What::Token { role, token: text.to_owned() })
    }

    fn read(text: &str) -> Option<Token> {
        let value = |value: &str| (!value.is_empty() && !value.starts_with('@')).then(|| value.to_owned());
        Some(match text {
            "*" => Token::Any,
            "@anyvm" => Token::AnyVm,
            "@adminvm" | "dom0" | DOM0_UUID => Token::AdminVm,
            "@default" => Token::Default,
            "@dispvm" => Token::DispVm,
            _ => {
                if let Some(tag) = text.strip_prefix("@dispvm:@tag:") {
                    Token::DispVmTag(value(tag)?)
                } else if let Some(name) = text.strip_prefix("@dispvm:") {
                    Token::DispVmOf(value(name)?)
                } else if let Some(tag) = text.strip_prefix("@tag:") {
                    Token::Tag(value(tag)?)
                } else if let Some(class) = text.strip_prefix("@type:") {
                    Token::Type(value(class)?)
                } else {
                    Token::Qube(value(text)?)
                }
            }
        })
    }

    /// Whether the word covers what was named; `dispvm` is the caller's default template.
    pub(crate) fn matches(&self, named: &Target, dispvm: Option<&str>, system: &System) -> bool {
        let template = match named {
            Target::DispVm => dispvm,
            Target::DispVmOf(name) => Some(name.as_str()),
            _ => None,
        };
        let qube = match named {
            Target::Qube(name) => system.get(name),
            _ => None,
        };
        match self {
            Token::Any => true,
            Token::AnyVm => *named != Target::AdminVm,
            Token::AdminVm => *named == Target::AdminVm,
            Token::Default => *named == Target::Default,
            Token::DispVm => *named == Target::DispVm,
            Token::DispVmOf(name) => template.is_some_and(|template| template == system.name_of(name)),
            Token::DispVmTag(tag) => template
                .and_then(|name| system.get(name))
                .is_some_and(|qube| qube.template_for_dispvms && qube.tags.contains(tag)),
            Token::Tag(tag) => qube.is_some_and(|qube| qube.tags.contains(tag)),
            Token::Type(class) => qube.is_some_and(|qube| qube.class == *class),
            Token::Qube(name) => matches!(named, Target::Qube(other) if other == system.name_of(name)),
        }
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Token::Any => f.write_str("*"),
            Token::AnyVm => f.write_str("@anyvm"),
            Token::AdminVm => f.write_str("@adminvm"),
            Token::Default => f.write_str("@default"),
            Token::DispVm => f.write_str("@dispvm"),
            Token::DispVmOf(name) => write!(f, "@dispvm:{name}"),
            Token::DispVmTag(tag) => write!(f, "@dispvm:@tag:{tag}"),
            Token::Tag(tag) => write!(f, "@tag:{tag}"),
            Token::Type(class) => write!(f, "@type:{class}"),
            Token::Qube(name) => f.write_str(name),
        }
    }
}

/// What a call names, once it is known to be there: qubes go by their names, never by UUID.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Target {
    AdminVm,
    Qube(String),
    DispVmOf(String),
    DispVm,
    Default,
}

impl Target {
    /// Looks a word up. A qube that is not there counts as not named, as in Qubes; a template that is none is an error.
    pub(crate) fn look_up(token: &Token, system: &System) -> Result<Target, String> {
        Ok(match token {
            Token::AdminVm => Target::AdminVm,
            Token::DispVm => Target::DispVm,
            Token::DispVmOf(name) => match system.template(name) {
                Some(name) => Target::DispVmOf(name.to_owned()),
                None => return Err(name.clone()),
            },
            Token::Qube(name) => match system.name_of(name) {
                "dom0" => Target::AdminVm,
                name if system.get(name).is_some() => Target::Qube(name.to_owned()),
                _ => Target::Default,
            },
            // No role that is looked up takes the others.
            _ => Target::Default,
        })
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Target::AdminVm => f.write_str("@adminvm"),
            Target::Qube(name) => f.write_str(name),
            Target::DispVmOf(name) => write!(f, "@dispvm:{name}"),
            Target::DispVm => f.write_str("@dispvm"),
            Target::Default => f.write_str("@default"),
        }
    }
}
