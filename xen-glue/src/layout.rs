//! Where a guest's memory lies in its physical address space, and which frame each page of the memory image is.
//!
//! Invariants:
//! - runs are sorted, disjoint, never empty and below [`GFN_MAX`];
//! - the memory image holds the frames of all runs one after the other: holes of the address space take no room in it.

use engine::units::{ByteCount, PageCount, PageRange};

/// RAM below 4 GiB ends here at the latest; above are the special pages (0xfeff8 to 0xfefff) and the local APIC. A
/// multiple of 2 MiB, so that all of it can be populated in large pages.
pub const LOW_END: u64 = 0xf0000;
/// RAM that has no room below goes on here: 4 GiB.
pub const HIGH_START: u64 = 0x100000;
/// No guest frame lies beyond: 16 TiB of guest physical address space.
pub const GFN_MAX: u64 = 1 << 32;
/// The special pages of a PVH guest, as libxc places them (`tools/libs/guest/xg_dom_x86.c`).
pub const SPECIAL_FIRST: u64 = 0xfeff8;
/// How many.
pub const SPECIAL_COUNT: u64 = 8;
/// The xenstore ring: `special_pfn(SPECIALPAGE_XENSTORE)`.
pub const STORE_GFN: u64 = SPECIAL_FIRST + 4;
/// The identity-mapping page table: `special_pfn(SPECIALPAGE_IDENT_PT)`.
pub const IDENT_PT_GFN: u64 = SPECIAL_FIRST + 6;
/// The console ring: `special_pfn(SPECIALPAGE_CONSOLE)`.
pub const CONSOLE_GFN: u64 = SPECIAL_FIRST + 7;

/// Which frames a guest has, in the order in which the memory image has them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    runs: Vec<PageRange>,
}

impl Layout {
    /// That of a fresh guest with so much memory.
    pub fn fresh(memory: ByteCount) -> Layout {
        let pages = memory.pages_covering().0;
        let low = pages.min(LOW_END);
        let mut runs = vec![PageRange::new(0, low)];
        if pages > low {
            runs.push(PageRange::new(HIGH_START, pages - low));
        }
        runs.retain(|run| run.count.0 > 0);
        Layout { runs }
    }

    /// From runs as they were found or read. Error: which rule they break.
    pub fn new(runs: Vec<PageRange>) -> Result<Layout, &'static str> {
        let mut next = 0;
        for run in &runs {
            if run.count.0 == 0 {
                return Err("a run of frames is empty");
            }
            if run.first.0 < next {
                return Err("runs of frames are out of order or overlap");
            }
            next = run.first.checked_add(run.count).ok_or("a run of frames wraps")?.0;
            if next > GFN_MAX {
                return Err("a frame is beyond 16 TiB");
            }
        }
        Ok(Layout { runs })
    }

    /// The runs of frames.
    pub fn runs(&self) -> &[PageRange] {
        &self.runs
    }

    /// All frames together; no more than [`GFN_MAX`], as the runs are disjoint.
    pub fn pages(&self) -> PageCount {
        PageCount(self.runs.iter().map(|run| run.count.0).sum())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_of_five_gib_goes_on_above_four() {
        let layout = Layout::fresh(ByteCount(5 << 30));
        assert_eq!(layout.runs(), [PageRange::new(0, 0xf0000), PageRange::new(0x100000, 0x50000)]);
        assert_eq!(layout.pages().bytes(), ByteCount(5 << 30));
        assert_eq!(Layout::fresh(ByteCount(256 << 20)).runs(), [PageRange::new(0, 0x10000)]);
    }

    #[test]
    fn broken_layouts_are_refused() {
        let bad = [
            vec![PageRange::new(0, 0)],
            vec![PageRange::new(0, 5), PageRange::new(4, 1)],
            vec![PageRange::new(u64::MAX, 2)],
            vec![PageRange::new(GFN_MAX, 1)],
        ];
        for runs in bad {
            assert!(Layout::new(runs).is_err());
        }
    }
}
