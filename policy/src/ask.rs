//! What can be chosen when a rule says ask: whatever rules for such calls of this caller do not deny, be the target the caller's or
//! another.
//!
//! Rules are taken from the last to the first: a rule that denies takes away what later ones have given, one that allows or asks gives
//! it. What is taken are words, as in Qubes: `@dispvm` and `@dispvm:NAME` are not the same, and only what is left is looked up.

use std::collections::BTreeSet;

use crate::evaluate::Looked;
use crate::load::Policy;
use crate::rule::Action;
use crate::system::System;
use crate::token::{Target, Token};
use crate::verdict::Destination;

impl Policy {
    pub(crate) fn targets_to_ask(&self, call: &Looked<'_>) -> Vec<Destination> {
        let mut targets = BTreeSet::new();
        for rule in self.rules().rev().filter(|rule| call.is_for_caller(rule)) {
            match &rule.action {
                Action::Deny { .. } => {
                    for target in expand(&rule.target, call.system) {
                        targets.remove(&target);
                    }
                }
                Action::Allow(terms) | Action::Ask { terms, .. } => {
                    targets.extend(expand(terms.target.as_ref().unwrap_or(&rule.target), call.system));
                }
            }
        }
        let destinations: BTreeSet<Destination> =
            targets.into_iter().filter_map(|target| call.destination(target).ok()).collect();
        destinations.into_iter().collect()
    }
}

/// All that a word covers.
fn expand(token: &Token, system: &System) -> Vec<Target> {
    let named = |name: &str| match name {
        "dom0" => Target::AdminVm,
        name => Target::Qube(name.to_owned()),
    };
    let template = |name: &str| Target::DispVmOf(name.to_owned());
    match token {
        Token::Default => Vec::new(),
        Token::AdminVm | Token::DispVm | Token::DispVmOf(_) | Token::Qube(_) => {
            let target = Target::look_up(token, system).ok();
            target.filter(|target| *target != Target::Default).into_iter().collect()
        }
        Token::Any | Token::AnyVm => {
            let qubes = system.qubes().map(|(name, _)| named(name));
            let templates = system.qubes().filter(|(_, qube)| qube.template_for_dispvms);
            qubes
                .chain(templates.map(|(name, _)| template(name)))
                .chain([Target::DispVm])
                .filter(|target| *token == Token::Any || *target != Target::AdminVm)
                .collect()
        }
        Token::Tag(tag) => {
            system.qubes().filter(|(_, qube)| qube.tags.contains(tag)).map(|(name, _)| named(name)).collect()
        }
        Token::Type(class) => {
            system.qubes().filter(|(_, qube)| qube.class == *class).map(|(name, _)| named(name)).collect()
        }
        Token::DispVmTag(tag) => system
            .qubes()
            .filter(|(_, qube)| qube.template_for_dispvms && qube.tags.contains(tag))
            .map(|(name, _)| template(name))
            .collect(),
    }
}
