//! What a PVH guest is told at its first instruction: hvm_start_info, version 1, and all it points to, in one piece of memory.
//!
//! Linux reads it before it has page tables of its own, by an identity mapping of the first GiB, and copies what it needs;
//! it must not lie above. Its memory map comes from here: Linux before 4.18 (which knew version 0 only) asks by XENMEM_memory_map.
//!
//! Source: `xen/include/public/arch-x86/hvm/start_info.h`; Linux `arch/x86/platform/pvh/enlighten.c`.

use std::mem::{offset_of, size_of};

use zerocopy::little_endian::{U32, U64};
use zerocopy::{Immutable, IntoBytes};

/// "xEn3", the E being 0xC5 (XEN_HVM_START_MAGIC_VALUE).
const MAGIC: u32 = 0x336e_c578;
/// It has a memory map.
const VERSION: u32 = 1;

/// RAM, in a memory map.
pub const RAM: u32 = 1;
/// Not to be touched.
pub const RESERVED: u32 = 2;
/// ACPI tables.
pub const ACPI: u32 = 3;

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct StartInfo {
    magic: U32,
    version: U32,
    flags: U32,
    nr_modules: U32,
    modlist_paddr: U64,
    cmdline_paddr: U64,
    rsdp_paddr: U64,
    memmap_paddr: U64,
    memmap_entries: U32,
    reserved: U32,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Module {
    paddr: U64,
    size: U64,
    cmdline_paddr: U64,
    reserved: U64,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct MemoryMapEntry {
    addr: U64,
    size: U64,
    kind: U32,
    reserved: U32,
}

const _: () = assert!(size_of::<StartInfo>() == 56 && size_of::<Module>() == 32);
const _: () = assert!(size_of::<MemoryMapEntry>() == 24);
const _: () = assert!(offset_of!(StartInfo, modlist_paddr) == 16 && offset_of!(StartInfo, rsdp_paddr) == 32);
const _: () =
    assert!(offset_of!(StartInfo, memmap_paddr) == 40 && offset_of!(StartInfo, memmap_entries) == 48);

/// What goes into it.
#[derive(Debug, Clone, Copy)]
pub struct Contents<'a> {
    /// The kernel command line, without NULs.
    pub cmdline: &'a str,
    /// The initrd's guest physical address and size, in bytes, if there is one.
    pub initrd: Option<(u64, u64)>,
    /// The guest physical address of the ACPI root pointer.
    pub rsdp: u64,
    /// Guest physical address, size in bytes, and type.
    pub memory_map: &'a [(u64, u64, u32)],
}

/// How many bytes it takes.
pub fn size(contents: &Contents) -> u64 {
    (cmdline_at(contents) + contents.cmdline.len() + 1) as u64
}

/// Its bytes, when it lies at this guest physical address: structure, module, memory map, command line.
pub fn bytes(contents: &Contents, address: u64) -> Vec<u8> {
    let at = |offset: usize| U64::new(address + offset as u64);
    let module = contents.initrd.map(|(address, size)| Module {
        paddr: U64::new(address),
        size: U64::new(size),
        cmdline_paddr: U64::ZERO,
        reserved: U64::ZERO,
    });
    let info = StartInfo {
        magic: U32::new(MAGIC),
        version: U32::new(VERSION),
        flags: U32::ZERO,
        nr_modules: U32::new(u32::from(module.is_some())),
        modlist_paddr: module.as_ref().map_or(U64::ZERO, |_| at(size_of::<StartInfo>())),
        cmdline_paddr: at(cmdline_at(contents)),
        rsdp_paddr: U64::new(contents.rsdp),
        memmap_paddr: at(memory_map_at(contents)),
        memmap_entries: U32::new(contents.memory_map.len() as u32),
        reserved: U32::ZERO,
    };
    let mut bytes = info.as_bytes().to_vec();
    bytes.extend(module.iter().flat_map(IntoBytes::as_bytes));
    for &(addr, size, kind) in contents.memory_map {
        let (addr, size, kind) = (U64::new(addr), U64::new(size), U32::new(kind));
        bytes.extend(MemoryMapEntry { addr, size, kind, reserved: U32::ZERO }.as_bytes());
    }
    bytes.extend(contents.cmdline.as_bytes());
    bytes.push(0);
    bytes
}

fn memory_map_at(contents: &Contents) -> usize {
    size_of::<StartInfo>() + contents.initrd.map_or(0, |_| size_of::<Module>())
}

fn cmdline_at(contents: &Contents) -> usize {
    memory_map_at(contents) + size_of::<MemoryMapEntry>() * contents.memory_map.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(*bytes[at..].first_chunk().unwrap())
    }

    #[test]
    fn pointers_lead_to_what_they_name() {
        let map = [(0, 0x1000, RAM), (0x1000, 0x1000, ACPI)];
        let contents =
            Contents { cmdline: "console=hvc0", initrd: Some((0x9000, 77)), rsdp: 0xf0000, memory_map: &map };
        let bytes = bytes(&contents, 0x5000);
        assert_eq!(bytes.len() as u64, size(&contents));
        assert_eq!(bytes[..16], *b"x\xc5n3\x01\0\0\0\0\0\0\0\x01\0\0\0");
        let at = |field| (u64_at(&bytes, field) - 0x5000) as usize;
        assert_eq!((u64_at(&bytes, at(16)), u64_at(&bytes, at(16) + 8)), (0x9000, 77));
        assert_eq!(bytes[at(24)..], *b"console=hvc0\0");
        assert_eq!(u64_at(&bytes, 32), 0xf0000);
        assert_eq!((u64_at(&bytes, at(40) + 24), bytes[at(40) + 40], bytes[48]), (0x1000, 3, 2));
    }

    #[test]
    fn without_an_initrd_there_is_no_module() {
        let contents = Contents { cmdline: "", initrd: None, rsdp: 0, memory_map: &[] };
        let bytes = bytes(&contents, 0x5000);
        assert_eq!((bytes[12], u64_at(&bytes, 16), bytes.len()), (0, 0, 57));
    }
}
