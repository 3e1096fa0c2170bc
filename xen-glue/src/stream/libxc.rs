//! The libxc stream: its headers, and the types of its records.

use std::io::{self, Read, Write};
use std::mem::size_of;

use zerocopy::{big_endian, little_endian};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::input::Input;
use super::{Fault, Place, Result};

const MARKER: u64 = u64::MAX;
/// "XENF".
const IDENT: u32 = 0x5845_4e46;
const OPTION_BIG_ENDIAN: u16 = 1 << 0;
const PAGE_SHIFT: u16 = 12;

/// The end.
pub const END: u32 = 0x00;
/// Frames and what is in them.
pub const PAGE_DATA: u32 = 0x01;
/// Width and page table levels of a PV guest.
pub const X86_PV_INFO: u32 = 0x02;
/// Frames of a PV guest's table of frames.
pub const X86_PV_P2M_FRAMES: u32 = 0x03;
/// A PV vCPU's registers.
pub const X86_PV_VCPU_BASIC: u32 = 0x04;
/// A PV vCPU's callbacks and MSRs that no older record has.
pub const X86_PV_VCPU_EXTENDED: u32 = 0x05;
/// A PV vCPU's extended state.
pub const X86_PV_VCPU_XSAVE: u32 = 0x06;
/// A PV guest's shared info page.
pub const SHARED_INFO: u32 = 0x07;
/// How the guest sees time-stamp counters.
pub const X86_TSC_INFO: u32 = 0x08;
/// CPUs and devices of an HVM or PVH guest.
pub const HVM_CONTEXT: u32 = 0x09;
/// Parameters of an HVM or PVH guest.
pub const HVM_PARAMS: u32 = 0x0a;
/// What Xen before 4.6 said of a device model; deprecated.
pub const TOOLSTACK: u32 = 0x0b;
/// A PV vCPU's MSRs.
pub const X86_PV_VCPU_MSRS: u32 = 0x0c;
/// Page data that follows is sent a second time, to be compared.
pub const VERIFY: u32 = 0x0d;
/// The end of a checkpoint.
pub const CHECKPOINT: u32 = 0x0e;
/// What a secondary of a checkpointed guest has changed.
pub const CHECKPOINT_DIRTY_PFN_LIST: u32 = 0x0f;
/// What does not change while the guest runs is complete.
pub const STATIC_DATA_END: u32 = 0x10;
/// The CPUID leaves that the guest sees.
pub const X86_CPUID_POLICY: u32 = 0x11;
/// The MSRs that the guest sees and that tell of the CPU.
pub const X86_MSR_POLICY: u32 = 0x12;
/// A record that whoever does not know it may skip.
pub const OPTIONAL: u32 = 1 << 31;

/// A record's name, as the specification has it.
pub fn name(kind: u32) -> &'static str {
    match kind {
        END => "END",
        PAGE_DATA => "PAGE_DATA",
        X86_PV_INFO => "X86_PV_INFO",
        X86_PV_P2M_FRAMES => "X86_PV_P2M_FRAMES",
        X86_PV_VCPU_BASIC => "X86_PV_VCPU_BASIC",
        X86_PV_VCPU_EXTENDED => "X86_PV_VCPU_EXTENDED",
        X86_PV_VCPU_XSAVE => "X86_PV_VCPU_XSAVE",
        SHARED_INFO => "SHARED_INFO",
        X86_TSC_INFO => "X86_TSC_INFO",
        HVM_CONTEXT => "HVM_CONTEXT",
        HVM_PARAMS => "HVM_PARAMS",
        TOOLSTACK => "TOOLSTACK",
        X86_PV_VCPU_MSRS => "X86_PV_VCPU_MSRS",
        VERIFY => "VERIFY",
        CHECKPOINT => "CHECKPOINT",
        CHECKPOINT_DIRTY_PFN_LIST => "CHECKPOINT_DIRTY_PFN_LIST",
        STATIC_DATA_END => "STATIC_DATA_END",
        X86_CPUID_POLICY => "X86_CPUID_POLICY",
        X86_MSR_POLICY => "X86_MSR_POLICY",
        _ => "unknown",
    }
}

/// What a guest is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestKind {
    /// Paravirtual.
    Pv,
    /// In hardware's virtual machine: HVM with an emulator, or PVH without one.
    Hvm,
}

/// Both headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Domain {
    /// The stream's version: 2 (Xen 4.6 to 4.13) or 3.
    pub version: u32,
    /// What the guest is.
    pub kind: GuestKind,
    /// The Xen it was saved on: major, minor. 0 for major: converted from an older format.
    pub xen: (u32, u32),
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawImageHeader {
    marker: big_endian::U64,
    ident: big_endian::U32,
    version: big_endian::U32,
    options: big_endian::U16,
    reserved: [u8; 6],
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawDomainHeader {
    kind: little_endian::U32,
    page_shift: little_endian::U16,
    reserved: little_endian::U16,
    xen_major: little_endian::U32,
    xen_minor: little_endian::U32,
}

const _: () = assert!(size_of::<RawImageHeader>() == 24);
const _: () = assert!(size_of::<RawDomainHeader>() == 16);

/// Reads both headers.
pub(super) fn read_headers<R: Read>(input: &mut Input<R>) -> Result<Domain> {
    input.enter(Place::ImageHeader);
    let image: RawImageHeader = input.read()?;
    let (version, options) = (image.version.get(), image.options.get());
    if image.marker.get() != MARKER || image.ident.get() != IDENT {
        return Err(input.fault(Fault::Magic));
    }
    if !matches!(version, 2 | 3) {
        return Err(input.fault(Fault::Version(version)));
    }
    if options & OPTION_BIG_ENDIAN != 0 {
        return Err(input.fault(Fault::ByteOrder));
    }
    if options != 0 || image.reserved != [0; 6] {
        return Err(input.fault(Fault::Reserved));
    }
    input.enter(Place::DomainHeader);
    let domain: RawDomainHeader = input.read()?;
    let value = |what, value| Fault::Value { what, value };
    let kind = match domain.kind.get() {
        1 => GuestKind::Pv,
        2 => GuestKind::Hvm,
        other => return Err(input.fault(value("guest type", other.into()))),
    };
    if domain.page_shift.get() != PAGE_SHIFT {
        return Err(input.fault(value("page shift", domain.page_shift.get().into())));
    }
    if domain.reserved.get() != 0 {
        return Err(input.fault(Fault::Reserved));
    }
    Ok(Domain { version, kind, xen: (domain.xen_major.get(), domain.xen_minor.get()) })
}

/// Writes both headers.
pub(super) fn write_headers(out: &mut impl Write, domain: &Domain) -> io::Result<()> {
    let image = RawImageHeader {
        marker: MARKER.into(),
        ident: IDENT.into(),
        version: domain.version.into(),
        options: 0.into(),
        reserved: [0; 6],
    };
    out.write_all(image.as_bytes())?;
    let header = RawDomainHeader {
        kind: match domain.kind {
            GuestKind::Pv => 1.into(),
            GuestKind::Hvm => 2.into(),
        },
        page_shift: PAGE_SHIFT.into(),
        reserved: 0.into(),
        xen_major: domain.xen.0.into(),
        xen_minor: domain.xen.1.into(),
    };
    out.write_all(header.as_bytes())
}
