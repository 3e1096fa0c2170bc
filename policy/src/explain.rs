//! A verdict as people and programs read it.

use serde::Serialize;

use crate::evaluate::Request;
use crate::rule::Rule;
use crate::system::System;
use crate::verdict::{Destination, Verdict};

/// A call, what becomes of it, and the rule that says so. Its JSON is this struct's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Explanation {
    /// `allow`, `ask` or `deny`.
    pub result: &'static str,
    /// Who calls.
    pub source: String,
    /// What it asks for, as policy sees it.
    pub requested_target: String,
    /// The service.
    pub service: String,
    /// Its argument, with the `+`.
    pub argument: String,
    /// Where an allowed call goes.
    pub target: Option<String>,
    /// What can be chosen where somebody is to be asked.
    pub targets: Option<Vec<String>>,
    /// What is chosen beforehand then.
    pub default_target: Option<String>,
    /// Who runs the service; null is the target's default user.
    pub user: Option<String>,
    /// Whether a target that does not run is started.
    pub autostart: Option<bool>,
    /// Whether the user hears of it.
    pub notify: bool,
    /// Why it is denied.
    pub reason: Option<String>,
    /// The rule, if one matched.
    pub rule: Option<RuleAt>,
    /// What one may have overlooked.
    pub note: Option<String>,
}

/// A rule and where it stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RuleAt {
    /// The file.
    pub file: String,
    /// The line; 0 for the denial that a legacy file for one argument implies at its end.
    pub line: u32,
    /// The rule, as a line of policy.d.
    pub text: String,
}

impl RuleAt {
    fn of(rule: &Rule) -> RuleAt {
        let file = rule.place.file.display().to_string();
        RuleAt { file, line: rule.place.line, text: rule.to_string() }
    }
}

impl Explanation {
    /// Explains what became of a call.
    pub fn new(system: &System, request: &Request, verdict: &Verdict) -> Explanation {
        let mut explanation = Explanation {
            result: "deny",
            source: request.source.clone(),
            requested_target: request.target.clone(),
            service: request.service.clone(),
            argument: request.argument.clone(),
            target: None,
            targets: None,
            default_target: None,
            user: None,
            autostart: None,
            notify: true,
            reason: None,
            rule: None,
            note: note(system, request),
        };
        match verdict {
            Verdict::Allow(allow) => {
                explanation.result = "allow";
                explanation.requested_target.clone_from(&allow.requested);
                explanation.target = Some(allow.target.to_string());
                explanation.user.clone_from(&allow.user);
                explanation.autostart = Some(allow.autostart);
                explanation.notify = allow.notify;
                explanation.rule = Some(RuleAt::of(&allow.rule));
            }
            Verdict::Ask(ask) => {
                explanation.result = "ask";
                explanation.requested_target.clone_from(&ask.requested);
                explanation.targets = Some(ask.targets.iter().map(Destination::to_string).collect());
                explanation.default_target = ask.default.as_ref().map(Destination::to_string);
                explanation.user.clone_from(&ask.user);
                explanation.autostart = Some(ask.autostart);
                explanation.notify = ask.notify;
                explanation.rule = Some(RuleAt::of(&ask.rule));
            }
            Verdict::Deny(denial) => {
                explanation.notify = denial.notify;
                explanation.reason = Some(denial.reason.to_string());
                explanation.rule = denial.rule.as_deref().map(RuleAt::of);
            }
        }
        explanation
    }

    /// Lines of text.
    pub fn text(&self) -> String {
        let yes_no = |value| if value { "yes" } else { "no" }.to_owned();
        let rule = self.rule.as_ref().map(|rule| match rule.line {
            0 => format!("{} (implied at its end): {}", rule.file, rule.text),
            line => format!("{}:{line}: {}", rule.file, rule.text),
        });
        let user = self.autostart.map(|_| self.user.clone().unwrap_or_else(|| "the target's default".into()));
        let lines = [
            ("target", self.target.clone()),
            ("choices", self.targets.as_ref().map(|targets| targets.join(" "))),
            ("chosen", self.default_target.clone()),
            ("reason", self.reason.clone()),
            ("user", user),
            ("autostart", self.autostart.map(yes_no)),
            ("notify", Some(yes_no(self.notify))),
            ("rule", rule.or_else(|| Some("none".into()))),
            ("note", self.note.clone()),
        ];
        let target = match self.requested_target.as_str() {
            "" => "@default",
            target => target,
        };
        let mut text =
            format!("{}: {} calls {}{} in {target}\n", self.result, self.source, self.service, self.argument);
        for (name, value) in lines {
            if let Some(value) = value {
                text += &format!("  {name:10} {value}\n");
            }
        }
        text
    }
}

/// A target that is not there counts as none.
fn note(system: &System, request: &Request) -> Option<String> {
    let name = request.target.as_str();
    let word = name.is_empty() || name == "dom0" || name.starts_with('@') || name.starts_with('*');
    (!word && system.get(system.name_of(name)).is_none())
        .then(|| format!("there is no qube {name}; the call counts as one to @default"))
}
