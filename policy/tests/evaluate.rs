//! What policies make of calls: each word in each column against each kind of caller and target, and what comes of a match.

mod common;

use std::path::Path;

use common::system;
use policy::*;

fn policy(text: &str) -> Policy {
    Policy::parse(Path::new("p.policy"), text.as_bytes()).unwrap()
}

fn verdict(text: &str, source: &str, target: &str, call: &str) -> Verdict {
    policy(text).evaluate(&system(), &Request::new(source, target, call))
}

/// In short: `allow TARGET [user=U] [autostart=no] [notify=yes]`, `ask TARGETS… [default=T]`, `deny: REASON`.
fn short(verdict: &Verdict) -> String {
    match verdict {
        Verdict::Allow(allow) => {
            let mut text = format!("allow {}", allow.target);
            if let Some(user) = &allow.user {
                text += &format!(" user={user}");
            }
            if !allow.autostart {
                text += " autostart=no";
            }
            if allow.notify {
                text += " notify=yes";
            }
            text
        }
        Verdict::Ask(ask) => {
            let targets: Vec<String> = ask.targets.iter().map(|target| target.to_string()).collect();
            let default = ask.default.as_ref().map(|target| format!(" default={target}"));
            format!("ask {}{}", targets.join(" "), default.unwrap_or_default())
        }
        Verdict::Deny(denial) => format!("deny: {}", denial.reason),
    }
}

fn decides(text: &str, source: &str, target: &str, expected: &str) {
    let got = short(&verdict(text, source, target, "a.Service+arg"));
    assert_eq!(got, expected, "{source} → {target} under:\n{text}");
}

/// Which words of the third column cover which caller.
#[test]
fn every_source_word_against_every_kind_of_caller() {
    let callers = ["work", "personal", "vault", "anon-whonix", "debian-dvm", "debian-12", "dom0"];
    let table = [
        ("*", "1111111"),
        ("@anyvm", "1111110"),
        ("@adminvm", "0000001"),
        ("dom0", "0000001"),
        ("@tag:trusted", "1010000"),
        ("@tag:anon", "0001000"),
        ("@type:AppVM", "1101100"),
        ("@type:StandaloneVM", "0010000"),
        ("@type:TemplateVM", "0000010"),
        ("@type:AdminVM", "0000000"),
        ("work", "1000000"),
        ("uuid:6d7a02b5-532b-467f-b9fb-6596bae03c33", "1000000"),
        ("nobody", "0000000"),
        ("@dispvm:debian-dvm", "0000000"),
        ("@dispvm:@tag:clearnet", "0000000"),
    ];
    for (word, row) in table {
        let rule = policy(&format!("* * {word} * deny"));
        for (caller, expected) in callers.iter().zip(row.chars()) {
            let target = if *caller == "work" { "personal" } else { "work" };
            let verdict = rule.evaluate(&system(), &Request::new(caller, target, "a.Service"));
            let matched = matches!(&verdict, Verdict::Deny(denial) if denial.rule.is_some());
            assert_eq!(matched, expected == '1', "{word} for {caller}: {verdict:?}");
        }
    }
}

/// Which words of the fourth column cover which target, for a caller whose default template is debian-dvm.
#[test]
fn every_target_word_against_every_kind_of_target() {
    let targets = [
        "dom0",
        "",
        "@default",
        "gone",
        "@dispvm",
        "@dispvm:debian-dvm",
        "@dispvm:whonix-ws-dvm",
        "personal",
        "vault",
        "debian-dvm",
        "debian-12",
    ];
    let table = [
        ("*", "11111111111"),
        ("@anyvm", "01111111111"),
        ("@adminvm", "10000000000"),
        ("dom0", "10000000000"),
        ("uuid:00000000-0000-0000-0000-000000000000", "10000000000"),
        ("@default", "01110000000"),
        ("@dispvm", "00001000000"),
        ("@dispvm:debian-dvm", "00001100000"),
        ("@dispvm:uuid:2ed2a7d6-5d95-4f0e-8e53-5b2a5dc0ef4c", "00001100000"),
        ("@dispvm:whonix-ws-dvm", "00000010000"),
        ("@dispvm:work", "00000000000"),
        ("@dispvm:@tag:clearnet", "00001100000"),
        ("@dispvm:@tag:anon", "00000010000"),
        ("@tag:trusted", "00000000100"),
        ("@tag:clearnet", "00000000010"),
        ("@type:AppVM", "00000001010"),
        ("@type:TemplateVM", "00000000001"),
        ("@type:AdminVM", "00000000000"),
        ("personal", "00000001000"),
        ("uuid:e3b6ea4c-2c4f-4a4f-a6d9-2b0b1b6ab2e0", "00000001000"),
        ("gone", "00000000000"),
        ("$anyvm", "00000000000"),
    ];
    for (word, row) in table {
        let rule = policy(&format!("* * * {word} deny"));
        for (target, expected) in targets.iter().zip(row.chars()) {
            let verdict = rule.evaluate(&system(), &Request::new("work", target, "a.Service"));
            let matched = matches!(&verdict, Verdict::Deny(denial) if denial.rule.is_some());
            assert_eq!(matched, expected == '1', "{word} for {target:?}: {verdict:?}");
        }
    }
}

#[test]
fn the_service_and_its_argument() {
    let matches = |call: &str, asked: &str| {
        let verdict = verdict(&format!("{call} * * allow target=personal"), "work", "", asked);
        matches!(verdict, Verdict::Allow(_))
    };
    for (call, asked, expected) in [
        ("* *", "a.Service+x", true),
        ("a.Service *", "a.Service+x", true),
        ("a.Service *", "a.Service", true),
        ("a.Service *", "a.Services", false),
        ("a.Service +", "a.Service", true),
        ("a.Service +", "a.Service+", true),
        ("a.Service +", "a.Service+x", false),
        ("a.Service +x", "a.Service+x", true),
        ("a.Service +x", "a.Service+X", false),
        ("a.Service +x+y", "a.Service+x+y", true),
    ] {
        assert_eq!(matches(call, asked), expected, "{call} for {asked}");
    }
    for call in ["a b", "a.Service+a b", "a/b", "*", "a.Service+ä", "a\0"] {
        let denied = verdict("* * * * allow", "work", "personal", call);
        assert_eq!(short(&denied).split_once(' ').unwrap().0, "deny:", "{call:?}");
    }
}

#[test]
fn the_first_rule_that_matches_decides() {
    let text = "* * vault * deny\n* * work personal allow user=first\n* * @anyvm @anyvm allow user=second\n";
    decides(text, "work", "personal", "allow personal user=first");
    decides(text, "work", "anon-whonix", "allow anon-whonix user=second");
    decides(text, "vault", "personal", "deny: denied by policy");
    decides(text, "work", "dom0", "deny: no rule matches");
    decides("", "work", "personal", "deny: no rule matches");
}

#[test]
fn allow_fills_in_where_the_call_goes() {
    let all = "* * * * allow";
    decides(all, "work", "personal", "allow personal");
    decides(all, "work", "uuid:e3b6ea4c-2c4f-4a4f-a6d9-2b0b1b6ab2e0", "allow personal");
    decides(all, "work", "dom0", "allow dom0");
    decides(all, "work", "@adminvm", "allow dom0");
    decides(all, "work", "@dispvm:whonix-ws-dvm", "allow @dispvm:whonix-ws-dvm");
    decides(all, "work", "work", "deny: a qube cannot call itself");
    decides("* * * * allow target=work", "work", "dom0", "deny: a qube cannot call itself");
    let nowhere = "deny: allowed, but neither the caller nor the rule names a target that is there";
    decides(all, "work", "", nowhere);
    decides(all, "work", "gone", nowhere);
    decides("* * * * allow target=gone", "work", "personal", nowhere);
    decides("* * * @default allow target=dom0", "work", "gone", "allow dom0");
    decides("* * * @default allow target=vault user=me", "work", "", "allow vault user=me");
    decides("* * * dom0 allow target=@dispvm:debian-dvm", "work", "dom0", "allow @dispvm:debian-dvm");
    for word in ["@anyvm", "*", "@tag:x", "@type:AppVM", "@dispvm:@tag:x", "@dispvm:", "@nothing"] {
        decides(all, "work", word, &format!("deny: {word:?} is no target"));
    }
}

#[test]
fn t3_only_a_template_for_disposables_makes_them() {
    let all = "* * * * allow";
    let hint =
        "deny: work is not a template for disposables. Hint: `qvm-prefs work template_for_dispvms True`";
    decides(all, "personal", "@dispvm:work", hint);
    decides("* * * * allow target=@dispvm:work", "personal", "vault", hint);
    // vault's default is one that lost the property.
    decides(all, "vault", "@dispvm", hint);
    decides(
        all,
        "vault",
        "@dispvm:gone",
        "deny: gone is not a template for disposables. Hint: `qvm-prefs gone template_for_dispvms True`",
    );
}

#[test]
fn t5_t6_t7_dispvm_is_the_callers_own_default() {
    let all = "* * * @dispvm allow";
    decides(all, "work", "@dispvm", "allow @dispvm:debian-dvm");
    decides(all, "anon-whonix", "@dispvm", "allow @dispvm:whonix-ws-dvm");
    decides(all, "whonix-ws-dvm", "@dispvm", "allow @dispvm:whonix-ws-dvm");
    let none = "deny: personal has no default_dispvm. Hint: `qvm-prefs personal default_dispvm NAME`";
    decides(all, "personal", "@dispvm", none);
    decides("* * * * allow target=@dispvm", "personal", "work", none);
    decides("* * * * allow target=@dispvm", "work", "personal", "allow @dispvm:debian-dvm");
}

#[test]
fn without_autostart_only_what_runs_is_allowed() {
    let text = "* * * * allow autostart=no notify=yes";
    decides(text, "work", "personal", "allow personal autostart=no notify=yes");
    decides(text, "work", "dom0", "allow dom0 autostart=no notify=yes");
    decides(text, "work", "vault", "deny: vault does not run, and the rule says autostart=no");
    let dispvm = "deny: @dispvm:debian-dvm does not run, and the rule says autostart=no";
    decides(text, "work", "@dispvm", dispvm);
    decides("* * * * ask autostart=no", "work", "vault", "ask dom0 anon-whonix personal");
}

#[test]
fn ask_offers_what_later_and_earlier_rules_leave() {
    let everything = "ask anon-whonix debian-12 debian-dvm personal vault whonix-ws-dvm @dispvm:debian-dvm \
                      @dispvm:whonix-ws-dvm";
    decides("* * @anyvm @anyvm ask", "work", "personal", everything);
    let stars = "ask dom0 anon-whonix debian-12 debian-dvm personal vault whonix-ws-dvm @dispvm:debian-dvm \
                 @dispvm:whonix-ws-dvm";
    decides("* * * * ask", "work", "personal", stars);
    // A denial takes away what rules after it give, and nothing of what rules before it gave.
    decides("* * * vault deny\n* * * vault allow\n* * * personal ask", "work", "personal", "ask personal");
    decides(
        "* * * vault allow\n* * * vault deny\n* * * personal ask",
        "work",
        "personal",
        "ask personal vault",
    );
    // Rules for other callers or services do not count.
    decides("* * vault anon-whonix allow\n* * * personal ask", "work", "personal", "ask personal");
    decides("other * * anon-whonix allow\n* * * personal ask", "work", "personal", "ask personal");
    // Where a rule sends its calls elsewhere, that is what it offers.
    decides("* * * personal ask\n* * * vault allow target=dom0", "work", "personal", "ask dom0 personal");
    decides("* * * @tag:trusted ask", "personal", "work", "ask dom0 vault work");
    decides("* * * @type:TemplateVM ask\n", "work", "debian-12", "ask debian-12");
    decides("* * * @dispvm:@tag:anon ask", "work", "@dispvm:whonix-ws-dvm", "ask @dispvm:whonix-ws-dvm");
    decides("* * * @dispvm ask\n* * * @dispvm:gone allow", "work", "@dispvm", "ask @dispvm:debian-dvm");
    // The words are not the same: who wants no disposables at all denies both.
    decides(
        "* * * @dispvm deny\n* * * @dispvm:debian-dvm allow\n* * * personal ask",
        "work",
        "personal",
        "ask personal @dispvm:debian-dvm",
    );
}

#[test]
fn ask_with_nothing_to_choose_from_is_denied() {
    let nothing = "deny: ask, but there is no target to choose from";
    decides("* * * @default ask", "work", "", nothing);
    decides("* * * work ask", "work", "work", nothing);
    decides("* * * @dispvm ask", "personal", "@dispvm", nothing);
    decides("* * * @dispvm ask", "vault", "@dispvm", nothing);
    decides("* * * vault ask autostart=no", "work", "vault", nothing);
    decides("* * * * ask target=work", "work", "personal", nothing);
    decides(
        "* * * * ask target=gone",
        "work",
        "personal",
        "deny: allowed, but neither the caller nor the rule names a target that is there",
    );
}

#[test]
fn asks_target_and_default() {
    decides("* * * * ask target=vault", "work", "personal", "ask vault");
    decides("* * * * ask target=dom0 default_target=@adminvm", "work", "personal", "ask dom0 default=dom0");
    decides(
        "* * * * ask target=@dispvm default_target=@dispvm",
        "work",
        "personal",
        "ask @dispvm:debian-dvm default=@dispvm:debian-dvm",
    );
    decides(
        "* * * @tag:home ask default_target=personal",
        "work",
        "personal",
        "ask personal default=personal",
    );
    decides(
        "* * * @tag:home ask default_target=@dispvm",
        "personal",
        "personal",
        "deny: ask, but there is no target to choose from",
    );
    decides(
        "* * * @tag:home ask default_target=@dispvm\n* * * vault allow",
        "personal",
        "personal",
        "ask vault",
    );
    decides(
        "* * * @tag:home ask default_target=vault",
        "work",
        "personal",
        "deny: ask, but default_target=vault is none of the targets to choose from",
    );
}

/// Denials are told to the user unless the rule says otherwise, what goes through is not.
#[test]
fn who_hears_of_it() {
    let notify = |text: &str, target: &str| match verdict(text, "work", target, "a") {
        Verdict::Allow(allow) => allow.notify,
        Verdict::Ask(ask) => ask.notify,
        Verdict::Deny(denial) => denial.notify,
    };
    for (text, target, expected) in [
        ("* * * * deny", "personal", true),
        ("* * * * deny notify=no", "personal", false),
        ("* * * * allow", "personal", false),
        ("* * * * allow notify=yes", "personal", true),
        ("* * * * ask", "personal", false),
        ("* * * * ask notify=yes", "personal", true),
        ("* * * * allow autostart=no", "vault", false),
        ("* * * * allow", "", true),
        ("", "personal", true),
    ] {
        assert_eq!(notify(text, target), expected, "{text} for {target}");
    }
}

struct Says(Answer);

impl Prompt for Says {
    fn ask(&self, _: &Request, question: &Ask) -> Answer {
        assert!(!question.targets.is_empty());
        self.0.clone()
    }
}

#[test]
fn an_answer_settles_the_call_and_nobody_is_no() {
    let policy = policy("* * * @tag:home ask user=me notify=no\n* * * vault allow\n");
    let request = Request::new("work", "personal", "a.Service");
    let decide = |prompt: &dyn Prompt| policy.decide(&system(), &request, prompt);
    let vault = Destination::Qube("vault".into());
    let allowed = decide(&Says(Answer::Allow(vault.clone()))).unwrap();
    assert_eq!((allowed.target, allowed.user.as_deref()), (vault, Some("me")));
    assert_eq!(allowed.requested, "personal");
    let denied = |prompt: &dyn Prompt| decide(prompt).unwrap_err().to_string();
    assert_eq!(denied(&Says(Answer::Deny)), "p.policy:1: denied by the user");
    assert_eq!(denied(&Says(Answer::Allow(Destination::AdminVm))), "p.policy:1: dom0 was not offered");
    assert_eq!(denied(&Nobody), "p.policy:1: ask, but there is nobody who could be asked");
}

/// The defaults for opening, running and copying between qubes (qubes.md, 5).
#[test]
fn t6_defaults_of_qubes() {
    let text = "qubes.OpenInVM * @anyvm @dispvm allow\nqubes.OpenInVM * @anyvm @anyvm ask\n\
                qubes.VMShell * @anyvm @dispvm allow\nqubes.VMShell * @anyvm @anyvm deny\n\
                qubes.Filecopy * @anyvm @anyvm ask\n";
    let call = |source, target, call| short(&verdict(text, source, target, call));
    assert_eq!(call("anon-whonix", "@dispvm", "qubes.OpenInVM"), "allow @dispvm:whonix-ws-dvm");
    assert!(call("work", "personal", "qubes.OpenInVM").starts_with("ask "));
    assert_eq!(call("work", "@dispvm", "qubes.VMShell"), "allow @dispvm:debian-dvm");
    assert_eq!(call("work", "personal", "qubes.VMShell"), "deny: denied by policy");
    assert_eq!(call("work", "dom0", "qubes.VMShell"), "deny: no rule matches");
    assert!(call("work", "@default", "qubes.Filecopy").starts_with("ask "));
}
