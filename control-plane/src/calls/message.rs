//! The words at a call socket: one message each way.
//!
//! A caller's message is one byte, then for `CALL` and `START` an `Exec` frame of [`qrexec`] as the agent gets it, which has room for any bytes
//! and no other form for the same; for `LINE` a command line of qrexec's; for `CONTROL` one byte that says which [`Control`]. A call has
//! three descriptors with it: stdin, stdout, stderr.
//! The answer is one [`Answer`] in JSON. After `Serve` the caller says one [`Serving`], and its end is the call's. The holder
//! hangs up with the guest, and says one more `NotStarted` when the guest has let go of the vchan, or cannot be told of it: news only for a caller whose
//! guest has not said its Hello.

use qrexec::service::CommandLine;
use qrexec::{Decoder, Exec, Exit, HostFrame, ProtocolError, HEADER_BYTES, PAYLOAD_BYTES_MAX};
use serde::{Deserialize, Serialize};

/// The longest message.
pub const MESSAGE_BYTES_MAX: usize = 1 + HEADER_BYTES + PAYLOAD_BYTES_MAX;
/// Descriptors of a call.
pub const CALL_FDS: usize = 3;

const CALL: u8 = b'x';
const START: u8 = b'e';
const LINE: u8 = b'l';
const CONTROL: u8 = b'c';
/// The frame has to have a stream; which one it gets, the holder says.
const ANY_STREAM: u32 = 1;

/// What is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// Run this.
    Call(Box<Exec>),
    /// Run this; where a call has a channel of its own, the caller can serve it.
    Line(CommandLine),
    /// Run this, with nothing to read and nobody to hear it, and do not wait for its end: the caller may go.
    Start(Box<Exec>),
    /// Something about the guest itself.
    Control(Control),
}

/// What can be done to a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Control {
    /// Have it switch itself off. Answered when it has been asked.
    Shutdown,
    /// Stop its CPUs.
    Pause,
    /// Let them run again.
    Unpause,
    /// Say how it is.
    Status,
}

const CONTROLS: [Control; 4] = [Control::Shutdown, Control::Pause, Control::Unpause, Control::Status];

/// What is wrong with a message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// The frame.
    #[error(transparent)]
    Frame(#[from] ProtocolError),
    /// Everything else.
    #[error("no message of a caller's")]
    Form,
}

impl Message {
    /// As bytes.
    pub fn encode(&self) -> Result<Vec<u8>, MessageError> {
        match self {
            Message::Call(exec) | Message::Start(exec) => {
                let mut out = vec![if matches!(self, Message::Call(_)) { CALL } else { START }];
                HostFrame::Exec { stream: ANY_STREAM, exec: exec.clone() }.encode(&mut out)?;
                Ok(out)
            }
            Message::Line(line) => Ok([&[LINE], &line.to_bytes()[..]].concat()),
            Message::Control(control) => {
                let number = CONTROLS.iter().position(|known| known == control).unwrap_or_default();
                Ok(vec![CONTROL, number as u8])
            }
        }
    }

    /// From bytes.
    pub fn parse(bytes: &[u8]) -> Result<Message, MessageError> {
        match bytes {
            [kind @ (CALL | START), frame @ ..] => {
                let mut rest = frame;
                let raw = Decoder::new().next(&mut rest)?.ok_or(MessageError::Form)?;
                match HostFrame::parse(raw)? {
                    HostFrame::Exec { exec, .. } if rest.is_empty() && *kind == CALL => {
                        Ok(Message::Call(exec))
                    }
                    HostFrame::Exec { exec, .. } if rest.is_empty() => Ok(Message::Start(exec)),
                    _ => Err(MessageError::Form),
                }
            }
            [LINE, line @ ..] => CommandLine::parse(line).map(Message::Line).map_err(|_| MessageError::Form),
            [CONTROL, number] => {
                CONTROLS.get(usize::from(*number)).copied().map(Message::Control).ok_or(MessageError::Form)
            }
            _ => Err(MessageError::Form),
        }
    }
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Answer {
    /// The command has ended.
    Exited(#[serde(with = "ExitAs")] Exit),
    /// The guest could not start it.
    NotStarted {
        /// The guest's own words.
        reason: String,
    },
    /// The holder does not do it.
    Refused {
        /// Why.
        reason: String,
    },
    /// Serve a vchan to this domain, say where it is, and carry the call over it yourself.
    Serve {
        /// The guest's number.
        domain: u16,
    },
    /// It is done.
    Done,
    /// How the guest is.
    Status(Status),
}

/// What a caller says of the vchan that it serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Serving {
    /// The grant of its first page.
    pub grant: u32,
    /// Its event channel.
    pub port: u32,
}

/// How a guest is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Status {
    /// Its CPUs are stopped.
    pub paused: bool,
    /// It was asked to switch itself off.
    pub shutting_down: bool,
    /// Commands that run in it.
    pub commands: usize,
    /// Calls of its own that are under way.
    pub calls_out: usize,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Exit", rename_all = "snake_case")]
enum ExitAs {
    Code(u8),
    Signal(u8),
    NotFound(u32),
    NotExecutable(u32),
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn controls_come_back_and_the_longest_call_has_room() {
        for control in CONTROLS {
            let message = Message::Control(control);
            assert_eq!(Message::parse(&message.encode().unwrap()), Ok(message));
        }
        let line = Message::Line(CommandLine::parse(b"user:QUBESRPC a+b work name x").unwrap());
        assert_eq!(Message::parse(&line.encode().unwrap()), Ok(line));
        assert_eq!(Message::parse(b"luser"), Err(MessageError::Form));
        let longest = Exec::user([vec![b'a'; PAYLOAD_BYTES_MAX - 9]]);
        let bytes = Message::Call(Box::new(longest)).encode().unwrap();
        assert_eq!(bytes.len(), MESSAGE_BYTES_MAX);
        let mut more = bytes.clone();
        more.push(0);
        assert_eq!(Message::parse(&more), Err(MessageError::Form));
        assert_eq!(Message::parse(&bytes[..40]), Err(MessageError::Form));
        assert_eq!(Message::parse(&[CONTROL, 4]), Err(MessageError::Form));
    }

    proptest! {
        #[test]
        fn any_command_comes_back(
            argv in prop::collection::vec(prop::collection::vec(1u8.., 1..20), 1..5),
            value in prop::collection::vec(1u8.., 0..20),
        ) {
            let mut exec = Exec::user(argv);
            exec.env.push((b"KEY".to_vec(), value));
            for message in [Message::Call(Box::new(exec.clone())), Message::Start(Box::new(exec))] {
                prop_assert_eq!(Message::parse(&message.encode().unwrap()), Ok(message));
            }
        }

        #[test]
        fn any_bytes_are_a_message_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            let _ = Message::parse(&bytes);
            let _ = Message::parse(&[&[CALL], &bytes[..]].concat());
        }
    }
}
