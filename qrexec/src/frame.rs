//! The header of every frame, and the kinds. Host kinds are below 0x100, guest kinds from there on.

use crate::call::CALL_STREAM;
use crate::ProtocolError;

/// Bytes of a header.
pub const HEADER_BYTES: usize = 12;

/// Bytes that one frame may carry: what a pipe holds that nobody has widened.
pub const PAYLOAD_BYTES_MAX: usize = 64 << 10;

/// The numbers on the wire.
#[allow(missing_docs)]
pub mod kind {
    pub const PRERUN: u16 = 0x01;
    pub const SETTLE: u16 = 0x02;
    pub const WARM: u16 = 0x03;
    pub const FREEZE: u16 = 0x04;
    pub const IDENTIFY: u16 = 0x05;
    pub const THAW: u16 = 0x06;
    pub const SHUTDOWN: u16 = 0x07;
    pub const PING: u16 = 0x08;
    pub const SERVE_CALLS: u16 = 0x09;
    pub const EXEC: u16 = 0x10;
    pub const STDIN: u16 = 0x11;
    pub const STDIN_EOF: u16 = 0x12;
    pub const STDOUT_CREDIT: u16 = 0x13;
    pub const STDERR_CREDIT: u16 = 0x14;
    pub const SIGNAL: u16 = 0x15;
    pub const CALL_ACCEPTED: u16 = 0x20;
    pub const CALL_REFUSED: u16 = 0x21;
    pub const CALL_STDOUT: u16 = 0x22;
    pub const CALL_STDERR: u16 = 0x23;
    pub const CALL_STDOUT_EOF: u16 = 0x24;
    pub const CALL_STDERR_EOF: u16 = 0x25;
    pub const CALL_STDIN_CREDIT: u16 = 0x26;
    pub const CALL_STDIN_CLOSED: u16 = 0x27;
    pub const CALL_EXITED: u16 = 0x28;

    pub const HELLO: u16 = 0x101;
    pub const DONE: u16 = 0x102;
    pub const FAILED: u16 = 0x103;
    pub const PONG: u16 = 0x104;
    pub const FREE_MEMORY: u16 = 0x105;
    pub const STDOUT: u16 = 0x110;
    pub const STDERR: u16 = 0x111;
    pub const STDOUT_EOF: u16 = 0x112;
    pub const STDERR_EOF: u16 = 0x113;
    pub const STDIN_CREDIT: u16 = 0x114;
    pub const STDIN_CLOSED: u16 = 0x115;
    pub const EXITED: u16 = 0x116;
    pub const CALL: u16 = 0x120;
    pub const CALL_STDIN: u16 = 0x121;
    pub const CALL_STDIN_EOF: u16 = 0x122;
    pub const CALL_STDOUT_CREDIT: u16 = 0x123;
    pub const CALL_STDERR_CREDIT: u16 = 0x124;
    pub const CALL_HANGUP: u16 = 0x125;
}

/// A frame whose header is sound and whose payload is complete, but not yet looked into.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawFrame {
    /// One of [`kind`], or anything else.
    pub kind: u16,
    /// 0 for control frames.
    pub stream: u32,
    /// At most [`PAYLOAD_BYTES_MAX`] bytes.
    pub payload: Vec<u8>,
}

impl RawFrame {
    /// Bytes of a header for a payload of `length` bytes. For those who write payloads straight into their own buffers;
    /// a `length` over [`PAYLOAD_BYTES_MAX`] is refused by the other side.
    pub fn header(kind: u16, stream: u32, length: usize) -> [u8; HEADER_BYTES] {
        let length = u32::try_from(length).unwrap_or(u32::MAX);
        let mut header = [0; HEADER_BYTES];
        header[0..2].copy_from_slice(&kind.to_le_bytes());
        header[4..8].copy_from_slice(&stream.to_le_bytes());
        header[8..12].copy_from_slice(&length.to_le_bytes());
        header
    }
}

/// A checked header.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Header {
    pub kind: u16,
    pub stream: u32,
    pub length: usize,
}

impl Header {
    pub fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<Self, ProtocolError> {
        let [k0, k1, r0, r1, s0, s1, s2, s3, l0, l1, l2, l3] = *bytes;
        let reserved = u16::from_le_bytes([r0, r1]);
        let length = u32::from_le_bytes([l0, l1, l2, l3]);
        if reserved != 0 {
            return Err(ProtocolError::Reserved(reserved));
        }
        if length as usize > PAYLOAD_BYTES_MAX {
            return Err(ProtocolError::PayloadTooLong(length));
        }
        Ok(Self {
            kind: u16::from_le_bytes([k0, k1]),
            stream: u32::from_le_bytes([s0, s1, s2, s3]),
            length: length as usize,
        })
    }

    /// The name and the streams of a frame of the host's that carries bytes for a pipe.
    pub fn host_data(&self) -> Option<(&'static str, Streams)> {
        match self.kind {
            kind::STDIN => Some(("Stdin", Streams::Command)),
            kind::CALL_STDOUT => Some(("CallStdout", Streams::Call)),
            kind::CALL_STDERR => Some(("CallStderr", Streams::Call)),
            _ => None,
        }
    }
}

/// Appends one frame. The caller keeps `payload` within its limit.
pub(crate) fn put(out: &mut Vec<u8>, kind: u16, stream: u32, payload: &[u8]) {
    debug_assert!(payload.len() <= PAYLOAD_BYTES_MAX);
    out.reserve(HEADER_BYTES + payload.len());
    out.extend_from_slice(&RawFrame::header(kind, stream, payload.len()));
    out.extend_from_slice(payload);
}

/// Appends `bytes` as one frame or more; none for no bytes.
pub(crate) fn put_data(out: &mut Vec<u8>, kind: u16, stream: u32, bytes: &[u8]) {
    for chunk in bytes.chunks(PAYLOAD_BYTES_MAX) {
        put(out, kind, stream, chunk);
    }
}

/// What a frame's stream has to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Streams {
    /// The control stream.
    Control,
    /// A command's.
    Command,
    /// Either of these.
    ControlOrCommand,
    /// A call's.
    Call,
}

impl Streams {
    /// Checks a frame's stream.
    pub fn check(self, frame: &'static str, stream: u32) -> Result<(), ProtocolError> {
        let is_call = stream & CALL_STREAM != 0;
        let fits = match self {
            Self::Control => stream == 0,
            Self::Command => stream != 0 && !is_call,
            Self::ControlOrCommand => !is_call,
            Self::Call => is_call,
        };
        if fits {
            return Ok(());
        }
        Err(ProtocolError::Stream { frame, stream })
    }
}

/// Checks that a frame carries nothing.
pub(crate) fn empty(frame: &'static str, payload: &[u8]) -> Result<(), ProtocolError> {
    if payload.is_empty() {
        return Ok(());
    }
    Err(ProtocolError::malformed(frame, "carries bytes and must carry none"))
}

/// Takes a payload of exactly `N` bytes.
pub(crate) fn exactly<const N: usize>(frame: &'static str, payload: &[u8]) -> Result<[u8; N], ProtocolError> {
    payload.try_into().map_err(|_| ProtocolError::malformed(frame, "payload has the wrong length"))
}
