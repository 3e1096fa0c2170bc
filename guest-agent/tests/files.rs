//! What `qubes.Filecopy` runs, as the agent's binary is it.

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// The binary that cargo built for these tests: it lies above them.
fn agent() -> PathBuf {
    std::env::current_exe().unwrap().ancestors().nth(2).unwrap().join("dispvm-agent")
}

#[test]
fn l6_what_another_qube_sends_is_in_its_folder() {
    let (ours, home) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let path: PathBuf = ours.path().join("report");
    fs::write(&path, "text").unwrap();
    let mut child = Command::new(agent())
        .arg("receive-files")
        .env("HOME", home.path())
        .env("QREXEC_REMOTE_DOMAIN", "work")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let (to, from) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    filecopy::send(&[path], false, to, from, &mut |_| {}).unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(fs::read_to_string(home.path().join("QubesIncoming/work/report")).unwrap(), "text");
}

#[test]
fn without_a_caller_nothing_is_taken() {
    let home = tempfile::tempdir().unwrap();
    for source in [None, Some("../.."), Some("")] {
        let mut command = Command::new(agent());
        command.arg("receive-files").env("HOME", home.path()).env_remove("QREXEC_REMOTE_DOMAIN");
        source.map(|source| command.env("QREXEC_REMOTE_DOMAIN", source));
        let mut child = command.stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let _ = child.stdin.take().unwrap().write_all(&[0; 32]);
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert!(
            String::from_utf8_lossy(&output.stderr).contains("QubesIncoming")
                || String::from_utf8_lossy(&output.stderr).contains("QREXEC_REMOTE_DOMAIN")
        );
    }
    let names: Vec<_> = fs::read_dir(home.path()).unwrap().collect();
    assert!(names.len() <= 1, "{names:?}");
}
