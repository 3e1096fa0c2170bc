//! Page data: which frames, of what type, and what is in them.

use super::{records, Fault};

/// Pages in a record that is written here: as libxc does it.
pub const BATCH_PAGES: usize = 1024;

const PFN_BITS: u32 = 52;
const TYPE_SHIFT: u32 = 60;

/// What a frame is: XEN_DOMCTL_PFINFO_*.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageKind {
    /// A plain page.
    Normal,
    /// A PV guest's page table: level from 1 to 4, and whether it is pinned.
    Table(u8, bool),
    /// A page whose memory is broken: the guest has it, without data.
    Broken,
    /// To be allocated, without data.
    Alloc,
    /// No page.
    None,
}

impl PageKind {
    /// Whether the record has the page's bytes.
    pub fn has_data(self) -> bool {
        matches!(self, PageKind::Normal | PageKind::Table(..))
    }

    /// Whether the guest has memory there.
    pub fn is_memory(self) -> bool {
        matches!(self, PageKind::Normal | PageKind::Table(..) | PageKind::Alloc)
    }

    fn bits(self) -> u64 {
        match self {
            PageKind::Normal => 0,
            PageKind::Table(level, pinned) => u64::from(level) | u64::from(pinned) << 3,
            PageKind::Broken => 0xd,
            PageKind::Alloc => 0xe,
            PageKind::None => 0xf,
        }
    }
}

/// A frame of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageEntry {
    /// The guest's frame number.
    pub pfn: u64,
    /// What it is.
    pub kind: PageKind,
}

impl PageEntry {
    /// Reads an entry.
    pub fn parse(raw: u64) -> Result<PageEntry, Fault> {
        let pfn = raw & ((1 << PFN_BITS) - 1);
        if raw >> PFN_BITS & 0xff != 0 {
            return Err(Fault::Reserved);
        }
        let kind = match raw >> TYPE_SHIFT {
            0 => PageKind::Normal,
            level @ 1..=4 => PageKind::Table(level as u8, false),
            level @ 9..=0xc => PageKind::Table((level & 7) as u8, true),
            0xd => PageKind::Broken,
            0xe => PageKind::Alloc,
            0xf => PageKind::None,
            other => return Err(Fault::Value { what: "page type", value: other }),
        };
        Ok(PageEntry { pfn, kind })
    }

    /// The entry's number.
    pub fn raw(self) -> u64 {
        self.kind.bits() << TYPE_SHIFT | self.pfn & ((1 << PFN_BITS) - 1)
    }
}

/// Reads the entries of a record, whose body has `length` bytes. `head` is the body's first 8 bytes, `list` reads so many more.
///
/// What is checked: that there is at least one entry, and that body and entries agree to the byte.
pub(super) fn parse_list(head: &[u8; 8], length: u32) -> Result<u64, Fault> {
    let (count, reserved, _) = records::split_pair(head)?;
    if reserved != 0 {
        return Err(Fault::Reserved);
    }
    let list = u64::from(count) * 8;
    if count == 0 || list > u64::from(length) - 8 {
        return Err(Fault::Length { found: length.into(), wanted: "no room for the frames it counts" });
    }
    Ok(list)
}

/// Checks the entries of a record against the bytes left for its pages.
pub(super) fn parse_entries(list: &[u8], data_bytes: u64) -> Result<Vec<PageEntry>, Fault> {
    let (raws, _) = list.as_chunks::<8>();
    let entries: Vec<PageEntry> =
        raws.iter().map(|raw| PageEntry::parse(u64::from_le_bytes(*raw))).collect::<Result<_, _>>()?;
    let pages = entries.iter().filter(|entry| entry.kind.has_data()).count() as u64;
    match pages * engine::units::PAGE_SIZE == data_bytes {
        true => Ok(entries),
        false => Err(Fault::Length {
            found: data_bytes,
            wanted: "behind its frames, more or fewer than their pages",
        }),
    }
}
