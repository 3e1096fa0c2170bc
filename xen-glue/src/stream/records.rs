//! The records of the libxc stream but for page data (`pages`).
//!
//! A record is small and whole, or it is an error: what [`Record::parse`] gives has a length that fits its type, and
//! [`Record::body`] gives the same bytes again.

use std::mem::size_of;

use engine::units::PAGE_BYTES;
use zerocopy::little_endian;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::libxc::*;
use super::Fault;
use crate::device_state::{TscInfo, CPUID_LEAF_BYTES, MSR_ENTRY_BYTES};

/// Which part of a PV vCPU a record has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VcpuPart {
    /// X86_PV_VCPU_BASIC.
    Basic,
    /// X86_PV_VCPU_EXTENDED.
    Extended,
    /// X86_PV_VCPU_XSAVE.
    Xsave,
    /// X86_PV_VCPU_MSRS.
    Msrs,
}

/// A record other than END and page data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// X86_PV_INFO.
    PvInfo {
        /// Bytes in a word of the guest's: 4 or 8.
        width: u8,
        /// Levels of its page tables: 3 or 4.
        levels: u8,
    },
    /// X86_PV_P2M_FRAMES.
    PvP2mFrames {
        /// The first frame they tell of.
        first: u32,
        /// The last.
        last: u32,
        /// The frames they are in.
        frames: Vec<u64>,
    },
    /// X86_PV_VCPU_*: opaque, empty from some writers (Xen 4.6 to 4.8).
    PvVcpu {
        /// Which part.
        part: VcpuPart,
        /// Which vCPU.
        vcpu: u32,
        /// The state.
        state: Vec<u8>,
    },
    /// SHARED_INFO: a page.
    SharedInfo(Vec<u8>),
    /// X86_TSC_INFO.
    Tsc(TscInfo),
    /// HVM_CONTEXT: opaque.
    HvmContext(Vec<u8>),
    /// HVM_PARAMS: index and value; empty from some writers (Xen 4.6 to 4.8).
    HvmParams(Vec<(u64, u64)>),
    /// VERIFY.
    Verify,
    /// CHECKPOINT.
    Checkpoint,
    /// STATIC_DATA_END.
    StaticDataEnd,
    /// X86_CPUID_POLICY: leaves of 24 bytes, opaque.
    CpuidPolicy(Vec<u8>),
    /// X86_MSR_POLICY: entries of 16 bytes, opaque.
    MsrPolicy(Vec<u8>),
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawTscInfo {
    mode: little_endian::U32,
    khz: little_endian::U32,
    nsec: little_endian::U64,
    incarnation: little_endian::U32,
    reserved: little_endian::U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawParam {
    index: little_endian::U64,
    value: little_endian::U64,
}

const _: () = assert!(size_of::<RawTscInfo>() == 24);
const _: () = assert!(size_of::<RawParam>() == 16);

impl Record {
    /// Reads the body of a record of this type. `width`: of the PV guest, once its X86_PV_INFO is known.
    pub fn parse(kind: u32, body: Vec<u8>, width: Option<u8>) -> std::result::Result<Record, Fault> {
        Ok(match kind {
            X86_PV_INFO => parse_pv_info(&body)?,
            X86_PV_P2M_FRAMES => parse_p2m_frames(&body, width)?,
            X86_PV_VCPU_BASIC => parse_vcpu(VcpuPart::Basic, body)?,
            X86_PV_VCPU_EXTENDED => parse_vcpu(VcpuPart::Extended, body)?,
            X86_PV_VCPU_XSAVE => parse_vcpu(VcpuPart::Xsave, body)?,
            X86_PV_VCPU_MSRS => parse_vcpu(VcpuPart::Msrs, body)?,
            SHARED_INFO if body.len() == PAGE_BYTES => Record::SharedInfo(body),
            SHARED_INFO => return Err(length(&body, "not a page")),
            X86_TSC_INFO => parse_tsc(&body)?,
            HVM_CONTEXT if body.is_empty() => return Err(length(&body, "there must be some")),
            HVM_CONTEXT => Record::HvmContext(body),
            HVM_PARAMS => parse_params(&body)?,
            VERIFY => empty(&body, Record::Verify)?,
            CHECKPOINT => empty(&body, Record::Checkpoint)?,
            STATIC_DATA_END => empty(&body, Record::StaticDataEnd)?,
            X86_CPUID_POLICY => Record::CpuidPolicy(entries(body, CPUID_LEAF_BYTES)?),
            X86_MSR_POLICY => Record::MsrPolicy(entries(body, MSR_ENTRY_BYTES)?),
            _ => return Err(Fault::UnknownRecord),
        })
    }

    /// Its type.
    pub fn kind(&self) -> u32 {
        match self {
            Record::PvInfo { .. } => X86_PV_INFO,
            Record::PvP2mFrames { .. } => X86_PV_P2M_FRAMES,
            Record::PvVcpu { part: VcpuPart::Basic, .. } => X86_PV_VCPU_BASIC,
            Record::PvVcpu { part: VcpuPart::Extended, .. } => X86_PV_VCPU_EXTENDED,
            Record::PvVcpu { part: VcpuPart::Xsave, .. } => X86_PV_VCPU_XSAVE,
            Record::PvVcpu { part: VcpuPart::Msrs, .. } => X86_PV_VCPU_MSRS,
            Record::SharedInfo(_) => SHARED_INFO,
            Record::Tsc(_) => X86_TSC_INFO,
            Record::HvmContext(_) => HVM_CONTEXT,
            Record::HvmParams(_) => HVM_PARAMS,
            Record::Verify => VERIFY,
            Record::Checkpoint => CHECKPOINT,
            Record::StaticDataEnd => STATIC_DATA_END,
            Record::CpuidPolicy(_) => X86_CPUID_POLICY,
            Record::MsrPolicy(_) => X86_MSR_POLICY,
        }
    }

    /// Its body's bytes.
    pub fn body(&self) -> Vec<u8> {
        match self {
            Record::PvInfo { width, levels } => vec![*width, *levels, 0, 0, 0, 0, 0, 0],
            Record::PvP2mFrames { first, last, frames } => {
                let mut body = pair(*first, *last);
                body.extend(frames.iter().flat_map(|frame| frame.to_le_bytes()));
                body
            }
            Record::PvVcpu { vcpu, state, .. } => [&pair(*vcpu, 0)[..], state].concat(),
            Record::Tsc(tsc) => {
                let TscInfo { mode, khz, nsec, incarnation } = *tsc;
                let raw = RawTscInfo {
                    mode: mode.into(),
                    khz: khz.into(),
                    nsec: nsec.into(),
                    incarnation: incarnation.into(),
                    reserved: 0.into(),
                };
                raw.as_bytes().to_vec()
            }
            Record::HvmParams(params) => {
                let mut body = pair(params.len() as u32, 0);
                for (index, value) in params {
                    body.extend(index.to_le_bytes());
                    body.extend(value.to_le_bytes());
                }
                body
            }
            Record::SharedInfo(bytes)
            | Record::HvmContext(bytes)
            | Record::CpuidPolicy(bytes)
            | Record::MsrPolicy(bytes) => bytes.clone(),
            Record::Verify | Record::Checkpoint | Record::StaticDataEnd => Vec::new(),
        }
    }
}

fn pair(first: u32, second: u32) -> Vec<u8> {
    [first.to_le_bytes(), second.to_le_bytes()].concat()
}

/// Splits two numbers off the front of a body.
pub(super) fn split_pair(body: &[u8]) -> std::result::Result<(u32, u32, &[u8]), Fault> {
    let short = || length(body, "at least 8");
    let ([first, second], rest) = <[little_endian::U32; 2]>::read_from_prefix(body).map_err(|_| short())?;
    Ok((first.get(), second.get(), rest))
}

fn length(body: &[u8], wanted: &'static str) -> Fault {
    Fault::Length { found: body.len() as u64, wanted }
}

fn empty(body: &[u8], record: Record) -> std::result::Result<Record, Fault> {
    match body.is_empty() {
        true => Ok(record),
        false => Err(length(body, "it should have none")),
    }
}

fn entries(body: Vec<u8>, each: usize) -> std::result::Result<Vec<u8>, Fault> {
    match !body.is_empty() && body.len().is_multiple_of(each) {
        true => Ok(body),
        false => Err(length(&body, "no whole number of entries")),
    }
}

fn parse_pv_info(body: &[u8]) -> std::result::Result<Record, Fault> {
    match *body {
        [width @ (4 | 8), levels @ (3 | 4), 0, 0, 0, 0, 0, 0] => Ok(Record::PvInfo { width, levels }),
        [width, levels, 0, 0, 0, 0, 0, 0] => {
            Err(Fault::Value { what: "width and levels", value: u16::from_be_bytes([width, levels]).into() })
        }
        [_, _, _, _, _, _, _, _] => Err(Fault::Reserved),
        _ => Err(length(body, "not 8")),
    }
}

fn parse_p2m_frames(body: &[u8], width: Option<u8>) -> std::result::Result<Record, Fault> {
    let width = width.ok_or(Fault::Misplaced("X86_PV_INFO has not come yet"))?;
    let per_frame = PAGE_BYTES as u32 / u32::from(width);
    let (first, last, rest) = split_pair(body)?;
    if last < first {
        return Err(Fault::Value { what: "last frame, which is below the first,", value: last.into() });
    }
    let count = u64::from(last / per_frame - first / per_frame) + 1;
    if rest.len() as u64 != count * 8 {
        return Err(length(body, "more or fewer frames than it tells of"));
    }
    let frames = rest.chunks_exact(8).map(le64).collect();
    Ok(Record::PvP2mFrames { first, last, frames })
}

fn parse_vcpu(part: VcpuPart, body: Vec<u8>) -> std::result::Result<Record, Fault> {
    let (vcpu, reserved, state) = split_pair(&body)?;
    match reserved {
        0 => Ok(Record::PvVcpu { part, vcpu, state: state.to_vec() }),
        _ => Err(Fault::Reserved),
    }
}

fn parse_tsc(body: &[u8]) -> std::result::Result<Record, Fault> {
    let raw = RawTscInfo::read_from_bytes(body).map_err(|_| length(body, "not 24"))?;
    match raw.reserved.get() {
        0 => Ok(Record::Tsc(TscInfo {
            mode: raw.mode.get(),
            khz: raw.khz.get(),
            nsec: raw.nsec.get(),
            incarnation: raw.incarnation.get(),
        })),
        _ => Err(Fault::Reserved),
    }
}

fn parse_params(body: &[u8]) -> std::result::Result<Record, Fault> {
    let (count, reserved, rest) = split_pair(body)?;
    if reserved != 0 {
        return Err(Fault::Reserved);
    }
    let entry = size_of::<RawParam>();
    if rest.len() as u64 != u64::from(count) * entry as u64 {
        return Err(length(body, "more or fewer parameters than it counts"));
    }
    let param = |bytes: &[u8]| (le64(&bytes[..8]), le64(&bytes[8..]));
    Ok(Record::HvmParams(rest.chunks_exact(entry).map(param).collect()))
}

fn le64(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}
