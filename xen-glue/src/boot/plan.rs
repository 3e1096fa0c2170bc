//! What goes where in a PVH guest's memory before its first instruction. Pure.
//!
//! Invariants of a [`BootImage`]:
//! - pieces are sorted by address, disjoint, and each inside one run of RAM of the layout;
//! - the memory map is sorted and disjoint; as RAM it has the layout's frames, all of them but those of the ACPI tables;
//! - what the kernel reads first (start info, modules, map, command line) follows the kernel itself, then comes the initrd: where
//!   libxc puts them (`tools/libs/guest/xg_dom_core.c`).

use std::borrow::Cow;
use std::ops::Range;

use engine::units::{ByteCount, PageRange};

use super::acpi;
use super::elf::Kernel;
use super::start_info::{self, Contents};
use crate::layout::{Layout, SPECIAL_COUNT, SPECIAL_FIRST};

const PAGE: u64 = 4096;
/// Linux' COMMAND_LINE_SIZE, less the NUL: it would cut off the rest without a word.
pub const CMDLINE_BYTES_MAX: usize = 2047;
/// Before it has page tables of its own, Linux sees the first GiB of memory.
const EARLY_END: u64 = 1 << 30;

/// Why a guest cannot be laid out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// Not all of it finds room.
    #[error("the {what} needs the guest's memory from {start:#x} to {end:#x}, which it does not have; give it more memory")]
    NoRoom {
        /// Which piece.
        what: &'static str,
        /// Guest physical address.
        start: u64,
        /// Behind the last byte.
        end: u64,
    },
    /// The kernel wants the place of the tables.
    #[error("the kernel and the {what} both want the guest's memory at {at:#x}")]
    Overlap {
        /// Which piece.
        what: &'static str,
        /// Guest physical address.
        at: u64,
    },
    /// The kernel would not see what it is told.
    #[error("the kernel ends at {0:#x}: what it reads first must lie below 1 GiB")]
    TooHigh(u64),
    /// Linux would cut it off.
    #[error("the kernel command line has {0} bytes, more than {CMDLINE_BYTES_MAX}")]
    CmdlineLong(usize),
    /// It would end there.
    #[error("the kernel command line has a NUL byte")]
    CmdlineNul,
    /// More, or fewer, than a guest can have.
    #[error("a guest has 1 to {max} vCPUs, not {0}", max = acpi::VCPUS_MAX)]
    Vcpus(u32),
    /// The layout has RAM where Xen's special pages are.
    #[error("the guest's RAM reaches into the special pages at {:#x}", special().start)]
    SpecialPages,
}

/// What is written to one place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content<'a> {
    /// These bytes.
    Bytes(Cow<'a, [u8]>),
    /// So many zero bytes. Fresh memory is zero already on most Xens, not on all.
    Zeros(u64),
}

/// One place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece<'a> {
    /// Guest physical address.
    pub address: u64,
    /// Never empty.
    pub content: Content<'a>,
    /// For messages: "kernel".
    pub what: &'static str,
}

impl<'a> Piece<'a> {
    fn bytes(what: &'static str, address: u64, bytes: impl Into<Cow<'a, [u8]>>) -> Piece<'a> {
        Piece { address, content: Content::Bytes(bytes.into()), what }
    }

    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        match &self.content {
            Content::Bytes(bytes) => bytes.len() as u64,
            Content::Zeros(count) => *count,
        }
    }

    /// The guest physical addresses it takes.
    pub fn range(&self) -> Range<u64> {
        self.address..self.address.saturating_add(self.size())
    }
}

/// A guest ready to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootImage<'a> {
    /// What is written where.
    pub pieces: Vec<Piece<'a>>,
    /// The guest physical address of the first instruction.
    pub entry: u32,
    /// That of hvm_start_info.
    pub start_info: u32,
    /// Guest physical address, size in bytes, and type ([`start_info::RAM`] and the others).
    pub memory_map: Vec<(u64, u64, u32)>,
}

/// Lays out a guest.
pub fn plan<'a>(
    kernel: &Kernel<'a>,
    initrd: &'a [u8],
    cmdline: &str,
    layout: &Layout,
    vcpus: u32,
) -> Result<BootImage<'a>, PlanError> {
    check(cmdline, vcpus)?;
    let mut pieces: Vec<_> = kernel.segments.iter().flat_map(pieces_of).collect();
    let memory_map = memory_map(layout)?;
    pieces.push(Piece::bytes("ACPI tables", acpi::ADDRESS, acpi::tables(vcpus, acpi::ADDRESS as u32)));

    let kernel_end = kernel.segments.iter().map(|segment| segment.range().end).max().unwrap_or(0);
    let start_info = kernel_end.next_multiple_of(PAGE);
    let mut contents = Contents { cmdline, initrd: None, rsdp: acpi::ADDRESS, memory_map: &memory_map };
    if !initrd.is_empty() {
        // Its size depends on that there is an initrd, not on where.
        contents.initrd = Some((0, initrd.len() as u64));
        let address = (start_info + start_info::size(&contents)).next_multiple_of(PAGE);
        contents.initrd = Some((address, initrd.len() as u64));
        pieces.push(Piece::bytes("initrd", address, initrd));
    }
    let told = Piece::bytes("start info", start_info, start_info::bytes(&contents, start_info));
    if told.range().end > EARLY_END {
        return Err(PlanError::TooHigh(kernel_end));
    }
    pieces.push(told);

    pieces.sort_by_key(|piece| piece.address);
    check_places(&pieces, layout)?;
    let start_info = u32::try_from(start_info).map_err(|_| PlanError::TooHigh(kernel_end))?;
    Ok(BootImage { pieces, entry: kernel.entry, start_info, memory_map })
}

fn check(cmdline: &str, vcpus: u32) -> Result<(), PlanError> {
    if !(1..=acpi::VCPUS_MAX).contains(&vcpus) {
        return Err(PlanError::Vcpus(vcpus));
    }
    if cmdline.len() > CMDLINE_BYTES_MAX {
        return Err(PlanError::CmdlineLong(cmdline.len()));
    }
    if cmdline.contains('\0') {
        return Err(PlanError::CmdlineNul);
    }
    Ok(())
}

/// A segment: what the file has of it, then zeros.
fn pieces_of<'a>(segment: &super::elf::Segment<'a>) -> impl Iterator<Item = Piece<'a>> {
    let bytes = Piece::bytes("kernel", segment.address, segment.bytes);
    let zeros = Piece { address: bytes.range().end, content: Content::Zeros(segment.zeros), what: "kernel" };
    [bytes, zeros].into_iter().filter(|piece| piece.size() > 0)
}

/// RAM, the ACPI tables in it, and the special pages.
fn memory_map(layout: &Layout) -> Result<Vec<(u64, u64, u32)>, PlanError> {
    let acpi = acpi::ADDRESS..acpi::ADDRESS + acpi::SIZE;
    let mut map = vec![(acpi.clone(), start_info::ACPI), (special(), start_info::RESERVED)];
    for ram in layout.runs().iter().map(addresses) {
        if ram.start < special().end && ram.end > special().start {
            return Err(PlanError::SpecialPages);
        }
        let below = ram.start..ram.end.min(acpi.start);
        let above = ram.start.max(acpi.end)..ram.end;
        map.extend(
            [below, above].into_iter().filter(|part| !part.is_empty()).map(|part| (part, start_info::RAM)),
        );
    }
    map.sort_by_key(|(range, _)| range.start);
    Ok(map.into_iter().map(|(range, kind)| (range.start, range.end - range.start, kind)).collect())
}

/// Every piece has its place to itself, in RAM.
fn check_places(pieces: &[Piece], layout: &Layout) -> Result<(), PlanError> {
    for piece in pieces {
        let Range { start, end } = piece.range();
        if !layout.runs().iter().map(addresses).any(|ram| ram.start <= start && end <= ram.end) {
            return Err(PlanError::NoRoom { what: piece.what, start, end });
        }
    }
    match pieces.windows(2).find(|pair| pair[0].range().end > pair[1].address) {
        None => Ok(()),
        Some(pair) => {
            let what = if pair[0].what == "kernel" { pair[1].what } else { pair[0].what };
            Err(PlanError::Overlap { what, at: pair[1].address })
        }
    }
}

/// The guest physical addresses of a run of frames. A layout's frames are below 16 TiB.
fn addresses(run: &PageRange) -> Range<u64> {
    let ByteCount(start) = engine::units::PageCount(run.first.0).bytes();
    start..start + run.count.bytes().0
}

fn special() -> Range<u64> {
    SPECIAL_FIRST * PAGE..(SPECIAL_FIRST + SPECIAL_COUNT) * PAGE
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::elf::Segment;
    use super::*;

    const BYTES: [u8; 0x3000] = [0x90; 0x3000];

    fn kernel(address: u64, bytes: usize, zeros: u64) -> Kernel<'static> {
        Kernel { segments: vec![Segment { address, bytes: &BYTES[..bytes], zeros }], entry: address as u32 }
    }

    #[test]
    fn everything_follows_the_kernel() {
        let layout = Layout::fresh(ByteCount(128 << 20));
        let image = plan(&kernel(16 << 20, 0x1234, 0x1000), b"initrd", "quiet", &layout, 2).unwrap();
        let places: Vec<_> = image.pieces.iter().map(|piece| (piece.what, piece.address)).collect();
        let acpi = ("ACPI tables", 0xf0000);
        let kernel = [("kernel", 0x100_0000), ("kernel", 0x100_1234)];
        assert_eq!(places, [acpi, kernel[0], kernel[1], ("start info", 0x100_3000), ("initrd", 0x100_4000)]);
        assert_eq!((image.entry, image.start_info), (0x100_0000, 0x100_3000));
        let ram = |start: u64, end: u64| (start, end - start, start_info::RAM);
        let special = (0xfeff_8000, 0x8000, start_info::RESERVED);
        let tables = (0xf0000, 0x10000, start_info::ACPI);
        assert_eq!(image.memory_map, [ram(0, 0xf0000), tables, ram(0x10_0000, 128 << 20), special]);
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let layout = Layout::fresh(ByteCount(20 << 20));
        let plan = |kernel: &Kernel<'static>, initrd: &'static [u8], cmdline: &str, vcpus| {
            plan(kernel, initrd, cmdline, &layout, vcpus).unwrap_err()
        };
        let fits = kernel(16 << 20, 1, 0);
        let high = kernel((20 << 20) - 0x3000, 1, 0);
        assert_eq!(
            plan(&high, &BYTES, "", 1),
            PlanError::NoRoom { what: "initrd", start: 0x13f_f000, end: 0x140_2000 }
        );
        assert!(matches!(
            plan(&kernel(20 << 20, 1, 0), b"", "", 1),
            PlanError::NoRoom { what: "kernel", .. }
        ));
        assert!(matches!(plan(&kernel(1 << 30, 1, 0), b"", "", 1), PlanError::TooHigh(_)));
        let under = kernel(acpi::ADDRESS - 1, 2, 0);
        assert_eq!(plan(&under, b"", "", 1), PlanError::Overlap { what: "ACPI tables", at: acpi::ADDRESS });
        assert_eq!(plan(&fits, b"", &"x".repeat(2048), 1), PlanError::CmdlineLong(2048));
        assert_eq!(plan(&fits, b"", "a\0b", 1), PlanError::CmdlineNul);
        assert_eq!(plan(&fits, b"", "", 0), PlanError::Vcpus(0));
        assert_eq!(plan(&fits, b"", "", 129), PlanError::Vcpus(129));
    }

    proptest! {
        #[test]
        fn pieces_are_apart_and_in_ram(
            memory in 0u64..6 << 30, address in 0u64..1 << 31, bytes in 0usize..0x3000, zeros in 0u64..1 << 27,
            initrd in 0usize..0x3000, vcpus in 1u32..=128, cmdline in "[ -~]{0,2047}",
        ) {
            let layout = Layout::fresh(ByteCount(memory));
            let kernel = kernel(address, bytes, zeros);
            if let Ok(image) = plan(&kernel, &BYTES[..initrd], &cmdline, &layout, vcpus) {
                for pair in image.pieces.windows(2) {
                    prop_assert!(pair[0].range().end <= pair[1].address);
                }
                for piece in &image.pieces {
                    prop_assert!(piece.size() > 0);
                    prop_assert!(layout.runs().iter().map(addresses).any(|run| run.start <= piece.address && piece.range().end <= run.end));
                }
                let map = &image.memory_map;
                prop_assert!(map.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0));
                let size = |kind| map.iter().filter(|entry| entry.2 == kind).map(|entry| entry.1).sum::<u64>();
                prop_assert_eq!(size(start_info::RAM) + size(start_info::ACPI), layout.pages().bytes().0);
            }
        }
    }
}
