//! `qrexec-policy explain` as it is typed: what it prints, and its exit status.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};

const POLICY: &str = "# opening\nqubes.OpenInVM * @anyvm @dispvm allow\nqubes.OpenInVM * @anyvm @anyvm ask default_target=personal\n\
                      qubes.VMShell * @anyvm @dispvm allow user=root autostart=yes notify=yes\nqubes.VMShell * @anyvm @anyvm deny\n";

/// The binary that cargo built for these tests: it lies above them.
fn program() -> PathBuf {
    std::env::current_exe().unwrap().ancestors().nth(2).unwrap().join("qrexec-policy")
}

struct Machine(tempfile::TempDir);

impl Machine {
    fn new(policy: &str) -> Machine {
        let machine = Machine(tempfile::tempdir().unwrap());
        fs::create_dir(machine.path("policy.d")).unwrap();
        fs::create_dir(machine.path("legacy")).unwrap();
        fs::write(machine.path("policy.d/90-default.policy"), policy).unwrap();
        fs::write(machine.path("system.json"), include_bytes!("data/system.json")).unwrap();
        machine
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn explain(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(program());
        command.arg("explain").arg("--policy").arg(self.path("policy.d"));
        command.arg("--system").arg(self.path("system.json")).arg("--legacy").arg(self.path("legacy"));
        command.args(arguments).output().unwrap()
    }

    /// The exit status, and what is on standard output.
    fn says(&self, arguments: &[&str]) -> (i32, String) {
        let output = self.explain(arguments);
        let text = String::from_utf8(output.stdout).unwrap();
        (output.status.code().unwrap(), text.replace(&format!("{}/", self.0.path().display()), ""))
    }

    /// The exit status, and what is on standard error.
    fn complains(&self, arguments: &[&str]) -> (i32, String) {
        let output = self.explain(arguments);
        let text = String::from_utf8(output.stderr).unwrap();
        (output.status.code().unwrap(), text.replace(&format!("{}/", self.0.path().display()), ""))
    }
}

#[test]
fn allowed_is_0_and_names_the_rule() {
    let machine = Machine::new(POLICY);
    let expected = "\
allow: anon-whonix calls qubes.VMShell+ in @dispvm
  target     @dispvm:whonix-ws-dvm
  user       root
  autostart  yes
  notify     yes
  rule       policy.d/90-default.policy:4: qubes.VMShell * @anyvm @dispvm allow user=root notify=yes
";
    assert_eq!(machine.says(&["anon-whonix", "@dispvm", "qubes.VMShell"]), (0, expected.into()));
}

#[test]
fn ask_is_3_and_lists_what_can_be_chosen() {
    let machine = Machine::new(POLICY);
    let expected = "\
ask: work calls qubes.OpenInVM+view in @default
  choices    anon-whonix debian-12 debian-dvm personal vault whonix-ws-dvm @dispvm:debian-dvm @dispvm:whonix-ws-dvm
  chosen     personal
  user       the target's default
  autostart  yes
  notify     no
  rule       policy.d/90-default.policy:3: qubes.OpenInVM * @anyvm @anyvm ask default_target=personal
  note       there is no qube gone; the call counts as one to @default
";
    assert_eq!(machine.says(&["work", "gone", "qubes.OpenInVM+view"]), (3, expected.into()));
}

#[test]
fn denied_is_126_with_or_without_a_rule() {
    let machine = Machine::new(POLICY);
    let expected = "\
deny: work calls qubes.VMShell+ in personal
  reason     denied by policy
  notify     yes
  rule       policy.d/90-default.policy:5: qubes.VMShell * @anyvm @anyvm deny
";
    assert_eq!(machine.says(&["work", "personal", "qubes.VMShell"]), (126, expected.into()));
    let expected = "\
deny: work calls qubes.VMShell+ in dom0
  reason     no rule matches
  notify     yes
  rule       none
";
    assert_eq!(machine.says(&["work", "dom0", "qubes.VMShell"]), (126, expected.into()));
    fs::write(machine.path("legacy/s+x"), "work vault allow\n").unwrap();
    fs::write(machine.path("policy.d/35-compat.policy"), "!compat-4.0\n").unwrap();
    let expected = "\
deny: work calls s+x in personal
  reason     denied by policy
  notify     yes
  rule       legacy/s+x (implied at its end): s +x @anyvm @anyvm deny
";
    assert_eq!(machine.says(&["work", "personal", "s+x"]), (126, expected.into()));
}

#[test]
fn json_has_every_key_always() {
    let machine = Machine::new(POLICY);
    let json = |arguments: &[&str]| -> (i32, serde_json::Value) {
        let (status, text) = machine.says(&[arguments, &["--json"]].concat());
        (status, serde_json::from_str(&text).unwrap())
    };
    let (status, denied) = json(&["work", "personal", "qubes.VMShell+x"]);
    assert_eq!(status, 126);
    let expected = serde_json::json!({
        "result": "deny", "source": "work", "requested_target": "personal", "service": "qubes.VMShell",
        "argument": "+x", "target": null, "targets": null, "default_target": null, "user": null,
        "autostart": null, "notify": true, "reason": "denied by policy",
        "rule": {"file": "policy.d/90-default.policy", "line": 5, "text": "qubes.VMShell * @anyvm @anyvm deny"},
        "note": null,
    });
    assert_eq!(denied, expected);
    let (status, asked) = json(&["work", "@dispvm:whonix-ws-dvm", "qubes.OpenInVM"]);
    assert_eq!((status, &asked["result"], &asked["default_target"]), (3, &"ask".into(), &"personal".into()));
    assert_eq!(asked["targets"].as_array().unwrap().len(), 8);
}

#[test]
fn what_cannot_be_read_is_1_and_wrong_usage_2() {
    let machine = Machine::new("a.Service\n");
    let (status, text) = machine.complains(&["work", "vault", "a"]);
    let broken = "qrexec-policy: cannot read the policy, so every call is denied: policy.d/90-default.policy:1: \
                  wrong number of fields. A rule is: SERVICE|* +ARGUMENT|* SOURCE TARGET allow|deny|ask [KEY=VALUE …]\n";
    assert_eq!((status, text.as_str()), (1, broken));
    assert!(machine
        .says(&["work", "vault", "a", "--json"])
        .1
        .starts_with("{\"error\":\"cannot read the policy"));

    let machine = Machine::new(POLICY);
    let (status, text) = machine.complains(&["nobody", "vault", "a"]);
    assert_eq!((status, text.as_str()), (2, "qrexec-policy: there is no qube nobody in system.json\n"));
    assert_eq!(machine.complains(&["work", "vault"]).0, 2);
    fs::write(machine.path("system.json"), "{").unwrap();
    let (status, text) = machine.complains(&["work", "vault", "a"]);
    assert_eq!(status, 1);
    assert!(
        text.starts_with(
            "qrexec-policy: cannot read the system from system.json: not the JSON of a system: "
        ),
        "{text}"
    );
    fs::remove_file(machine.path("system.json")).unwrap();
    assert_eq!(machine.complains(&["work", "vault", "a"]).0, 1);
}
