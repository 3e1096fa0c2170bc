//! How a command ended. Payload: how u16 (0 code, 1 signal, 2 not found, 3 not executable), zero u16, value u32.

use crate::frame::exactly;
use crate::ProtocolError;

const FRAME: &str = "Exited";
/// Linux has signals 1 to 64.
const SIGNAL_MAX: u32 = 64;

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// It exited with this status.
    Code(u8),
    /// This signal ended it.
    Signal(u8),
    /// There is no such command; it never ran. The `errno` of the attempt.
    NotFound(u32),
    /// It is there and can't be executed; it never ran. The `errno` of the attempt.
    NotExecutable(u32),
}

impl Exit {
    /// The status as a shell would give it: 127 not found, 126 not executable, 128 + N for signal N.
    pub fn status(self) -> u8 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => signal.saturating_add(128),
            Self::NotFound(_) => 127,
            Self::NotExecutable(_) => 126,
        }
    }

    pub(crate) fn encode(self) -> [u8; 8] {
        let (how, value) = match self {
            Self::Code(code) => (0, code.into()),
            Self::Signal(signal) => (1, signal.into()),
            Self::NotFound(errno) => (2, errno),
            Self::NotExecutable(errno) => (3u8, errno),
        };
        let [v0, v1, v2, v3] = u32::to_le_bytes(value);
        [how, 0, 0, 0, v0, v1, v2, v3]
    }

    pub(crate) fn parse(payload: &[u8]) -> Result<Self, ProtocolError> {
        let [how, 0, 0, 0, v0, v1, v2, v3] = exactly(FRAME, payload)? else {
            return Err(ProtocolError::malformed(FRAME, "reserved bytes are not zero"));
        };
        match (how, u32::from_le_bytes([v0, v1, v2, v3])) {
            (0, code @ 0..=255) => Ok(Self::Code(code as u8)),
            (1, signal @ 1..=SIGNAL_MAX) => Ok(Self::Signal(signal as u8)),
            (2, errno) => Ok(Self::NotFound(errno)),
            (3, errno) => Ok(Self::NotExecutable(errno)),
            _ => Err(ProtocolError::malformed(FRAME, "no such way to end")),
        }
    }
}
