//! Properties of page maps and plans, and of finding twins.

use std::collections::{HashMap, HashSet};
use std::fs::File;

use proptest::prelude::*;

use super::*;
use crate::image::scan::{fingerprint, scan, Scope};
use crate::savefile::chunk::Chunk;
use crate::savefile::twins::find_twins;
use crate::units::{ByteCount, ByteOffset, PAGE_BYTES};

/// What pages hold: `None` is as the base (or, in memory, zero), 0 is zero, else data, equal where the number is.
type Pages = Vec<Option<u8>>;

fn pages(max: usize) -> impl Strategy<Value = Pages> {
    let runs = prop::collection::vec((prop::option::weighted(0.8, 0..6u8), 1..150usize), 0..20);
    runs.prop_map(move |runs| {
        runs.into_iter().flat_map(|(content, count)| vec![content; count]).take(max).collect()
    })
}

fn runs_where(pages: &Pages, wanted: impl Fn(&Option<u8>) -> bool) -> Vec<PageRange> {
    let mut runs: Vec<PageRange> = Vec::new();
    for (index, _) in pages.iter().enumerate().filter(|(_, page)| wanted(page)) {
        match runs.last_mut() {
            Some(last) if last.end().0 == index as u64 => last.count.0 += 1,
            _ => runs.push(PageRange::new(index as u64, 1)),
        }
    }
    runs
}

fn scanned(id: ImageId, mut pages: Pages, first: Vec<PageRange>) -> Scanned {
    if id == ImageId::Memory {
        pages.iter_mut().for_each(|page| *page = Some(page.unwrap_or(0)));
    }
    let is_data = |page: &Option<u8>| page.is_some_and(|content| content > 0);
    let scan = Scan {
        data: runs_where(&pages, is_data),
        zero: runs_where(&pages, |page| *page == Some(0)),
        prints: pages.iter().filter(|page| is_data(page)).map(|page| page.unwrap_or(0).into()).collect(),
    };
    Scanned { id, pages: PageCount(pages.len() as u64), scan, first }
}

/// Twins by brute force: here fingerprints are the content.
fn twins(images: &[Scanned]) -> Vec<Ordinal> {
    let mut firsts = HashMap::new();
    let prints = images.iter().flat_map(|image| &image.scan.prints);
    prints.zip(0..).map(|(print, ordinal)| *firsts.entry(*print).or_insert(ordinal)).collect()
}

fn images() -> impl Strategy<Value = Vec<Scanned>> {
    let first = prop::collection::vec((0..300u64, 0..50u64), 0..4);
    (pages(1000), pages(600), first).prop_map(|(memory, root, first)| {
        let first = first.into_iter().map(|(page, count)| PageRange::new(page, count)).collect();
        vec![scanned(ImageId::Memory, memory, first), scanned(ImageId::Volume("root".into()), root, vec![])]
    })
}

/// The content of each data page, by image and page.
fn contents(images: &[Scanned]) -> HashMap<(usize, u64), u64> {
    let of_image = |(index, image): (usize, &Scanned)| {
        let pages = image.scan.data.iter().flat_map(|run| run.pages()).map(|page| page.0).collect::<Vec<_>>();
        pages.into_iter().zip(image.scan.prints.clone()).map(move |(page, print)| ((index, page), print))
    };
    images.iter().enumerate().flat_map(of_image).collect()
}

fn table(slots: PageCount) -> ChunkTable {
    let chunk = Chunk {
        offset: ByteOffset(0),
        stored: ByteCount(1),
        raw: ByteCount(1),
        codec: crate::savefile::Codec::Raw,
        hash: [0; 32],
    };
    ChunkTable::new(slots, 0, vec![chunk; slots.0.div_ceil(CHUNK_PAGES.0) as usize])
}

proptest! {
    #[test]
    fn every_slot_holds_what_the_pages_that_use_it_hold(images in images()) {
        let plan = plan_store(&images, &twins(&images)).unwrap();
        let contents = contents(&images);
        let sources: Vec<u64> = plan
            .sources
            .iter()
            .flat_map(|source| source.pages.pages().map(|page| contents[&(source.image, page.0)]))
            .collect();
        prop_assert_eq!(sources.len() as u64, plan.slots.0);
        prop_assert_eq!(sources.iter().collect::<HashSet<_>>().len(), sources.len(), "stored twice");
        let mut mapped = 0;
        for (index, map) in plan.maps.iter().enumerate() {
            for (run, slot) in map.data_runs() {
                for (page, slot) in run.pages().zip(slot.0..) {
                    prop_assert_eq!(sources[slot as usize], contents[&(index, page.0)]);
                    mapped += 1;
                }
            }
            let zeros: Vec<PageRange> = map.zero_runs().collect();
            prop_assert_eq!(&zeros, &images[index].scan.zero);
        }
        prop_assert_eq!(mapped, contents.len());
        prop_assert!(check_no_orphans(&plan.maps, plan.slots).is_ok());
    }

    #[test]
    fn pages_asked_for_first_have_the_first_slots(images in images()) {
        let plan = plan_store(&images, &twins(&images)).unwrap();
        let contents = contents(&images);
        let wanted: HashSet<u64> = images[0]
            .first
            .iter()
            .flat_map(|run| run.pages())
            .filter_map(|page| contents.get(&(0, page.0)).copied())
            .collect();
        prop_assert_eq!(plan.first_slots.0, wanted.len() as u64);
    }

    #[test]
    fn a_map_is_read_as_it_was_written(images in images()) {
        let plan = plan_store(&images, &twins(&images)).unwrap();
        for map in &plan.maps {
            prop_assert_eq!(&PageMap::parse(&map.to_bytes(), plan.slots).unwrap(), map);
        }
    }

    #[test]
    fn a_map_with_one_changed_word_is_refused_or_still_keeps_every_rule(
        images in images(), place in any::<prop::sample::Index>(), value in any::<u32>(),
    ) {
        let plan = plan_store(&images, &twins(&images)).unwrap();
        let mut bytes = plan.maps[0].to_bytes();
        let place = place.index(bytes.len() / 4) * 4;
        bytes[place..place + 4].copy_from_slice(&(value >> (value % 32)).to_le_bytes());
        if let Ok(map) = PageMap::parse(&bytes, plan.slots) {
            prop_assert_eq!(map.to_bytes(), bytes);
            let mut builder = PageMapBuilder::new(map.image().clone(), map.pages(), 0);
            map.runs().iter().for_each(|run| builder.push(*run));
            prop_assert_eq!(builder.finish(plan.slots).unwrap(), map);
        }
    }

    #[test]
    fn chunks_hold_the_sources_in_order_and_are_full_but_the_last(images in images()) {
        let plan = plan_store(&images, &twins(&images)).unwrap();
        let chunks = plan_chunks(&plan.sources);
        let len = |chunk: &Vec<Source>| chunk.iter().map(|source| source.pages.count.0).sum::<u64>();
        if let Some((last, full)) = chunks.split_last() {
            prop_assert!(full.iter().all(|chunk| len(chunk) == CHUNK_PAGES.0));
            prop_assert!((1..=CHUNK_PAGES.0).contains(&len(last)));
        }
        let flat = |sources: &[Source]| -> Vec<(usize, u64)> {
            sources.iter().flat_map(|source| source.pages.pages().map(|page| (source.image, page.0))).collect()
        };
        prop_assert_eq!(flat(&chunks.concat()), flat(&plan.sources));
    }

    /// The first slots are those of the pages asked for first, and no others.
    #[test]
    fn the_first_slots_hold_the_working_set_and_nothing_else(images in images()) {
        let plan = plan_store(&images, &twins(&images)).unwrap();
        let contents = contents(&images);
        let wanted: HashSet<u64> = images[0].first.iter().flat_map(|run| run.pages())
            .filter_map(|page| contents.get(&(0, page.0)).copied())
            .collect();
        let stored = plan.sources.iter().flat_map(|source| source.pages.pages().map(|page| contents[&(source.image, page.0)]));
        let first: HashSet<u64> = stored.take(plan.first_slots.0 as usize).collect();
        prop_assert_eq!(first.len() as u64, plan.first_slots.0);
        prop_assert_eq!(first, wanted);
    }

    #[test]
    fn decoding_puts_every_data_page_once_and_from_its_slot(images in images(), both in any::<bool>()) {
        let plan = plan_store(&images, &twins(&images)).unwrap();
        let table = table(plan.slots);
        let maps: Vec<&PageMap> = plan.maps.iter().rev().take(if both { 2 } else { 1 }).collect();
        let jobs = plan_decode(&maps, &table);
        prop_assert!(jobs.windows(2).all(|pair| pair[0].chunk < pair[1].chunk));
        let mut placed = HashMap::new();
        for job in &jobs {
            prop_assert!(!job.places.is_empty());
            for place in &job.places {
                prop_assert!(place.from.0 + place.pages.count.0 <= CHUNK_PAGES.0);
                let slots = job.chunk as u64 * CHUNK_PAGES.0 + place.from.0..;
                for (page, slot) in place.pages.pages().zip(slots) {
                    prop_assert_eq!(placed.insert((place.image, page), slot), None, "placed twice");
                }
            }
        }
        let expected = maps.iter().enumerate().flat_map(|(image, map)| {
            map.data_runs().flat_map(move |(run, slot)| run.pages().map(move |page| (image, page)).zip(slot.0..))
        });
        prop_assert_eq!(placed, expected.collect::<HashMap<_, _>>());
    }
}

#[test]
fn stored_pages_that_nobody_uses_are_refused() {
    let mut builder = PageMapBuilder::new(ImageId::Volume("root".into()), PageCount(10), 0);
    builder.push(Run { pages: PageRange::new(0, 2), content: Content::Data(Slot(0)) });
    builder.push(Run { pages: PageRange::new(4, 2), content: Content::Data(Slot(3)) });
    let map = builder.finish(PageCount(5)).unwrap();
    assert_eq!(check_no_orphans(&[map], PageCount(5)), Err(Fault::Orphan { slot: 2 }));
}

#[test]
fn memory_with_a_gap_and_a_delta_out_of_order_are_refused() {
    let run = |first, count| Run { pages: PageRange::new(first, count), content: Content::Zero };
    let refused = |image: ImageId, runs: &[Run]| {
        let mut builder = PageMapBuilder::new(image, PageCount(10), 0);
        runs.iter().for_each(|run| builder.push(*run));
        builder.finish(PageCount(0)).is_err()
    };
    assert!(refused(ImageId::Memory, &[run(0, 3), run(4, 6)]));
    assert!(refused(ImageId::Memory, &[run(0, 9)]));
    assert!(!refused(ImageId::Memory, &[run(0, 3), run(3, 7)]));
    let root = || ImageId::Volume("root".into());
    assert!(refused(root(), &[run(5, 1), run(3, 1)]));
    assert!(refused(root(), &[run(9, 2)]));
    assert!(!refused(root(), &[run(3, 1), run(5, 1)]));
}

/// Pages whose fingerprints collide without being equal stay apart.
#[test]
fn only_pages_that_were_compared_are_twins() {
    let file = tempfile::tempfile().unwrap();
    write_pages(&file, &[5, 6, 5, 0, 6, 5]);
    let mut scan = scan(&file, PageCount(6), &Scope::Whole, &|_| {}).unwrap();
    assert_eq!(scan.prints[0], fingerprint(&[5; PAGE_BYTES]));
    let mut images =
        vec![Scanned { id: ImageId::Memory, pages: PageCount(6), scan: scan.clone(), first: vec![] }];
    assert_eq!(find_twins(&images, &[&file]).unwrap(), [0, 1, 0, 1, 0]);
    scan.prints.fill(7);
    images[0].scan = scan;
    assert_eq!(find_twins(&images, &[&file]).unwrap(), [0, 1, 0, 3, 0]);
}

fn write_pages(mut file: &File, pages: &[u8]) {
    use std::io::Write;
    pages.iter().for_each(|page| file.write_all(&[*page; PAGE_BYTES]).unwrap());
}
