//! Properties of the plans, by brute force, and what reading ahead does to the page cache.

use std::collections::BTreeSet;
use std::io::Write;
use std::os::fd::AsRawFd;

use proptest::prelude::*;

use super::*;
use crate::units::PAGE_BYTES;

fn pages_of(runs: &[PageRange]) -> BTreeSet<u64> {
    runs.iter().flat_map(|run| run.pages()).map(|page| page.0).collect()
}

fn runs() -> impl Strategy<Value = Vec<PageRange>> {
    let run = (0..400u64, 0..40u64).prop_map(|(first, count)| PageRange::new(first, count));
    prop::collection::vec(run, 0..12)
}

fn is_in_order(runs: &[PageRange]) -> bool {
    runs.windows(2).all(|pair| pair[0].end() < pair[1].first) && runs.iter().all(|run| !run.is_empty())
}

proptest! {
    #[test]
    fn normalized_runs_hold_the_same_pages_and_only_gaps_so_small(runs in runs(), gap in 0..10u64) {
        let merged = normalized(runs.clone(), PageCount(gap));
        prop_assert!(is_in_order(&merged));
        prop_assert!(merged.windows(2).all(|pair| pair[1].first.0 - pair[0].end().0 > gap));
        let (before, after) = (pages_of(&runs), pages_of(&merged));
        prop_assert!(before.is_subset(&after));
        // A page that was added lies between two that were there, at most `gap` apart.
        for page in after.difference(&before) {
            let (below, above) = (before.range(..page).next_back(), before.range(page..).next());
            prop_assert!(below.zip(above).is_some_and(|(below, above)| above - below - 1 <= gap));
        }
    }

    #[test]
    fn what_is_recorded_lies_within_memory(touched in runs(), memory in 0..300u64) {
        let kept = bounded(touched.clone(), PageCount(memory));
        prop_assert!(is_in_order(&kept));
        let expected: BTreeSet<u64> = pages_of(&touched).into_iter().filter(|page| *page < memory).collect();
        prop_assert_eq!(pages_of(&kept), expected);
    }
}

#[test]
fn a_set_of_too_many_runs_is_recorded_in_fewer() {
    let pages = 4 * RUNS_MAX as u64;
    let scattered: Vec<PageRange> = (0..pages).step_by(3).map(|page| PageRange::new(page, 1)).collect();
    assert!(scattered.len() > RUNS_MAX);
    let kept = bounded(scattered.clone(), PageCount(pages));
    assert!((1..=RUNS_MAX).contains(&kept.len()));
    assert!(pages_of(&scattered).is_subset(&pages_of(&kept)));
}

#[test]
fn impossible_runs_harm_nobody_and_no_more_is_read_than_the_limit() {
    let wild = vec![PageRange::new(u64::MAX, u64::MAX), PageRange::new(7, u64::MAX), PageRange::new(0, 0)];
    assert_eq!(bounded(wild.clone(), PageCount(10)), [PageRange::new(7, 3)]);
    let plan = to_read(wild);
    assert_eq!(plan, [PageRange { first: PageIndex(7), count: READ_AHEAD_MAX }]);
    let many = (0..READ_AHEAD_MAX.0 / 10 + 2).map(|n| PageRange::new(n * 100, 10)).collect();
    assert_eq!(to_read(many).iter().map(|run| run.count.0).sum::<u64>(), READ_AHEAD_MAX.0);
}

/// An image in a folder of the build, so on a disk where there is one: what lies on a tmpfs is always cached.
fn image(pages: u64, working_set: Vec<PageRange>) -> HotFiles {
    let file = |pages: u64| {
        let mut file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        (0..pages).for_each(|page| file.write_all(&[page as u8; PAGE_BYTES]).unwrap());
        file
    };
    HotFiles {
        memory: file(pages),
        device_state: file(3),
        deltas: vec![("root".into(), file(5))],
        working_set,
    }
}

/// Takes a file out of the page cache; says whether that is possible here.
fn drop_from_cache(file: &File) -> bool {
    file.sync_all().unwrap();
    posix_fadvise(file.as_raw_fd(), 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
    !is_cached(file, ByteOffset(0))
}

fn await_cached(file: &File, run: PageRange) {
    let start = std::time::Instant::now();
    while !run.pages().all(|page| is_cached(file, page.offset())) {
        assert!(start.elapsed().as_secs() < 10, "{run} was not read");
        thread::sleep(std::time::Duration::from_millis(1));
    }
}

#[test]
fn a_cold_image_is_read_ahead_and_a_warm_one_left_alone() {
    let set = vec![PageRange::new(600, 40), PageRange::new(2000, 100)];
    let image = image(4096, set.clone());
    assert!(read_ahead(&image).is_none(), "just written, so in the page cache");
    if !drop_from_cache(&image.memory) {
        eprintln!("skipped: nothing can be taken out of the page cache here");
        return;
    }
    assert!(drop_from_cache(&image.deltas[0].1));
    read_ahead(&image).expect("it is cold").join().unwrap();
    // Asked about only once it has been asked for: the question itself may have a page read.
    set.iter().for_each(|run| await_cached(&image.memory, *run));
    await_cached(&image.deltas[0].1, PageRange::new(0, 5));
    assert!(read_ahead(&image).is_none());
    assert!(!is_cached(&image.memory, PageIndex(3500).offset()), "no more than the working set is read");
}

#[test]
fn an_image_without_a_working_set_is_left_alone() {
    let image = image(64, vec![]);
    drop_from_cache(&image.memory);
    assert!(read_ahead(&image).is_none());
}
