//! The libxl stream around the libxc one: its header, and the types of its records.

use std::io::{self, Read, Write};
use std::mem::size_of;

use zerocopy::{big_endian, little_endian};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::input::Input;
use super::{Fault, Place, Result};

/// "LibxlFmt".
const IDENT: u64 = 0x4c69_6278_6c46_6d74;
const VERSION: u32 = 2;
const OPTION_BIG_ENDIAN: u32 = 1 << 0;
const OPTION_LEGACY: u32 = 1 << 1;

/// The end.
pub const END: u32 = 0;
/// A libxc stream follows.
pub const LIBXC_CONTEXT: u32 = 1;
/// Keys and values of an emulator in xenstore.
pub const EMULATOR_XENSTORE_DATA: u32 = 2;
/// An emulator's state.
pub const EMULATOR_CONTEXT: u32 = 3;
/// The end of a checkpoint.
pub const CHECKPOINT_END: u32 = 4;
/// What a secondary of a checkpointed guest says.
pub const CHECKPOINT_STATE: u32 = 5;
/// A record that whoever does not know it may skip.
pub const OPTIONAL: u32 = 1 << 31;

/// A record's name, as the specification has it.
pub fn name(kind: u32) -> &'static str {
    match kind {
        END => "END",
        LIBXC_CONTEXT => "LIBXC_CONTEXT",
        EMULATOR_XENSTORE_DATA => "EMULATOR_XENSTORE_DATA",
        EMULATOR_CONTEXT => "EMULATOR_CONTEXT",
        CHECKPOINT_END => "CHECKPOINT_END",
        CHECKPOINT_STATE => "CHECKPOINT_STATE",
        _ => "unknown",
    }
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    ident: big_endian::U64,
    version: big_endian::U32,
    options: big_endian::U32,
}

/// What every record begins with, here and in the libxc stream.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RecordHeader {
    pub kind: little_endian::U32,
    pub length: little_endian::U32,
}

/// How the body of an emulator's record begins.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct EmulatorHeader {
    pub id: little_endian::U32,
    pub index: little_endian::U32,
}

const _: () = assert!(size_of::<RawHeader>() == 16);
const _: () = assert!(size_of::<RecordHeader>() == 8);
const _: () = assert!(size_of::<EmulatorHeader>() == 8);

/// Reads the header.
pub(super) fn read_header<R: Read>(input: &mut Input<R>) -> Result<()> {
    input.enter(Place::LibxlHeader);
    let header: RawHeader = input.read()?;
    let (version, options) = (header.version.get(), header.options.get());
    if header.ident.get() != IDENT {
        Err(input.fault(Fault::Magic))
    } else if version != VERSION {
        Err(input.fault(Fault::Version(version)))
    } else if options & OPTION_BIG_ENDIAN != 0 {
        Err(input.fault(Fault::ByteOrder))
    } else if options & OPTION_LEGACY != 0 {
        Err(input.fault(Fault::Legacy))
    } else if options != 0 {
        Err(input.fault(Fault::Flags(options)))
    } else {
        Ok(())
    }
}

/// Writes the header.
pub(super) fn write_header(out: &mut impl Write) -> io::Result<()> {
    out.write_all(RawHeader { ident: IDENT.into(), version: VERSION.into(), options: 0.into() }.as_bytes())
}

/// Writes a record of either stream.
pub(super) fn write_record(out: &mut impl Write, kind: u32, body: &[&[u8]]) -> io::Result<()> {
    let length: usize = body.iter().map(|part| part.len()).sum();
    let length32 = u32::try_from(length).ok().filter(|length| *length <= super::RECORD_BYTES_MAX);
    let length32 = length32.ok_or_else(|| io::Error::other("a record is longer than 128 MiB"))?;
    out.write_all(RecordHeader { kind: kind.into(), length: length32.into() }.as_bytes())?;
    body.iter().try_for_each(|part| out.write_all(part))?;
    out.write_all(&[0; 8][..length.wrapping_neg() % 8])
}
