//! Calls out of the guest: real callers at a real agent, whose host is this test.

mod common;

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use common::guest::{status, text, Guest};
use common::Host;
use guest_agent::calls::message::Answer;
use guest_agent::calls::Calls;
use qrexec::{GuestFrame, HostFrame, ReceiveWindow, SendWindow, CALL_STREAM, INITIAL_WINDOW};
use rustix::net::{self, SendFlags};

/// A `cat` of a service: sends back what comes, within both windows, until the caller's stdin ends.
fn echo(host: &mut Host, stream: u32) -> usize {
    let (mut window, mut granted) = (SendWindow::default(), ReceiveWindow::default());
    let (mut waiting, mut total, mut ended) = (Vec::new(), 0, false);
    while !ended || !waiting.is_empty() {
        let count = waiting.len().min(window.left()).min(65536);
        if count > 0 {
            let bytes: Vec<u8> = waiting.drain(..count).collect();
            window.sent(count);
            total += count;
            host.say(HostFrame::CallStdout { stream, bytes });
            if let Some(bytes) = granted.consumed(count) {
                host.say(HostFrame::CallStdinCredit { stream, bytes });
            }
            continue;
        }
        match host.hear() {
            GuestFrame::CallStdin { stream: from, bytes } if from == stream => {
                granted.received(bytes.len()).expect("within the window");
                waiting.extend(bytes);
            }
            GuestFrame::CallStdinEof { .. } => ended = true,
            GuestFrame::CallStdoutCredit { bytes, .. } => window.credit(bytes).expect("within the limit"),
            other => panic!("unexpected: {other:?}"),
        }
    }
    total
}

#[test]
fn a_call_carries_both_ways_over_many_windows_and_its_status() {
    let mut guest = Guest::new();
    let mut caller = guest.call(&["$dispvm", "qubes.Echo+a"]);
    let (stream, target, service) = guest.hear_call();
    assert_eq!((target.as_str(), service.as_str()), ("@dispvm", "qubes.Echo+a"));
    assert!(stream & CALL_STREAM != 0);
    guest.host.say(HostFrame::CallAccepted { stream });
    let input: Vec<u8> = (0..5 << 20).map(|at: u32| (at.wrapping_mul(0x9e37_79b1) >> 24) as u8).collect();
    let mut stdin = caller.stdin.take().expect("piped");
    let sent = input.clone();
    let feeder = std::thread::spawn(move || stdin.write_all(&sent).expect("all is taken"));
    let mut stdout = caller.stdout.take().expect("piped");
    let reader = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        stdout.read_to_end(&mut bytes).map(|_| bytes).expect("reads")
    });
    assert_eq!(echo(&mut guest.host, stream), input.len());
    guest.host.say(HostFrame::CallStderr { stream, bytes: b"and a word\n".to_vec() });
    guest.exit(stream, 7);
    feeder.join().expect("fed");
    assert!(reader.join().expect("read") == input, "the bytes differ");
    let output = caller.wait_with_output().expect("ends");
    assert_eq!((status(&output), text(&output.stderr)), (Some(7), "and a word\n"));
    guest.host.hang_up();
}

#[test]
fn a_killed_caller_is_told_of_and_its_stream_ends_with_the_hosts_word() {
    let mut guest = Guest::new();
    for accepted in [false, true] {
        let mut caller = guest.call(&["work", "svc"]);
        let (stream, ..) = guest.hear_call();
        if accepted {
            guest.host.say(HostFrame::CallAccepted { stream });
            guest.host.ping(1);
        }
        caller.kill().expect("kills");
        caller.wait().expect("ends");
        let mut heard = guest.host.hear();
        if matches!(heard, GuestFrame::CallStdinEof { .. }) {
            heard = guest.host.hear();
        }
        assert_eq!(heard, GuestFrame::CallHangup { stream });
        // What was under way, and more than its window: nobody counts any more.
        for _ in 0..6 {
            guest.host.say(HostFrame::CallStdout { stream, bytes: vec![0; 65536] });
        }
        guest.exit(stream, 0);
        guest.host.ping(2);
    }
    guest.host.hang_up();
}

#[test]
fn callers_learn_that_the_host_is_gone() {
    let mut guest = Guest::new();
    let callers = [guest.call(&["work", "svc"]), guest.call(&["work", "svc"])];
    let (stream, ..) = guest.hear_call();
    guest.hear_call();
    guest.host.say(HostFrame::CallAccepted { stream });
    guest.host.ping(1);
    guest.host.hang_up();
    for caller in callers {
        let output = caller.wait_with_output().expect("ends");
        assert_eq!(status(&output), Some(125));
        assert!(text(&output.stderr).contains("lost its host"), "{}", text(&output.stderr));
    }
}

#[test]
fn a_frame_that_breaks_the_protocol_ends_the_calls() {
    let mut guest = Guest::new();
    let wrong: [fn(u32) -> HostFrame; 3] = [
        |stream| HostFrame::CallStdout { stream, bytes: vec![1] },
        |stream| HostFrame::CallStdinCredit { stream, bytes: 1 },
        |stream| HostFrame::CallStdoutEof { stream },
    ];
    for frame in wrong {
        let (caller, stream) = guest.ask();
        guest.host.say(frame(stream));
        let protest = guest.host.hear();
        assert!(matches!(&protest, GuestFrame::Failed { stream: 0, failed } if failed.errno == libc::EPROTO));
        assert!(Answer::receive(&caller).expect("reads").is_none(), "it has hung up");
    }
    guest.host.ping(1);
    guest.host.hang_up();
}

#[test]
fn garbage_and_silence_harm_nobody() {
    let mut guest = Guest::new();
    let silent: Vec<OwnedFd> = (0..80).map(|_| guest.connect()).collect();
    let messages = [vec![0], vec![b'x'; 9], b"work\0svc".to_vec(), vec![b'a'; 70_000], b"\0\0".to_vec()];
    for message in messages {
        let caller = guest.connect();
        net::send(&caller, &message, SendFlags::empty()).expect("sends");
        let answer = Answer::receive(&caller).expect("reads");
        assert!(matches!(answer, Some((Answer::Problem(_), _))), "{answer:?}");
    }
    // Silent ones make room, and who talks on after its question is sent away.
    let (caller, stream) = guest.ask();
    net::send(&caller, b"more", SendFlags::empty()).expect("sends");
    assert_eq!(guest.host.hear(), GuestFrame::CallHangup { stream });
    drop(silent);
    guest.host.ping(1);
    guest.host.hang_up();
}

#[test]
fn more_calls_than_allowed_are_told_so() {
    let mut guest = Guest::new();
    let mut callers: Vec<_> = (0..64).map(|_| guest.ask()).collect();
    let refuse = |guest: &Guest| {
        let caller = guest.connect();
        let _ = net::send(&caller, b"work\0svc\0", SendFlags::NOSIGNAL);
        match Answer::receive(&caller).expect("reads") {
            Some((Answer::Problem(reason), _)) => assert!(reason.contains("64 calls"), "{reason}"),
            other => panic!("unexpected: {other:?}"),
        }
    };
    refuse(&guest);
    // A caller that is gone counts until the host has said its last.
    let (caller, stream) = callers.remove(0);
    drop(caller);
    assert_eq!(guest.host.hear(), GuestFrame::CallHangup { stream });
    refuse(&guest);
    guest.exit(stream, 0);
    guest.host.ping(1);
    callers.push(guest.ask());
    guest.host.hang_up();
}

#[test]
fn a_stalled_caller_stalls_its_own_stream_only() {
    let mut guest = Guest::new();
    let (stalled, stream) = guest.ask();
    guest.host.say(HostFrame::CallAccepted { stream });
    let (_, fds) = Answer::receive(&stalled).expect("reads").expect("is there");
    for _ in 0..INITIAL_WINDOW / 65536 {
        guest.host.say(HostFrame::CallStdout { stream, bytes: vec![b's'; 65536] });
    }
    // A pipe's worth is in the pipe, the rest waits, and nothing is granted for it.
    assert_eq!(guest.host.hear(), GuestFrame::CallStdoutCredit { stream, bytes: 65536 });
    guest.host.ping(1);
    assert_eq!(guest.host.run(1, "echo free").stdout, b"free\n");
    let caller = guest.call(&["work", "svc"]);
    let (other, ..) = guest.hear_call();
    guest.host.say(HostFrame::CallAccepted { stream: other });
    guest.host.say(HostFrame::CallStdout { stream: other, bytes: b"free too\n".to_vec() });
    guest.exit(other, 0);
    assert_eq!(text(&caller.wait_with_output().expect("ends").stdout), "free too\n");
    // The service's end does not take away what it had written.
    guest.exit(stream, 9);
    guest.host.ping(2);
    std::thread::sleep(Duration::from_millis(50));
    let mut rest = Vec::new();
    std::fs::File::from(fds.into_iter().nth(1).expect("stdout")).read_to_end(&mut rest).expect("reads");
    assert_eq!(rest.len(), INITIAL_WINDOW as usize);
    assert_eq!(Answer::receive(&stalled).expect("reads").expect("is there").0, Answer::Exited(9));
    guest.host.hang_up();
}

#[test]
fn a_caller_that_reads_no_more_has_the_rest_dropped_and_credited() {
    let mut guest = Guest::new();
    let (caller, stream) = guest.ask();
    guest.host.say(HostFrame::CallAccepted { stream });
    let (_, mut fds) = Answer::receive(&caller).expect("reads").expect("is there");
    fds.truncate(1);
    let mut window = SendWindow::default();
    for _ in 0..20 {
        while window.left() < 65536 {
            let frame = guest.host.hear();
            let GuestFrame::CallStdoutCredit { bytes, .. } = frame else { panic!("unexpected: {frame:?}") };
            window.credit(bytes).expect("within the limit");
        }
        window.sent(65536);
        guest.host.say(HostFrame::CallStdout { stream, bytes: vec![0; 65536] });
    }
    guest.exit(stream, 0);
    guest.host.hang_up();
}

#[test]
fn a_service_that_reads_no_more_closes_the_callers_pipe() {
    let mut guest = Guest::new();
    let (caller, stream) = guest.ask();
    guest.host.say(HostFrame::CallAccepted { stream });
    let (_, fds) = Answer::receive(&caller).expect("reads").expect("is there");
    guest.host.say(HostFrame::CallStdinClosed { stream });
    guest.host.ping(1);
    assert_eq!(nix::unistd::write(&fds[0], b"x"), Err(nix::errno::Errno::EPIPE));
    guest.exit(stream, 0);
    guest.host.hang_up();
}

#[test]
fn the_socket_is_for_everybody_and_the_pipes_block() {
    use std::os::unix::fs::PermissionsExt;
    let mut guest = Guest::new();
    let mode = std::fs::metadata(guest.socket()).expect("is there").permissions().mode();
    assert_eq!(mode & 0o777, 0o666);
    let (caller, stream) = guest.ask();
    guest.host.say(HostFrame::CallAccepted { stream });
    let (_, fds) = Answer::receive(&caller).expect("reads").expect("is there");
    for fd in &fds {
        let flags = nix::fcntl::fcntl(fd.as_raw_fd(), nix::fcntl::FcntlArg::F_GETFL).expect("flags");
        assert_eq!(flags & libc::O_NONBLOCK, 0);
    }
    // An agent that starts again takes the place of the one before.
    assert!(Calls::listen(&guest.socket()).is_ok());
    assert!(Calls::listen(Path::new("/proc/no/such/place")).is_err());
    guest.host.hang_up();
}
