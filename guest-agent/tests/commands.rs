//! Real commands through a real agent over a socket pair: bytes, statuses, signals, environment.

mod common;

use std::time::{Duration, Instant};

use common::Host;
use guest_agent::calls::Calls;
use guest_agent::place::Place;
use guest_agent::services::Services;
use qrexec::{Exec, Exit, GuestFrame, HostFrame, Op, User};

#[test]
fn output_and_status_come_back() {
    let mut host = Host::connect();
    let output = host.run(1, "echo out; echo err >&2; exit 7");
    assert_eq!((output.stdout, output.stderr), (b"out\n".to_vec(), b"err\n".to_vec()));
    assert_eq!(output.exit, Some(Exit::Code(7)));
    for status in [0, 1, 125, 255] {
        assert_eq!(host.run(status + 2, &format!("exit {status}")).exit, Some(Exit::Code(status as u8)));
    }
    host.hang_up();
}

#[test]
fn arguments_are_any_bytes() {
    let mut host = Host::connect();
    let all: Vec<u8> = (1..=255).collect();
    host.exec(1, [&b"printf"[..], b"%s|%s", &all, b""]);
    assert_eq!(host.finish(1).stdout, [&all[..], b"|"].concat());
    host.hang_up();
}

#[test]
fn ends_by_signal_are_told() {
    let mut host = Host::connect();
    assert_eq!(host.run(1, "kill -9 $$").exit, Some(Exit::Signal(9)));
    assert_eq!(host.run(2, "kill -40 $$").exit, Some(Exit::Signal(40)));
    host.sh(3, "trap 'echo caught; exit 5' TERM; echo ready; while :; do sleep 0.05; done");
    let ready = host.hear();
    assert!(matches!(ready, GuestFrame::Stdout { stream: 3, .. }), "{ready:?}");
    host.say(HostFrame::Signal { stream: 3, signal: 15 });
    let output = host.finish(3);
    assert_eq!((output.stdout, output.exit), (b"caught\n".to_vec(), Some(Exit::Code(5))));
    host.sh(4, "sleep 100 | sleep 100");
    host.say(HostFrame::Signal { stream: 4, signal: 2 });
    assert_eq!(host.finish(4).exit, Some(Exit::Signal(2)), "the whole group gets it");
    host.hang_up();
}

#[test]
fn what_cannot_be_run_is_told_apart() {
    let folder = tempfile::tempdir().expect("tempdir");
    let path = |name: &str| folder.path().join(name).to_str().expect("UTF-8").to_string();
    std::fs::write(path("plain"), "not executable").expect("write");
    std::fs::write(path("script"), "#!/no/such/interpreter\n").expect("write");
    std::fs::set_permissions(path("script"), std::os::unix::fs::PermissionsExt::from_mode(0o755))
        .expect("chmod");
    let mut host = Host::connect();
    let cases = [
        ("no-such-command-anywhere".to_string(), 127),
        ("/no/such/file".into(), 127),
        (path("script"), 127),
        (path("plain"), 126),
        ("/".into(), 126),
    ];
    for (stream, (command, status)) in (1..).zip(cases) {
        host.exec(stream, [command.clone()]);
        let exit = host.finish(stream).exit.expect("ended");
        let told =
            matches!(exit, Exit::NotFound(_) if status == 127) || matches!(exit, Exit::NotExecutable(_));
        assert!(told && exit.status() == status, "{command}: {exit:?}");
    }
    let output = host.run(99, "exit 127");
    assert_eq!(output.exit, Some(Exit::Code(127)), "a command's own 127 is another thing");
    host.hang_up();
}

#[test]
fn commands_start_clean() {
    let mut host = Host::connect();
    let exec = Exec {
        argv: [
            "sh",
            "-c",
            "pwd; echo $GREETING; umask; ls /proc/self/fd | wc -l; echo $(ps -o pgid= -p $$) $$",
        ]
        .map(Vec::from)
        .to_vec(),
        user: User::User,
        env: vec![(b"GREETING".to_vec(), b"hi there".to_vec())],
        cwd: Some(b"/usr/bin".to_vec()),
    };
    host.say(HostFrame::Exec { stream: 1, exec: Box::new(exec) });
    let output = String::from_utf8(host.finish(1).stdout).expect("text");
    let lines: Vec<&str> = output.lines().collect();
    assert_eq!(lines[..4], ["/usr/bin", "hi there", "0022", "4"], "three descriptors and the one of ls");
    // Only SIGPIPE, which this process ignores: the others are what the test's own parent left.
    let ignored = host.run(2, "grep ^SigIgn /proc/self/status | cut -f 2").stdout;
    let ignored = u64::from_str_radix(String::from_utf8(ignored).expect("text").trim(), 16).expect("a mask");
    assert_eq!(ignored & (1 << (libc::SIGPIPE - 1)), 0);

    let exec = Exec { cwd: Some(b"/no/such/folder".to_vec()), ..Exec::user(["true"]) };
    host.say(HostFrame::Exec { stream: 3, exec: Box::new(exec) });
    loop {
        match host.hear() {
            GuestFrame::Failed { stream: 3, failed } => {
                assert_eq!(
                    (failed.op, failed.step.as_str(), failed.errno),
                    (Some(Op::Exec), "chdir", libc::ENOENT)
                );
                break;
            }
            GuestFrame::StdoutEof { .. } | GuestFrame::StderrEof { .. } | GuestFrame::StdinClosed { .. } => {}
            other => panic!("unexpected: {other:?}"),
        }
    }
    host.hang_up();
}

#[test]
fn background_processes_do_not_hold_a_command() {
    let mut host = Host::connect();
    let started = Instant::now();
    let output = host.run(1, "sleep 60 & echo now");
    assert_eq!((output.stdout, output.exit), (b"now\n".to_vec(), Some(Exit::Code(0))));
    assert!(started.elapsed() < Duration::from_secs(20));
    host.hang_up();
}

#[test]
fn hanging_up_kills_the_commands() {
    let mut host = Host::connect();
    host.sh(1, "echo $$; exec sleep 1000");
    let GuestFrame::Stdout { bytes, .. } = host.hear() else { panic!("no output") };
    let pid = String::from_utf8(bytes).expect("a number").trim().to_string();
    host.hang_up();
    let deadline = Instant::now() + Duration::from_secs(10);
    let alive = || {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        !stat.is_empty() && !stat.contains(") Z ")
    };
    while alive() {
        assert!(Instant::now() < deadline, "the command outlived its host");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn hooks_run_and_their_failure_is_told() {
    let mut host = Host::connect();
    let mut bytes = Vec::new();
    HostFrame::encode_prerun(&mut bytes, b"#!/bin/sh\nexit 0\n");
    HostFrame::encode_prerun(&mut bytes, b"#!/bin/sh\necho no way; exit 4\n");
    let (first, second) = bytes.split_at(bytes.len() / 2 - 6);
    std::io::Write::write_all(&mut host.socket, first).expect("write");
    assert_eq!(host.hear(), GuestFrame::Done(Op::Prerun));
    std::io::Write::write_all(&mut host.socket, second).expect("write");
    let answer = host.hear();
    let GuestFrame::Failed { stream: 0, failed } = answer else { panic!("{answer:?}") };
    assert_eq!((failed.op, failed.message.as_str()), (Some(Op::Prerun), "no way\n"));
    host.hang_up();
}

#[test]
fn services_are_the_guests_own() {
    let root = tempfile::tempdir().expect("tempdir");
    let write = |path: &str, text: &str| {
        let path = root.path().join(path);
        std::fs::create_dir_all(path.parent().expect("has one")).expect("mkdir");
        std::fs::write(&path, text).expect("write");
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("chmod");
    };
    write("etc/qubes-rpc/svc", "#!/bin/sh\necho any $1\n");
    write("usr/local/etc/qubes-rpc/svc+x", "#!/bin/sh\necho just $1\n");
    write("etc/qubes-rpc/other", "#!/bin/sh\n");
    write("etc/qubes/rpc-config/other", "force-user='nobody'\n");
    let services = Services::below(root.path(), "user");
    let mut host = Host::connect_to(Place::here().with_services(services), Calls::default());
    let mut call = |stream, name: &str, argument: &str| {
        let mut exec = Exec::user([format!("/etc/qubes-rpc/{name}"), argument.into()]);
        exec.env = vec![(b"QREXEC_SERVICE_FULL_NAME".to_vec(), format!("{name}+{argument}").into_bytes())];
        host.say(HostFrame::Exec { stream, exec: Box::new(exec) });
        match name {
            "other" => Err(host.hear()),
            _ => Ok(host.finish(stream)),
        }
    };
    assert_eq!(call(1, "svc", "x").expect("runs").stdout, b"just x\n");
    assert_eq!(call(2, "svc", "y").expect("runs").stdout, b"any y\n");
    assert_eq!(call(3, "none", "y").expect("is told").exit, Some(Exit::NotFound(2)));
    let refused = call(4, "other", "").expect_err("nobody runs it");
    assert!(matches!(&refused, GuestFrame::Failed { stream: 4, .. }), "{refused:?}");
    host.hang_up();
}
