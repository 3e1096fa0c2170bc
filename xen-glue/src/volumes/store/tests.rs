use engine::savefile::{ImageId, PageMapBuilder, Run, Slot};
use engine::units::PageCount;
use proptest::prelude::*;

use super::*;

const PAGES: u64 = 2000;

/// What a delta does to each page of a volume: nothing, zeros, data.
fn delta() -> impl Strategy<Value = Vec<(u64, u64, Option<bool>)>> {
    // Runs of (gap before, pages, data?).
    proptest::collection::vec((0u64..40, 1u64..300, any::<bool>()), 0..12).prop_map(|runs| {
        let mut at = 0;
        let mut placed = Vec::new();
        for (gap, count, data) in runs {
            at += gap;
            let count = count.min(PAGES.saturating_sub(at));
            if count > 0 {
                placed.push((at, count, Some(data)));
            }
            at += count;
        }
        placed
    })
}

fn info() -> VolumeInfo {
    VolumeInfo { name: "root".into(), base: "b".into(), virtual_bytes: PAGES * PAGE_SIZE }
}

fn page_of(page: u64) -> Vec<u8> {
    (page + 1).to_le_bytes().repeat(PAGE_BYTES / 8)
}

fn written(delta: &[(u64, u64, Option<bool>)]) -> (File, ByteCount) {
    let mut map = PageMapBuilder::new(ImageId::Volume("root".into()), PageCount(PAGES), delta.len());
    let raw = tempfile::tempfile().unwrap();
    raw.set_len(PAGES * PAGE_SIZE).unwrap();
    let mut slot = 0;
    for (first, count, data) in delta {
        let pages = PageRange::new(*first, *count);
        let content = match data {
            Some(true) => {
                pages.pages().for_each(|page| raw.write_all_at(&page_of(page.0), page.offset().0).unwrap());
                slot += count;
                Content::Data(Slot(slot - count))
            }
            _ => Content::Zero,
        };
        map.push(Run { pages, content });
    }
    let map = map.finish(PageCount(slot)).unwrap();
    let out = tempfile::tempfile().unwrap();
    write_store(&out, &info(), &map, &raw).unwrap();
    let length = ByteCount(out.metadata().unwrap().len());
    (out, length)
}

fn size() -> ByteCount {
    ByteCount(PAGES * PAGE_SIZE)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn what_is_written_is_read(delta in delta()) {
        let (out, length) = written(&delta);
        prop_assert!(length.0 <= bytes_max(size()).0);
        let changes = Changes::read(&out, length, size()).unwrap();
        let pages: Vec<u64> = delta.iter().flat_map(|(first, count, _)| *first..first + count).collect();
        prop_assert_eq!(changes.entries.iter().map(|(page, _)| *page).collect::<Vec<_>>(), pages);
        let raw = tempfile::tempfile().unwrap();
        raw.set_len(size().0).unwrap();
        changes.copy(&out, &raw).unwrap();
        let mut expected = vec![0; size().0 as usize];
        for (first, count, _) in delta.iter().filter(|(.., data)| *data == Some(true)) {
            for page in *first..first + count {
                expected[page as usize * PAGE_BYTES..][..PAGE_BYTES].copy_from_slice(&page_of(page));
            }
        }
        let mut found = vec![0; expected.len()];
        raw.read_exact_at(&mut found, 0).unwrap();
        prop_assert!(found == expected);
    }

    #[test]
    fn damage_is_refused_or_harmless(delta in delta(), at in 0u64..600 * 16, byte in any::<u8>()) {
        let (out, length) = written(&delta);
        // Header and first two areas.
        let at = if at < 16 { at } else if at < 4112 { PAGE_SIZE + at } else { 257 * PAGE_SIZE + at };
        out.write_all_at(&[byte], at).unwrap();
        let length = ByteCount(out.metadata().unwrap().len().max(length.0));
        if let Ok(changes) = Changes::read(&out, length, size()) {
            let raw = tempfile::tempfile().unwrap();
            changes.copy(&out, &raw).unwrap();
            prop_assert!(changes.ranges().iter().all(|run| run.end().0 <= PAGES));
        }
    }
}

fn store_of(entries: &[(u64, u64)]) -> File {
    let out = tempfile::tempfile().unwrap();
    out.write_all_at(&empty(), 0).unwrap();
    out.set_len(400 * PAGE_SIZE).unwrap();
    for (index, (origin, store)) in entries.iter().enumerate() {
        let entry = Entry { origin: (*origin).into(), store: (*store).into() };
        let chunk = area_chunk(index as u64 / ENTRIES);
        let within = index as u64 % ENTRIES * 16;
        out.write_all_at(entry.as_bytes(), chunk * PAGE_SIZE + within).unwrap();
    }
    out
}

fn read(out: &File) -> Result<Changes, StoreError> {
    Changes::read(out, ByteCount(400 * PAGE_SIZE), size())
}

#[test]
fn hostile_stores_are_refused() {
    assert_eq!(read(&store_of(&[])).unwrap().entries, []);
    assert_eq!(read(&store_of(&[(5, 3), (4, 2)])).unwrap().entries, [(4, 2), (5, 3)]);
    for bad in [
        vec![(PAGES, 2)],
        vec![(1, 400)],
        vec![(1, 1)],
        vec![(1, 258)],
        vec![(1, 2), (1, 3)],
        vec![(1, 2), (2, 2)],
    ] {
        assert!(matches!(read(&store_of(&bad)), Err(StoreError::Damaged(_))), "{bad:?}");
    }
    // Two full areas in a store that ends before a third.
    let full: Vec<(u64, u64)> = (0..512).map(|n| (n, 2 + n % 255)).collect();
    assert!(matches!(read(&store_of(&full)), Err(StoreError::Damaged(_))));
    let given_up = store_of(&[]);
    given_up.write_all_at(&[0], 4).unwrap();
    assert!(matches!(read(&given_up), Err(StoreError::GivenUp)));
    for (at, byte) in [(0, 0), (8, 2), (12, 16), (4, 2)] {
        let bad = store_of(&[]);
        bad.write_all_at(&[byte], at).unwrap();
        assert!(matches!(read(&bad), Err(StoreError::Damaged(_))), "{at}");
    }
    assert!(Changes::read(&store_of(&[]), ByteCount(PAGE_SIZE), size()).is_err());
}

#[test]
fn a_later_store_hides_an_earlier_one() {
    let earlier = Changes { entries: vec![(1, 2), (2, 3), (9, 4)] };
    let later = Changes { entries: vec![(2, 2), (3, 3)] };
    assert_eq!(later.ranges_with(&earlier), [PageRange::new(1, 3), PageRange::new(9, 1)]);
    assert_eq!(earlier.without(&later).entries, [(1, 2), (9, 4)]);
}

#[test]
fn a_full_area_is_followed_by_an_empty_one() {
    for pages in [0, 1, 255, 256, 257, 512] {
        let delta = if pages == 0 { vec![] } else { vec![(0, pages, Some(true))] };
        let (out, length) = written(&delta);
        assert!(length.0 > area_chunk(pages / ENTRIES) * PAGE_SIZE, "{pages}");
        assert_eq!(Changes::read(&out, length, size()).unwrap().entries.len() as u64, pages);
        assert!(length.0 <= bytes_max(ByteCount(pages.max(1) * PAGE_SIZE)).0);
    }
}
