//! The policy that `make install` puts in place.

use std::path::{Path, PathBuf};
use std::process::Command;

/// The binary that cargo built for these tests: it lies above them.
fn program() -> PathBuf {
    std::env::current_exe().unwrap().ancestors().nth(2).unwrap().join("qrexec-policy")
}

/// The exit status of `qrexec-policy explain` over the installed files, and the rule it names.
fn explain(source: &str, target: &str, service: &str) -> (i32, String) {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let legacy = tempfile::tempdir().unwrap();
    let output = Command::new(program())
        .arg("explain")
        .arg("--policy")
        .arg(here.join("defaults"))
        .arg("--system")
        .arg(here.join("tests/data/system.json"))
        .arg("--legacy")
        .arg(legacy.path())
        .args(["--json", source, target, service])
        .output()
        .unwrap();
    (output.status.code().unwrap(), String::from_utf8(output.stdout).unwrap())
}

const ALLOWED: i32 = 0;
const ASKED: i32 = 3;
const DENIED: i32 = 126;

#[test]
fn the_defaults_decide_as_those_of_qubes() {
    for service in ["qubes.OpenInVM", "qubes.OpenURL", "qubes.StartApp+firefox"] {
        assert_eq!(explain("work", "@dispvm", service).0, ALLOWED, "{service}");
        assert_eq!(explain("work", "personal", service).0, ASKED, "{service}");
        assert_eq!(explain("work", "@default", service).0, ASKED, "{service}");
        assert_eq!(explain("work", "dom0", service).0, DENIED, "{service}");
    }
    for service in ["qubes.VMShell", "qubes.VMExec+ls", "qubes.VMExecGUI+xterm"] {
        assert_eq!(explain("work", "@dispvm", service).0, ALLOWED, "{service}");
        for target in ["personal", "@default", "dom0"] {
            assert_eq!(explain("work", target, service).0, DENIED, "{service} {target}");
        }
    }
    for service in ["qubes.VMRootShell", "qubes.VMRootExec+id", "qubes.WaitForSession", "my.Service"] {
        for target in ["@dispvm", "personal", "dom0"] {
            assert_eq!(explain("work", target, service).0, DENIED, "{service} {target}");
        }
    }
    for service in ["qubes.Filecopy", "qubes.Filecopy+allow-unsafe-characters"] {
        for target in ["personal", "@dispvm", "@default"] {
            assert_eq!(explain("work", target, service).0, ASKED, "{service} {target}");
        }
    }
}

#[test]
fn t6_a_disposable_is_the_callers_own_by_default_and_another_only_when_asked() {
    let (status, text) = explain("anon-whonix", "@dispvm", "qubes.OpenURL");
    assert!(status == ALLOWED && text.contains("@dispvm:whonix-ws-dvm"), "{text}");
    // A caller that is anonymous does not pick one that is not.
    let (status, text) = explain("anon-whonix", "@dispvm:debian-dvm", "qubes.OpenURL");
    assert_eq!(status, ASKED, "{text}");
    assert_eq!(explain("anon-whonix", "@dispvm:debian-dvm", "qubes.VMShell").0, DENIED);
}
