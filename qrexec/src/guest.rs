//! What the guest says. Its texts end up on a terminal, so parsing takes control characters out of them.

use serde::{Deserialize, Serialize};

use crate::frame::{empty, exactly, kind, put, put_data, Streams};
use crate::{Call, Exit, ProtocolError, RawFrame};

/// Bytes of each text in a frame; longer ones are cut.
pub const TEXT_BYTES_MAX: usize = 4096;

/// The first frame of a connection, once the session is up; also whenever the guest saw the host go and come.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`crate::PROTOCOL`].
    pub protocol: u32,
    /// The agent's version.
    pub agent_version: String,
    /// The kernel's release.
    pub kernel: String,
    /// Whether the login session came up in time.
    pub session: bool,
    /// Whether everything but the agent is frozen.
    pub frozen: bool,
}

/// An operation did not succeed, and what it had changed is undone as far as it can be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failed {
    /// The operation; `None` for a frame that broke the protocol, which also ends the connection's commands.
    pub op: Option<Op>,
    /// The step that failed, in words.
    pub step: String,
    /// The system's error number, or 0.
    pub errno: i32,
    /// The error, in words.
    pub message: String,
}

/// An operation that is answered.
#[allow(missing_docs)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Op {
    Prerun,
    Settle,
    Warm,
    Freeze,
    Identify,
    Thaw,
    Shutdown,
    Exec,
    ServeCalls,
}

/// A frame from guest to host.
#[allow(missing_docs)]
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GuestFrame {
    /// The guest is there.
    Hello(Hello),
    /// The operation succeeded.
    Done(Op),
    /// The operation failed; on a command's stream: the command could not be started, nothing more comes for it.
    Failed { stream: u32, failed: Failed },
    /// The answer to a ping.
    Pong(u64),
    /// Bytes of memory nothing in the guest uses; comes before the answer to `Settle`, so that the host can take them back.
    FreeMemory(u64),
    /// Bytes of the command's stdout, within the window.
    Stdout { stream: u32, bytes: Vec<u8> },
    /// Bytes of the command's stderr, within the window.
    Stderr { stream: u32, bytes: Vec<u8> },
    /// No more stdout.
    StdoutEof { stream: u32 },
    /// No more stderr.
    StderrEof { stream: u32 },
    /// So many more bytes of stdin may be sent.
    StdinCredit { stream: u32, bytes: u32 },
    /// The command has closed its stdin; what is still sent is dropped, and credited.
    StdinClosed { stream: u32 },
    /// The command has ended and its output is complete: the stream's last frame. For a command that never ran (there is none, or it can't
    /// be executed) it is the only one: no ends of output come before it.
    Exited { stream: u32, exit: Exit },
    /// A program in the guest calls a service, on a stream of its own that was not used before on this connection. Answered by
    /// `CallAccepted` or `CallRefused`; bytes of the call are sent only after the former.
    Call { stream: u32, call: Call },
    /// Bytes for the service's stdin, within the window.
    CallStdin { stream: u32, bytes: Vec<u8> },
    /// The end of the service's stdin.
    CallStdinEof { stream: u32 },
    /// So many more bytes of the service's stdout may be sent.
    CallStdoutCredit { stream: u32, bytes: u32 },
    /// So many more bytes of the service's stderr may be sent.
    CallStderrCredit { stream: u32, bytes: u32 },
    /// The caller is gone, the service is to end; it is answered by the stream's last frame all the same.
    CallHangup { stream: u32 },
}

impl GuestFrame {
    /// Appends the frame to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Hello(hello) => put(out, kind::HELLO, 0, &hello.encode()),
            Self::Done(op) => put(out, kind::DONE, 0, &op.number().to_le_bytes()),
            Self::Failed { stream, failed } => put(out, kind::FAILED, *stream, &failed.encode()),
            Self::Pong(number) => put(out, kind::PONG, 0, &number.to_le_bytes()),
            Self::FreeMemory(bytes) => put(out, kind::FREE_MEMORY, 0, &bytes.to_le_bytes()),
            Self::Stdout { stream, bytes } => put_data(out, kind::STDOUT, *stream, bytes),
            Self::Stderr { stream, bytes } => put_data(out, kind::STDERR, *stream, bytes),
            Self::StdoutEof { stream } => put(out, kind::STDOUT_EOF, *stream, &[]),
            Self::StderrEof { stream } => put(out, kind::STDERR_EOF, *stream, &[]),
            Self::StdinCredit { stream, bytes } => {
                put(out, kind::STDIN_CREDIT, *stream, &bytes.to_le_bytes())
            }
            Self::StdinClosed { stream } => put(out, kind::STDIN_CLOSED, *stream, &[]),
            Self::Exited { stream, exit } => put(out, kind::EXITED, *stream, &exit.encode()),
            Self::Call { stream, call } => put(out, kind::CALL, *stream, &call.encode()),
            Self::CallStdin { stream, bytes } => put_data(out, kind::CALL_STDIN, *stream, bytes),
            Self::CallStdinEof { stream } => put(out, kind::CALL_STDIN_EOF, *stream, &[]),
            Self::CallStdoutCredit { stream, bytes } => {
                put(out, kind::CALL_STDOUT_CREDIT, *stream, &bytes.to_le_bytes())
            }
            Self::CallStderrCredit { stream, bytes } => {
                put(out, kind::CALL_STDERR_CREDIT, *stream, &bytes.to_le_bytes())
            }
            Self::CallHangup { stream } => put(out, kind::CALL_HANGUP, *stream, &[]),
        }
    }

    /// Validates a frame from the guest.
    pub fn parse(raw: RawFrame) -> Result<Self, ProtocolError> {
        let RawFrame { kind, stream, payload } = raw;
        let frame = name(kind).ok_or(ProtocolError::UnknownKind(kind))?;
        streams(kind).check(frame, stream)?;
        let nothing = |parsed| empty(frame, &payload).map(|()| parsed);
        let number = || exactly(frame, &payload).map(u32::from_le_bytes);
        Ok(match kind {
            kind::HELLO => Self::Hello(Hello::parse(&payload)?),
            kind::DONE => Self::Done(Op::parse(u16::from_le_bytes(exactly(frame, &payload)?))?),
            kind::FAILED => Self::Failed { stream, failed: Failed::parse(&payload)? },
            kind::PONG => Self::Pong(u64::from_le_bytes(exactly(frame, &payload)?)),
            kind::FREE_MEMORY => Self::FreeMemory(u64::from_le_bytes(exactly(frame, &payload)?)),
            kind::STDOUT => Self::Stdout { stream, bytes: payload },
            kind::STDERR => Self::Stderr { stream, bytes: payload },
            kind::STDOUT_EOF => nothing(Self::StdoutEof { stream })?,
            kind::STDERR_EOF => nothing(Self::StderrEof { stream })?,
            kind::STDIN_CREDIT => Self::StdinCredit { stream, bytes: number()? },
            kind::STDIN_CLOSED => nothing(Self::StdinClosed { stream })?,
            kind::EXITED => Self::Exited { stream, exit: Exit::parse(&payload)? },
            kind::CALL => Self::Call { stream, call: Call::decode(&payload)? },
            kind::CALL_STDIN => Self::CallStdin { stream, bytes: payload },
            kind::CALL_STDIN_EOF => nothing(Self::CallStdinEof { stream })?,
            kind::CALL_STDOUT_CREDIT => Self::CallStdoutCredit { stream, bytes: number()? },
            kind::CALL_STDERR_CREDIT => Self::CallStderrCredit { stream, bytes: number()? },
            kind::CALL_HANGUP => nothing(Self::CallHangup { stream })?,
            _ => return Err(ProtocolError::UnknownKind(kind)),
        })
    }
}

impl Hello {
    fn encode(&self) -> Vec<u8> {
        let hello = Self {
            agent_version: printable(&self.agent_version),
            kernel: printable(&self.kernel),
            ..self.clone()
        };
        serde_json::to_vec(&hello).unwrap_or_default()
    }

    fn parse(payload: &[u8]) -> Result<Self, ProtocolError> {
        let hello: Self = serde_json::from_slice(payload)
            .map_err(|_| ProtocolError::malformed("Hello", "not the JSON it must be"))?;
        Ok(Self { agent_version: printable(&hello.agent_version), kernel: printable(&hello.kernel), ..hello })
    }
}

impl Failed {
    fn encode(&self) -> Vec<u8> {
        let failed = Self { step: printable(&self.step), message: printable(&self.message), ..*self };
        serde_json::to_vec(&failed).unwrap_or_default()
    }

    fn parse(payload: &[u8]) -> Result<Self, ProtocolError> {
        let failed: Self = serde_json::from_slice(payload)
            .map_err(|_| ProtocolError::malformed("Failed", "not the JSON it must be"))?;
        Ok(Self { step: printable(&failed.step), message: printable(&failed.message), ..failed })
    }
}

impl Op {
    /// The kind of the frame that asks for it.
    fn number(self) -> u16 {
        match self {
            Self::Prerun => kind::PRERUN,
            Self::Settle => kind::SETTLE,
            Self::Warm => kind::WARM,
            Self::Freeze => kind::FREEZE,
            Self::Identify => kind::IDENTIFY,
            Self::Thaw => kind::THAW,
            Self::Shutdown => kind::SHUTDOWN,
            Self::Exec => kind::EXEC,
            Self::ServeCalls => kind::SERVE_CALLS,
        }
    }

    fn parse(number: u16) -> Result<Self, ProtocolError> {
        use Op::*;
        let ops = [Prerun, Settle, Warm, Freeze, Identify, Thaw, Shutdown, Exec, ServeCalls];
        let found = ops.into_iter().find(|op| op.number() == number);
        found.ok_or(ProtocolError::malformed("Done", "no such operation"))
    }
}

/// The text without what could steer a terminal, cut to [`TEXT_BYTES_MAX`]. Doing it twice changes nothing.
fn printable(text: &str) -> String {
    let mut out = String::new();
    for char in text.chars() {
        let char = if is_harmless(char) { char } else { char::REPLACEMENT_CHARACTER };
        if out.len() + char.len_utf8() > TEXT_BYTES_MAX {
            break;
        }
        out.push(char);
    }
    out
}

/// No control characters but newline and tab, none that reorders text.
fn is_harmless(char: char) -> bool {
    match char {
        '\n' | '\t' => true,
        '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => false,
        _ => !char.is_control(),
    }
}

fn streams(kind: u16) -> Streams {
    match kind {
        kind::FAILED => Streams::ControlOrCommand,
        kind if kind < kind::STDOUT => Streams::Control,
        kind if kind < kind::CALL => Streams::Command,
        _ => Streams::Call,
    }
}

fn name(kind: u16) -> Option<&'static str> {
    Some(match kind {
        kind::HELLO => "Hello",
        kind::DONE => "Done",
        kind::FAILED => "Failed",
        kind::PONG => "Pong",
        kind::FREE_MEMORY => "FreeMemory",
        kind::STDOUT => "Stdout",
        kind::STDERR => "Stderr",
        kind::STDOUT_EOF => "StdoutEof",
        kind::STDERR_EOF => "StderrEof",
        kind::STDIN_CREDIT => "StdinCredit",
        kind::STDIN_CLOSED => "StdinClosed",
        kind::EXITED => "Exited",
        kind::CALL => "Call",
        kind::CALL_STDIN => "CallStdin",
        kind::CALL_STDIN_EOF => "CallStdinEof",
        kind::CALL_STDOUT_CREDIT => "CallStdoutCredit",
        kind::CALL_STDERR_CREDIT => "CallStderrCredit",
        kind::CALL_HANGUP => "CallHangup",
        _ => return None,
    })
}
