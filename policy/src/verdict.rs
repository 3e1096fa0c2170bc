//! What becomes of a call.

use std::fmt;
use std::sync::Arc;

use crate::error::PolicyError;
use crate::evaluate::Request;
use crate::rule::Rule;
use crate::token::Target;

/// What policy says of a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It goes through.
    Allow(Allow),
    /// Somebody has to be asked.
    Ask(Ask),
    /// It is refused.
    Deny(Denial),
}

/// Where a call goes: what its caller asked for, or the rule's `target=`, with all defaults filled in.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Destination {
    /// dom0.
    AdminVm,
    /// A qube.
    Qube(String),
    /// A new disposable of this template.
    DispVmOf(String),
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Destination::AdminVm => f.write_str("dom0"),
            Destination::Qube(name) => f.write_str(name),
            Destination::DispVmOf(name) => write!(f, "@dispvm:{name}"),
        }
    }
}

/// How a call goes through.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Allow {
    /// Where it goes.
    pub target: Destination,
    /// Who runs the service; none is the target's default user.
    pub user: Option<String>,
    /// Whether the target is started if it does not run. It runs if this is false.
    pub autostart: bool,
    /// Whether the user hears of it.
    pub notify: bool,
    /// What the caller asked for, in the words of policy: a name, `@adminvm`, `@dispvm`, `@dispvm:NAME` or `@default`.
    pub requested: String,
    /// The rule that says so.
    pub rule: Arc<Rule>,
}

/// A question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ask {
    /// What can be chosen: never empty, each once, in order.
    pub targets: Vec<Destination>,
    /// What is chosen beforehand: one of `targets`.
    pub default: Option<Destination>,
    /// Who runs the service; none is the target's default user.
    pub user: Option<String>,
    /// Whether the target is started if it does not run. All `targets` run if this is false.
    pub autostart: bool,
    /// Whether the user hears of the outcome.
    pub notify: bool,
    /// What the caller asked for, as in [`Allow::requested`].
    pub requested: String,
    /// The rule that asks.
    pub rule: Arc<Rule>,
}

/// A refusal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Denial {
    /// Why.
    pub reason: Reason,
    /// Whether the user hears of it.
    pub notify: bool,
    /// The rule behind it, if one matched.
    pub rule: Option<Arc<Rule>>,
}

/// Why a call is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// A rule says deny.
    #[error("denied by policy")]
    Policy,
    /// No rule is about it.
    #[error("no rule matches")]
    NoRule,
    /// The service or its argument has a character that none has, or the argument does not start with `+`.
    #[error("{0:?} is no service and argument")]
    Service(String),
    /// The caller asked for something that is no target.
    #[error("{0:?} is no target")]
    Target(String),
    /// No disposables may be made of it.
    #[error("{0} is not a template for disposables. Hint: `qvm-prefs {0} template_for_dispvms True`")]
    NotATemplate(String),
    /// Allowed, but neither caller nor rule say where to.
    #[error("allowed, but neither the caller nor the rule names a target that is there")]
    NoTarget,
    /// `@dispvm`, but the caller has no template for it.
    #[error("{0} has no default_dispvm. Hint: `qvm-prefs {0} default_dispvm NAME`")]
    NoDispvm(String),
    /// `autostart=no`, and it does not run.
    #[error("{0} does not run, and the rule says autostart=no")]
    Autostart(String),
    /// The caller would call itself.
    #[error("a qube cannot call itself")]
    Loopback,
    /// Nothing to choose from.
    #[error("ask, but there is no target to choose from")]
    NothingToAsk,
    /// The rule's default is not among what can be chosen.
    #[error("ask, but default_target={0} is none of the targets to choose from")]
    DefaultNotOffered(String),
    /// The answer was no.
    #[error("denied by the user")]
    User,
    /// The answer names what was not offered.
    #[error("{0} was not offered")]
    NotOffered(String),
    /// The answer has to come from somebody, and there is nobody.
    #[error("ask, but there is nobody who could be asked")]
    Nobody,
    /// The policy cannot be read.
    #[error("the policy cannot be read: {0}")]
    Broken(PolicyError),
}

impl Denial {
    pub(crate) fn without_rule(reason: Reason) -> Denial {
        Denial { reason, notify: true, rule: None }
    }

    pub(crate) fn of(rule: &Arc<Rule>, reason: Reason, notify: bool) -> Denial {
        Denial { reason, notify, rule: Some(rule.clone()) }
    }
}

/// A policy that cannot be read refuses every call.
impl From<PolicyError> for Denial {
    fn from(error: PolicyError) -> Denial {
        Denial::without_rule(Reason::Broken(error))
    }
}

impl fmt::Display for Denial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.rule {
            Some(rule) => write!(f, "{}: {}", rule.place, self.reason),
            None => write!(f, "{}", self.reason),
        }
    }
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Yes, and there.
    Allow(Destination),
    /// No.
    Deny,
    /// Nobody is there to say.
    Nobody,
}

/// Asks somebody.
pub trait Prompt {
    /// Asks whether, and where, the call may go. May take its time.
    fn ask(&self, request: &Request, question: &Ask) -> Answer;
}

/// Nobody can be asked: what is to be asked is denied.
#[derive(Clone, Copy, Debug, Default)]
pub struct Nobody;

impl Prompt for Nobody {
    fn ask(&self, _: &Request, _: &Ask) -> Answer {
        Answer::Nobody
    }
}

impl Ask {
    /// What becomes of the call now that somebody has answered.
    pub fn answered(self, answer: Answer) -> Result<Allow, Denial> {
        match answer {
            Answer::Deny => Err(Denial::of(&self.rule, Reason::User, self.notify)),
            Answer::Nobody => Err(Denial::of(&self.rule, Reason::Nobody, true)),
            Answer::Allow(target) if !self.targets.contains(&target) => {
                Err(Denial::of(&self.rule, Reason::NotOffered(target.to_string()), true))
            }
            Answer::Allow(target) => Ok(Allow {
                target,
                user: self.user,
                autostart: self.autostart,
                notify: self.notify,
                requested: self.requested,
                rule: self.rule,
            }),
        }
    }
}

impl Destination {
    /// The target as the words of policy name it.
    pub(crate) fn of(target: Target) -> Option<Destination> {
        match target {
            Target::AdminVm => Some(Destination::AdminVm),
            Target::Qube(name) => Some(Destination::Qube(name)),
            Target::DispVmOf(name) => Some(Destination::DispVmOf(name)),
            Target::DispVm | Target::Default => None,
        }
    }
}
