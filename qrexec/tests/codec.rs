//! What the codec promises: round trips, no panic on any bytes, splits that make no difference, limits that hold.

use std::net::Ipv4Addr;

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use qrexec::*;

fn decode(pieces: &[&[u8]]) -> Result<Vec<RawFrame>, ProtocolError> {
    let mut decoder = Decoder::new();
    let mut frames = Vec::new();
    for piece in pieces {
        let mut input = *piece;
        while let Some(frame) = decoder.next(&mut input)? {
            frames.push(frame);
        }
        assert!(input.is_empty());
    }
    Ok(frames)
}

fn string() -> impl Strategy<Value = Vec<u8>> {
    vec(1u8.., 0..40)
}

fn exec() -> impl Strategy<Value = Exec> {
    let name = vec(1u8.., 1..20)
        .prop_map(|name| name.into_iter().map(|b| if b == b'=' { b'_' } else { b }).collect());
    let argv = (vec(1u8.., 1..20), vec(string(), 0..20)).prop_map(|(name, mut rest)| {
        rest.insert(0, name);
        rest
    });
    (argv, any::<bool>(), vec((name, string()), 0..8), option::of(vec(1u8.., 1..30))).prop_map(
        |(argv, root, env, cwd)| Exec { argv, user: if root { User::Root } else { User::User }, env, cwd },
    )
}

fn address() -> impl Strategy<Value = Ipv4Addr> {
    (1u8..224, any::<[u8; 3]>()).prop_map(|(a, [b, c, d])| Ipv4Addr::new(a, b, c, d))
}

fn identity() -> impl Strategy<Value = Identity> {
    let network = (address(), 0u8..=32, option::of(address()), vec(address(), 0..=DNS_COUNT_MAX))
        .prop_map(|(address, prefix_len, gateway, dns)| Network { address, prefix_len, gateway, dns });
    let text = "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?";
    let parts = (text, 1u128.., vec(any::<u8>(), 64), any::<u64>(), any::<[u8; 6]>(), option::of(network));
    parts.prop_map(|(hostname, id, entropy, realtime_ns, mut mac, network)| {
        mac[0] = mac[0] & !1 | 2;
        let entropy = entropy.try_into().expect("64 bytes");
        Identity { hostname, machine_id: id.to_le_bytes(), entropy, realtime_ns, mac, network }
    })
}

fn command() -> impl Strategy<Value = u32> {
    1..CALL_STREAM
}

fn call() -> impl Strategy<Value = u32> {
    CALL_STREAM..
}

fn exit() -> impl Strategy<Value = Exit> {
    prop_oneof![
        any::<u8>().prop_map(Exit::Code),
        (1u8..=64).prop_map(Exit::Signal),
        any::<u32>().prop_map(Exit::NotFound),
        any::<u32>().prop_map(Exit::NotExecutable),
    ]
}

fn host_frame() -> impl Strategy<Value = HostFrame> {
    let data = || vec(any::<u8>(), 1..2000);
    prop_oneof![
        vec(any::<u8>(), 0..2000).prop_map(HostFrame::Prerun),
        Just(HostFrame::Settle),
        Just(HostFrame::Warm),
        Just(HostFrame::Freeze),
        identity().prop_map(|identity| HostFrame::Identify(Box::new(identity))),
        Just(HostFrame::Thaw),
        Just(HostFrame::Shutdown),
        Just(HostFrame::ServeCalls),
        any::<u64>().prop_map(HostFrame::Ping),
        (command(), exec()).prop_map(|(stream, exec)| HostFrame::Exec { stream, exec: Box::new(exec) }),
        (command(), data()).prop_map(|(stream, bytes)| HostFrame::Stdin { stream, bytes }),
        command().prop_map(|stream| HostFrame::StdinEof { stream }),
        (command(), any::<u32>()).prop_map(|(stream, bytes)| HostFrame::StdoutCredit { stream, bytes }),
        (command(), any::<u32>()).prop_map(|(stream, bytes)| HostFrame::StderrCredit { stream, bytes }),
        (command(), 1u8..=64).prop_map(|(stream, signal)| HostFrame::Signal { stream, signal }),
        call().prop_map(|stream| HostFrame::CallAccepted { stream }),
        call().prop_map(|stream| HostFrame::CallRefused { stream }),
        (call(), data()).prop_map(|(stream, bytes)| HostFrame::CallStdout { stream, bytes }),
        (call(), data()).prop_map(|(stream, bytes)| HostFrame::CallStderr { stream, bytes }),
        call().prop_map(|stream| HostFrame::CallStdoutEof { stream }),
        call().prop_map(|stream| HostFrame::CallStderrEof { stream }),
        (call(), any::<u32>()).prop_map(|(stream, bytes)| HostFrame::CallStdinCredit { stream, bytes }),
        call().prop_map(|stream| HostFrame::CallStdinClosed { stream }),
        (call(), exit()).prop_map(|(stream, exit)| HostFrame::CallExited { stream, exit }),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    use Op::*;
    prop::sample::select(vec![Prerun, Settle, Warm, Freeze, Identify, Thaw, Shutdown, Exec, ServeCalls])
}

fn guest_frame() -> impl Strategy<Value = GuestFrame> {
    let data = || vec(any::<u8>(), 1..2000);
    let text = || "[ -~\n]{0,60}";
    let target = "([a-z][a-z0-9-]{0,30}|@default|@dispvm(:[a-z]{1,9})?)";
    let asked = (target, "[a-z][a-z.]{0,20}([+][a-z+_.-]{0,30})?");
    prop_oneof![
        (any::<u32>(), text(), text(), any::<[bool; 2]>()).prop_map(
            |(protocol, agent_version, kernel, [session, frozen])| {
                GuestFrame::Hello(Hello { protocol, agent_version, kernel, session, frozen })
            }
        ),
        op().prop_map(GuestFrame::Done),
        (0..CALL_STREAM, option::of(op()), text(), any::<i32>(), text()).prop_map(
            |(stream, op, step, errno, message)| {
                GuestFrame::Failed { stream, failed: Failed { op, step, errno, message } }
            }
        ),
        any::<u64>().prop_map(GuestFrame::Pong),
        (command(), data()).prop_map(|(stream, bytes)| GuestFrame::Stdout { stream, bytes }),
        (command(), data()).prop_map(|(stream, bytes)| GuestFrame::Stderr { stream, bytes }),
        command().prop_map(|stream| GuestFrame::StdoutEof { stream }),
        command().prop_map(|stream| GuestFrame::StderrEof { stream }),
        (command(), any::<u32>()).prop_map(|(stream, bytes)| GuestFrame::StdinCredit { stream, bytes }),
        command().prop_map(|stream| GuestFrame::StdinClosed { stream }),
        (command(), exit()).prop_map(|(stream, exit)| GuestFrame::Exited { stream, exit }),
        (call(), asked).prop_map(|(stream, (target, service))| {
            let call = Call::parse(target.as_bytes(), service.as_bytes()).expect("well-formed");
            GuestFrame::Call { stream, call }
        }),
        (call(), data()).prop_map(|(stream, bytes)| GuestFrame::CallStdin { stream, bytes }),
        call().prop_map(|stream| GuestFrame::CallStdinEof { stream }),
        (call(), any::<u32>()).prop_map(|(stream, bytes)| GuestFrame::CallStdoutCredit { stream, bytes }),
        (call(), any::<u32>()).prop_map(|(stream, bytes)| GuestFrame::CallStderrCredit { stream, bytes }),
        call().prop_map(|stream| GuestFrame::CallHangup { stream }),
    ]
}

proptest! {
    #[test]
    fn host_frames_come_back_whole(frames in vec(host_frame(), 0..6), cuts in vec(any::<prop::sample::Index>(), 0..12)) {
        let mut bytes = Vec::new();
        for frame in &frames {
            frame.encode(&mut bytes).expect("within the limits");
        }
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
        cuts.extend([0, bytes.len()]);
        cuts.sort_unstable();
        let pieces: Vec<&[u8]> = cuts.windows(2).map(|cut| &bytes[cut[0]..cut[1]]).collect();
        let parsed: Vec<_> = decode(&pieces).expect("decodes").into_iter()
            .map(|raw| HostFrame::parse(raw).expect("parses")).collect();
        prop_assert_eq!(parsed, frames);
    }

    #[test]
    fn guest_frames_come_back_whole(frames in vec(guest_frame(), 0..6)) {
        let mut bytes = Vec::new();
        frames.iter().for_each(|frame| frame.encode(&mut bytes));
        let bytewise: Vec<&[u8]> = bytes.chunks(1).collect();
        let parsed: Vec<_> = decode(&bytewise).expect("decodes").into_iter()
            .map(|raw| GuestFrame::parse(raw).expect("parses")).collect();
        prop_assert_eq!(parsed, frames);
    }

    #[test]
    fn no_bytes_panic(bytes in vec(any::<u8>(), 0..300)) {
        let _ = decode(&[&bytes]);
    }

    #[test]
    fn no_payload_panics(host in 0u16..0x30, guest in 0x100u16..0x130, number in 0u32..3, is_call in any::<bool>(),
        payload in vec(any::<u8>(), 0..300)) {
        let stream = if is_call { number | CALL_STREAM } else { number };
        let _ = HostFrame::parse(RawFrame { kind: host, stream, payload: payload.clone() });
        let _ = GuestFrame::parse(RawFrame { kind: guest, stream, payload });
    }

    /// A single changed byte may still be a valid frame, but what it parses to must itself be encodable: limits can't be passed.
    #[test]
    fn what_parses_is_within_the_limits(frame in host_frame(), at in any::<prop::sample::Index>(), flip in 1u8..) {
        let mut bytes = Vec::new();
        frame.encode(&mut bytes).expect("within the limits");
        let at = at.index(bytes.len());
        bytes[at] ^= flip;
        for raw in decode(&[&bytes]).unwrap_or_default() {
            if let Ok(frame) = HostFrame::parse(raw) {
                frame.encode(&mut Vec::new()).expect("what was parsed can be said again");
            }
        }
    }

    #[test]
    fn windows_bound_what_is_under_way(chunks in vec(1usize..100_000, 1..200)) {
        let (mut sender, mut receiver) = (SendWindow::default(), ReceiveWindow::default());
        for chunk in chunks {
            let chunk = chunk.min(sender.left());
            sender.sent(chunk);
            receiver.received(chunk).expect("within the window");
            if let Some(credit) = receiver.consumed(chunk) {
                sender.credit(credit).expect("within the limit");
            }
            prop_assert!(sender.left() > 0, "a receiver that consumes never stalls its sender");
            prop_assert!(sender.left() <= receiver.size());
            prop_assert!(receiver.size() <= GROWN_WINDOW as usize);
        }
    }
}

#[test]
fn headers_are_checked_before_anything_is_buffered() {
    let mut long = RawFrame::header(kind::STDIN, 1, PAYLOAD_BYTES_MAX + 1).to_vec();
    assert_eq!(decode(&[&long]), Err(ProtocolError::PayloadTooLong(65537)));
    long = RawFrame::header(kind::STDIN, 1, 0).to_vec();
    long[3] = 1;
    assert_eq!(decode(&[&long]), Err(ProtocolError::Reserved(0x100)));
}

#[test]
fn a_broken_decoder_stays_broken() {
    let mut decoder = Decoder::new();
    let broken = [0xff; HEADER_BYTES];
    assert!(decoder.next(&mut &broken[..]).is_err());
    assert!(decoder.next(&mut &RawFrame::header(kind::SETTLE, 0, 0)[..]).is_err());
}

#[test]
fn commands_outside_the_limits_are_refused_when_encoded() {
    let refused = |exec: Exec| exec.validate().is_err();
    assert!(refused(Exec::user(Vec::<Vec<u8>>::new())));
    assert!(refused(Exec::user([""])));
    assert!(refused(Exec::user(["a\0b"])));
    assert!(refused(Exec::user(vec!["x"; ARGV_COUNT_MAX + 1])));
    assert!(refused(Exec::user(vec!["cat".to_string(), "x".repeat(65536)])));
    assert!(refused(Exec { env: vec![(b"A=B".to_vec(), vec![])], ..Exec::user(["cat"]) }));
    assert!(Exec::user([&b"cat"[..], b"\xff\xfe\n="]).validate().is_ok());
}

#[test]
fn calls_and_commands_keep_to_their_own_streams() {
    let host = |kind, stream| HostFrame::parse(RawFrame { kind, stream, payload: vec![] });
    let guest = |kind, stream| GuestFrame::parse(RawFrame { kind, stream, payload: vec![] });
    assert!(host(kind::CALL_ACCEPTED, CALL_STREAM).is_ok() && guest(kind::CALL_HANGUP, CALL_STREAM).is_ok());
    for stream in [0, 1, CALL_STREAM - 1] {
        assert!(host(kind::CALL_ACCEPTED, stream).is_err(), "{stream}");
        assert!(guest(kind::CALL_HANGUP, stream).is_err(), "{stream}");
    }
    assert!(host(kind::STDIN_EOF, 1).is_ok() && host(kind::STDIN_EOF, CALL_STREAM).is_err());
    assert!(guest(kind::STDOUT_EOF, 1).is_ok() && guest(kind::STDOUT_EOF, CALL_STREAM | 1).is_err());
    let failed = GuestFrame::Failed {
        stream: CALL_STREAM,
        failed: Failed { op: None, step: String::new(), errno: 0, message: String::new() },
    };
    let mut bytes = Vec::new();
    failed.encode(&mut bytes);
    assert!(decode(&[&bytes]).expect("decodes").into_iter().all(|raw| GuestFrame::parse(raw).is_err()));
}

#[test]
fn a_call_names_one_target_and_one_service() {
    let parse = |payload: &[u8]| {
        GuestFrame::parse(RawFrame { kind: kind::CALL, stream: CALL_STREAM, payload: payload.to_vec() })
    };
    let text = |payload: &[u8]| match parse(payload) {
        Ok(GuestFrame::Call { call, .. }) => format!("{} {}", call.target, call.service),
        other => panic!("{other:?}"),
    };
    assert_eq!(text(b"work\0qubes.OpenURL+x\0"), "work qubes.OpenURL+x");
    assert_eq!(text(b"$dispvm\0qubes.VMShell\0"), "@dispvm qubes.VMShell");
    assert_eq!(text(b"\0qubes.VMShell\0"), "@default qubes.VMShell");
    let wrong = [
        "",
        "\0",
        "work\0",
        "work\0x",
        "work\0x\0\0",
        "work\0x\0y\0",
        "w/k\0x\0",
        "work\0../x\0",
        "work\0\0",
    ];
    for payload in wrong {
        assert!(parse(payload.as_bytes()).is_err(), "{payload:?}");
    }
}

#[test]
fn identities_outside_the_limits_are_refused() {
    let good = Identity {
        hostname: "disp7".into(),
        machine_id: [1; 16],
        entropy: [2; ENTROPY_BYTES],
        realtime_ns: 1,
        mac: [2, 0, 0, 0, 0, 1],
        network: None,
    };
    assert!(good.validate().is_ok());
    for hostname in ["", "-a", "a-", "a.b", "a\nb", "a b", &"x".repeat(64)] {
        assert!(Identity { hostname: hostname.into(), ..good.clone() }.validate().is_err(), "{hostname:?}");
    }
    assert!(Identity { mac: [1, 0, 0, 0, 0, 1], ..good.clone() }.validate().is_err());
    assert!(Identity { machine_id: [0; 16], ..good.clone() }.validate().is_err());
    assert!(!format!("{good:?}").contains("[2, 2"), "entropy is never printed");
}

#[test]
fn texts_of_the_guest_cannot_steer_a_terminal() {
    let failed =
        Failed {
            op: None, step: "\u{1b}[2J\u{202e}x".into(), errno: 0, message: "é".repeat(TEXT_BYTES_MAX)
        };
    let json = serde_json::to_vec(&failed).expect("serializes");
    let parsed = GuestFrame::parse(RawFrame { kind: kind::FAILED, stream: 0, payload: json });
    let Ok(GuestFrame::Failed { failed, .. }) = parsed else { panic!("{parsed:?}") };
    assert_eq!(failed.step, "\u{fffd}[2J\u{fffd}x");
    assert!(failed.message.len() <= TEXT_BYTES_MAX);
}

#[test]
fn a_window_grows_for_a_reader_that_has_used_up_more_than_fits_a_pipe() {
    let mut window = ReceiveWindow::default();
    let mut take = |count: u32| {
        window.received(count as usize).expect("granted");
        window.consumed(count as usize)
    };
    assert_eq!(take(INITIAL_WINDOW / 4), Some(INITIAL_WINDOW / 4));
    assert_eq!(take(INITIAL_WINDOW / 2), Some(INITIAL_WINDOW / 2));
    assert_eq!(take(INITIAL_WINDOW / 4), Some(INITIAL_WINDOW / 4 + INITIAL_WINDOW), "twice as large");
    assert_eq!(take(INITIAL_WINDOW / 4), None, "a quarter of what it is now");
    assert_eq!(take(INITIAL_WINDOW / 4), Some(INITIAL_WINDOW / 2 + 2 * INITIAL_WINDOW));
    assert_eq!(take(GROWN_WINDOW), Some(GROWN_WINDOW), "no larger");
    assert!(window.received(GROWN_WINDOW as usize + 1).is_err());
}

#[test]
fn windows_refuse_what_was_not_granted() {
    assert!(ReceiveWindow::default().received(INITIAL_WINDOW as usize + 1).is_err());
    assert!(SendWindow::default().credit(u32::MAX).is_err());
    assert!(SendWindow::default().credit(WINDOW_MAX).is_err());
}
