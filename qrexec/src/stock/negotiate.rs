//! Which version two peers speak: the smaller of what each says in its `Hello`.
//!
//! Invariants: less than 2 is refused (agent/qrexec-agent-data.c, `QREXEC_DATA_MIN_VERSION`); what is newer than v4 is spoken to in v4.

use super::message::{kind, put, HELLO_BYTES};
use super::WireError;

/// A version both sides know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Version {
    /// Qubes R3.0 to R4.0: data in chunks of 4 KiB, service names of 63 bytes.
    V2 = 2,
    /// R4.1 and R4.2: chunks of 64 KiB, service names of any sensible length.
    V3 = 3,
    /// R4.3: a service call may name the source it speaks for.
    V4 = 4,
}

impl Version {
    /// What this project offers.
    pub const NEWEST: Self = Self::V4;

    /// The number on the wire.
    pub fn number(self) -> u32 {
        self as u32
    }

    /// Bytes that one data message may carry.
    pub fn chunk_bytes_max(self) -> usize {
        match self {
            Self::V2 => 4 << 10,
            Self::V3 | Self::V4 => 64 << 10,
        }
    }

    /// The version to speak with a peer that says `theirs`.
    pub fn agree(self, theirs: u32) -> Result<Self, WireError> {
        let common = match theirs {
            0 | 1 => return Err(WireError::TooOld(theirs)),
            2 => Self::V2,
            3 => Self::V3,
            _ => Self::V4,
        };
        Ok(common.min(self))
    }

    /// Appends the `Hello` that offers this version; the first message of every channel, in both directions.
    pub fn encode_hello(self, out: &mut Vec<u8>) {
        put(out, kind::HELLO, &self.number().to_le_bytes());
    }
}

/// The number in a `Hello`'s body.
pub fn parse_hello(body: &[u8]) -> Result<u32, WireError> {
    let bytes: [u8; HELLO_BYTES] =
        body.try_into().map_err(|_| WireError::malformed("Hello", "the body is not 4 bytes"))?;
    Ok(u32::from_le_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smaller_version_is_spoken_and_less_than_two_refused() {
        use Version::{V2, V3, V4};
        for (ours, theirs, spoken) in
            [(V4, 2, V2), (V4, 3, V3), (V4, 4, V4), (V4, u32::MAX, V4), (V2, 4, V2), (V3, 4, V3)]
        {
            assert_eq!(ours.agree(theirs), Ok(spoken));
        }
        for theirs in [0, 1] {
            assert_eq!(V4.agree(theirs), Err(WireError::TooOld(theirs)));
        }
    }

    #[test]
    fn hello_has_the_bytes_of_the_header_file() {
        let mut out = Vec::new();
        Version::V3.encode_hello(&mut out);
        assert_eq!(out, [0, 3, 0, 0, 4, 0, 0, 0, 3, 0, 0, 0]);
        assert_eq!(parse_hello(&out[8..]), Ok(3));
        assert!(parse_hello(&out[7..]).is_err());
    }
}
