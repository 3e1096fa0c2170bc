//! How a stock peer's bytes can be wrong, or our own use of a channel.

use thiserror::Error;

/// A message that breaks the protocol; the channel that carried it is of no more use.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum WireError {
    /// The peer is older than Qubes R3.0, or doesn't speak qrexec.
    #[error("Hello: the peer speaks version {0}, at least 2 is needed")]
    TooOld(u32),
    /// This channel, in this direction and version, has no such message.
    #[error("message of kind {kind:#05x} does not belong on the {channel}")]
    UnknownKind {
        /// The kind in the header.
        kind: u32,
        /// What the channel is at this moment.
        channel: &'static str,
    },
    /// The header announces a length that its kind can't have.
    #[error("{message}: a body of {length} bytes, {min} to {max} are allowed")]
    Length {
        /// The message's name.
        message: &'static str,
        /// The length in the header.
        length: u32,
        /// The least it may be.
        min: usize,
        /// The most it may be.
        max: usize,
    },
    /// The body isn't what this kind carries.
    #[error("{message}: {what}")]
    Malformed {
        /// The message's name.
        message: &'static str,
        /// What is wrong, in words.
        what: &'static str,
    },
    /// Our own end was asked to send what it may not send now.
    #[error("data channel: {0}")]
    OutOfTurn(&'static str),
}

impl WireError {
    pub(crate) fn malformed(message: &'static str, what: &'static str) -> Self {
        Self::Malformed { message, what }
    }
}
