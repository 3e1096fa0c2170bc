//! Calls out of a guest, with the processes that carry them out, and a guest that is hostile.

mod common;

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Instant;

use common::{program, Guest, LIMIT};
use control_plane::calls::client;
use control_plane::calls::outgoing::CALLS_OUT_MAX;
use control_plane::session::{Ending, SessionError};
use qrexec::{kind, Call, Exit, GuestFrame, HostFrame, RawFrame, CALL_STREAM, INITIAL_WINDOW};

const POLICY: &str = "* * work dom0 allow\n* * work vault allow user=root\n";
const SOURCE: &str = "work";

/// Policy and services, the same for all tests of this process, for they are found by its environment.
fn setup() -> &'static PathBuf {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("calls-out");
        let _ = fs::remove_dir_all(&folder);
        for name in ["policy", "rpc"] {
            fs::create_dir_all(folder.join(name)).unwrap();
        }
        fs::write(folder.join("policy/50-test.policy"), POLICY).unwrap();
        for (name, text) in [
            ("test.Echo", "cat; echo done >&2; exit 3"),
            ("test.Slow", "echo $$ >> \"$(dirname \"$0\")/pids\"; sleep 60 & wait"),
            ("test.Deaf", "exec <&-; sleep 60"),
            ("test.Idle", "sleep 60"),
            (
                "test.Stubborn",
                "sh -c 'trap \"\" TERM; echo $$ > \"$0\"; sleep 60' \"$(dirname \"$0\")/stubborn\" & wait",
            ),
            ("test.Logged", "tr '\\0' '\\n' < /proc/$PPID/environ | grep -c ^DISPVM_CALL_UNLOGGED="),
            ("test.Much", "head -c 1000000 /dev/zero"),
        ] {
            let path = folder.join("rpc").join(name);
            fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
            fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        let programs = program("qrexec-policy-exec").parent().unwrap().to_owned();
        let path = format!("{}:{}", programs.display(), std::env::var("PATH").unwrap());
        std::env::set_var("PATH", path);
        std::env::set_var("DISPVM_POLICY_DIR", folder.join("policy"));
        std::env::set_var("DISPVM_RPC_DIR", folder.join("rpc"));
        folder
    })
}

fn guest() -> Guest {
    setup();
    Guest::start_as(SOURCE, true)
}

impl Guest {
    fn calls(&mut self, number: u32, target: &str, service: &str) -> u32 {
        let stream = CALL_STREAM | number;
        let call = Call::parse(target.as_bytes(), service.as_bytes()).unwrap();
        self.agent.say(&GuestFrame::Call { stream, call });
        stream
    }

    /// All that comes for a stream up to its last frame: stdout, stderr and how it ended.
    fn outcome(&mut self, stream: u32) -> (Vec<u8>, Vec<u8>, Exit) {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        loop {
            match self.agent.hear_any() {
                HostFrame::CallStdout { stream: of, bytes } if of == stream => {
                    let count = bytes.len() as u32;
                    out.extend(bytes);
                    self.agent.say(&GuestFrame::CallStdoutCredit { stream, bytes: count });
                }
                HostFrame::CallStderr { stream: of, bytes } if of == stream => err.extend(bytes),
                HostFrame::CallExited { stream: of, exit } if of == stream => return (out, err, exit),
                HostFrame::CallRefused { stream: of } if of == stream => panic!("refused"),
                _ => {}
            }
        }
    }
}

fn is_alive(pid: &str) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().is_some_and(|rest| !rest.trim().is_empty() && !rest.starts_with(" Z"))
}

#[test]
fn a_call_that_policy_allows_has_its_streams_and_its_exit() {
    let mut guest = guest();
    let stream = guest.calls(1, "dom0", "test.Echo");
    assert_eq!(guest.agent.hear(), HostFrame::CallAccepted { stream });
    guest.agent.say(&GuestFrame::CallStdin { stream, bytes: b"words".to_vec() });
    guest.agent.say(&GuestFrame::CallStdinEof { stream });
    // What dom0's programs say on stderr is not for a guest.
    assert_eq!(guest.outcome(stream), (b"words".to_vec(), Vec::new(), Exit::Code(3)));
    let stream = guest.calls(2, "@adminvm", "test.Much");
    assert_eq!(guest.outcome(stream).0.len(), 1_000_000);
    let stream = guest.calls(3, "dom0", "test.None");
    assert_eq!(guest.outcome(stream).2, Exit::Code(127));
    assert_eq!(client::status(&guest.state, SOURCE).unwrap().calls_out, 0);
    assert!(matches!(guest.end(), Ok(Ending::PoweredOff)));
}

/// What becomes of calls is logged by their processes, which are told whether to.
#[test]
fn of_a_guest_that_makes_many_calls_at_once_not_all_are_logged() {
    const MANY: u32 = CALLS_OUT_MAX as u32;
    let mut guest = guest();
    for number in 1..=MANY {
        guest.calls(number, "dom0", "test.Logged");
    }
    let (mut said, mut ended) = (String::new(), 0);
    while ended < MANY {
        match guest.agent.hear_any() {
            HostFrame::CallStdout { bytes, .. } => said += std::str::from_utf8(&bytes).unwrap(),
            HostFrame::CallExited { .. } => ended += 1,
            HostFrame::CallRefused { .. } => panic!("refused"),
            _ => {}
        }
    }
    let (logged, unlogged) = (said.matches("0\n").count(), said.matches("1\n").count());
    assert_eq!(logged + unlogged, MANY as usize, "{said}");
    assert!(logged >= 20 && unlogged > 0, "{logged} are logged");
    guest.end().unwrap();
}

#[test]
fn a_call_that_policy_does_not_allow_is_refused_and_over() {
    let mut guest = guest();
    let stream = guest.calls(1, "personal", "test.Echo");
    assert_eq!(guest.agent.hear(), HostFrame::CallRefused { stream });
    // What was under way is dropped.
    guest.agent.say(&GuestFrame::CallStdin { stream, bytes: vec![0; 65_536] });
    guest.agent.say(&GuestFrame::CallHangup { stream });
    let stream = guest.calls(2, "dom0", "test.Echo");
    assert_eq!(guest.agent.hear(), HostFrame::CallAccepted { stream });
    guest.end().unwrap();
}

#[test]
fn a_call_of_another_qube_has_that_qubes_streams_and_its_end() {
    let mut guest = guest();
    let mut vault = guest.start_beside("vault");
    let stream = guest.calls(1, "vault", "test.There+arg");
    assert_eq!(guest.agent.hear(), HostFrame::CallAccepted { stream });
    guest.agent.say(&GuestFrame::CallStdin { stream, bytes: b"words".to_vec() });
    guest.agent.say(&GuestFrame::CallStdinEof { stream });
    let (there, exec) = match vault.agent.hear() {
        HostFrame::Exec { stream, exec } => (stream, exec),
        other => panic!("{other:?}"),
    };
    assert_eq!(exec.argv, [&b"/etc/qubes-rpc/test.There"[..], b"arg"]);
    assert_eq!(exec.user, qrexec::User::Root);
    assert!(exec.env.contains(&(b"QREXEC_REMOTE_DOMAIN".to_vec(), b"work".to_vec())));
    assert_eq!(vault.agent.hear(), HostFrame::Stdin { stream: there, bytes: b"words".to_vec() });
    assert_eq!(vault.agent.hear(), HostFrame::StdinEof { stream: there });
    vault.agent.say(&GuestFrame::Stdout { stream: there, bytes: b"answer".to_vec() });
    vault.agent.say(&GuestFrame::Stderr { stream: there, bytes: b"remark".to_vec() });
    vault.agent.say(&GuestFrame::Exited { stream: there, exit: Exit::Code(9) });
    assert_eq!(guest.outcome(stream), (b"answer".to_vec(), b"remark".to_vec(), Exit::Code(9)));

    // The caller's end is told there, and the target's here.
    let stream = guest.calls(2, "vault", "test.There");
    let there = vault.agent.take_exec();
    guest.agent.say(&GuestFrame::CallHangup { stream });
    let heard = [vault.agent.hear(), vault.agent.hear()];
    assert!(heard.contains(&HostFrame::Signal { stream: there, signal: 15 }), "{heard:?}");
    assert_eq!(guest.outcome(stream).2, Exit::Signal(15));
    let stream = guest.calls(3, "vault", "test.There");
    vault.agent.take_exec();
    vault.end().unwrap();
    assert_eq!(guest.outcome(stream).2, Exit::Code(125));
    guest.end().unwrap();
}

#[test]
fn a_caller_that_hangs_up_ends_the_service_and_its_processes() {
    let mut guest = guest();
    let stream = guest.calls(1, "dom0", "test.Idle");
    assert_eq!(guest.agent.hear(), HostFrame::CallAccepted { stream });
    let start = Instant::now();
    guest.agent.say(&GuestFrame::CallHangup { stream });
    assert_eq!(guest.outcome(stream).2, Exit::Signal(15));
    assert!(start.elapsed() < LIMIT / 4, "{:?}", start.elapsed());
    guest.end().unwrap();
}

#[test]
fn processes_that_do_not_heed_sigterm_do_not_outlive_the_call_either() {
    let mut guest = guest();
    let stream = guest.calls(1, "dom0", "test.Stubborn");
    assert_eq!(guest.agent.hear(), HostFrame::CallAccepted { stream });
    let path = setup().join("rpc/stubborn");
    let deadline = Instant::now() + LIMIT;
    let until = |is_so: &dyn Fn() -> bool| {
        while !is_so() && Instant::now() < deadline {
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
    };
    let pid = || fs::read_to_string(&path).unwrap_or_default().trim().to_owned();
    until(&|| !pid().is_empty());
    assert!(is_alive(&pid()));
    guest.agent.say(&GuestFrame::CallHangup { stream });
    assert_eq!(guest.outcome(stream).2, Exit::Signal(15));
    until(&|| !is_alive(&pid()));
    assert!(!is_alive(&pid()));
    guest.end().unwrap();
}

#[test]
fn a_service_that_reads_nothing_stalls_its_own_call_alone() {
    let mut guest = guest();
    let idle = guest.calls(1, "dom0", "test.Idle");
    assert_eq!(guest.agent.hear(), HostFrame::CallAccepted { stream: idle });
    for _ in 0..INITIAL_WINDOW / 65_536 {
        guest.agent.say(&GuestFrame::CallStdin { stream: idle, bytes: vec![0; 65_536] });
    }
    let deaf = guest.calls(2, "dom0", "test.Deaf");
    assert_eq!(guest.agent.hear(), HostFrame::CallAccepted { stream: deaf });
    guest.agent.say(&GuestFrame::CallStdin { stream: deaf, bytes: b"x".to_vec() });
    assert_eq!(guest.agent.hear(), HostFrame::CallStdinClosed { stream: deaf });
    let echo = guest.calls(3, "dom0", "test.Echo");
    guest.agent.say(&GuestFrame::CallStdinEof { stream: echo });
    assert_eq!(guest.outcome(echo).2, Exit::Code(3));
    guest.end().unwrap();
}

#[test]
fn a_flood_of_calls_is_bounded_and_all_of_it_ends_with_the_guest() {
    let mut guest = guest();
    for number in 0..200 {
        guest.calls(number, "dom0", "test.Slow");
    }
    let (mut accepted, mut refused) = (0, 0);
    while accepted + refused < 200 {
        match guest.agent.hear() {
            HostFrame::CallAccepted { .. } => accepted += 1,
            HostFrame::CallRefused { .. } => refused += 1,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(accepted, CALLS_OUT_MAX);
    assert_eq!(client::status(&guest.state, SOURCE).unwrap().calls_out, CALLS_OUT_MAX);
    let pids = setup().join("rpc/pids");
    let deadline = Instant::now() + LIMIT;
    let started = loop {
        let started = fs::read_to_string(&pids).unwrap_or_default();
        if started.lines().count() >= CALLS_OUT_MAX || Instant::now() > deadline {
            break started;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    };
    assert!(started.lines().count() >= CALLS_OUT_MAX && started.lines().any(is_alive));
    guest.end().unwrap();
    assert!(!started.lines().any(is_alive));
}

#[test]
fn a_guest_that_breaks_the_protocol_of_calls_ends() {
    let mut over = guest();
    let stream = over.calls(1, "dom0", "test.Idle");
    assert_eq!(over.agent.hear(), HostFrame::CallAccepted { stream });
    over.agent.say(&GuestFrame::CallStdin { stream, bytes: vec![0; 2 * INITIAL_WINDOW as usize] });
    assert!(matches!(over.ended(), Err(SessionError::Protocol(_))));

    let mut twice = guest();
    twice.calls(1, "dom0", "test.Idle");
    twice.calls(1, "dom0", "test.Idle");
    assert!(matches!(twice.ended(), Err(SessionError::Protocol(_))));

    let mut credit = guest();
    let stream = credit.calls(1, "dom0", "test.Idle");
    credit.agent.say(&GuestFrame::CallStdoutCredit { stream, bytes: u32::MAX });
    assert!(matches!(credit.ended(), Err(SessionError::Protocol(_))));

    for payload in [&b"dom0\0../../bin/sh\0"[..], b"dom0\0x", b"a/b\0x\0", b"dom0\0x\0work\0", b"\xff\0x\0"] {
        let mut names = guest();
        let header = RawFrame::header(kind::CALL, CALL_STREAM | 1, payload.len());
        names.agent.stream.write_all(&[&header, payload].concat()).unwrap();
        assert!(matches!(names.ended(), Err(SessionError::Agent(_))), "{payload:?}");
    }
}
