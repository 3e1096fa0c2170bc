//! What holds for every text and every policy.

mod common;

use std::path::Path;

use common::system;
use policy::*;
use proptest::prelude::*;

const WORDS: [&str; 20] = [
    "*",
    "@anyvm",
    "@adminvm",
    "dom0",
    "@default",
    "@dispvm",
    "@dispvm:debian-dvm",
    "@dispvm:whonix-ws-dvm",
    "@dispvm:work",
    "@dispvm:@tag:anon",
    "@dispvm:@tag:clearnet",
    "@tag:trusted",
    "@tag:anon",
    "@type:AppVM",
    "@type:AdminVM",
    "work",
    "personal",
    "vault",
    "debian-dvm",
    "gone",
];
const CALLERS: [&str; 7] = ["work", "personal", "vault", "anon-whonix", "debian-dvm", "dom0", "gone"];

/// A line with a bit of everything, mostly right.
fn line() -> impl Strategy<Value = String> {
    let word = || prop::sample::select(&WORDS[..]);
    let action = prop::sample::select(vec![
        "allow",
        "deny",
        "ask",
        "allow target=@dispvm",
        "allow target=dom0",
        "allow target=vault autostart=no",
        "ask target=work",
        "ask default_target=personal",
        "ask autostart=no notify=yes",
        "deny notify=no",
        "allow user=root",
    ]);
    let call = prop::sample::select(vec!["* *", "s *", "s +a", "t +"]);
    (call, word(), word(), action)
        .prop_map(|(call, source, target, action)| format!("{call} {source} {target} {action}"))
}

/// Lines that a policy can have.
fn policy() -> impl Strategy<Value = Policy> {
    let valid = line().prop_filter("a rule", |line| parse(line).is_ok());
    prop::collection::vec(valid, 0..12).prop_map(|lines| parse(&lines.join("\n")).unwrap())
}

fn parse(text: &str) -> Result<Policy, PolicyError> {
    Policy::parse(Path::new("p"), text.as_bytes())
}

fn request() -> impl Strategy<Value = Request> {
    let call = prop::sample::select(vec!["s", "s+a", "t", "u+b"]);
    (prop::sample::select(&CALLERS[..]), prop::sample::select(&WORDS[..]), call)
        .prop_map(|(source, target, call)| Request::new(source, target, call))
}

/// The same question answered a second way, by comparing words.
fn covers(word: &str, named: &str, caller: &str) -> bool {
    let system = system();
    let plain = |word: &str| if word == "dom0" { "@adminvm".to_owned() } else { word.to_owned() };
    let (word, named) = (plain(word), plain(named));
    let disposable = match named.as_str() {
        "@dispvm" => system.get(caller).and_then(|qube| qube.default_dispvm.clone()),
        other => other.strip_prefix("@dispvm:").map(str::to_owned),
    };
    let qube = (named != "@adminvm").then(|| system.get(&named)).flatten();
    if word == "*" || (word == "@anyvm" && named != "@adminvm") {
        return true;
    }
    if let Some(tag) = word.strip_prefix("@dispvm:@tag:") {
        let template = disposable.and_then(|name| system.get(&name).cloned());
        return template.is_some_and(|qube| qube.template_for_dispvms && qube.tags.contains(tag));
    }
    if let Some(name) = word.strip_prefix("@dispvm:") {
        return disposable.as_deref() == Some(name);
    }
    if let Some(tag) = word.strip_prefix("@tag:") {
        return qube.is_some_and(|qube| qube.tags.contains(tag));
    }
    if let Some(class) = word.strip_prefix("@type:") {
        return qube.is_some_and(|qube| qube.class == class);
    }
    word == named
}

/// What a caller names, as rules see it.
fn named(target: &str) -> &str {
    match target {
        "" => "@default",
        target if target.starts_with('@') || target == "dom0" || system().get(target).is_some() => target,
        _ => "@default",
    }
}

fn first_match<'a>(policy: &'a Policy, request: &Request) -> Option<&'a Rule> {
    policy.rules().map(|rule| &**rule).find(|rule| {
        let or_any = |own: &Option<String>, asked: &str| own.as_deref().is_none_or(|own| own == asked);
        or_any(&rule.call.service, &request.service)
            && or_any(&rule.call.argument, &request.argument)
            && (covers(&rule.source.to_string(), &request.source, &request.source)
                || rule.source == Token::Qube(request.source.clone()))
            && covers(&rule.target.to_string(), named(&request.target), &request.source)
    })
}

/// It is there, can be gone to, and is not the caller.
fn is_sound(target: &Destination, request: &Request) {
    let system = system();
    match target {
        Destination::AdminVm => assert_ne!(request.source, "dom0"),
        Destination::Qube(name) => assert!(system.get(name).is_some() && *name != request.source),
        Destination::DispVmOf(name) => assert!(system.get(name).unwrap().template_for_dispvms),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_bytes_make_parsing_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let _ = Policy::parse(Path::new("p"), &bytes);
        let _ = Policy::parse_legacy(Path::new("p"), "s", "+a", &bytes);
        let _ = System::parse(&bytes);
    }

    #[test]
    fn no_text_makes_parsing_panic(text in "([a@$*!+=,:. \t\r\n#-]|allow|ask|deny|include|target=|@tag:|\\PC){0,60}") {
        let _ = Policy::parse(Path::new("p"), text.as_bytes());
        let _ = Policy::parse_legacy(Path::new("p"), "*", "*", text.as_bytes());
    }

    /// A rule says of itself what was read.
    #[test]
    fn a_rule_reads_back_as_itself(line in line()) {
        let Ok(policy) = parse(&line) else { return Ok(()) };
        let text: Vec<String> = policy.rules().map(|rule| rule.to_string()).collect();
        prop_assert_eq!(parse(&text.join("\n")).unwrap(), policy);
    }

    /// Nothing is allowed but by the first rule that is about the call, and nothing else than what it says.
    #[test]
    fn nothing_is_allowed_that_no_rule_names(policy in policy(), request in request()) {
        let rule = first_match(&policy, &request);
        match policy.evaluate(&system(), &request) {
            Verdict::Allow(allow) => {
                prop_assert_eq!(Some(&*allow.rule), rule);
                let Action::Allow(terms) = &allow.rule.action else { panic!("{:?}", allow.rule) };
                is_sound(&allow.target, &request);
                let word = terms.target.as_ref().map_or(named(&request.target).to_owned(), Token::to_string);
                let landed = match &allow.target {
                    Destination::AdminVm => "@adminvm".to_owned(),
                    other => other.to_string(),
                };
                prop_assert!(covers(&landed, &word, &request.source), "{} for {}", landed, word);
            }
            Verdict::Ask(ask) => {
                prop_assert_eq!(Some(&*ask.rule), rule);
                assert!(matches!(ask.rule.action, Action::Ask { .. }));
                prop_assert!(!ask.targets.is_empty() && ask.targets.is_sorted());
                ask.targets.iter().for_each(|target| is_sound(target, &request));
                prop_assert!(ask.default.iter().all(|default| ask.targets.contains(default)));
            }
            Verdict::Deny(denial) => match denial.rule {
                Some(of) => prop_assert_eq!(Some(&*of), rule),
                None if denial.reason == Reason::NoRule => prop_assert_eq!(rule, None),
                None => {}
            },
        }
    }

    /// Without anybody to ask, only rules that say allow allow.
    #[test]
    fn nobody_is_no(policy in policy(), request in request()) {
        if let Ok(allow) = policy.decide(&system(), &request, &Nobody) {
            prop_assert!(matches!(allow.rule.action, Action::Allow(_)));
        }
    }
}
