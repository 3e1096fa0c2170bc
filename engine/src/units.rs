//! Units are types; the only shifts and masks of the engine live here.
//!
//! Invariants:
//! - a page is 4 KiB everywhere: in guest memory, in volumes, in the savefile;
//! - a [`PageIndex`] counts from the start of one image; for guest memory it is the guest frame number ([`Gfn`]);
//! - a [`PageRange`] never wraps: `first + count` fits in 64 bits, and it is never empty once it is in a map;
//! - arithmetic on values read from a file is checked, and answers `None` rather than wrapping.

use std::fmt;

/// Bytes in a page.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;
/// Bytes in a page, as a buffer length.
pub const PAGE_BYTES: usize = PAGE_SIZE as usize;
const PAGE_SHIFT: u32 = 12;

/// The largest image format 1 can describe: page numbers are stored in 32 bits, which is 16 TiB.
pub const IMAGE_PAGES_MAX: u64 = u32::MAX as u64;

/// A page's place in its image, in pages from the image's start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageIndex(pub u64);

/// A guest frame number: a page's place in guest memory.
pub type Gfn = PageIndex;

/// A number of pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageCount(pub u64);

/// A place in a file, in bytes from its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteOffset(pub u64);

/// A number of bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteCount(pub u64);

/// A run of pages: `count` pages from `first` on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageRange {
    /// The first page of the run.
    pub first: PageIndex,
    /// How many pages it has.
    pub count: PageCount,
}

impl PageIndex {
    /// Where the page begins in a file that holds the image from its start.
    ///
    /// Only for indices within [`IMAGE_PAGES_MAX`]: beyond it the offset saturates.
    pub const fn offset(self) -> ByteOffset {
        ByteOffset(self.0.saturating_mul(PAGE_SIZE))
    }

    /// The page that holds the byte at `offset`.
    pub const fn holding(offset: ByteOffset) -> PageIndex {
        PageIndex(offset.0 >> PAGE_SHIFT)
    }

    /// The page `count` further on, or `None` past 64 bits.
    pub const fn checked_add(self, count: PageCount) -> Option<PageIndex> {
        match self.0.checked_add(count.0) {
            Some(sum) => Some(PageIndex(sum)),
            None => None,
        }
    }
}

impl PageCount {
    /// None at all.
    pub const ZERO: PageCount = PageCount(0);

    /// As bytes; saturates beyond [`IMAGE_PAGES_MAX`].
    pub const fn bytes(self) -> ByteCount {
        ByteCount(self.0.saturating_mul(PAGE_SIZE))
    }

    /// As a buffer length in bytes; only for counts the caller has bounded (a chunk, a batch).
    pub const fn buffer_len(self) -> usize {
        self.bytes().0 as usize
    }
}

impl ByteOffset {
    /// The offset `count` further on, or `None` past 64 bits.
    pub const fn checked_add(self, count: ByteCount) -> Option<ByteOffset> {
        match self.0.checked_add(count.0) {
            Some(sum) => Some(ByteOffset(sum)),
            None => None,
        }
    }
}

impl ByteCount {
    /// None at all.
    pub const ZERO: ByteCount = ByteCount(0);

    /// The number of pages, or `None` when it is no whole number of pages.
    pub const fn whole_pages(self) -> Option<PageCount> {
        if self.0.is_multiple_of(PAGE_SIZE) {
            Some(PageCount(self.0 >> PAGE_SHIFT))
        } else {
            None
        }
    }

    /// The number of pages that cover it, the last one perhaps in part.
    pub const fn pages_covering(self) -> PageCount {
        PageCount(self.0.div_ceil(PAGE_SIZE))
    }
}

impl PageRange {
    /// `count` pages from `first` on.
    pub const fn new(first: u64, count: u64) -> PageRange {
        PageRange { first: PageIndex(first), count: PageCount(count) }
    }

    /// The page after the last one; saturates past 64 bits.
    pub const fn end(self) -> PageIndex {
        PageIndex(self.first.0.saturating_add(self.count.0))
    }

    /// Whether it has no page.
    pub const fn is_empty(self) -> bool {
        self.count.0 == 0
    }

    /// Every page of the run, in order.
    pub fn pages(self) -> impl Iterator<Item = PageIndex> {
        (self.first.0..self.end().0).map(PageIndex)
    }

    /// What both runs have, or `None` when that is nothing.
    pub fn intersection(self, other: PageRange) -> Option<PageRange> {
        let first = self.first.max(other.first);
        let end = self.end().min(other.end());
        (first < end).then(|| PageRange { first, count: PageCount(end.0 - first.0) })
    }
}

impl fmt::Display for PageIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Display for PageCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl fmt::Display for ByteOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Display for ByteCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl fmt::Display for PageRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{}", self.first, self.count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_and_bytes_convert_exactly() {
        assert_eq!(PageIndex(3).offset(), ByteOffset(12288));
        assert_eq!(PageIndex::holding(ByteOffset(12287)), PageIndex(2));
        assert_eq!(ByteCount(8192).whole_pages(), Some(PageCount(2)));
        assert_eq!(ByteCount(8193).whole_pages(), None);
        assert_eq!(ByteCount(8193).pages_covering(), PageCount(3));
    }

    #[test]
    fn nothing_wraps() {
        assert_eq!(PageIndex(u64::MAX).offset(), ByteOffset(u64::MAX));
        assert_eq!(PageRange::new(u64::MAX, 2).end(), PageIndex(u64::MAX));
        assert_eq!(ByteOffset(u64::MAX).checked_add(ByteCount(1)), None);
    }

    #[test]
    fn intersection_is_what_both_have() {
        let run = PageRange::new(10, 10);
        assert_eq!(run.intersection(PageRange::new(15, 100)), Some(PageRange::new(15, 5)));
        assert_eq!(run.intersection(PageRange::new(20, 1)), None);
    }
}
