//! What is to be done, as data: which frames are populated in which calls, and how much memory a domain takes.

use engine::units::{ByteCount, PageCount, PageRange};

use crate::layout::{Layout, SPECIAL_COUNT, SPECIAL_FIRST};

/// Order of a large extent: 2 MiB, which Xen can map with one entry.
pub const LARGE_ORDER: u32 = 9;
const LARGE_FRAMES: u64 = 1 << LARGE_ORDER;
/// The most extents in one call: 1 GiB of large ones. Xen stops in between by itself, so the limit is that of our buffer.
const LARGE_EXTENTS_MAX: usize = 512;
/// As [`LARGE_EXTENTS_MAX`], of single frames: 32 KiB of numbers.
const SMALL_EXTENTS_MAX: usize = 4096;
/// What max_mem is above what is populated, as libxl sets it: room for pages that a guest hands back and takes again.
const SLACK: ByteCount = ByteCount(1 << 20);

/// One call of populate: `1 << order` frames from each of `first` on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extents {
    /// Their order.
    pub order: u32,
    /// The first frame of each.
    pub first: Vec<u64>,
}

/// The calls that populate these runs: each aligned 2 MiB that lies in one run as one extent, the rest frame by frame.
pub fn populate(runs: &[PageRange]) -> Vec<Extents> {
    let (mut large, mut small) = (Vec::new(), Vec::new());
    for run in runs {
        let (first, end) = (run.first.0, run.end().0);
        let large_first = first.next_multiple_of(LARGE_FRAMES).min(end);
        let large_end = (end - end % LARGE_FRAMES).max(large_first);
        small.extend(first..large_first);
        large.extend((large_first..large_end).step_by(LARGE_FRAMES as usize));
        small.extend(large_end..end);
    }
    let calls = |order, extents: &[u64], max| -> Vec<Extents> {
        extents.chunks(max).map(|first| Extents { order, first: first.to_vec() }).collect()
    };
    let mut plan = calls(LARGE_ORDER, &large, LARGE_EXTENTS_MAX);
    plan.extend(calls(0, &small, SMALL_EXTENTS_MAX));
    plan
}

/// What is left to do of a call of large extents of which Xen did `done`: memory in one piece has run out, so frame by frame.
pub fn in_single_frames(extents: &Extents, done: u64) -> Vec<Extents> {
    let left = extents.first.iter().skip(done as usize);
    left.map(|first| Extents { order: 0, first: (*first..first + (1 << extents.order)).collect() }).collect()
}

/// The frames a domain has besides those of its layout: the special pages, and those of `named` that lie nowhere else.
pub fn special_frames(layout: &Layout, named: &[u64]) -> Vec<u64> {
    let mut frames: Vec<u64> =
        (SPECIAL_FIRST..SPECIAL_FIRST + SPECIAL_COUNT).chain(named.iter().copied()).collect();
    frames.sort_unstable();
    frames.dedup();
    frames.retain(|frame| !holds(layout, *frame));
    frames
}

/// Whether the layout has this frame.
pub fn holds(layout: &Layout, gfn: u64) -> bool {
    let after = layout.runs().partition_point(|run| run.first.0 <= gfn);
    after.checked_sub(1).is_some_and(|at| gfn < layout.runs()[at].end().0)
}

/// What the domain may have at most: the RAM of a guest that takes back all it had handed back when it was captured.
pub fn max_memory(layout: &Layout, memory: ByteCount, special: usize) -> ByteCount {
    let memory = layout.pages().bytes().max(memory);
    ByteCount(memory.0.saturating_add(PageCount(special as u64).bytes().0 + SLACK.0))
}

/// Pages for Xen's own tables about it: what libxl gives (`libxl_get_required_paging_memory`), a page per MiB of memory and a
/// MiB per vCPU.
pub fn paging_pool(max_memory: ByteCount, vcpus: u32) -> ByteCount {
    let pages = 256 * u64::from(vcpus) + max_memory.0.div_ceil(1 << 20);
    PageCount(pages).bytes()
}

/// All that Xen must have free for a domain that may have so much.
pub fn needed(max_memory: ByteCount, vcpus: u32) -> ByteCount {
    ByteCount(max_memory.0.saturating_add(paging_pool(max_memory, vcpus).0))
}

/// The same for a guest of this layout with the usual special pages.
pub fn needed_for(layout: &Layout, vcpus: u32) -> ByteCount {
    needed(max_memory(layout, layout.pages().bytes(), SPECIAL_COUNT as usize), vcpus)
}

/// Whether a Xen with this command line scrubs all memory before it gives it away.
///
/// It does so with the memory of a domain that ended, not with pages that a living one hands back: those come to us with what
/// that guest has left in them, unless scrub-domheap asks for more (`xen/common/page_alloc.c`, `free_domheap_pages`). And it
/// does so with what nobody ever had, unless bootscrub forbids it.
pub fn scrubs_all(command_line: &str) -> bool {
    let option = |name: &str, unset| {
        let mut values =
            command_line.split_ascii_whitespace().filter_map(|word| match word.split_once('=') {
                Some((key, value)) if key == name => {
                    Some(matches!(value, "1" | "on" | "yes" | "true" | "enable" | "idle"))
                }
                None if word == name => Some(true),
                None if word.strip_prefix("no-") == Some(name) => Some(false),
                _ => None,
            });
        values.next_back().unwrap_or(unset)
    };
    option("scrub-domheap", false) && option("bootscrub", true)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    prop_compose! {
        fn layouts()(parts in proptest::collection::vec((0u64..1500, 1u64..2000), 0..12)) -> Layout {
            let mut next = 0;
            let runs = parts.into_iter().map(|(gap, count)| {
                let run = PageRange::new(next + gap, count);
                next = run.end().0;
                run
            });
            Layout::new(runs.collect()).unwrap()
        }
    }

    proptest! {
        /// Every frame exactly once, large extents aligned, and no more single frames than the edges of the runs have.
        #[test]
        fn populating_makes_exactly_the_layout(layout in layouts()) {
            let mut frames = Vec::new();
            for call in populate(layout.runs()) {
                prop_assert!(!call.first.is_empty() && call.first.len() <= SMALL_EXTENTS_MAX);
                for first in call.first {
                    prop_assert_eq!(first % (1 << call.order), 0);
                    frames.extend(first..first + (1 << call.order));
                }
            }
            frames.sort_unstable();
            let expected: Vec<u64> =
                layout.runs().iter().flat_map(|run| run.pages()).map(|page| page.0).collect();
            prop_assert_eq!(frames, expected);
        }

        #[test]
        fn single_frames_are_few(layout in layouts()) {
            let small: usize =
                populate(layout.runs()).iter().filter(|call| call.order == 0).map(|call| call.first.len()).sum();
            prop_assert!(small <= layout.runs().len() * 2 * (LARGE_FRAMES as usize - 1));
        }

        #[test]
        fn a_layout_holds_the_frames_of_its_runs(layout in layouts(), gfn in 0u64..40_000) {
            let held = layout.runs().iter().any(|run| run.pages().any(|page| page.0 == gfn));
            prop_assert_eq!(holds(&layout, gfn), held);
        }

        #[test]
        fn what_is_left_of_large_extents_is_the_rest_of_their_frames(count in 1u64..5, done in 0u64..6) {
            let extents = Extents { order: LARGE_ORDER, first: (0..count).map(|at| at * 512).collect() };
            let left: Vec<u64> = in_single_frames(&extents, done).into_iter().flat_map(|call| call.first).collect();
            prop_assert_eq!(left, (done * 512..count * 512).collect::<Vec<_>>());
        }
    }

    #[test]
    fn only_a_xen_that_is_told_to_scrubs_all() {
        for line in [
            "scrub-domheap",
            "loglvl=info scrub-domheap=1 bootscrub=idle",
            "scrub-domheap=0 scrub-domheap=yes",
        ] {
            assert!(scrubs_all(line), "{line}");
        }
        for line in [
            "",
            "no-scrub-domheap",
            "scrub-domheap=off",
            "scrub-domheap bootscrub=0",
            "scrub-domheap no-bootscrub",
            "scrub",
        ] {
            assert!(!scrubs_all(line), "{line}");
        }
    }

    #[test]
    fn special_frames_are_never_frames_of_the_layout() {
        let layout = Layout::new(vec![PageRange::new(0, 10), PageRange::new(SPECIAL_FIRST, 2)]).unwrap();
        let frames = special_frames(&layout, &[5, 20, SPECIAL_FIRST + 3]);
        let expected: Vec<u64> =
            [20].into_iter().chain(SPECIAL_FIRST + 2..SPECIAL_FIRST + SPECIAL_COUNT).collect();
        assert_eq!(frames, expected);
    }
}
