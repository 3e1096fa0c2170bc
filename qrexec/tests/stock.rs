//! Qubes' protocol against itself and against hostile bytes.

use proptest::prelude::*;
use qrexec::stock::control::{Endpoint, RequestId, Trigger};
use qrexec::stock::message::kind;
use qrexec::stock::*;

fn decoder(rules: Rules) -> Decoder {
    let mut decoder = Decoder::new();
    decoder.expect(rules);
    decoder
}

fn one(rules: Rules, bytes: &[u8]) -> Result<RawMessage, WireError> {
    let mut input = bytes;
    let raw = decoder(rules).next(&mut input)?;
    assert!(input.is_empty());
    Ok(raw.expect("a whole message"))
}

fn header(kind: u32, length: u32) -> [u8; HEADER_BYTES] {
    Header { kind, length }.encode()
}

fn version() -> impl Strategy<Value = Version> {
    prop_oneof![Just(Version::V2), Just(Version::V3), Just(Version::V4)]
}

fn trigger(service: &str, target: &str, source: &str) -> FromAgent {
    let request = RequestId::new("SOCKET5").unwrap();
    FromAgent::Trigger(Trigger {
        service: service.into(),
        target: target.into(),
        source: source.into(),
        request,
    })
}

#[test]
fn calls_have_the_lengths_of_their_structs_and_come_back() {
    for (version, source, kind, length) in [
        (Version::V2, "", kind::TRIGGER_SERVICE, 128),
        (Version::V3, "", kind::TRIGGER_SERVICE3, 96 + 14),
        (Version::V4, "remote", kind::TRIGGER_SERVICE4, 160 + 14),
    ] {
        let call = trigger("qubes.VMShell", "@dispvm", source);
        let mut bytes = Vec::new();
        call.encode(version, &mut bytes).unwrap();
        assert_eq!(bytes[..8], header(kind, length));
        assert_eq!(FromAgent::parse(&one(Rules::FromAgent(version), &bytes).unwrap()), Ok(call));
    }
    let long = "a".repeat(64);
    assert!(trigger(&long, "", "").encode(Version::V2, &mut Vec::new()).is_err());
    assert!(trigger("a", "", "b").encode(Version::V3, &mut Vec::new()).is_err());
}

#[test]
fn a_call_of_no_service_is_refused_in_each_version() {
    let fields = |lengths: &[usize]| -> Vec<u8> {
        // Texts of one letter, each in its field; the last, the service, is empty.
        lengths.iter().flat_map(|length| [b"a".to_vec(), vec![0; length - 1]].concat()).collect()
    };
    for (version, kind, body) in [
        (Version::V2, kind::TRIGGER_SERVICE, [vec![0; 64], fields(&[32, 32])].concat()),
        (Version::V3, kind::TRIGGER_SERVICE3, [fields(&[64, 32]), vec![0; 2]].concat()),
        (Version::V4, kind::TRIGGER_SERVICE4, [fields(&[64, 64, 32]), vec![0; 2]].concat()),
    ] {
        let bytes = [&header(kind, body.len() as u32)[..], &body].concat();
        let raw = one(Rules::FromAgent(version), &bytes).expect("its length is legal");
        assert!(FromAgent::parse(&raw).is_err(), "{version:?}");
    }
}

#[test]
fn lengths_and_kinds_out_of_place_are_refused_at_the_header() {
    for (rules, kind, length) in [
        (Rules::Hello, kind::HELLO, 5),
        (Rules::Hello, kind::DATA_STDIN, 4),
        (Rules::Data(Version::V2), kind::DATA_STDIN, 4097),
        (Rules::Data(Version::V4), kind::DATA_STDOUT, 65537),
        (Rules::Data(Version::V4), kind::HELLO, 4),
        (Rules::ToAgent, kind::EXEC_CMDLINE, 8),
        (Rules::ToAgent, kind::EXEC_CMDLINE, 8 + 65536),
        (Rules::ToAgent, kind::SERVICE_REFUSED, 31),
        (Rules::FromAgent(Version::V3), kind::TRIGGER_SERVICE, 128),
        (Rules::FromAgent(Version::V2), kind::TRIGGER_SERVICE3, 110),
        (Rules::FromAgent(Version::V3), kind::TRIGGER_SERVICE4, 174),
        (Rules::FromAgent(Version::V3), kind::TRIGGER_SERVICE3, 96 + 65001),
        (Rules::FromAgent(Version::V4), kind::TRIGGER_SERVICE4, u32::MAX),
    ] {
        assert!(one(rules, &header(kind, length)).is_err(), "{rules:?} {kind:#x} {length}");
    }
}

#[test]
fn messages_to_the_agent_come_back_and_nuls_stand_only_at_the_end() {
    let endpoint = Endpoint { domain: 7, port: 513 };
    let id = RequestId::new("SOCKET5").unwrap();
    for message in [
        ToAgent::ExecCmdline(endpoint, b"user:date".to_vec()),
        ToAgent::JustExec(endpoint, b"root:true".to_vec()),
        ToAgent::ServiceConnect(endpoint, id.clone()),
        ToAgent::ServiceRefused(id),
    ] {
        let mut bytes = Vec::new();
        message.encode(&mut bytes).unwrap();
        assert_eq!(ToAgent::parse(&one(Rules::ToAgent, &bytes).unwrap()), Ok(message));
    }
    for text in [&b"user:a"[..], b"user:a\0b\0", b"\0"] {
        let body = [&[0; 8][..], text].concat();
        assert!(ToAgent::parse(&RawMessage { kind: kind::EXEC_CMDLINE, body }).is_err());
    }
    let body = [[1, 0, 0, 0], 769u32.to_le_bytes()].concat();
    assert!(FromAgent::parse(&RawMessage { kind: kind::CONNECTION_TERMINATED, body }).is_err());
}

#[test]
fn what_is_odd_but_known_goes_nowhere() {
    let (mut client, mut service, mut out) = agreed(Version::V4, Version::V4);
    for (kind, body) in
        [(kind::DATA_STDERR, &b"x"[..]), (kind::DATA_EXIT_CODE, &[0; 4]), (kind::DATA_STDIN, b"")]
    {
        RawMessage { kind, body: body.to_vec() }.encode(&mut out);
    }
    RawMessage { kind: kind::DATA_STDIN, body: b"late".to_vec() }.encode(&mut out);
    let mut input = &out[..];
    assert_eq!(service.receive(&mut input), Ok(Some(FromClient::StdinEof)));
    assert_eq!(service.receive(&mut input), Ok(None));

    let mut out = header(kind::DATA_EXIT_CODE, 2).to_vec();
    out.extend([1, 1]);
    let mut input = &out[..];
    assert_eq!(client.receive(&mut input), Ok(Some(FromService::Exit(255))));
    assert!(client.finished() && client.stdin(b"x", &mut Vec::new()).is_err());
    let mut input = &header(0x1ff, 0)[..];
    assert!(client.receive(&mut input).is_err() && client.receive(&mut input).is_err());
}

#[test]
fn nothing_is_sent_before_the_hello_nor_after_the_end() {
    let mut out = Vec::new();
    let mut service = ServiceEnd::new(Version::V4, &mut out);
    assert!(service.stdout(b"x", &mut out).is_err() && service.exit(0, &mut out).is_err());
    let (_, mut service, mut out) = agreed(Version::V4, Version::V4);
    service.exit(3, &mut out).unwrap();
    assert!(service.finished() && service.exit(3, &mut out).is_err());
    assert!(service.stdout(b"x", &mut out).is_err());
}

fn agreed(client: Version, service: Version) -> (ClientEnd, ServiceEnd, Vec<u8>) {
    let (mut to_service, mut to_client) = (Vec::new(), Vec::new());
    let mut client_end = ClientEnd::new(client, &mut to_service);
    let mut service_end = ServiceEnd::new(service, &mut to_client);
    let spoken = client.min(service);
    assert_eq!(client_end.receive(&mut &to_client[..]), Ok(Some(FromService::Agreed(spoken))));
    assert_eq!(service_end.receive(&mut &to_service[..]), Ok(Some(FromClient::Agreed(spoken))));
    (client_end, service_end, Vec::new())
}

/// A v2 client and a v4 service that echoes: 1 MiB each way, in pieces of any length.
#[test]
fn a_mebibyte_goes_both_ways_between_versions() {
    let sent: Vec<u8> = (0..1u32 << 20).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let (mut client, mut service, _) = agreed(Version::V2, Version::V4);
    let (mut there, mut back, mut heard, mut exit) = (Vec::new(), Vec::new(), Vec::new(), None);
    let mut state = 1u32;
    let mut piece = |left: usize| {
        state = state.wrapping_mul(747_796_405).wrapping_add(2_891_336_453);
        (state >> 18) as usize % 9000.min(left) + 1
    };
    let mut rest = &sent[..];
    while !rest.is_empty() {
        let (bytes, left) = rest.split_at(piece(rest.len()));
        client.stdin(bytes, &mut there).unwrap();
        rest = left;
    }
    client.stdin_eof(&mut there).unwrap();
    let mut rest = &there[..];
    while !rest.is_empty() {
        let (mut input, left) = rest.split_at(piece(rest.len()));
        while let Some(event) = service.receive(&mut input).unwrap() {
            match event {
                FromClient::Stdin(bytes) => service.stdout(bytes, &mut back).unwrap(),
                FromClient::StdinEof => service.exit(7, &mut back).unwrap(),
                FromClient::Agreed(_) => unreachable!(),
            }
        }
        rest = left;
    }
    let mut rest = &back[..];
    while !rest.is_empty() {
        let (mut input, left) = rest.split_at(piece(rest.len()));
        while let Some(event) = client.receive(&mut input).unwrap() {
            match event {
                FromService::Stdout(bytes) => heard.extend_from_slice(bytes),
                FromService::Exit(code) => exit = Some(code),
                _ => {}
            }
        }
        rest = left;
    }
    assert!(heard == sent && exit == Some(7));
}

proptest! {
    #[test]
    fn any_bytes_are_read_without_harm(
        version in version(), bytes in prop::collection::vec(any::<u8>(), 0..600), kind in 0x18eu32..0x216, length in 0u32..300,
    ) {
        let stream = [&header(kind, length)[..], &bytes].concat();
        for rules in [Rules::Hello, Rules::ToAgent, Rules::FromAgent(version), Rules::Data(version)] {
            let (mut decoder, mut input) = (decoder(rules), &stream[..]);
            while let Ok(Some(raw)) = decoder.next(&mut input) {
                prop_assert!(raw.body.capacity() <= 65_535 + 8);
                let _ = ToAgent::parse(&raw);
                if let Ok(FromAgent::Trigger(call)) = FromAgent::parse(&raw) {
                    let _ = call.names();
                }
            }
        }
        let (mut client, mut service, _) = agreed(version, Version::V4);
        let (mut to_client, mut to_service) = (&stream[..], &stream[..]);
        while let Ok(Some(_)) = client.receive(&mut to_client) {}
        while let Ok(Some(_)) = service.receive(&mut to_service) {}
    }
}
