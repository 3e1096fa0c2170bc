//! The calling programs, as their users meet them.

mod common;

use std::io::{Read, Write};
use std::process::{Command, ExitStatus, Stdio};

use common::guest::{agent, status, text, Guest};
use qrexec::{Exit, GuestFrame, HostFrame};

#[test]
fn refused_calls_end_with_126_and_failed_ones_with_125() {
    let mut guest = Guest::new();
    let caller = guest.call(&["work", "svc"]);
    let (stream, ..) = guest.hear_call();
    guest.host.say(HostFrame::CallRefused { stream });
    let output = caller.wait_with_output().expect("ends");
    assert_eq!((status(&output), text(&output.stderr)), (Some(126), "Request refused\n"));

    let caller = guest.call(&["work", "svc"]);
    let (next, ..) = guest.hear_call();
    assert_ne!(next, stream, "a stream is used once");
    guest.exit(next, 125);
    assert_eq!(status(&caller.wait_with_output().expect("ends")), Some(125));

    let caller = guest.call(&["work", "svc"]);
    let (stream, ..) = guest.hear_call();
    guest.host.say(HostFrame::CallAccepted { stream });
    guest.host.say(HostFrame::CallExited { stream, exit: Exit::NotFound(2) });
    assert_eq!(status(&caller.wait_with_output().expect("ends")), Some(127));

    for wrong in [["w/rk", "svc"], ["work", "../svc"]] {
        let output = guest.call(&wrong).wait_with_output().expect("ends");
        assert_eq!(status(&output), Some(125), "{}", text(&output.stderr));
    }
    guest.host.hang_up();
}

#[test]
fn a_local_program_has_the_services_streams() {
    let mut guest = Guest::new();
    // It hears the service, answers it, and speaks to the caller's own stdout.
    let script =
        "read word; echo \"heard $word\"; eval \"echo of our own >&$SAVED_FD_1\"; exec >&-; cat; exit 5";
    let caller = guest.call(&["work", "svc", "/bin/sh", "-c", script]);
    let (stream, ..) = guest.hear_call();
    guest.host.say(HostFrame::CallAccepted { stream });
    guest.host.say(HostFrame::CallStdout { stream, bytes: b"hello\n".to_vec() });
    let heard = guest.host.hear();
    assert_eq!(heard, GuestFrame::CallStdin { stream, bytes: b"heard hello\n".to_vec() });
    assert_eq!(guest.host.hear(), GuestFrame::CallStdinEof { stream });
    guest.host.say(HostFrame::CallStdoutEof { stream });
    guest.exit(stream, 0);
    let output = caller.wait_with_output().expect("ends");
    assert_eq!((status(&output), text(&output.stdout)), (Some(5), "of our own\n"));
    guest.host.hang_up();
}

#[test]
fn f5_qvm_run_runs_a_command_in_a_disposable() {
    for name in ["qvm-run", "qvm-run-vm"] {
        let mut guest = Guest::new();
        let mut caller = guest.tool(name).args(["$dispvm", "echo", "it's me"]).spawn().expect("starts");
        let (stream, target, service) = guest.hear_call();
        assert_eq!((target.as_str(), service.as_str()), ("@dispvm", "qubes.VMShell+WaitForSession"));
        guest.host.say(HostFrame::CallAccepted { stream });
        caller.stdin.take().expect("piped").write_all(b"the rest").expect("writes");
        let line = "exec $(command -v bash || command -v sh) -c 'echo it'\\''s me' || exit 127\n";
        assert_eq!(guest.hear_stdin(), format!("{line}the rest").into_bytes());
        guest.host.say(HostFrame::CallStdout { stream, bytes: b"it\x1bs\n".to_vec() });
        guest.exit(stream, 3);
        let output = caller.wait_with_output().expect("ends");
        assert_eq!(
            (status(&output), output.stdout),
            (Some(3), b"it\x1bs\n".to_vec()),
            "a pipe is not filtered"
        );
        guest.host.hang_up();
    }
}

#[test]
fn a_caller_whose_reader_is_gone_hangs_up() {
    let mut guest = Guest::new();
    let mut caller = guest.call(&["work", "yes"]);
    drop(caller.stdout.take());
    let (stream, ..) = guest.hear_call();
    guest.host.say(HostFrame::CallAccepted { stream });
    guest.host.say(HostFrame::CallStdout { stream, bytes: vec![b'y'; 65536] });
    assert_eq!(status(&caller.wait_with_output().expect("ends")), Some(128 + libc::SIGPIPE));
    loop {
        match guest.host.hear() {
            GuestFrame::CallHangup { .. } => break,
            GuestFrame::CallStdinEof { .. } | GuestFrame::CallStdoutCredit { .. } => {}
            other => panic!("unexpected: {other:?}"),
        }
    }
    guest.host.hang_up();
}

#[test]
fn what_a_service_says_is_filtered_when_asked_for_and_a_prefix_goes_first() {
    let mut guest = Guest::new();
    let mut caller = guest.call(&["-t", "-T", "--prefix-data=begin ", "work", "svc"]);
    let (stream, ..) = guest.hear_call();
    guest.host.say(HostFrame::CallAccepted { stream });
    caller.stdin.take().expect("piped").write_all(b"end").expect("writes");
    assert_eq!(text(&guest.hear_stdin()), "begin end");
    guest.host.say(HostFrame::CallStdout { stream, bytes: b"\x1b[2J\xc3\xa4\n".to_vec() });
    guest.host.say(HostFrame::CallStderr { stream, bytes: b"\x1b]0;x\x07".to_vec() });
    guest.exit(stream, 0);
    let output = caller.wait_with_output().expect("ends");
    assert_eq!((text(&output.stdout), text(&output.stderr)), ("_[2J__\n", "_]0;x\x07"));
    guest.host.hang_up();
}

#[test]
fn the_service_decides_when_a_call_is_over() {
    let mut guest = Guest::new();
    // Its own stdin never ends.
    let (keep, theirs) = std::os::unix::net::UnixStream::pair().expect("socketpair");
    let mut command = guest.tool("qrexec-client-vm");
    let caller = command.args(["work", "svc"]).stdin(Stdio::from(std::os::fd::OwnedFd::from(theirs)));
    let caller = caller.spawn().expect("starts");
    let (stream, ..) = guest.hear_call();
    guest.host.say(HostFrame::CallAccepted { stream });
    guest.host.say(HostFrame::CallStdoutEof { stream });
    guest.exit(stream, 4);
    assert_eq!(status(&caller.wait_with_output().expect("ends")), Some(4));
    drop(keep);
    guest.host.hang_up();
}

#[test]
fn a_local_program_that_is_not_there_ends_the_call() {
    let mut guest = Guest::new();
    let caller = guest.call(&["work", "svc", "/no/such/program"]);
    let (stream, ..) = guest.hear_call();
    guest.host.say(HostFrame::CallAccepted { stream });
    let output = caller.wait_with_output().expect("ends");
    assert_eq!(status(&output), Some(125));
    assert!(text(&output.stderr).contains("cannot run /no/such/program"), "{}", text(&output.stderr));
    loop {
        match guest.host.hear() {
            GuestFrame::CallHangup { .. } => break,
            GuestFrame::CallStdinEof { .. } => {}
            other => panic!("unexpected: {other:?}"),
        }
    }
    guest.host.hang_up();
}

#[test]
fn without_an_agent_a_caller_is_told_where_it_was_looked_for() {
    let guest = Guest::new();
    std::fs::remove_file(guest.socket()).expect("removes");
    let output = guest.call(&["work", "svc"]).wait_with_output().expect("ends");
    assert_eq!(status(&output), Some(125));
    assert!(text(&output.stderr).contains("agent at /"), "{}", text(&output.stderr));
    let output = guest.tool("qvm-run").arg("work").output().expect("ends");
    assert_eq!(status(&output), Some(1));
    assert!(text(&output.stderr).starts_with("usage: "), "{}", text(&output.stderr));
    guest.host.hang_up();
}

/// Leads a call to a service that says little, until the caller has said all.
fn carry(guest: &mut Guest, stream: u32, service: &mut Command) -> ExitStatus {
    let mut service = service.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("starts");
    let (mut stdin, mut stdout) =
        (service.stdin.take().expect("piped"), service.stdout.take().expect("piped"));
    let mut to_agent = guest.host.socket.try_clone().expect("dup");
    let answering = std::thread::spawn(move || {
        let (mut bytes, mut frames) = (Vec::new(), Vec::new());
        stdout.read_to_end(&mut bytes).expect("answers");
        HostFrame::CallStdout { stream, bytes }.encode(&mut frames).expect("is short");
        HostFrame::CallStdoutEof { stream }.encode(&mut frames).expect("is short");
        to_agent.write_all(&frames).expect("says it");
    });
    loop {
        match guest.host.hear() {
            GuestFrame::CallStdin { bytes, .. } => {
                stdin.write_all(&bytes).expect("takes it");
                guest.host.say(HostFrame::CallStdinCredit { stream, bytes: bytes.len() as u32 });
            }
            GuestFrame::CallStdinEof { .. } => break,
            other => panic!("unexpected: {other:?}"),
        }
    }
    answering.join().expect("answered");
    let status = service.wait().expect("ends");
    guest.exit(stream, status.code().expect("exited") as u8);
    status
}

#[test]
fn l6_files_go_from_qube_to_qube() {
    let folder = tempfile::tempdir().expect("tempdir");
    let (from, home) = (folder.path().join("from"), folder.path().join("home"));
    std::fs::create_dir_all(from.join("tree/inner")).expect("mkdir");
    std::fs::create_dir(&home).expect("mkdir");
    let content = "some text\n".repeat(100_000);
    std::fs::write(from.join("tree/inner/file"), &content).expect("write");
    for (name, target) in [("qvm-copy-to-vm", Some("disp42")), ("qvm-move", None)] {
        let mut guest = Guest::new();
        let source = name.trim_start_matches("qvm-").trim_end_matches("-to-vm");
        let sender = guest.tool(name).arg("--").args(target).arg(from.join("tree")).spawn().expect("starts");
        let (stream, called, service) = guest.hear_call();
        assert_eq!((called.as_str(), service.as_str()), (target.unwrap_or("@default"), "qubes.Filecopy"));
        guest.host.say(HostFrame::CallAccepted { stream });
        let mut receiver = Command::new(agent());
        receiver.arg("receive-files").env("HOME", &home).env("QREXEC_REMOTE_DOMAIN", source);
        assert!(carry(&mut guest, stream, &mut receiver).success());
        let output = sender.wait_with_output().expect("ends");
        assert_eq!((status(&output), text(&output.stderr)), (Some(0), ""));
        let came = home.join("QubesIncoming").join(source).join("tree/inner/file");
        assert!(std::fs::read_to_string(came).expect("has come") == content);
        assert_eq!(from.join("tree").exists(), name != "qvm-move");
        guest.host.hang_up();
    }
}

#[test]
fn a_transfer_that_is_refused_leaves_files_where_they_are() {
    let file = tempfile::NamedTempFile::new().expect("tempfile");
    let mut guest = Guest::new();
    let sender = guest.tool("qvm-move-to-vm").arg("work").arg(file.path()).spawn().expect("starts");
    let (stream, ..) = guest.hear_call();
    guest.host.say(HostFrame::CallRefused { stream });
    let output = sender.wait_with_output().expect("ends");
    assert_eq!((status(&output), text(&output.stderr)), (Some(126), "Request refused\n"));
    assert!(file.path().exists());
    let output = guest.tool("qvm-copy-to-vm").arg("work").output().expect("ends");
    assert_eq!(status(&output), Some(1), "nothing to copy");
    guest.host.hang_up();
}
