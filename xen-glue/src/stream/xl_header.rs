//! The file's own header: 48 bytes, then optional data, of which the guest's configuration is the first and so far only part.

use std::io::{self, Read, Write};
use std::mem::size_of;

use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::input::Input;
use super::{Fault, Place, Result};

const MAGIC: [u8; 32] = *b"Xen saved domain, xl format\n \0 \r";
const BYTE_ORDER: u32 = 0x0102_0304;
const FLAG_JSON: u32 = 1 << 0;
const FLAG_STREAM_V2: u32 = 1 << 1;
/// A configuration has a kilobyte or two, with hundreds of devices some tens; no optional data beyond is read.
pub const OPTIONAL_BYTES_MAX: u32 = 4 << 20;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawXlHeader {
    magic: [u8; 32],
    byte_order: U32,
    mandatory_flags: U32,
    optional_flags: U32,
    optional_bytes: U32,
}

const _: () = assert!(size_of::<RawXlHeader>() == 48);

/// A guest's configuration, as text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConfigText {
    /// libxl_domain_config as JSON: what xl has written since 4.2.
    Json(String),
    /// An xl.cfg: what a user gave with `xl save`.
    Cfg(String),
}

/// Reads header and configuration.
pub(super) fn read<R: Read>(input: &mut Input<R>) -> Result<ConfigText> {
    let header: RawXlHeader = input.read()?;
    if header.magic != MAGIC {
        return Err(input.fault(Fault::Magic));
    }
    match header.byte_order.get() {
        BYTE_ORDER => {}
        order if order == BYTE_ORDER.swap_bytes() => return Err(input.fault(Fault::ByteOrder)),
        order => return Err(input.fault(Fault::Value { what: "byte order", value: order.into() })),
    }
    let flags = header.mandatory_flags.get();
    if flags & !(FLAG_JSON | FLAG_STREAM_V2) != 0 {
        return Err(input.fault(Fault::Flags(flags & !(FLAG_JSON | FLAG_STREAM_V2))));
    }
    if flags & FLAG_STREAM_V2 == 0 {
        return Err(input.fault(Fault::Legacy));
    }
    let length = header.optional_bytes.get();
    if !(4..=OPTIONAL_BYTES_MAX).contains(&length) {
        let wanted = "its optional data must hold a configuration and have at most 4 MiB";
        return Err(input.fault(Fault::Length { found: length.into(), wanted }));
    }
    input.enter(Place::Config);
    let mut optional = input.bytes(length.into())?;
    let text = config_text(&mut optional).map_err(|fault| input.fault(fault))?;
    Ok(if flags & FLAG_JSON != 0 { ConfigText::Json(text) } else { ConfigText::Cfg(text) })
}

/// A length, which counts the NUL at the end, and the text; what is behind is of a later xl.
fn config_text(optional: &mut Vec<u8>) -> std::result::Result<String, Fault> {
    let length = optional.first_chunk::<4>().map_or(0, |bytes| u32::from_le_bytes(*bytes));
    let end = u64::from(length) + 4;
    if length == 0 || end > optional.len() as u64 {
        let wanted = "and must end, with a NUL, within the optional data";
        return Err(Fault::Length { found: length.into(), wanted });
    }
    optional.truncate(end as usize);
    if optional.pop() != Some(0) {
        return Err(Fault::Text("it does not end with a NUL".into()));
    }
    String::from_utf8(optional.split_off(4)).map_err(|error| Fault::Text(error.to_string()))
}

/// Writes header and configuration.
pub(super) fn write(out: &mut impl Write, config: &ConfigText) -> io::Result<()> {
    let (text, json) = match config {
        ConfigText::Json(text) => (text, FLAG_JSON),
        ConfigText::Cfg(text) => (text, 0),
    };
    let length = u32::try_from(text.len() + 1).ok().filter(|length| *length <= OPTIONAL_BYTES_MAX - 4);
    let length = length.ok_or_else(|| io::Error::other("the configuration is too long"))?;
    let header = RawXlHeader {
        magic: MAGIC,
        byte_order: BYTE_ORDER.into(),
        mandatory_flags: (FLAG_STREAM_V2 | json).into(),
        optional_flags: 0.into(),
        optional_bytes: (length + 4).into(),
    };
    out.write_all(header.as_bytes())?;
    out.write_all(&length.to_le_bytes())?;
    out.write_all(text.as_bytes())?;
    out.write_all(&[0])
}
