//! Files of qrexec policy.

use std::path::Path;

use policy::{Action, Destination, Nobody, Policy, Request, System, Verdict};

use crate::take;

/// The qubes that calls go between.
const SYSTEM: &[u8] = br#"{"domains": {
    "dom0": {"type": "AdminVM", "tags": ["t"], "power_state": "Running"},
    "a": {"type": "AppVM", "tags": ["t"], "default_dispvm": "dvm", "power_state": "Running", "uuid": "1"},
    "b": {"type": "AppVM", "tags": [], "power_state": "Halted"},
    "dvm": {"type": "AppVM", "tags": ["t"], "template_for_dispvms": true, "default_dispvm": "dvm"}}}"#;
/// What is asked for under every policy that can be read.
const CALLS: [(&str, &str, &str); 7] = [
    ("a", "b", "s+x"),
    ("a", "dom0", "s"),
    ("a", "@dispvm", "s+x"),
    ("b", "@dispvm", "s"),
    ("b", "", "s+x"),
    ("dvm", "@dispvm:dvm", "s"),
    ("dom0", "a", "s"),
];

/// A file of policy.d, or with an odd first byte a legacy one for a service; without folders, so that it includes nothing.
pub fn file(data: &[u8]) {
    let mut data = data;
    let [kind] = take::<1>(&mut data);
    let path = Path::new("p");
    let policy = match kind & 1 {
        0 => Policy::parse(path, data),
        _ => Policy::parse_legacy(path, "s", "+x", data),
    };
    let Ok(policy) = policy else { return };
    let system = System::parse(SYSTEM).expect("a system");
    for rule in policy.rules() {
        let again =
            Policy::parse(path, rule.to_string().as_bytes()).expect("a rule that was read can be read");
        let again = again.rules().next().expect("a rule");
        assert_eq!((&again.call, &again.source, &again.target), (&rule.call, &rule.source, &rule.target));
        assert_eq!(again.action, rule.action);
    }
    for (source, target, call) in CALLS {
        let request = Request::new(source, target, call);
        match policy.evaluate(&system, &request) {
            Verdict::Allow(allow) => {
                assert!(
                    matches!(allow.rule.action, Action::Allow(_))
                        && policy.rules().any(|rule| *rule == allow.rule)
                );
                is_sound(&system, source, &allow.target);
            }
            Verdict::Ask(ask) => {
                assert!(matches!(ask.rule.action, Action::Ask { .. }) && !ask.targets.is_empty());
                ask.targets.iter().for_each(|target| is_sound(&system, source, target));
                assert!(policy.decide(&system, &request, &Nobody).is_err(), "nobody said yes");
            }
            Verdict::Deny(_) => {}
        }
    }
}

/// A call can go there.
fn is_sound(system: &System, source: &str, target: &Destination) {
    match target {
        Destination::AdminVm => assert_ne!(source, "dom0"),
        Destination::Qube(name) => assert!(name != source && system.get(name).is_some()),
        Destination::DispVmOf(name) => {
            assert!(system.get(name).is_some_and(|qube| qube.template_for_dispvms))
        }
    }
}
