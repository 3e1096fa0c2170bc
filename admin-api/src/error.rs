//! What can be wrong with a message, and with a call.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;

use crate::Exception;

/// Bytes that are no message of the protocol.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum DecodeError {
    /// More than the protocol allows for.
    #[error("{what}: longer than {limit} bytes")]
    TooLong {
        /// Which message.
        what: &'static str,
        /// What it may have.
        limit: usize,
    },
    /// It ends, or goes on, where it must not; or a part of it is not what it must be.
    #[error("{what}: {wrong}")]
    Malformed {
        /// Which message, or which part.
        what: &'static str,
        /// What is the matter with it.
        wrong: &'static str,
    },
}

impl DecodeError {
    pub(crate) fn malformed(what: &'static str, wrong: &'static str) -> Self {
        Self::Malformed { what, wrong }
    }
}

/// A message that the protocol has no way to carry.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum EncodeError {
    /// A part of the header that is empty, or has a byte that ends or divides the header.
    #[error("request: {part} {value:?} must be printable ASCII without spaces{}", if *.part == "method" { ", and not empty or with a '+'" } else { "" })]
    Header {
        /// Which part.
        part: &'static str,
        /// What was given for it.
        value: String,
    },
    /// More than qubesd takes.
    #[error("request: {bytes} bytes, at most {limit} are allowed")]
    TooLong {
        /// What it would have.
        bytes: usize,
        /// What it may have.
        limit: usize,
    },
}

/// Why a call has no answer.
#[derive(Debug, Error)]
pub enum ApiError {
    /// There is nobody at the socket, or no way to it.
    #[error("Failed to connect to qubesd service: {}: {source}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The request cannot be said.
    #[error("cannot send the call: {0}")]
    Encode(#[from] EncodeError),
    /// The connection broke.
    #[error("cannot {step}: {source}")]
    Io {
        /// What was being done.
        step: &'static str,
        /// What the system says.
        source: io::Error,
    },
    /// Nothing came in time.
    #[error("{what} gave no answer within {after:?}")]
    TimedOut {
        /// The method.
        what: String,
        /// How long it was waited for.
        after: Duration,
    },
    /// The connection was closed without a word: how qubesd refuses malformed calls and those it does not permit.
    #[error("Got empty response from qubesd. See journalctl in dom0 for details.")]
    Empty,
    /// What came is no reply.
    #[error("Invalid response format ({0})")]
    Decode(#[from] DecodeError),
    /// The method was carried out, and failed.
    #[error("{0}")]
    Exception(Exception),
}

impl ApiError {
    /// The exception it is about, if it is one.
    pub fn exception(&self) -> Option<&Exception> {
        match self {
            Self::Exception(exception) => Some(exception),
            _ => None,
        }
    }
}
