//! Policies read from folders: order, includes, the legacy folder, limits, and every error with its file and line.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::system;
use policy::load::{DEPTH_MAX, ENTRIES_MAX, FILE_BYTES_MAX, READS_MAX, RULES_MAX};
use policy::*;

/// A folder with policy.d, runtime.d and legacy in it.
struct Folders(tempfile::TempDir);

impl Folders {
    fn new(files: &[(&str, &str)]) -> Folders {
        let folders = Folders(tempfile::tempdir().unwrap());
        for folder in ["policy.d/include", "runtime.d", "legacy"] {
            fs::create_dir_all(folders.path(folder)).unwrap();
        }
        for (name, text) in files {
            folders.write(name, text);
        }
        folders
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: impl AsRef<[u8]>) {
        fs::write(self.path(name), text).unwrap();
    }

    fn load(&self) -> Result<Policy, PolicyError> {
        Policy::load(&[self.path("policy.d")], &self.path("legacy"))
    }

    /// `FILE:LINE` and the rule, for each rule.
    fn rules(&self) -> Vec<String> {
        let policy = self.load().unwrap_or_else(|error| panic!("{error}"));
        policy.rules().map(|rule| self.short(&format!("{} {rule}", rule.place))).collect()
    }

    fn error(&self) -> String {
        self.short(&self.load().unwrap_err().to_string())
    }

    fn short(&self, text: &str) -> String {
        text.replace(&format!("{}/", self.0.path().display()), "")
    }
}

#[test]
fn files_in_the_order_of_their_bytes_and_no_others() {
    let folders = Folders::new(&[
        ("policy.d/90-default.policy", "* * @anyvm @anyvm deny\n"),
        ("policy.d/30-user.policy", "# mine\n\n  \ta.Service\t+x  work   dom0 allow \r\n"),
        ("policy.d/3_.policy", "a * * * deny"),
        ("policy.d/3.policy", "b * * * deny"),
        ("policy.d/.hidden.policy", "nonsense"),
        ("policy.d/README", "nonsense"),
        ("policy.d/30-user.policy~", "nonsense"),
        ("policy.d/30-user.policy.rpmsave", "nonsense"),
    ]);
    fs::create_dir(folders.path("policy.d/folder.policy")).unwrap();
    std::os::unix::fs::symlink("nowhere", folders.path("policy.d/40-gone.policy")).unwrap();
    std::os::unix::fs::symlink("90-default.policy", folders.path("policy.d/95-again.policy")).unwrap();
    assert_eq!(
        folders.rules(),
        [
            "policy.d/3.policy:1 b * * * deny",
            "policy.d/30-user.policy:3 a.Service +x work @adminvm allow",
            "policy.d/3_.policy:1 a * * * deny",
            "policy.d/90-default.policy:1 * * @anyvm @anyvm deny",
            "policy.d/95-again.policy:1 * * @anyvm @anyvm deny",
        ]
    );
}

#[test]
fn a_file_of_an_earlier_folder_hides_its_namesake() {
    let folders = Folders::new(&[
        ("runtime.d/50-x.policy", "a * * * allow"),
        ("policy.d/50-x.policy", "b * * * allow"),
        ("policy.d/40-y.policy", "c * * * allow"),
    ]);
    let both = [folders.path("runtime.d"), folders.path("policy.d")];
    let policy = Policy::load(&both, &folders.path("legacy")).unwrap();
    let services: Vec<_> = policy.rules().map(|rule| rule.call.to_string()).collect();
    assert_eq!(services, ["c *", "a *"]);
}

#[test]
fn lines_end_as_in_qubes_so_that_no_rule_hides_in_a_comment() {
    let folders = Folders::new(&[("policy.d/1.policy", "# a\rb * * * deny\r\n# c\r\rd * * * deny")]);
    assert_eq!(folders.rules(), ["policy.d/1.policy:2 b * * * deny", "policy.d/1.policy:5 d * * * deny"]);
}

#[test]
fn includes_stand_where_their_directive_does() {
    let folders = Folders::new(&[
        (
            "policy.d/50-a.policy",
            "a * * * deny\n!include include/one\n!include-dir include\n!include-service s +x include/old\nb * * * deny\n",
        ),
        ("policy.d/include/one", "c * * * deny\n!include include/two\n"),
        ("policy.d/include/two", "d * * * deny\n"),
        ("policy.d/include/9.policy", "e * * * deny\n"),
        (
            "policy.d/include/old",
            "# old\n$anyvm $dispvm:$tag:t allow,target=$dispvm,user=u\n$include:include/older\n",
        ),
        ("policy.d/include/older", "@anyvm dom0 ask, default_target=work notify=yes\n"),
    ]);
    assert_eq!(
        folders.rules(),
        [
            "policy.d/50-a.policy:1 a * * * deny",
            "policy.d/include/one:1 c * * * deny",
            "policy.d/include/two:1 d * * * deny",
            "policy.d/include/9.policy:1 e * * * deny",
            "policy.d/include/old:2 s +x @anyvm @dispvm:@tag:t allow target=@dispvm user=u",
            "policy.d/include/older:1 s +x @anyvm @adminvm ask notify=yes default_target=work",
            "policy.d/50-a.policy:5 b * * * deny",
        ]
    );
}

const LEGACY: [(&str, &str); 8] = [
    ("legacy/qubes.OpenURL", "$anyvm $dispvm allow\n$anyvm $anyvm ask,default_target=$dispvm\n"),
    ("legacy/qubes.OpenURL+b", "work personal allow,user=root\n"),
    ("legacy/qubes.OpenURL+", "$include:common\n"),
    ("legacy/qubes.OpenURL+a.rpmnew", "nonsense"),
    ("legacy/.qubes.OpenURL", "nonsense"),
    ("legacy/qubes OpenURL", "nonsense"),
    ("legacy/a.First", "$tag:t $type:AppVM deny\n"),
    ("legacy/common", "vault $default allow,target=dom0\n"),
];

#[test]
fn the_legacy_folder_is_read_where_compat_says() {
    let folders = Folders::new(&LEGACY);
    folders.write("policy.d/35-compat.policy", "!compat-4.0\n");
    folders.write("policy.d/90-default.policy", "* * @anyvm @anyvm deny\n");
    let legacy = [
        "legacy/a.First:1 a.First * @tag:t @type:AppVM deny",
        "legacy/common:1 common * vault @default allow target=@adminvm",
        "legacy/common:1 qubes.OpenURL + vault @default allow target=@adminvm",
        "legacy/qubes.OpenURL+ qubes.OpenURL + @anyvm @anyvm deny",
        "legacy/qubes.OpenURL+ qubes.OpenURL + @anyvm @adminvm deny",
        "legacy/qubes.OpenURL+b:1 qubes.OpenURL +b work personal allow user=root",
        "legacy/qubes.OpenURL+b qubes.OpenURL +b @anyvm @anyvm deny",
        "legacy/qubes.OpenURL+b qubes.OpenURL +b @anyvm @adminvm deny",
        "legacy/qubes.OpenURL:1 qubes.OpenURL * @anyvm @dispvm allow",
        "legacy/qubes.OpenURL:2 qubes.OpenURL * @anyvm @anyvm ask default_target=@dispvm",
    ];
    let rules = folders.rules();
    assert_eq!(rules[..legacy.len()], legacy);
    assert_eq!(rules[legacy.len()..], ["policy.d/90-default.policy:1 * * @anyvm @anyvm deny"]);

    let alone = Policy::load_legacy(&folders.path("legacy")).unwrap();
    let decide = |target, call| alone.evaluate(&system(), &Request::new("work", target, call));
    assert!(matches!(decide("personal", "qubes.OpenURL+b"), Verdict::Allow(_)));
    assert!(matches!(decide("vault", "qubes.OpenURL+b"), Verdict::Deny(_)));
    assert!(matches!(decide("vault", "qubes.OpenURL+c"), Verdict::Ask(_)));
}

/// What is wrong in line 2 of a file of policy.d, and what is said about it.
#[test]
fn every_error_has_its_file_and_line() {
    let form = "A rule is: SERVICE|* +ARGUMENT|* SOURCE TARGET allow|deny|ask [KEY=VALUE …]";
    let table: &[(&str, &str)] = &[
        ("a", &format!("wrong number of fields. {form}")),
        ("a * * *", &format!("wrong number of fields. {form}")),
        ("a+b * * * deny", "service \"a+b\" has invalid characters: '+'"),
        ("a/b,c * * * deny", "service \"a/b,c\" has invalid characters: ',', '/'"),
        ("a +ä * * deny", "argument \"+ä\" has invalid characters: 'ä'"),
        ("a x * * deny", "argument \"x\" does not start with '+'"),
        ("* +x * * deny", "with service * the argument can only be *"),
        ("a * @default * deny", "invalid source: \"@default\""),
        ("a * @dispvm * deny", "invalid source: \"@dispvm\""),
        ("a * @tag: * deny", "invalid source: \"@tag:\""),
        ("a * @tag:@x * deny", "invalid source: \"@tag:@x\""),
        ("a * * @nothing deny", "invalid target: \"@nothing\""),
        ("a * * @dispvm: deny", "invalid target: \"@dispvm:\""),
        ("a * * @dispvm:@tag: deny", "invalid target: \"@dispvm:@tag:\""),
        ("a * * @dispvm:@type:AppVM deny", "invalid target: \"@dispvm:@type:AppVM\""),
        ("a * * * permit", "invalid action: \"permit\". It is allow, deny or ask"),
        ("a * * * allow,user=x", "invalid action: \"allow,user=x\". It is allow, deny or ask"),
        ("a * * * allow user", "invalid parameter: \"user\". It is KEY=VALUE"),
        ("a * * * allow user=a user=b", "parameter given twice: \"user\""),
        ("a * * * allow default_target=work", "allow takes no parameter \"default_target\""),
        ("a * * * deny user=x", "deny takes no parameter \"user\""),
        ("a * * * deny autostart=no", "deny takes no parameter \"autostart\""),
        ("a * * * ask color=red", "ask takes no parameter \"color\""),
        ("a * * * allow notify=true", "notify is \"true\", but can be only 'yes' or 'no'"),
        ("a * * * ask autostart=", "autostart is \"\", but can be only 'yes' or 'no'"),
        ("a * * * allow a=1 b=1 c=1 d=1 e=1 f=1", "more than 5 parameters"),
        ("a * * * allow target=", "invalid redirect target: \"\""),
        ("a * * * allow target=@anyvm", "invalid redirect target: \"@anyvm\""),
        ("a * * * allow target=*", "invalid redirect target: \"*\""),
        ("a * * * allow target=@default", "invalid redirect target: \"@default\""),
        ("a * * * ask default_target=@dispvm:@tag:x", "invalid redirect target: \"@dispvm:@tag:x\""),
        ("a * * @default allow", "allow for @default must specify target="),
        ("a * * * deny\u{7}", "a control character outside a comment"),
        ("!exclude x", "invalid directive: \"!exclude\""),
        ("!include", "wrong number of parameters: !include FILE"),
        ("!include a b", "wrong number of parameters: !include FILE"),
        ("!include-dir", "wrong number of parameters: !include-dir FOLDER"),
        ("!include-service a x", "wrong number of parameters: !include-service SERVICE|* +ARGUMENT|* FILE"),
        ("!include-service a x include/f", "argument \"x\" does not start with '+'"),
        ("!compat-4.0 now", "wrong number of parameters: !compat-4.0"),
        ("!include nothing", "policy.d/nothing is not a file"),
        ("!include include", "policy.d/include is not a file"),
        ("!include-dir nothing", "policy.d/nothing is not a folder"),
        ("!include-service a * nothing", "policy.d/nothing is not a file"),
    ];
    for (line, what) in table {
        let folders = Folders::new(&[("policy.d/1.policy", "* * * * deny\n")]);
        folders.write("policy.d/2.policy", format!("# first\n{line}\na * * * deny\n"));
        assert_eq!(folders.error(), format!("policy.d/2.policy:2: {what}"), "{line}");
    }
}

#[test]
fn errors_of_other_places() {
    let form = "A rule is: SOURCE TARGET allow|deny|ask[,KEY=VALUE …]";
    for (file, text, error) in [
        (
            "policy.d/Upper.policy",
            "",
            "policy.d: policy.d/Upper.policy: a policy file's name has only a-z, 0-9, '_', '.' and '-'. \
             Without the ending .policy it is ignored"
                .to_owned(),
        ),
        ("legacy/s", "a b", format!("legacy/s:1: wrong number of fields. {form}")),
        ("legacy/s", "\n$anyvm,x $anyvm allow", "legacy/s:2: invalid action: \"@anyvm\". It is allow, deny or ask".into()),
        ("legacy/s", "!include-dir x", "legacy/s:1: invalid directive: \"!include-dir\"".into()),
        ("legacy/s", "!compat-4.0", "legacy/s:1: invalid directive: \"!compat-4.0\"".into()),
        ("legacy/s", "$include:a b", "legacy/s:1: wrong number of parameters: $include:FILE".into()),
        ("legacy/s+x", "$include:gone", "legacy/s+x:1: legacy/gone is not a file".into()),
        ("policy.d/include/x.policy", "a", "policy.d/include/x.policy:1: wrong number of fields. A rule is: SERVICE|* +ARGUMENT|* SOURCE TARGET allow|deny|ask [KEY=VALUE …]".into()),
    ] {
        let folders = Folders::new(&[("policy.d/1.policy", "!include-dir include\n!compat-4.0\n"), (file, text)]);
        assert_eq!(folders.error(), error);
    }
    let folders = Folders::new(&[("policy.d/1.policy", "!compat-4.0\n")]);
    folders.write("policy.d/0.policy", b"# x\n* * * * deny\n# \xff\n");
    assert_eq!(folders.error(), "policy.d/0.policy:3: not UTF-8");
    folders.write("policy.d/0.policy", "");
    fs::remove_dir(folders.path("legacy")).unwrap();
    assert_eq!(folders.error(), "policy.d/1.policy:1: legacy is not a folder");
    let gone = Policy::load(&[folders.path("gone.d")], Path::new("/")).unwrap_err();
    assert_eq!(folders.short(&gone.to_string()), "gone.d: gone.d is not a folder");
    let nothing = Policy::parse(Path::new("p"), b"!include x").unwrap_err();
    assert_eq!(nothing.to_string(), "p:1: nothing can be included here");
    let denial = Denial::from(nothing);
    assert_eq!(denial.to_string(), "the policy cannot be read: p:1: nothing can be included here");
    assert!(denial.notify);
}

#[test]
fn what_includes_itself_ends() {
    let loops = |text: &str| Folders::new(&[("policy.d/1.policy", text)]).error();
    let deep = format!("1.policy:1: more than {DEPTH_MAX} files that include each other");
    assert_eq!(loops("!include 1.policy"), format!("policy.d/{deep}"));
    assert_eq!(loops("!include-dir ."), format!("policy.d/./{deep}"));
    let legacy = Folders::new(&[("policy.d/1.policy", "!compat-4.0"), ("legacy/s", "$include:s")]);
    assert_eq!(legacy.error(), format!("legacy/s:1: more than {DEPTH_MAX} files that include each other"));
    // Each file of a chain includes the next one many times.
    let fan = Folders::new(&[("policy.d/include/9", "# the last\n")]);
    for nth in 0..9 {
        fan.write(&format!("policy.d/include/{nth}"), format!("!include include/{}\n", nth + 1).repeat(99));
    }
    fan.write("policy.d/1.policy", "!include include/0\n");
    assert_eq!(fan.error(), format!("policy.d/include/9: more than {READS_MAX} files read in all"));
}

#[test]
fn files_folders_and_rules_are_limited() {
    let folders = Folders::new(&[]);
    folders.write("policy.d/1.policy", "#".repeat(FILE_BYTES_MAX as usize));
    assert!(folders.rules().is_empty());
    folders.write("policy.d/1.policy", "#".repeat(FILE_BYTES_MAX as usize + 1));
    assert_eq!(folders.error(), format!("policy.d/1.policy: more than {FILE_BYTES_MAX} bytes"));

    let rule = "a * * * deny\n";
    folders.write("policy.d/1.policy", rule.repeat(RULES_MAX as usize));
    assert_eq!(folders.load().unwrap().rules().count() as u64, RULES_MAX);
    folders.write("policy.d/2.policy", rule);
    assert_eq!(folders.error(), format!("policy.d/2.policy:1: more than {RULES_MAX} rules in all"));

    let full = Folders::new(&[("policy.d/include/x", &"#".repeat(FILE_BYTES_MAX as usize))]);
    full.write("policy.d/1.policy", "!include include/x\n".repeat(9));
    assert_eq!(full.error(), "policy.d/include/x: more than 8388608 bytes read in all");

    // The file that includes counts too.
    full.write("policy.d/include/x", "");
    full.write("policy.d/1.policy", "!include include/x\n".repeat(READS_MAX as usize - 1));
    assert!(full.rules().is_empty());
    full.write("policy.d/1.policy", "!include include/x\n".repeat(READS_MAX as usize));
    assert_eq!(full.error(), format!("policy.d/include/x: more than {READS_MAX} files read in all"));

    for nth in 0..=ENTRIES_MAX {
        full.write(&format!("legacy/{nth}"), "");
    }
    full.write("policy.d/1.policy", "!compat-4.0");
    assert_eq!(full.error(), format!("policy.d/1.policy:1: more than {ENTRIES_MAX} entries in a folder"));
}

#[test]
fn a_system_is_checked_before_anybody_is_looked_up_in_it() {
    let parse = |json: &str| System::parse(json.as_bytes()).unwrap_err().to_string();
    assert_eq!(parse(r#"{"domains":{"@anyvm":{"type":"AppVM"}}}"#), "no qube can be named \"@anyvm\"");
    assert_eq!(parse(r#"{"domains":{"a b":{"type":"AppVM"}}}"#), "no qube can be named \"a b\"");
    assert_eq!(parse(r#"{"domains":{"uuid:1":{"type":"AppVM"}}}"#), "no qube can be named \"uuid:1\"");
    assert_eq!(
        parse(r#"{"domains":{"a":{"type":"AppVM","default_dispvm":"b"}}}"#),
        "default_dispvm of a is b, which is not there"
    );
    assert!(parse(r#"{"domains":{"a":{}}}"#).contains("missing field `type`"));
    assert!(parse(&" ".repeat((4 << 20) + 1)).starts_with("more than"));
    let again = serde_json::to_vec(&system()).unwrap();
    assert_eq!(System::parse(&again).unwrap(), system());
}

/// What docs/policy.md shows is what is read.
#[test]
fn the_examples_of_the_docs_are_valid() {
    let docs = include_str!("../../docs/policy.md");
    let block = |start: &str| -> String {
        let lines = docs.lines().skip_while(|line| !line.starts_with(&format!("    {start}")));
        lines
            .take_while(|line| line.starts_with("    "))
            .map(|line| format!("{}\n", line.trim_start()))
            .collect()
    };
    let example = System::parse(block("{\"domains\"").as_bytes()).unwrap();
    assert_eq!(example.get("work").and_then(|qube| qube.default_dispvm.as_deref()), Some("debian-dvm"));
    let policy = Policy::parse(Path::new("docs"), block("# SERVICE").as_bytes()).unwrap();
    let decide = |target, call| policy.evaluate(&example, &Request::new("work", target, call));
    assert!(matches!(decide("@dispvm", "qubes.OpenURL"), Verdict::Allow(_)));
    assert!(matches!(decide("debian-dvm", "qubes.OpenURL"), Verdict::Ask(_)));
    let number = |max: u64| format!("{},{:03}", max / 1000, max % 1000);
    for line in [
        format!("| rules | {} |", number(RULES_MAX)),
        format!("| entries of a folder | {} |", number(ENTRIES_MAX)),
        format!("8 MiB, {} reads |", number(READS_MAX)),
        format!("| {DEPTH_MAX} deep |"),
    ] {
        assert!(docs.contains(&line), "{line}");
    }
}
