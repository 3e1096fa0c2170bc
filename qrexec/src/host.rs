//! What the host says. See [`HostFrame`] for what each frame does and which answer it gets.

use crate::frame::{empty, exactly, kind, put, put_data, Streams};
use crate::{Exec, Exit, Identity, ProtocolError, RawFrame};

/// Linux has signals 1 to 64.
const SIGNAL_MAX: u32 = 64;

/// A frame from host to guest. Control frames are answered in order by `Done` or `Failed`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HostFrame {
    /// A piece of the prerun hook, an executable file; an empty piece ends it and has it run as `user` in its session.
    /// Answered once, when the hook has exited.
    Prerun(Vec<u8>),
    /// Sync, then drop caches and compact memory. Answered.
    Settle,
    /// Run once what a launch runs. Answered.
    Warm,
    /// Freeze everything but the agent. Answered; the answer is the last thing the guest sends before it is captured.
    Freeze,
    /// Become this machine. Answered.
    Identify(Box<Identity>),
    /// Let everything run again. Answered.
    Thaw,
    /// Switch the guest off cleanly. Answered, if the guest gets to it.
    Shutdown,
    /// Answered by `Pong` with the same number.
    Ping(u64),
    /// Offer dom0 the control channel of Qubes' own protocol (`stock`), by which calls go from then on: to a guest that runs, on Xen. Answered
    /// once the offer stands, this agent's or that of Qubes' own one in the guest.
    ServeCalls,
    /// Run a command on a stream of its own. Answered by its output and `Exited`, or by `Failed` on that stream.
    Exec {
        /// A number not used before on this connection, not 0, below [`CALL_STREAM`](crate::CALL_STREAM).
        stream: u32,
        /// What to run.
        exec: Box<Exec>,
    },
    /// Bytes for the command's stdin, within the window.
    Stdin {
        /// The command.
        stream: u32,
        /// At most one frame's worth.
        bytes: Vec<u8>,
    },
    /// The end of the command's stdin.
    StdinEof {
        /// The command.
        stream: u32,
    },
    /// So many more bytes of stdout may be sent.
    StdoutCredit {
        /// The command.
        stream: u32,
        /// More bytes.
        bytes: u32,
    },
    /// So many more bytes of stderr may be sent.
    StderrCredit {
        /// The command.
        stream: u32,
        /// More bytes.
        bytes: u32,
    },
    /// Send a signal to the command's process group.
    Signal {
        /// The command.
        stream: u32,
        /// 1 to 64.
        signal: u8,
    },
    /// The guest's call may happen: from here on its bytes flow.
    CallAccepted {
        /// The call.
        stream: u32,
    },
    /// The call may not happen, whatever the reason: the stream's last frame.
    CallRefused {
        /// The call.
        stream: u32,
    },
    /// Bytes of the service's stdout, within the window.
    CallStdout {
        /// The call.
        stream: u32,
        /// At most one frame's worth.
        bytes: Vec<u8>,
    },
    /// Bytes of the service's stderr, within the window.
    CallStderr {
        /// The call.
        stream: u32,
        /// At most one frame's worth.
        bytes: Vec<u8>,
    },
    /// No more stdout of the service.
    CallStdoutEof {
        /// The call.
        stream: u32,
    },
    /// No more stderr of the service.
    CallStderrEof {
        /// The call.
        stream: u32,
    },
    /// So many more bytes of the service's stdin may be sent.
    CallStdinCredit {
        /// The call.
        stream: u32,
        /// More bytes.
        bytes: u32,
    },
    /// The service has closed its stdin; what is still sent is dropped, and credited.
    CallStdinClosed {
        /// The call.
        stream: u32,
    },
    /// The service has ended and its output is complete, or it never began: the stream's last frame.
    CallExited {
        /// The call.
        stream: u32,
        /// How.
        exit: Exit,
    },
}

impl HostFrame {
    /// Appends the frame to `out`. Fails when a command or an identity is outside its limits; then `out` is unchanged.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<(), ProtocolError> {
        match self {
            Self::Prerun(chunk) if chunk.len() > crate::PAYLOAD_BYTES_MAX => {
                return Err(ProtocolError::malformed("Prerun", "piece is over 64 KiB"))
            }
            Self::Prerun(chunk) => put(out, kind::PRERUN, 0, chunk),
            Self::Settle => put(out, kind::SETTLE, 0, &[]),
            Self::Warm => put(out, kind::WARM, 0, &[]),
            Self::Freeze => put(out, kind::FREEZE, 0, &[]),
            Self::Identify(identity) => put(out, kind::IDENTIFY, 0, &identity.encode()?),
            Self::Thaw => put(out, kind::THAW, 0, &[]),
            Self::Shutdown => put(out, kind::SHUTDOWN, 0, &[]),
            Self::Ping(number) => put(out, kind::PING, 0, &number.to_le_bytes()),
            Self::ServeCalls => put(out, kind::SERVE_CALLS, 0, &[]),
            Self::Exec { stream, exec } => put(out, kind::EXEC, *stream, &exec.encode()?),
            Self::Stdin { stream, bytes } => Self::encode_stdin(out, *stream, bytes),
            Self::StdinEof { stream } => put(out, kind::STDIN_EOF, *stream, &[]),
            Self::StdoutCredit { stream, bytes } => {
                put(out, kind::STDOUT_CREDIT, *stream, &bytes.to_le_bytes())
            }
            Self::StderrCredit { stream, bytes } => {
                put(out, kind::STDERR_CREDIT, *stream, &bytes.to_le_bytes())
            }
            Self::Signal { stream, signal } => {
                put(out, kind::SIGNAL, *stream, &u32::from(*signal).to_le_bytes())
            }
            Self::CallAccepted { stream } => put(out, kind::CALL_ACCEPTED, *stream, &[]),
            Self::CallRefused { stream } => put(out, kind::CALL_REFUSED, *stream, &[]),
            Self::CallStdout { stream, bytes } => put_data(out, kind::CALL_STDOUT, *stream, bytes),
            Self::CallStderr { stream, bytes } => put_data(out, kind::CALL_STDERR, *stream, bytes),
            Self::CallStdoutEof { stream } => put(out, kind::CALL_STDOUT_EOF, *stream, &[]),
            Self::CallStderrEof { stream } => put(out, kind::CALL_STDERR_EOF, *stream, &[]),
            Self::CallStdinCredit { stream, bytes } => {
                put(out, kind::CALL_STDIN_CREDIT, *stream, &bytes.to_le_bytes())
            }
            Self::CallStdinClosed { stream } => put(out, kind::CALL_STDIN_CLOSED, *stream, &[]),
            Self::CallExited { stream, exit } => put(out, kind::CALL_EXITED, *stream, &exit.encode()),
        }
        Ok(())
    }

    /// Appends `Stdin` frames for bytes that need not be owned, as many as it takes.
    pub fn encode_stdin(out: &mut Vec<u8>, stream: u32, bytes: &[u8]) {
        put_data(out, kind::STDIN, stream, bytes);
    }

    /// Appends a whole prerun hook: its pieces, and the end.
    pub fn encode_prerun(out: &mut Vec<u8>, hook: &[u8]) {
        put_data(out, kind::PRERUN, 0, hook);
        put(out, kind::PRERUN, 0, &[]);
    }

    /// The call that it is about, if any.
    pub fn call(&self) -> Option<u32> {
        match self {
            Self::CallAccepted { stream }
            | Self::CallRefused { stream }
            | Self::CallStdout { stream, .. }
            | Self::CallStderr { stream, .. }
            | Self::CallStdoutEof { stream }
            | Self::CallStderrEof { stream }
            | Self::CallStdinCredit { stream, .. }
            | Self::CallStdinClosed { stream }
            | Self::CallExited { stream, .. } => Some(*stream),
            _ => None,
        }
    }

    /// Validates a frame from the host.
    pub fn parse(raw: RawFrame) -> Result<Self, ProtocolError> {
        let RawFrame { kind, stream, payload } = raw;
        let frame = name(kind).ok_or(ProtocolError::UnknownKind(kind))?;
        streams(kind).check(frame, stream)?;
        let nothing = |parsed| empty(frame, &payload).map(|()| parsed);
        let number = || exactly(frame, &payload).map(u32::from_le_bytes);
        Ok(match kind {
            kind::PRERUN => Self::Prerun(payload),
            kind::SETTLE => nothing(Self::Settle)?,
            kind::WARM => nothing(Self::Warm)?,
            kind::FREEZE => nothing(Self::Freeze)?,
            kind::IDENTIFY => Self::Identify(Box::new(Identity::parse(&payload)?)),
            kind::THAW => nothing(Self::Thaw)?,
            kind::SHUTDOWN => nothing(Self::Shutdown)?,
            kind::PING => Self::Ping(u64::from_le_bytes(exactly(frame, &payload)?)),
            kind::SERVE_CALLS => nothing(Self::ServeCalls)?,
            kind::EXEC => Self::Exec { stream, exec: Box::new(Exec::parse(&payload)?) },
            kind::STDIN => Self::Stdin { stream, bytes: payload },
            kind::STDIN_EOF => nothing(Self::StdinEof { stream })?,
            kind::STDOUT_CREDIT => Self::StdoutCredit { stream, bytes: number()? },
            kind::STDERR_CREDIT => Self::StderrCredit { stream, bytes: number()? },
            kind::SIGNAL => match number()? {
                signal @ 1..=SIGNAL_MAX => Self::Signal { stream, signal: signal as u8 },
                _ => return Err(ProtocolError::malformed(frame, "no such signal")),
            },
            kind::CALL_ACCEPTED => nothing(Self::CallAccepted { stream })?,
            kind::CALL_REFUSED => nothing(Self::CallRefused { stream })?,
            kind::CALL_STDOUT => Self::CallStdout { stream, bytes: payload },
            kind::CALL_STDERR => Self::CallStderr { stream, bytes: payload },
            kind::CALL_STDOUT_EOF => nothing(Self::CallStdoutEof { stream })?,
            kind::CALL_STDERR_EOF => nothing(Self::CallStderrEof { stream })?,
            kind::CALL_STDIN_CREDIT => Self::CallStdinCredit { stream, bytes: number()? },
            kind::CALL_STDIN_CLOSED => nothing(Self::CallStdinClosed { stream })?,
            kind::CALL_EXITED => Self::CallExited { stream, exit: Exit::parse(&payload)? },
            _ => return Err(ProtocolError::UnknownKind(kind)),
        })
    }
}

fn streams(kind: u16) -> Streams {
    match kind {
        kind if kind < kind::EXEC => Streams::Control,
        kind if kind < kind::CALL_ACCEPTED => Streams::Command,
        _ => Streams::Call,
    }
}

fn name(kind: u16) -> Option<&'static str> {
    Some(match kind {
        kind::PRERUN => "Prerun",
        kind::SETTLE => "Settle",
        kind::WARM => "Warm",
        kind::FREEZE => "Freeze",
        kind::IDENTIFY => "Identify",
        kind::THAW => "Thaw",
        kind::SHUTDOWN => "Shutdown",
        kind::PING => "Ping",
        kind::SERVE_CALLS => "ServeCalls",
        kind::EXEC => "Exec",
        kind::STDIN => "Stdin",
        kind::STDIN_EOF => "StdinEof",
        kind::STDOUT_CREDIT => "StdoutCredit",
        kind::STDERR_CREDIT => "StderrCredit",
        kind::SIGNAL => "Signal",
        kind::CALL_ACCEPTED => "CallAccepted",
        kind::CALL_REFUSED => "CallRefused",
        kind::CALL_STDOUT => "CallStdout",
        kind::CALL_STDERR => "CallStderr",
        kind::CALL_STDOUT_EOF => "CallStdoutEof",
        kind::CALL_STDERR_EOF => "CallStderrEof",
        kind::CALL_STDIN_CREDIT => "CallStdinCredit",
        kind::CALL_STDIN_CLOSED => "CallStdinClosed",
        kind::CALL_EXITED => "CallExited",
        _ => return None,
    })
}
