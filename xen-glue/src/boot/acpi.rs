//! The ACPI tables of a PVH guest: what it has (processors), and above all what it has not (everything else). Linux learns from the MADT
//! that it has more than one vCPU, and which; it wakes them by the emulated local APIC, as on hardware.
//!
//! Invariants: the root pointer (RSDP) comes first; each table begins at a multiple of 16 bytes and its bytes add up to zero.
//!
//! They lie in the segment below 1 MiB where a PC's firmware has its own. No kernel takes that for free memory, and one that doesn't
//! look at hvm_start_info.rsdp_paddr (Linux before 4.20) searches it for the root pointer. Within the guest's RAM they are captured
//! and restored like any other page of it; libxl has frames at 0xfc000000 for them, which it must keep apart.
//!
//! Unlike libxl's, the FADT says that the hardware is reduced (libxl names registers at ports nobody serves, and Linux reads
//! events from them that are none).
//!
//! Sources: ACPI specification 5.0, chapters 5.2 (tables) and 20.2 (AML); what libxl's PVH guests have is in
//! `tools/libacpi/build.c` and `tools/libs/light/libxl_x86_acpi.c`.

use std::mem::{offset_of, size_of};

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromZeros, Immutable, IntoBytes};

/// Where they lie: the guest physical address.
pub const ADDRESS: u64 = 0xf_0000;
/// The room they have, in bytes: [`VCPUS_MAX`] take a tenth of it.
pub const SIZE: u64 = 0x1_0000;
/// Xen's HVM_MAX_VCPUS; the last one's APIC id is 254, and 255 means all.
pub const VCPUS_MAX: u32 = 128;

const LOCAL_APIC: u32 = 0xfee0_0000;

/// The APIC id Xen gives a vCPU (`xen/arch/x86/hvm/vlapic.c`): even numbers, as if each were a core with a second thread.
pub fn apic_id(vcpu: u32) -> Option<u8> {
    u8::try_from(vcpu.checked_mul(2)?).ok()
}

/// The header of every table.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Header {
    signature: [u8; 4],
    length: U32,
    revision: u8,
    checksum: u8,
    oem_id: [u8; 6],
    oem_table_id: [u8; 8],
    oem_revision: U32,
    creator_id: [u8; 4],
    creator_revision: U32,
}

/// The root pointer. `checksum` is of what was all of it in ACPI 1.0: the first 20 bytes.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Rsdp {
    signature: [u8; 8],
    checksum: u8,
    oem_id: [u8; 6],
    revision: u8,
    rsdt_address: U32,
    length: U32,
    xsdt_address: U64,
    extended_checksum: u8,
    reserved: [u8; 3],
}

/// What follows the header in a FADT of revision 5. Blocks of registers a PVH guest has none of are zero, and left together here.
#[derive(IntoBytes, FromZeros, Immutable)]
#[repr(C)]
struct Fadt {
    firmware_ctrl: U32,
    dsdt: U32,
    reserved: u8,
    preferred_pm_profile: u8,
    sci_int: U16,
    registers: [u8; 48],
    p_lvl2_lat: U16,
    p_lvl3_lat: U16,
    flush: [u8; 6],
    rtc: [u8; 3],
    iapc_boot_arch: [u8; 2],
    reserved1: u8,
    flags: U32,
    reset_reg: [u8; 12],
    reset_value: u8,
    arm_boot_arch: [u8; 2],
    minor_revision: u8,
    x_firmware_ctrl: U64,
    x_dsdt: U64,
    x_registers: [u8; 120],
}

/// A processor in the MADT.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct LocalApic {
    kind: u8,
    length: u8,
    processor_uid: u8,
    apic_id: u8,
    flags: U32,
}

const _: () = assert!(size_of::<Header>() == 36 && size_of::<Rsdp>() == 36 && size_of::<LocalApic>() == 8);
const _: () = assert!(size_of::<Header>() + size_of::<Fadt>() == 268, "revision 5");
const _: () = assert!(offset_of!(Fadt, flags) == 112 - 36 && offset_of!(Fadt, x_dsdt) == 140 - 36);
const _: () =
    assert!(offset_of!(Fadt, iapc_boot_arch) == 109 - 36 && offset_of!(Fadt, p_lvl2_lat) == 96 - 36);

/// No VGA to be probed, no CMOS clock to be read. That there are legacy devices or a keyboard controller is not said.
const BOOT_ARCH_NO_VGA: u16 = 1 << 2;
const BOOT_ARCH_NO_CMOS_RTC: u16 = 1 << 5;
/// WBINVD works; HLT is the one idle state.
const FLAG_WBINVD: u32 = 1 << 0;
const FLAG_PROC_C1: u32 = 1 << 2;
/// Buttons and alarm are no fixed hardware.
const FLAG_POWER_BUTTON: u32 = 1 << 4;
const FLAG_SLEEP_BUTTON: u32 = 1 << 5;
const FLAG_FIX_RTC: u32 = 1 << 6;
/// There is no fixed hardware at all: no PM timer, no SCI, no port to write to.
const FLAG_HW_REDUCED: u32 = 1 << 20;
/// Latencies above 100 and 1000 µs: no C2, no C3.
const NO_SUCH_STATE: u16 = 0xfff;
/// The processor is usable.
const ENABLED: u32 = 1;

/// The tables of a guest with so many vCPUs, at most [`VCPUS_MAX`], at a guest physical address below 4 GiB.
pub fn tables(vcpus: u32, address: u32) -> Vec<u8> {
    let mut out = Tables { address, bytes: vec![0; size_of::<Rsdp>()] };
    let dsdt = out.add(b"DSDT", 2, &processors(vcpus));
    let fadt = out.add(b"FACP", 5, fadt(dsdt).as_bytes());
    let madt = out.add(b"APIC", 3, &madt(vcpus));
    let pointers = [fadt, madt].map(|table| U64::new(u64::from(table)));
    let xsdt = out.add(b"XSDT", 1, pointers.as_bytes());
    out.finish(xsdt)
}

struct Tables {
    address: u32,
    bytes: Vec<u8>,
}

impl Tables {
    /// Appends a table; returns its guest physical address.
    fn add(&mut self, signature: &[u8; 4], revision: u8, body: &[u8]) -> u32 {
        let header = Header {
            signature: *signature,
            length: U32::new((size_of::<Header>() + body.len()) as u32),
            revision,
            checksum: 0,
            oem_id: *b"Xen\0\0\0",
            oem_table_id: *b"PVH\0\0\0\0\0",
            oem_revision: U32::ZERO,
            creator_id: *b"DVMX",
            creator_revision: U32::ZERO,
        };
        self.bytes.resize(self.bytes.len().next_multiple_of(16), 0);
        let start = self.bytes.len();
        self.bytes.extend(header.as_bytes());
        self.bytes.extend(body);
        self.bytes[start + offset_of!(Header, checksum)] = checksum(&self.bytes[start..]);
        self.address + start as u32
    }

    /// Writes the root pointer in front.
    fn finish(mut self, xsdt: u32) -> Vec<u8> {
        let mut rsdp = Rsdp {
            signature: *b"RSD PTR ",
            checksum: 0,
            oem_id: *b"Xen\0\0\0",
            revision: 2,
            rsdt_address: U32::ZERO,
            length: U32::new(size_of::<Rsdp>() as u32),
            xsdt_address: U64::new(u64::from(xsdt)),
            extended_checksum: 0,
            reserved: [0; 3],
        };
        rsdp.checksum = checksum(&rsdp.as_bytes()[..20]);
        rsdp.extended_checksum = checksum(rsdp.as_bytes());
        self.bytes[..size_of::<Rsdp>()].copy_from_slice(rsdp.as_bytes());
        self.bytes
    }
}

fn fadt(dsdt: u32) -> Fadt {
    let mut fadt = Fadt::new_zeroed();
    fadt.dsdt.set(dsdt);
    fadt.x_dsdt.set(u64::from(dsdt));
    fadt.p_lvl2_lat.set(NO_SUCH_STATE);
    fadt.p_lvl3_lat.set(NO_SUCH_STATE);
    fadt.iapc_boot_arch = (BOOT_ARCH_NO_VGA | BOOT_ARCH_NO_CMOS_RTC).to_le_bytes();
    let no_fixed_hardware = FLAG_POWER_BUTTON | FLAG_SLEEP_BUTTON | FLAG_FIX_RTC | FLAG_HW_REDUCED;
    fadt.flags.set(FLAG_WBINVD | FLAG_PROC_C1 | no_fixed_hardware);
    fadt
}

/// A local APIC for each vCPU, all enabled; no I/O APIC and, by flags of zero, no pair of 8259s.
fn madt(vcpus: u32) -> Vec<u8> {
    let mut body = [U32::new(LOCAL_APIC), U32::ZERO].as_bytes().to_vec();
    for vcpu in 0..vcpus.min(VCPUS_MAX) {
        let flags = U32::new(ENABLED);
        let apic_id = apic_id(vcpu).unwrap_or(u8::MAX);
        body.extend(LocalApic { kind: 0, length: 8, processor_uid: vcpu as u8, apic_id, flags }.as_bytes());
    }
    body
}

/// AML: a device object for each processor the MADT names, as the specification wants it.
///
/// `Device (\_SB.P000) { Name (_HID, "ACPI0007") Name (_UID, 0) }`
fn processors(vcpus: u32) -> Vec<u8> {
    const DEVICE: [u8; 2] = [0x5b, 0x82];
    const NAME: u8 = 0x08;
    const BYTE: u8 = 0x0a;
    const STRING: u8 = 0x0d;
    let mut aml = Vec::new();
    for vcpu in 0..vcpus.min(VCPUS_MAX) {
        let mut device = b"\\\x2e_SB_".to_vec();
        device.extend(format!("P{vcpu:03X}").as_bytes());
        device.push(NAME);
        device.extend(b"_HID");
        device.push(STRING);
        device.extend(b"ACPI0007\0");
        device.push(NAME);
        device.extend(b"_UID");
        device.extend([BYTE, vcpu as u8]);
        aml.extend(DEVICE);
        // A length below 64 is one byte, which it counts.
        aml.push(device.len() as u8 + 1);
        aml.extend(device);
    }
    aml
}

/// What makes the bytes add up to zero, given that the place for it is still zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)).wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn table(all: &[u8], address: u64) -> &[u8] {
        let bytes = &all[(address - ADDRESS) as usize..];
        &bytes[..u32::from_le_bytes(*bytes[4..].first_chunk().unwrap()) as usize]
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(*bytes[at..].first_chunk().unwrap())
    }

    #[test]
    fn each_table_is_reached_and_adds_up() {
        for vcpus in [1, 2, VCPUS_MAX] {
            let all = tables(vcpus, ADDRESS as u32);
            assert!(all.len() as u64 <= SIZE);
            assert_eq!((&all[..8], sum(&all[..20]), sum(&all[..36])), (&b"RSD PTR "[..], 0, 0));
            let xsdt = table(&all, u64_at(&all, 24));
            let fadt = table(&all, u64_at(xsdt, 36));
            let madt = table(&all, u64_at(xsdt, 44));
            let dsdt = table(&all, u64_at(fadt, 140));
            for (table, signature) in [(xsdt, b"XSDT"), (fadt, b"FACP"), (madt, b"APIC"), (dsdt, b"DSDT")] {
                assert_eq!((&table[..4], sum(table)), (&signature[..], 0));
            }
            assert_eq!(madt.len(), 44 + 8 * vcpus as usize);
            assert_eq!(madt[madt.len() - 8..], [0, 8, vcpus as u8 - 1, (vcpus as u8 - 1) * 2, 1, 0, 0, 0]);
            assert_eq!(dsdt.len(), 36 + 35 * vcpus as usize);
        }
    }

    #[test]
    fn a_processor_is_a_device() {
        assert_eq!(processors(1), b"\x5b\x82\x21\\\x2e_SB_P000\x08_HID\x0dACPI0007\0\x08_UID\x0a\0");
    }
}
