//! Qubes' own qrexec. Input: which channel u8, how it is cut into pieces u8, then what the peer says, its `Hello` first.

use qrexec::service::CommandLine;
use qrexec::stock::message::COMMAND_BYTES_MAX;
use qrexec::stock::{
    ClientEnd, Decoder, FromAgent, FromService, Rules, ServiceEnd, ToAgent, Version, WireError,
};

use crate::take;

/// One peer's bytes, on each kind of channel.
pub fn channel(mut data: &[u8]) {
    let [which, cut] = take(&mut data);
    let pieces = |step: usize| data.chunks(step.max(1));
    let (whole, cut) = (data.len(), usize::from(cut));
    match which & 3 {
        0 => control(data, Rules::ToAgent),
        1 => control(data, Rules::FromAgent(version(which >> 2))),
        2 => assert_eq!(heard(pieces(whole)), heard(pieces(cut)), "the pieces make a difference"),
        _ => serve(pieces(cut)),
    }
}

fn version(which: u8) -> Version {
    [Version::V2, Version::V3, Version::V4][usize::from(which % 3)]
}

/// What is understood can be said again, and is then understood in the same way.
fn control(mut data: &[u8], rules: Rules) {
    let mut decoder = Decoder::new();
    let mut again = Vec::new();
    while let Ok(Some(raw)) = decoder.next(&mut data) {
        assert!(raw.body.capacity() <= 8 + COMMAND_BYTES_MAX);
        decoder.expect(rules);
        again.clear();
        if let Ok(message) = ToAgent::parse(&raw) {
            message.encode(&mut again).expect("what was parsed can be said again");
            assert_eq!(ToAgent::parse(&once(&again, rules)), Ok(message.clone()));
            if let ToAgent::ExecCmdline(_, line) | ToAgent::JustExec(_, line) = message {
                if let Ok(line) = CommandLine::parse(&line) {
                    assert_eq!(CommandLine::parse(&line.to_bytes()), Ok(line));
                }
            }
        } else if let Ok(message) = FromAgent::parse(&raw) {
            message.encode(Version::V4, &mut again).expect("what was parsed can be said again");
            assert_eq!(FromAgent::parse(&once(&again, Rules::FromAgent(Version::V4))), Ok(message.clone()));
            if let FromAgent::Trigger(trigger) = message {
                let _ = trigger.names();
            }
        }
    }
}

fn once(mut bytes: &[u8], rules: Rules) -> qrexec::stock::RawMessage {
    let mut decoder = Decoder::new();
    decoder.expect(rules);
    decoder.next(&mut bytes).expect("our own message").expect("a whole message")
}

/// Output, complaints, and how it ended: the exit code or an error.
type Heard = (Vec<u8>, Vec<u8>, Option<i32>, Option<WireError>);

/// What a client hears from these pieces.
fn heard<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> Heard {
    let mut client = ClientEnd::new(Version::NEWEST, &mut Vec::new());
    let (mut stdout, mut stderr, mut exit) = (Vec::new(), Vec::new(), None);
    for mut piece in pieces {
        loop {
            match client.receive(&mut piece) {
                Ok(Some(FromService::Stdout(bytes))) => stdout.extend_from_slice(bytes),
                Ok(Some(FromService::Stderr(bytes))) => stderr.extend_from_slice(bytes),
                Ok(Some(FromService::Exit(code))) => assert!(exit.replace(code).is_none(), "two exit codes"),
                Ok(Some(_)) => {}
                Ok(None) => break assert!(piece.is_empty()),
                Err(error) => return (stdout, stderr, exit, Some(error)),
            }
        }
    }
    (stdout, stderr, exit, None)
}

fn serve<'a>(pieces: impl Iterator<Item = &'a [u8]>) {
    let mut service = ServiceEnd::new(Version::NEWEST, &mut Vec::new());
    for mut piece in pieces {
        while let Ok(Some(_)) = service.receive(&mut piece) {}
    }
}
