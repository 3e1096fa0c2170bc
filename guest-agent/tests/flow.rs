//! Back-pressure, several streams, and frames that break the protocol.

mod common;

use std::io::Write;
use std::time::Duration;

use common::{Host, Output};
use qrexec::{Exit, GuestFrame, HostFrame, Op, RawFrame, SendWindow, INITIAL_WINDOW};

/// Bytes without a short period, so that a lost or doubled piece shows.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    let mut bytes: Vec<u8> = (0..length / 8 + 1).flat_map(|_| next()).collect();
    bytes.truncate(length);
    bytes
}

/// Feeds `input` to the command within its window while collecting what comes back.
fn pump(host: &mut Host, stream: u32, input: &[u8]) -> Output {
    let (mut window, mut sent, mut output) = (SendWindow::default(), 0, Output::default());
    while output.exit.is_none() {
        let count = window.left().min(input.len() - sent).min(65536);
        if count > 0 {
            host.say(HostFrame::Stdin { stream, bytes: input[sent..sent + count].to_vec() });
            window.sent(count);
            sent += count;
            if sent == input.len() {
                host.say(HostFrame::StdinEof { stream });
            }
            continue;
        }
        match host.hear() {
            GuestFrame::StdinCredit { bytes, .. } => window.credit(bytes).expect("within the limit"),
            frame => host.collect(&mut output, stream, frame),
        }
    }
    output
}

#[test]
fn sixty_four_mebibytes_go_through_cat() {
    let mut host = Host::connect();
    let input = noise(64 << 20);
    host.exec(1, ["cat"]);
    let output = pump(&mut host, 1, &input);
    assert!(output.stdout == input, "the bytes differ");
    assert_eq!(output.exit, Some(Exit::Code(0)));
    host.hang_up();
}

#[test]
fn pieces_that_come_together_reach_each_their_own_stream() {
    let mut host = Host::connect();
    let file = tempfile::NamedTempFile::new().expect("a file");
    host.exec(1, ["cat"]);
    host.sh(2, &format!("cat > {}", file.path().display()));
    let input = noise(200 * 100);
    let (mut words, mut wanted) = (Vec::new(), [Vec::new(), Vec::new()]);
    for (number, piece) in input.chunks(100).enumerate() {
        // More in a row than are handed on at once, and frames without a byte among them.
        let stream = if number < 150 { 1 } else { 1 + number % 2 };
        wanted[stream - 1].extend_from_slice(piece);
        for bytes in [piece, b""] {
            HostFrame::Stdin { stream: stream as u32, bytes: bytes.to_vec() }
                .encode(&mut words)
                .expect("encodes");
        }
    }
    host.socket.write_all(&words).expect("the agent reads");
    host.say(HostFrame::StdinEof { stream: 1 });
    assert!(host.finish(1).stdout == wanted[0], "the bytes differ");
    host.say(HostFrame::StdinEof { stream: 2 });
    host.finish(2);
    assert!(std::fs::read(file.path()).expect("reads") == wanted[1], "the bytes differ");
    host.hang_up();
}

#[test]
fn a_stream_that_never_pauses_leaves_room_for_others() {
    let mut host = Host::connect();
    // It writes faster than we read: its pipe is full whenever the agent looks.
    host.sh(1, "exec cat /dev/zero");
    host.say(HostFrame::StdoutCredit { stream: 1, bytes: 4 * INITIAL_WINDOW });
    let (mut waited, mut begun, mut ended, mut said) = (0, false, false, Vec::new());
    while !ended {
        match host.hear() {
            GuestFrame::Stdout { stream: stream @ 1, bytes } => {
                host.say(HostFrame::StdoutCredit { stream, bytes: bytes.len() as u32 });
                waited += bytes.len();
                if waited > 8 << 20 && !begun {
                    (waited, begun) = (0, true);
                    host.sh(2, "echo out; sleep 0.1; echo err >&2");
                }
            }
            GuestFrame::Stdout { stream: 2, bytes } | GuestFrame::Stderr { stream: 2, bytes } => {
                said.extend(bytes)
            }
            GuestFrame::Exited { stream: 2, .. } => ended = true,
            _ => {}
        }
        assert!(waited < 1 << 30, "nobody else has had a turn");
    }
    assert_eq!(said, b"out\nerr\n");
    host.say(HostFrame::Signal { stream: 1, signal: 9 });
    host.finish_after_credit(1);
    host.hang_up();
}

/// Takes output without giving credit, and insists that it stops at the window.
fn take_without_credit(host: &mut Host, stream: u32) {
    let mut taken = 0;
    let mut hear_until = |host: &mut Host, end: &dyn Fn(usize, bool) -> bool| loop {
        let mut ponged = false;
        match host.hear() {
            GuestFrame::Stdout { stream: from, bytes } if from == stream => taken += bytes.len(),
            GuestFrame::StdinClosed { .. } | GuestFrame::StderrEof { .. } => {}
            GuestFrame::Pong(5) => ponged = true,
            other => panic!("unexpected: {other:?}"),
        }
        if end(taken, ponged) {
            return;
        }
    };
    hear_until(host, &|taken, _| taken >= INITIAL_WINDOW as usize);
    std::thread::sleep(Duration::from_millis(100));
    host.say(HostFrame::Ping(5));
    hear_until(host, &|_, ponged| ponged);
    assert_eq!(taken, INITIAL_WINDOW as usize);
}

#[test]
fn a_stalled_reader_stalls_its_own_stream_only() {
    let mut host = Host::connect();
    host.sh(1, "yes; echo over >&2");
    take_without_credit(&mut host, 1);
    host.ping(1);
    assert_eq!(host.run(2, "echo free").stdout, b"free\n");
    host.say(HostFrame::StdoutCredit { stream: 1, bytes: 10 });
    let frame = host.hear();
    assert!(matches!(&frame, GuestFrame::Stdout { stream: 1, bytes } if bytes.len() == 10), "{frame:?}");
    // Frames are taken in order: the signal has been sent before the credit that finishing gives.
    host.say(HostFrame::Signal { stream: 1, signal: 9 });
    assert_eq!(host.finish_after_credit(1), Some(Exit::Signal(9)));
    host.hang_up();
}

#[test]
fn stalled_stdout_leaves_stderr_free() {
    let mut host = Host::connect();
    host.sh(1, "yes & sleep 0.3; echo to stderr >&2; kill $!; wait");
    let mut taken = 0;
    loop {
        match host.hear() {
            GuestFrame::Stdout { bytes, .. } => taken += bytes.len(),
            GuestFrame::Stderr { bytes, .. } => break assert_eq!(bytes, b"to stderr\n"),
            other => panic!("unexpected: {other:?}"),
        }
    }
    assert_eq!(taken, INITIAL_WINDOW as usize);
    host.hang_up();
}

#[test]
fn what_a_stalled_reader_has_not_seen_is_kept_after_the_end() {
    let mut host = Host::connect();
    let length = INITIAL_WINDOW as usize + 5000;
    host.sh(1, &format!("head -c {length} /dev/zero"));
    take_without_credit(&mut host, 1);
    std::thread::sleep(Duration::from_millis(300));
    host.say(HostFrame::StdoutCredit { stream: 1, bytes: INITIAL_WINDOW });
    let output = host.finish(1);
    assert_eq!((output.stdout.len(), output.exit), (5000, Some(Exit::Code(0))));
    host.hang_up();
}

#[test]
fn closed_stdin_is_told_and_takes_everything() {
    let mut host = Host::connect();
    host.sh(1, "exec 0<&-; echo closed; sleep 0.3; exit 3");
    let output = pump_closed(&mut host, &noise(2 << 20));
    assert_eq!((output.stdout, output.exit), (b"closed\n".to_vec(), Some(Exit::Code(3))));
    host.say(HostFrame::Stdin { stream: 1, bytes: vec![1; 10] });
    host.say(HostFrame::StdinEof { stream: 1 });
    host.ping(7);
    host.hang_up();
}

/// As `pump`, and insists on being told that stdin is closed.
fn pump_closed(host: &mut Host, input: &[u8]) -> Output {
    loop {
        match host.hear() {
            GuestFrame::StdinClosed { stream: 1 } => break,
            GuestFrame::Stdout { .. } => {}
            other => panic!("unexpected: {other:?}"),
        }
    }
    let mut output = pump(host, 1, input);
    output.stdout = b"closed\n".to_vec();
    output
}

#[test]
fn many_streams_at_a_time() {
    let mut host = Host::connect();
    let streams = 1..=40u32;
    for stream in streams.clone() {
        host.exec(stream, ["cat"]);
    }
    for stream in streams.clone() {
        host.say(HostFrame::Stdin { stream, bytes: noise(1000 * stream as usize) });
    }
    streams.clone().for_each(|stream| host.say(HostFrame::StdinEof { stream }));
    let mut bytes = vec![Vec::new(); 41];
    let mut exits = 0;
    while exits < 40 {
        match host.hear() {
            GuestFrame::Stdout { stream, bytes: more } => bytes[stream as usize].extend(more),
            GuestFrame::Exited { exit, .. } => {
                assert_eq!(exit, Exit::Code(0));
                exits += 1;
            }
            _ => {}
        }
    }
    for stream in streams {
        assert!(bytes[stream as usize] == noise(1000 * stream as usize), "stream {stream}");
    }
    host.hang_up();
}

#[test]
fn more_commands_than_allowed_fail_on_their_own_stream() {
    let mut host = Host::connect();
    for stream in 1..=65 {
        host.exec(stream, ["sleep", "100"]);
    }
    let answer = host.hear();
    assert!(matches!(answer, GuestFrame::Failed { stream: 65, .. }), "{answer:?}");
    host.hang_up();
}

fn hear_protest(host: &mut Host) {
    loop {
        match host.hear() {
            GuestFrame::Failed { stream: 0, failed } => {
                assert_eq!((failed.op, failed.errno), (None, libc::EPROTO), "{}", failed.message);
                return;
            }
            GuestFrame::Exited { .. } => panic!("killed commands are not told of"),
            _ => {}
        }
    }
}

#[test]
fn broken_frames_get_an_answer_and_the_next_host_starts_afresh() {
    let mut host = Host::connect();
    let kind = qrexec::kind::STDIN;
    let cases: [Vec<u8>; 6] = [
        vec![0xff; 5000],
        RawFrame::header(kind, 1, 65537).to_vec(),
        RawFrame::header(0x999, 1, 0).to_vec(),
        RawFrame::header(kind, 0, 0).to_vec(),
        RawFrame::header(qrexec::kind::EXEC, 2, 0).to_vec(),
        RawFrame::header(qrexec::kind::SIGNAL, 1, 0).to_vec(),
    ];
    for case in cases {
        host.exec(1, ["sleep", "1000"]);
        host.ping(1);
        host.socket.write_all(&case).expect("write");
        hear_protest(&mut host);
        host.ping(2);
    }
    assert_eq!(host.run(1, "echo fine").stdout, b"fine\n");
    host.hang_up();
}

#[test]
fn limits_of_the_flow_are_enforced() {
    let mut host = Host::connect();
    host.exec(1, ["sleep", "1000"]);
    for _ in 0..6 {
        host.say(HostFrame::Stdin { stream: 1, bytes: vec![0; 65536] });
    }
    hear_protest(&mut host);
    host.exec(2, ["sleep", "1000"]);
    host.say(HostFrame::StdoutCredit { stream: 2, bytes: u32::MAX });
    hear_protest(&mut host);
    host.exec(3, ["sleep", "1000"]);
    host.exec(3, ["sleep", "1000"]);
    hear_protest(&mut host);
    host.hang_up();
}

#[test]
fn what_needs_the_freezer_fails_by_name() {
    let mut host = Host::connect();
    host.say(HostFrame::Thaw);
    let answer = host.hear();
    let GuestFrame::Failed { stream: 0, failed } = answer else { panic!("{answer:?}") };
    assert_eq!((failed.op, failed.step.as_str()), (Some(Op::Thaw), "freeze"));
    host.hang_up();
}
