//! Evaluates a call: the first rule that matches, and what it comes to.

use std::sync::Arc;

use crate::error::What;
use crate::load::Policy;
use crate::rule::{Action, Call, Rule, Terms};
use crate::system::System;
use crate::token::{Role, Target, Token};
use crate::verdict::{Allow, Answer, Ask, Denial, Destination, Prompt, Reason, Verdict};

/// A call, as its caller asks for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The caller's name; `dom0` is possible.
    pub source: String,
    /// What it named: a qube, a word of policy, or nothing.
    pub target: String,
    /// The service.
    pub service: String,
    /// The argument with its `+`.
    pub argument: String,
}

impl Request {
    /// A call of `SERVICE[+ARGUMENT]`.
    pub fn new(source: &str, target: &str, service_and_argument: &str) -> Request {
        let (service, argument) = match service_and_argument.split_once('+') {
            Some((service, argument)) => (service, argument),
            None => (service_and_argument, ""),
        };
        Request {
            source: source.to_owned(),
            target: target.to_owned(),
            service: service.to_owned(),
            argument: format!("+{argument}"),
        }
    }
}

/// A call, looked up in the system.
pub(crate) struct Looked<'a> {
    request: &'a Request,
    pub(crate) system: &'a System,
    pub(crate) source: Target,
    target: Target,
    /// The caller's default_dispvm.
    pub(crate) dispvm: Option<&'a str>,
}

impl<'a> Looked<'a> {
    fn up(request: &'a Request, system: &'a System) -> Result<Looked<'a>, Reason> {
        let Request { source, target, service, argument } = request;
        if service == "*" || argument == "*" || Call::parse(service, argument).is_err() {
            return Err(Reason::Service(format!("{service}{argument}")));
        }
        let word = if target.is_empty() { "@default" } else { target };
        let token = Token::parse(word, Role::Requested).map_err(|_: What| Reason::Target(target.clone()))?;
        let target = Target::look_up(&token, system).map_err(Reason::NotATemplate)?;
        let source = system.name_of(source);
        let dispvm = system.get(source).and_then(|qube| qube.default_dispvm.as_deref());
        let source = match source {
            "dom0" | "@adminvm" => Target::AdminVm,
            name => Target::Qube(name.to_owned()),
        };
        Ok(Looked { request, system, source, target, dispvm })
    }

    /// Whether a rule is about such calls of this caller, whatever their target.
    pub(crate) fn is_for_caller(&self, rule: &Rule) -> bool {
        rule.call.matches(&self.request.service, &self.request.argument)
            && rule.source.matches(&self.source, None, self.system)
    }

    fn is_for(&self, rule: &Rule) -> bool {
        self.is_for_caller(rule) && rule.target.matches(&self.target, self.dispvm, self.system)
    }

    /// Where a target leads: `@dispvm` to the caller's default template.
    pub(crate) fn destination(&self, target: Target) -> Result<Destination, Reason> {
        if let Target::DispVm = target {
            let name = self.dispvm.ok_or_else(|| Reason::NoDispvm(self.request.source.clone()))?;
            let template = self.system.template(name).ok_or_else(|| Reason::NotATemplate(name.to_owned()))?;
            return Ok(Destination::DispVmOf(template.to_owned()));
        }
        Destination::of(target).ok_or(Reason::NoTarget)
    }

    /// Where `target=` or `default_target=` leads.
    fn redirect(&self, token: &Token) -> Result<Destination, Reason> {
        self.destination(Target::look_up(token, self.system).map_err(Reason::NotATemplate)?)
    }

    /// Whether a call can go there without starting anything.
    fn runs(&self, target: &Destination) -> bool {
        match target {
            Destination::AdminVm => true,
            Destination::DispVmOf(_) => false,
            Destination::Qube(name) => {
                self.system.get(name).is_some_and(|qube| qube.power_state == "Running")
            }
        }
    }

    /// Whether the caller would call itself.
    pub(crate) fn is_caller(&self, target: &Destination) -> bool {
        match (&self.source, target) {
            (Target::AdminVm, Destination::AdminVm) => true,
            (Target::Qube(source), Destination::Qube(target)) => source == target,
            _ => false,
        }
    }
}

impl Policy {
    /// What policy says of a call.
    pub fn evaluate(&self, system: &System, request: &Request) -> Verdict {
        let call = match Looked::up(request, system) {
            Ok(call) => call,
            Err(reason) => return Verdict::Deny(Denial::without_rule(reason)),
        };
        let Some(rule) = self.rules().find(|rule| call.is_for(rule)) else {
            return Verdict::Deny(Denial::without_rule(Reason::NoRule));
        };
        let verdict = match &rule.action {
            Action::Deny { notify } => Err(Denial::of(rule, Reason::Policy, *notify)),
            Action::Allow(terms) => allow(&call, rule, terms).map(Verdict::Allow),
            Action::Ask { terms, default_target } => {
                self.ask(&call, rule, terms, default_target.as_ref()).map(Verdict::Ask)
            }
        };
        verdict.unwrap_or_else(Verdict::Deny)
    }

    /// What becomes of a call, with whoever can be asked.
    pub fn decide(&self, system: &System, request: &Request, prompt: &dyn Prompt) -> Result<Allow, Denial> {
        match self.evaluate(system, request) {
            Verdict::Allow(allow) => Ok(allow),
            Verdict::Deny(denial) => Err(denial),
            Verdict::Ask(question) => {
                let answer: Answer = prompt.ask(request, &question);
                question.answered(answer)
            }
        }
    }

    fn ask(
        &self,
        call: &Looked<'_>,
        rule: &Arc<Rule>,
        terms: &Terms,
        default: Option<&Token>,
    ) -> Result<Ask, Denial> {
        let deny = |reason| Denial::of(rule, reason, true);
        let mut targets = match &terms.target {
            Some(token) => vec![call.redirect(token).map_err(deny)?],
            None => self.targets_to_ask(call),
        };
        targets.retain(|target| !call.is_caller(target) && (terms.autostart || call.runs(target)));
        if targets.is_empty() {
            return Err(deny(Reason::NothingToAsk));
        }
        let default = match default {
            None => None,
            // Whoever has no default template is asked all the same, with nothing chosen beforehand.
            Some(Token::DispVm) if call.dispvm.is_none() => None,
            Some(token) => Some(
                call.redirect(token)
                    .ok()
                    .filter(|target| targets.contains(target))
                    .ok_or_else(|| deny(Reason::DefaultNotOffered(token.to_string())))?,
            ),
        };
        Ok(Ask {
            targets,
            default,
            user: terms.user.clone(),
            autostart: terms.autostart,
            notify: terms.notify,
            requested: call.target.to_string(),
            rule: rule.clone(),
        })
    }
}

fn allow(call: &Looked<'_>, rule: &Arc<Rule>, terms: &Terms) -> Result<Allow, Denial> {
    let deny = |reason| Denial::of(rule, reason, true);
    let target = match &terms.target {
        Some(token) => call.redirect(token),
        None => call.destination(call.target.clone()),
    }
    .map_err(deny)?;
    if !terms.autostart && !call.runs(&target) {
        return Err(Denial::of(rule, Reason::Autostart(target.to_string()), terms.notify));
    }
    if call.is_caller(&target) {
        return Err(deny(Reason::Loopback));
    }
    Ok(Allow {
        target,
        user: terms.user.clone(),
        autostart: terms.autostart,
        notify: terms.notify,
        requested: call.target.to_string(),
        rule: rule.clone(),
    })
}
