//! The lines of a policy file: pure text in, rules and directives out. What directives name is read by [`crate::load`].
//!
//! Lines end as Python's universal newlines do, by LF, CR LF or CR alone: a line that Qubes reads as a rule is never part of a
//! comment here.

use crate::error::{Place, PolicyError, What};
use crate::rule::{Call, Rule};

/// What a line says.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Item<'a> {
    Rule(Rule),
    /// `!include PATH`.
    Include(&'a str),
    /// `!include-dir PATH`.
    IncludeDir(&'a str),
    /// `!include-service SERVICE ARGUMENT PATH`, and `!include PATH` or `$include:PATH` in a legacy file.
    IncludeService(Call, String),
    /// `!compat-4.0`.
    Compat,
}

/// The lines of a text that say something, with their places, in order.
fn lines<'a>(text: &'a str, place: &'a Place) -> impl Iterator<Item = (Place, &'a str)> {
    let ended = text.split('\n').flat_map(|line| line.strip_suffix('\r').unwrap_or(line).split('\r'));
    (1u32..)
        .zip(ended)
        .map(|(line, text)| (Place { file: place.file.clone(), line }, text.trim()))
        .filter(|(_, text)| !text.is_empty() && !text.starts_with('#'))
}

/// Reads a file of policy.d.
pub(crate) fn items<'a>(
    text: &'a str,
    file: &'a Place,
) -> impl Iterator<Item = Result<(Place, Item<'a>), PolicyError>> {
    lines(text, file).map(|(place, line)| {
        let item = without_controls(line).and_then(|()| match line.starts_with('!') {
            true => directive(line),
            false => Ok(Item::Rule(Rule::parse(line, place.clone())?)),
        });
        located(item, place)
    })
}

/// Reads a legacy file, which is about this call.
pub(crate) fn legacy_items<'a>(
    text: &'a str,
    file: &'a Place,
    call: &'a Call,
) -> impl Iterator<Item = Result<(Place, Item<'a>), PolicyError>> {
    lines(text, file).map(move |(place, line)| {
        let line = line.replace("$include:", "!include ").replace('$', "@").replace(',', " ");
        let item = without_controls(&line).and_then(|()| match line.starts_with('!') {
            true => legacy_directive(&line, call),
            false => Ok(Item::Rule(Rule::parse_legacy(&line, call, place.clone())?)),
        });
        located(item, place)
    })
}

fn located<'a>(item: Result<Item<'a>, What>, place: Place) -> Result<(Place, Item<'a>), PolicyError> {
    match item {
        Ok(item) => Ok((place, item)),
        Err(what) => Err(PolicyError { place, what }),
    }
}

/// Python takes some of these for blanks, a terminal takes some for commands: none has a place in a rule.
fn without_controls(line: &str) -> Result<(), What> {
    match line.chars().any(|c| c.is_control() && c != '\t') {
        true => Err(What::ControlCharacter),
        false => Ok(()),
    }
}

fn directive(line: &str) -> Result<Item<'_>, What> {
    let mut words = line.split_whitespace();
    let directive = words.next().unwrap_or_default();
    let words: Vec<&str> = words.take(4).collect();
    match (directive, &words[..]) {
        ("!include", [path]) => Ok(Item::Include(path)),
        ("!include", _) => Err(What::DirectiveForm { form: "!include FILE" }),
        ("!include-dir", [path]) => Ok(Item::IncludeDir(path)),
        ("!include-dir", _) => Err(What::DirectiveForm { form: "!include-dir FOLDER" }),
        ("!include-service", [service, argument, path]) => {
            Ok(Item::IncludeService(Call::parse(service, argument)?, (*path).to_owned()))
        }
        ("!include-service", _) => {
            Err(What::DirectiveForm { form: "!include-service SERVICE|* +ARGUMENT|* FILE" })
        }
        ("!compat-4.0", []) => Ok(Item::Compat),
        ("!compat-4.0", _) => Err(What::DirectiveForm { form: "!compat-4.0" }),
        _ => Err(What::Directive(directive.to_owned())),
    }
}

fn legacy_directive(line: &str, call: &Call) -> Result<Item<'static>, What> {
    let mut words = line.split_whitespace();
    match (words.next().unwrap_or_default(), words.next(), words.next()) {
        ("!include", Some(path), None) => Ok(Item::IncludeService(call.clone(), path.to_owned())),
        ("!include", ..) => Err(What::DirectiveForm { form: "$include:FILE" }),
        (directive, ..) => Err(What::Directive(directive.to_owned())),
    }
}
