//! Calls into a guest: many callers, some of whom stall, vanish, or send what is no call; and a guest that does not keep to the protocol.

mod common;
#[path = "common/hanging.rs"]
mod hanging;

use std::fs::File;
use std::io::{self, pipe, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::{channel, Receiver};
use std::sync::Mutex;
use std::time::Duration;

use common::{Guest, LIMIT, NAME};
use control_plane::calls::client;
use control_plane::calls::message::{Control, Status};
use control_plane::calls::requests::CALLS_MAX;
use control_plane::daemon::channel::Channel;
use control_plane::error::{Kind, Result};
use control_plane::session::{Ending, SessionError};
use hanging::{Hanging, SIZE};
use qrexec::{Exec, Exit, Failed, GuestFrame, HostFrame, Op, INITIAL_WINDOW};

/// One who calls, on a thread of its own.
struct Caller {
    stdin: PipeWriter,
    stdout: PipeReader,
    stderr: PipeReader,
    outcome: Receiver<Result<Exit>>,
}

fn call(guest: &Guest, argv: &[&str]) -> Caller {
    let ((in_reader, stdin), (stdout, out), (stderr, err)) =
        (pipe().unwrap(), pipe().unwrap(), pipe().unwrap());
    let (state, exec) = (guest.state.clone(), Exec::user(argv.iter().copied()));
    let (tell, outcome) = channel();
    std::thread::spawn(move || {
        let fds: [OwnedFd; 3] = [in_reader.into(), out.into(), err.into()];
        let outcome = client::call(&state, NAME, exec, [fds[0].as_fd(), fds[1].as_fd(), fds[2].as_fd()]);
        drop(fds);
        let _ = tell.send(outcome);
    });
    Caller { stdin, stdout, stderr, outcome }
}

impl Caller {
    fn end(mut self) -> (Exit, Vec<u8>, Vec<u8>) {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        drop(self.stdin);
        self.stdout.read_to_end(&mut out).unwrap();
        self.stderr.read_to_end(&mut err).unwrap();
        (self.outcome.recv_timeout(LIMIT).unwrap().unwrap(), out, err)
    }
}

#[test]
fn a_call_has_its_own_streams_and_its_own_exit() {
    let mut guest = Guest::start(true);
    let mut caller = call(&guest, &["cat"]);
    let stream = guest.agent.take_exec();
    caller.stdin.write_all(b"words").unwrap();
    assert_eq!(guest.agent.hear(), HostFrame::Stdin { stream, bytes: b"words".to_vec() });
    guest.agent.say(&GuestFrame::Stdout { stream, bytes: b"out".to_vec() });
    guest.agent.say(&GuestFrame::Stderr { stream, bytes: b"err".to_vec() });
    guest.agent.say(&GuestFrame::Exited { stream, exit: Exit::Code(3) });
    assert_eq!(caller.end(), (Exit::Code(3), b"out".to_vec(), b"err".to_vec()));
    assert!(matches!(guest.end(), Ok(Ending::PoweredOff)));
}

#[test]
fn a_command_that_cannot_be_started_is_its_callers_trouble_alone() {
    let mut guest = Guest::start(true);
    let caller = call(&guest, &["nonesuch"]);
    let stream = guest.agent.take_exec();
    let failed = qrexec::Failed { op: None, step: "fork".into(), errno: 12, message: "no memory".into() };
    guest.agent.say(&GuestFrame::Failed { stream, failed });
    let error = caller.outcome.recv_timeout(LIMIT).unwrap().unwrap_err();
    assert!(error.to_string().contains("fork: no memory"), "{error}");
    assert_eq!(client::status(&guest.state, NAME).unwrap(), Status::default());
    guest.end().unwrap();
}

#[test]
fn a_stalled_reader_delays_no_other_stream_nor_control() {
    let mut guest = Guest::start(true);
    let stalled = call(&guest, &["yes"]);
    let first = guest.agent.take_exec();
    let much = vec![b'y'; INITIAL_WINDOW as usize];
    guest.agent.say(&GuestFrame::Stdout { stream: first, bytes: much.clone() });
    let others: Vec<(Caller, u32)> =
        (0..8).map(|_| (call(&guest, &["cat"]), guest.agent.take_exec())).collect();
    for (_, stream) in &others {
        guest.agent.say(&GuestFrame::Stdout { stream: *stream, bytes: vec![*stream as u8; 100_000] });
        guest.agent.say(&GuestFrame::Exited { stream: *stream, exit: Exit::Code(*stream as u8) });
    }
    for (caller, stream) in others {
        let (exit, out, _) = caller.end();
        assert_eq!((exit, out), (Exit::Code(stream as u8), vec![stream as u8; 100_000]));
    }
    client::control(&guest.state, NAME, Control::Pause).unwrap();
    let status = client::status(&guest.state, NAME).unwrap();
    assert_eq!(status, Status { paused: true, commands: 1, ..Status::default() });
    guest.agent.say(&GuestFrame::Exited { stream: first, exit: Exit::Code(0) });
    assert_eq!(stalled.end(), (Exit::Code(0), much, Vec::new()));
    guest.end().unwrap();
}

#[test]
fn a_command_ends_with_its_caller_and_with_its_reader() {
    let mut guest = Guest::start(true);
    // One whose socket closes, as that of a killed process does.
    let exec = control_plane::calls::message::Message::Call(Box::new(Exec::user(["sleep"])));
    let holder = Channel::connect(&guest.state.call_socket(NAME)).unwrap();
    let (null, (reader, writer)) = (std::fs::File::open("/dev/null").unwrap(), pipe().unwrap());
    let fds = [null.as_fd(), writer.as_fd(), writer.as_fd()];
    holder.send_bytes(&exec.encode().unwrap(), &fds).unwrap();
    let stream = guest.agent.take_exec();
    assert_eq!(guest.agent.hear(), HostFrame::StdinEof { stream });
    drop(holder);
    assert_eq!(guest.agent.hear(), HostFrame::Signal { stream, signal: 15 });
    // What it still writes goes nowhere, and is credited.
    guest.agent.say(&GuestFrame::Stdout { stream, bytes: vec![0; INITIAL_WINDOW as usize] });
    assert!(matches!(guest.agent.hear_any(), HostFrame::StdoutCredit { .. }));
    guest.agent.say(&GuestFrame::Exited { stream, exit: Exit::Signal(15) });
    drop(reader);

    let caller = call(&guest, &["yes"]);
    let stream = guest.agent.take_exec();
    drop(caller.stdout);
    guest.agent.say(&GuestFrame::Stdout { stream, bytes: b"y".to_vec() });
    assert_eq!(guest.agent.hear(), HostFrame::Signal { stream, signal: 13 });
    guest.agent.say(&GuestFrame::Exited { stream, exit: Exit::Signal(13) });
    assert_eq!(caller.outcome.recv_timeout(LIMIT).unwrap().unwrap(), Exit::Signal(13));
    guest.end().unwrap();
}

#[test]
fn peers_that_send_garbage_or_nothing_harm_nobody() {
    let mut guest = Guest::start(true);
    let path = guest.state.call_socket(NAME);
    let silent: Vec<Channel> = (0..40).map(|_| Channel::connect(&path).unwrap()).collect();
    for bytes in
        [&b"x"[..], b"c\x09", b"{\"status\":1}", &[0; 70_000], b"x\x10\0\0\0\x01\0\0\0\xff\xff\xff\xff"]
    {
        let peer = Channel::connect(&path).unwrap();
        peer.send_bytes(bytes, &[]).unwrap();
        let _ = peer.receive_within::<control_plane::calls::message::Answer>(LIMIT).unwrap();
    }
    // A call without its streams, and one that hangs up before it is heard.
    let message = control_plane::calls::message::Message::Call(Box::new(Exec::user(["true"])));
    let peer = Channel::connect(&path).unwrap();
    peer.send_bytes(&message.encode().unwrap(), &[peer.as_fd()]).unwrap();
    assert!(format!("{:?}", peer.receive_within::<control_plane::calls::message::Answer>(LIMIT))
        .contains("stdin"));
    let caller = call(&guest, &["true"]);
    let stream = guest.agent.take_exec();
    guest.agent.say(&GuestFrame::Exited { stream, exit: Exit::Code(0) });
    assert_eq!(caller.end().0, Exit::Code(0));
    drop(silent);
    guest.end().unwrap();
}

#[test]
fn no_more_commands_than_the_agent_takes() {
    let mut guest = Guest::start(true);
    let callers: Vec<Caller> = (0..CALLS_MAX).map(|_| call(&guest, &["sleep"])).collect();
    let streams: Vec<u32> = callers.iter().map(|_| guest.agent.take_exec()).collect();
    let refused = call(&guest, &["sleep"]).outcome.recv_timeout(LIMIT).unwrap().unwrap_err();
    assert_eq!(refused.kind, Kind::Refused);
    assert_eq!(client::status(&guest.state, NAME).unwrap().commands, CALLS_MAX);
    for stream in streams {
        guest.agent.say(&GuestFrame::Exited { stream, exit: Exit::Code(0) });
    }
    assert!(callers.into_iter().all(|caller| caller.end().0 == Exit::Code(0)));
    guest.end().unwrap();
}

#[test]
fn frames_of_no_stream_are_dropped_and_more_than_was_granted_ends_the_guest() {
    let mut guest = Guest::start(true);
    for stream in [1, 2, 77, u32::MAX >> 1] {
        guest.agent.say(&GuestFrame::Stdout { stream, bytes: vec![0; 70_000] });
        guest.agent.say(&GuestFrame::StdinCredit { stream, bytes: u32::MAX });
        guest.agent.say(&GuestFrame::Exited { stream, exit: Exit::Code(0) });
    }
    for number in 0..10_000 {
        guest.agent.say(&GuestFrame::Pong(number));
    }
    let caller = call(&guest, &["yes"]);
    let stream = guest.agent.take_exec();
    guest.agent.say(&GuestFrame::Stdout { stream, bytes: vec![0; INITIAL_WINDOW as usize] });
    guest.agent.say(&GuestFrame::Stdout { stream, bytes: vec![0; 2 * INITIAL_WINDOW as usize] });
    assert!(matches!(guest.ended(), Err(SessionError::Protocol(_))));
    assert!(caller.outcome.recv_timeout(LIMIT).unwrap().is_err());
}

#[test]
fn a_guest_is_shut_down_paused_and_asked_by_its_socket() {
    let mut guest = Guest::start(false);
    let refused = client::control(&guest.state, NAME, Control::Pause).unwrap_err();
    assert!(refused.to_string().contains("not this one"), "{refused}");
    client::control(&guest.state, NAME, Control::Shutdown).unwrap();
    client::control(&guest.state, NAME, Control::Shutdown).unwrap();
    assert_eq!(guest.agent.hear(), HostFrame::Shutdown);
    let refused = call(&guest, &["true"]).outcome.recv_timeout(LIMIT).unwrap().unwrap_err();
    assert_eq!(refused.kind, Kind::Refused);
    let state = guest.state.clone();
    // The agent's channel closes first.
    guest.agent.stream.shutdown(std::net::Shutdown::Both).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    let _folder = std::mem::replace(&mut guest.folder, tempfile::tempdir().unwrap());
    assert!(matches!(guest.end(), Ok(Ending::PoweredOff)));
    let error = client::status(&state, NAME).unwrap_err();
    assert!(error.to_string().contains("does not run") && error.hint_text().is_some(), "{error}");
    assert!(!state.call_socket(NAME).exists());
    assert_eq!(client::status(&state, "../x").unwrap_err().kind, Kind::Usage);
}

/// What is logged in this process.
static LOG: Mutex<Vec<u8>> = Mutex::new(Vec::new());

struct Logged;

impl io::Write for Logged {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        LOG.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_guest_that_says_again_and_again_that_it_does_not_shut_down_does_not_fill_the_log() {
    tracing_subscriber::fmt().with_writer(|| Logged).init();
    let mut guest = Guest::start(true);
    client::control(&guest.state, NAME, Control::Shutdown).unwrap();
    let failed =
        Failed { op: Some(Op::Shutdown), step: "power off".into(), errno: 1, message: "never".into() };
    for _ in 0..1000 {
        guest.agent.say(&GuestFrame::Failed { stream: 0, failed: failed.clone() });
    }
    client::control(&guest.state, NAME, Control::Pause).unwrap();
    guest.end().unwrap();
    let log = String::from_utf8(LOG.lock().unwrap().clone()).unwrap();
    assert_eq!(log.matches("does not shut down").count(), 1);
}

/// A call with these files as its stdin and stdout, on a thread of its own.
fn call_with(guest: &Guest, stdin: OwnedFd, stdout: OwnedFd) -> Receiver<Result<Exit>> {
    let (state, (tell, outcome)) = (guest.state.clone(), channel());
    std::thread::spawn(move || {
        let fds = [stdin.as_fd(), stdout.as_fd(), stdout.as_fd()];
        let _ = tell.send(client::call(&state, NAME, Exec::user(["cat"]), fds));
    });
    outcome
}

/// Of a program's file system, of a server's: whoever reads or writes it may wait for ever.
#[test]
fn a_callers_file_that_hangs_delays_no_other_call() {
    let Some(file_system) = Hanging::mount() else { return eprintln!("needs root and /dev/fuse") };
    let mut guest = Guest::start(true);
    let file = || File::options().read(true).write(true).open(file_system.path()).unwrap();
    let full = file_system.written.lock().unwrap();
    let stalled = call_with(&guest, file().into(), file().into());
    let stream = guest.agent.take_exec();
    // It reads and writes in vain.
    guest.agent.say(&GuestFrame::Stdout { stream, bytes: vec![7; 1000] });
    let other = call(&guest, &["true"]);
    let next = guest.agent.take_exec();
    guest.agent.say(&GuestFrame::Stdout { stream: next, bytes: b"fine".to_vec() });
    guest.agent.say(&GuestFrame::Exited { stream: next, exit: Exit::Code(0) });
    assert_eq!(other.end().1, b"fine");
    // Its command has ended, but not what it wrote.
    guest.agent.say(&GuestFrame::Exited { stream, exit: Exit::Code(3) });
    assert!(stalled.recv_timeout(Duration::from_millis(200)).is_err());
    drop(full);
    assert_eq!(stalled.recv_timeout(LIMIT).unwrap().unwrap(), Exit::Code(3));
    assert_eq!(*file_system.written.lock().unwrap(), [7; 1000]);
    // One that takes no more keeps nobody waiting either.
    let null = File::open("/dev/null").unwrap();
    let broken = call_with(&guest, null.into(), file().into());
    let stream = loop {
        if let HostFrame::Exec { stream, .. } = guest.agent.hear_any() {
            break stream;
        }
    };
    guest.agent.say(&GuestFrame::Stdout { stream, bytes: vec![7; 65_000] });
    guest.agent.say(&GuestFrame::Stdout { stream, bytes: vec![7; 65_000] });
    guest.agent.say(&GuestFrame::Exited { stream, exit: Exit::Code(4) });
    assert_eq!(broken.recv_timeout(LIMIT).unwrap().unwrap(), Exit::Code(4));
    assert!(file_system.written.lock().unwrap().len() > SIZE);
    drop(file_system);
    guest.end().unwrap();
}
