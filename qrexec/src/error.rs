//! The one way in which bytes can be wrong. Every variant names the frame and what is the matter with it.

use thiserror::Error;

/// A frame that breaks the protocol; the connection that carried it is of no more use.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ProtocolError {
    /// The header's reserved field is not zero: the stream is out of step, or a newer protocol is spoken.
    #[error("frame header: reserved field is {0:#06x}, must be zero")]
    Reserved(u16),
    /// The header announces more than a frame may carry.
    #[error("frame header: payload of {0} bytes, at most 65536 are allowed")]
    PayloadTooLong(u32),
    /// No frame of this direction has this kind.
    #[error("frame of unknown kind {0:#06x}")]
    UnknownKind(u16),
    /// A control frame with a stream, or a command's or call's frame with none or with one of the other.
    #[error("{frame} frame: must not carry stream {stream}")]
    Stream {
        /// The frame's name.
        frame: &'static str,
        /// The stream in its header.
        stream: u32,
    },
    /// The payload isn't what this kind of frame carries, or a value is outside its limits.
    #[error("{frame} frame: {what}")]
    Malformed {
        /// The frame's name.
        frame: &'static str,
        /// What is wrong, in words.
        what: &'static str,
    },
    /// More bytes than the window had room for.
    #[error("flow control: {sent} bytes sent, {window} were granted")]
    WindowExceeded {
        /// Bytes that came.
        sent: usize,
        /// Bytes that might have come.
        window: u32,
    },
    /// Credit that would lift a window over its limit.
    #[error("flow control: credit of {0} bytes lifts the window over its limit")]
    CreditTooLarge(u32),
}

impl ProtocolError {
    pub(crate) fn malformed(frame: &'static str, what: &'static str) -> Self {
        Self::Malformed { frame, what }
    }
}
