//! The host's device state: opaque bytes with a kind and a version.
//!
//! Invariants: the kind is 1 to 31 bytes of `[a-z0-9.-]`, padded with zeros; the engine never looks into the bytes, and a
//! host refuses a kind or version it does not know.

use std::mem::size_of;

use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::error::Fault;
use crate::units::ByteCount;

/// QEMU's is below 1 MiB, a Xen device model's a few; a frame buffer in it is at most some tens.
pub const DEVICE_STATE_MAX: ByteCount = ByteCount(256 << 20);
const KIND_MAX: usize = 31;

const _: () = assert!(size_of::<RawHead>() == 40);

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHead {
    kind: [u8; KIND_MAX + 1],
    version: U32,
    reserved: U32,
}

/// The state of everything but memory and volumes, as the host gave it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceState {
    /// Which host's, in which form: "qemu-migration".
    pub kind: String,
    /// The version of that form.
    pub version: u32,
    /// The host's bytes.
    pub bytes: Vec<u8>,
}

impl DeviceState {
    /// Reads a device state section.
    pub fn parse(section: &[u8]) -> Result<DeviceState, Fault> {
        let (head, bytes) = RawHead::ref_from_prefix(section)
            .map_err(|_| Fault::DeviceState("it is too short for its head"))?;
        if head.reserved.get() != 0 {
            return Err(Fault::Reserved("the device state"));
        }
        let len = head.kind.iter().position(|&byte| byte == 0).unwrap_or(KIND_MAX + 1);
        let (name, padding) = head.kind.split_at(len);
        if padding.iter().any(|&byte| byte != 0) {
            return Err(Fault::Reserved("the device state"));
        }
        let kind = std::str::from_utf8(name).map_err(|_| Fault::DeviceState("its kind is no text"))?;
        if !is_kind(kind) {
            return Err(Fault::DeviceState("its kind is not 1 to 31 of a-z 0-9 . -"));
        }
        Ok(DeviceState { kind: kind.to_owned(), version: head.version.get(), bytes: bytes.to_vec() })
    }

    /// The device state section's bytes; an error says which rule they would break.
    pub fn to_bytes(&self) -> Result<Vec<u8>, String> {
        if !is_kind(&self.kind) {
            return Err(format!("the device state's kind {:?} is not 1 to 31 of a-z 0-9 . -", self.kind));
        }
        if self.bytes.len() as u64 > DEVICE_STATE_MAX.0 {
            return Err(format!(
                "the device state has {} bytes, at most {DEVICE_STATE_MAX} are allowed",
                self.bytes.len()
            ));
        }
        let mut head = RawHead { kind: [0; KIND_MAX + 1], version: self.version.into(), reserved: 0.into() };
        head.kind[..self.kind.len()].copy_from_slice(self.kind.as_bytes());
        Ok([head.as_bytes(), &self.bytes].concat())
    }
}

fn is_kind(kind: &str) -> bool {
    let allowed =
        |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'.' || byte == b'-';
    (1..=KIND_MAX).contains(&kind.len()) && kind.bytes().all(allowed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let state = DeviceState { kind: "qemu-migration".into(), version: 7, bytes: vec![1, 2, 3] };
        assert_eq!(DeviceState::parse(&state.to_bytes().unwrap()), Ok(state));
    }

    #[test]
    fn a_kind_that_does_not_fit_is_refused() {
        for kind in ["", "UPPER", "a kind with spaces", "x".repeat(32).as_str()] {
            let state = DeviceState { kind: kind.into(), version: 1, bytes: vec![] };
            assert!(state.to_bytes().is_err(), "{kind:?}");
        }
    }
}
