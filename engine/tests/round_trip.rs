//! What is written comes back, by either way of reading.

mod common;

use common::{content, decode, device_state, holes, Guest, Page};
use engine::savefile::{self, Content, ImageId, ImageOutput, ReadBackend, Savefile};
use engine::units::{PageCount, PageRange};
use proptest::prelude::*;

fn page() -> impl Strategy<Value = Page> {
    prop_oneof![
        3 => Just(Page::Hole),
        1 => Just(Page::Zeros),
        2 => (1..4u8).prop_map(Page::Fill),
        2 => (0..40u64).prop_map(Page::Noise),
    ]
}

/// Up to three chunks of pages that repeat often, a delta, and a working set that need not be sorted or disjoint.
fn guest() -> impl Strategy<Value = Guest> {
    let runs = |max: u64| prop::collection::vec((0..max, 0..max / 2), 0..4);
    (prop::collection::vec(page(), 1..200), prop::collection::vec(page(), 1..60), runs(60), runs(250)).prop_map(
        |(memory, root, changed, working_set)| {
            let changed = disjoint(changed, root.len() as u64);
            Guest { memory, root, changed, working_set }
        },
    )
}

fn disjoint(mut runs: Vec<(u64, u64)>, pages: u64) -> Vec<PageRange> {
    runs.sort_unstable();
    let mut end = 0;
    let mut kept = Vec::new();
    for (first, count) in runs {
        let first = first.max(end);
        let count = count.min(pages.saturating_sub(first));
        if count > 0 {
            kept.push(PageRange::new(first, count));
            end = first + count;
        }
    }
    kept
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn any_guest_comes_back_by_ring_and_by_pread(guest in guest()) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("guest.save");
        let written = guest.write(&path).unwrap();

        let savefile = Savefile::open(&path, Some(&written.root)).unwrap();
        savefile.verify(ReadBackend::Pread, &savefile::silent).unwrap();
        savefile.verify(ReadBackend::Ring, &savefile::silent).unwrap();
        let by_ring = decode(&savefile, ReadBackend::Ring).unwrap();
        let by_pread = decode(&savefile, ReadBackend::Pread).unwrap();
        prop_assert!(by_ring == by_pread, "the two ways of reading differ");
        prop_assert!(by_ring == (guest.memory_bytes(), guest.delta_bytes()), "what came back is not what was written");
        prop_assert_eq!(savefile.manifest(), &guest.manifest());
        prop_assert_eq!(savefile.device_state().unwrap(), device_state());
    }

    #[test]
    fn the_same_guest_gives_the_same_file(guest in guest()) {
        let folder = tempfile::tempdir().unwrap();
        let (first, second) = (folder.path().join("1"), folder.path().join("2"));
        guest.write(&first).unwrap();
        guest.write(&second).unwrap();
        prop_assert!(std::fs::read(first).unwrap() == std::fs::read(second).unwrap());
    }
}

fn written(guest: &Guest) -> (Savefile, savefile::Written, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("guest.save");
    let written = guest.write(&path).unwrap();
    (Savefile::open(&path, None).unwrap(), written, folder)
}

#[test]
fn zeros_are_not_stored_and_equal_pages_are_stored_once_over_all_images() {
    let (savefile, written, _folder) = written(&Guest::small());
    // Memory: two of Fill(1), one of Fill(2). Delta: the same Fill(2), and Fill(3).
    assert_eq!(written.unique_pages, PageCount(3));
    assert_eq!(written.pages, PageCount(16 + 3));
    assert_eq!(written.zero_pages, PageCount(13 + 1));
    assert_eq!(written.chunks, 1);
    assert_eq!(savefile.chunk_table().slots(), PageCount(3));
}

#[test]
fn the_working_set_is_stored_first() {
    let mut guest = Guest::small();
    guest.memory = Guest::incompressible(200).memory;
    guest.working_set = vec![(150, 10), (3, 1)];
    let (savefile, _, _folder) = written(&guest);
    let map = savefile.page_map(&ImageId::Memory).unwrap();
    let slot_of = |page: u64| {
        map.data_runs()
            .find(|(run, _)| run.first.0 <= page && page < run.end().0)
            .map(|(run, slot)| slot.0 + page - run.first.0)
    };
    assert_eq!(slot_of(150), Some(0));
    assert_eq!(slot_of(159), Some(9));
    assert_eq!(slot_of(3), Some(10));
    assert_eq!(slot_of(0), Some(11));
    assert_eq!(savefile.chunk_table().working_set_chunks(), 1);
    assert!(decode(&savefile, ReadBackend::Ring).unwrap().0 == guest.memory_bytes());
}

#[test]
fn a_delta_tells_zero_pages_from_those_that_are_as_the_base() {
    let (savefile, _, _folder) = written(&Guest::small());
    let map = savefile.page_map(&ImageId::Volume("root".into())).unwrap();
    assert_eq!(map.zero_runs().collect::<Vec<_>>(), [PageRange::new(2, 1)]);
    assert_eq!(map.data_runs().map(|(run, _)| run.count.0).sum::<u64>(), 2);
    assert!(map.runs().iter().all(|run| run.content == Content::Zero || run.pages.first.0 >= 3));
}

#[test]
fn images_of_zeros_only_need_no_chunk() {
    let guest = Guest { memory: vec![Page::Hole; 7], root: vec![Page::Hole], changed: vec![], working_set: vec![] };
    let (savefile, written, _folder) = written(&guest);
    assert_eq!((written.chunks, written.unique_pages), (0, PageCount(0)));
    savefile.verify(ReadBackend::Ring, &savefile::silent).unwrap();
    assert!(decode(&savefile, ReadBackend::Ring).unwrap() == (guest.memory_bytes(), guest.delta_bytes()));
}

#[test]
fn zero_pages_stay_holes() {
    use std::os::unix::fs::MetadataExt;
    let mut guest = Guest::small();
    guest.memory = vec![Page::Zeros; 5000];
    guest.memory[4000] = Page::Noise(9);
    let (savefile, _, _folder) = written(&guest);
    let out = holes(5000);
    let outputs = [ImageOutput { id: &ImageId::Memory, file: &out }];
    savefile.decode(&outputs, ReadBackend::Ring, &savefile::silent).unwrap();
    assert!(content(&out) == guest.memory_bytes());
    assert!(out.metadata().unwrap().blocks() * 512 < 100_000);
}

#[test]
fn an_output_of_another_length_is_refused() {
    let (savefile, _, _folder) = written(&Guest::small());
    for pages in [15, 17] {
        let out = holes(pages);
        let outputs = [ImageOutput { id: &ImageId::Memory, file: &out }];
        let err = savefile.decode(&outputs, ReadBackend::Pread, &savefile::silent).unwrap_err();
        assert!(matches!(err, savefile::Error::Mismatch { .. }), "{err}");
    }
}
