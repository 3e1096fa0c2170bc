//! One rule: a line of a policy file, checked.

use std::fmt;

use crate::error::{Place, What};
use crate::token::{Role, Token};

/// What a rule of policy.d looks like.
pub(crate) const FORM: &str = "SERVICE|* +ARGUMENT|* SOURCE TARGET allow|deny|ask [KEY=VALUE …]";
/// What a rule of a legacy file looks like.
pub(crate) const LEGACY_FORM: &str = "SOURCE TARGET allow|deny|ask[,KEY=VALUE …]";

/// A rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Where it stands.
    pub place: Place,
    /// Which calls it is about.
    pub call: Call,
    /// Who calls.
    pub source: Token,
    /// What the caller asks for.
    pub target: Token,
    /// What happens then.
    pub action: Action,
}

/// The calls a rule or a file is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// The service; none is `*`.
    pub service: Option<String>,
    /// The argument with its `+`; none is `*`.
    pub argument: Option<String>,
}

/// What a rule says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// The call goes through.
    Allow(Terms),
    /// Somebody is asked.
    Ask {
        /// How it goes through then.
        terms: Terms,
        /// `default_target=`: what is chosen beforehand.
        default_target: Option<Token>,
    },
    /// It is refused.
    Deny {
        /// `notify=`: whether the user hears of it; yes unless said otherwise.
        notify: bool,
    },
}

/// How a call goes through.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Terms {
    /// `target=`: where it goes instead.
    pub target: Option<Token>,
    /// `user=`: who runs the service; none is the target's default user.
    pub user: Option<String>,
    /// `notify=`: whether the user hears of it; no unless said otherwise.
    pub notify: bool,
    /// `autostart=`: whether the target is started for it; yes unless said otherwise.
    pub autostart: bool,
}

impl Call {
    /// Checks service and argument as they stand in a file.
    pub(crate) fn parse(service: &str, argument: &str) -> Result<Call, What> {
        let service = Some(service).filter(|service| *service != "*").map(str::to_owned);
        if let Some(service) = &service {
            if let Some(characters) = invalid_characters(service, "") {
                return Err(What::ServiceCharacters { service: service.clone(), characters });
            }
        }
        let argument = Some(argument).filter(|argument| *argument != "*").map(str::to_owned);
        if let Some(argument) = &argument {
            if let Some(characters) = invalid_characters(argument, "+") {
                return Err(What::ArgumentCharacters { argument: argument.clone(), characters });
            }
            if !argument.starts_with('+') {
                return Err(What::ArgumentStart(argument.clone()));
            }
            if service.is_none() {
                return Err(What::ArgumentOfAnyService);
            }
        }
        Ok(Call { service, argument })
    }

    pub(crate) fn matches(&self, service: &str, argument: &str) -> bool {
        self.service.as_deref().is_none_or(|own| own == service)
            && self.argument.as_deref().is_none_or(|own| own == argument)
    }
}

/// The characters that no name of a service has, in order and each once.
pub(crate) fn invalid_characters(text: &str, also: &str) -> Option<String> {
    let valid = |c: &char| c.is_ascii_alphanumeric() || "-._".contains(*c) || also.contains(*c);
    let invalid: std::collections::BTreeSet<char> = text.chars().filter(|c| !valid(c)).collect();
    let list: Vec<String> = invalid.iter().map(|c| format!("{c:?}")).collect();
    (!list.is_empty()).then(|| list.join(", "))
}

impl Rule {
    /// Reads `SERVICE ARGUMENT SOURCE TARGET ACTION [KEY=VALUE …]`.
    pub(crate) fn parse(line: &str, place: Place) -> Result<Rule, What> {
        let mut words = line.split_whitespace();
        let (Some(service), Some(argument)) = (words.next(), words.next()) else {
            return Err(What::Fields { form: FORM });
        };
        Rule::parse_rest(words, place, FORM, || Call::parse(service, argument))
    }

    /// Reads `SOURCE TARGET ACTION [KEY=VALUE …]`, of a file for this call. Commas are blanks by then.
    pub(crate) fn parse_legacy(line: &str, call: &Call, place: Place) -> Result<Rule, What> {
        Rule::parse_rest(line.split_whitespace(), place, LEGACY_FORM, || Ok(call.clone()))
    }

    fn parse_rest<'a>(
        mut words: impl Iterator<Item = &'a str>,
        place: Place,
        form: &'static str,
        call: impl FnOnce() -> Result<Call, What>,
    ) -> Result<Rule, What> {
        let (Some(source), Some(target), Some(action)) = (words.next(), words.next(), words.next()) else {
            return Err(What::Fields { form });
        };
        let rule = Rule {
            place,
            call: call()?,
            source: Token::parse(source, Role::Source)?,
            target: Token::parse(target, Role::Target)?,
            action: Action::parse(action, words)?,
        };
        match &rule.action {
            Action::Allow(terms) if rule.target == Token::Default && terms.target.is_none() => {
                Err(What::AllowDefault)
            }
            _ => Ok(rule),
        }
    }
}

impl Action {
    fn parse<'a>(action: &str, words: impl Iterator<Item = &'a str>) -> Result<Action, What> {
        let action = match action {
            "allow" => "allow",
            "deny" => "deny",
            "ask" => "ask",
            _ => return Err(What::Action(action.to_owned())),
        };
        let mut parameters = Parameters::parse(words)?;
        let notify = parameters.take_bool("notify")?;
        let parsed = if action == "deny" {
            Action::Deny { notify: notify.unwrap_or(true) }
        } else {
            let terms = Terms {
                notify: notify.unwrap_or(false),
                autostart: parameters.take_bool("autostart")?.unwrap_or(true),
                target: parameters.take_redirect("target")?,
                user: parameters.take("user").filter(|user| !user.is_empty()).map(str::to_owned),
            };
            match action {
                "allow" => Action::Allow(terms),
                _ => Action::Ask { terms, default_target: parameters.take_redirect("default_target")? },
            }
        };
        match parameters.0.first() {
            None => Ok(parsed),
            Some((key, _)) => Err(What::ParameterUnknown { action, key: (*key).to_owned() }),
        }
    }
}

/// The parameters that nobody has taken yet.
struct Parameters<'a>(Vec<(&'a str, &'a str)>);

impl<'a> Parameters<'a> {
    fn parse(words: impl Iterator<Item = &'a str>) -> Result<Parameters<'a>, What> {
        // Each is looked for among those before it: a line has no more than this many keys that differ and are known.
        const KNOWN: usize = 5;
        let mut parameters = Parameters(Vec::new());
        for word in words {
            let (key, value) = word.split_once('=').ok_or_else(|| What::ParameterForm(word.to_owned()))?;
            if parameters.0.iter().any(|(other, _)| *other == key) {
                return Err(What::ParameterTwice(key.to_owned()));
            }
            parameters.0.push((key, value));
            if parameters.0.len() > KNOWN {
                return Err(What::Limit { what: "parameters", max: KNOWN as u64 });
            }
        }
        Ok(parameters)
    }

    fn take(&mut self, key: &str) -> Option<&'a str> {
        let at = self.0.iter().position(|(other, _)| *other == key)?;
        Some(self.0.remove(at).1)
    }

    fn take_bool(&mut self, key: &'static str) -> Result<Option<bool>, What> {
        match self.take(key) {
            None => Ok(None),
            Some("yes") => Ok(Some(true)),
            Some("no") => Ok(Some(false)),
            Some(value) => Err(What::ParameterBool { key, value: value.to_owned() }),
        }
    }

    fn take_redirect(&mut self, key: &str) -> Result<Option<Token>, What> {
        self.take(key).map(|value| Token::parse(value, Role::Redirect)).transpose()
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let or_any = |word: &Option<String>| word.clone().unwrap_or_else(|| "*".into());
        write!(f, "{} {}", or_any(&self.service), or_any(&self.argument))
    }
}

impl fmt::Display for Terms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(target) = &self.target {
            write!(f, " target={target}")?;
        }
        if let Some(user) = &self.user {
            write!(f, " user={user}")?;
        }
        if self.notify {
            f.write_str(" notify=yes")?;
        }
        if !self.autostart {
            f.write_str(" autostart=no")?;
        }
        Ok(())
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Action::Allow(terms) => write!(f, "allow{terms}"),
            Action::Ask { terms, default_target: None } => write!(f, "ask{terms}"),
            Action::Ask { terms, default_target: Some(target) } => {
                write!(f, "ask{terms} default_target={target}")
            }
            Action::Deny { notify: true } => f.write_str("deny"),
            Action::Deny { notify: false } => f.write_str("deny notify=no"),
        }
    }
}

/// The rule as a line of policy.d.
impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {} {}", self.call, self.source, self.target, self.action)
    }
}
