//! What Xen hosts read that others have written: kernels, a guest's ring, xenstored's words, the stores of what clones have written.

use engine::units::ByteCount;
use vchan::end::{read_grants, read_layout, End, Want};
use vchan::layout::{Layout, PAGE_BYTES};
use vchan::shared::Shared;
use xen_glue::boot::elf::Kernel;
use xen_glue::boot::kernel::vmlinux;
use xen_glue::volumes::store::Changes;
use xen_glue::xenstore::wire::{strings, Message, Perm};

use crate::{files, take};

/// The rings of a hostile peer are as large as this at most, so that an input is not spent on zeroing memory.
const RING_PAGES_MAX: usize = 32;
const PAGE: u64 = 4096;

/// A kernel file.
pub fn kernel(data: &[u8]) {
    let image = vmlinux(data);
    let Ok(kernel) = Kernel::parse(image.as_deref().unwrap_or(data)) else { return };
    let mut end = 0;
    for segment in &kernel.segments {
        assert!(segment.range().start >= end && !segment.range().is_empty());
        end = segment.range().end;
    }
    assert!(kernel.segments.iter().any(|segment| segment.range().contains(&kernel.entry.into())));
}

/// A vchan whose peer is hostile. Input: the first page's patches as (count u8, then place u16, byte), then operations (what u8, how
/// much u16), with a patch after each.
pub fn ring(mut data: &[u8]) {
    let first = files::holes(PAGE);
    let page = || Shared::new(map(&first));
    for _ in 0..take::<1>(&mut data)[0] {
        patch(&page(), &mut data);
    }
    let Ok(layout) = read_layout(&page()) else { return };
    let (left, right) = read_grants(&page(), &layout);
    assert!(left.len() == layout.left_pages() && right.len() == layout.right_pages());
    if left.len().max(right.len()) > RING_PAGES_MAX {
        return;
    }
    let (left, right) = (files::holes(left.len() as u64 * PAGE), files::holes(right.len() as u64 * PAGE));
    let pages = |file, count| (count > 0).then(|| Shared::new(map(file)));
    let rings = (pages(&left, layout.left_pages()), pages(&right, layout.right_pages()));
    if let Ok(mut end) = End::connect(page(), rings.0, rings.1, layout) {
        operate(&mut end, &page(), &layout, data);
    }
}

fn operate(end: &mut End, page: &Shared, layout: &Layout, mut data: &[u8]) {
    let most = RING_PAGES_MAX * PAGE_BYTES;
    let mut buffer = vec![0; most];
    while !data.is_empty() {
        let what = take::<1>(&mut data)[0];
        let count = usize::from(u16::from_le_bytes(take(&mut data)));
        let part = &mut buffer[..count.min(most)];
        let done = match what & 3 {
            0 => end.read(part).map(|(done, _)| done),
            1 => end.write(part).map(|(done, _)| done),
            2 => end.ask(Want::Bytes).map(|_| 0),
            _ => end.ask(Want::Room).map(|_| 0),
        };
        assert!(done.is_ok_and(|done| done <= part.len()) || done.is_err());
        for there in [end.readable(), end.writable(), end.unread()].into_iter().flatten() {
            assert!(there <= most, "{there} bytes in rings of {layout:?}");
        }
        let _ = end.peer();
        patch(page, &mut data);
    }
}

fn patch(page: &Shared, data: &mut &[u8]) {
    let place = usize::from(u16::from_le_bytes(take(data))) % PAGE_BYTES;
    page.set_byte(place, take::<1>(data)[0]);
}

fn map(file: &std::fs::File) -> memmap2::MmapRaw {
    memmap2::MmapRaw::map_raw(file).expect("a file in memory can be mapped")
}

/// What xenstored says: messages one after the other.
pub fn xenstore(mut data: &[u8]) {
    while let Ok(Some((message, count))) = Message::parse(data) {
        assert_eq!(message.to_bytes().as_deref(), Ok(&data[..count]), "what was read is written as it was");
        let _ = (message.errno(), message.event());
        for word in strings(&message.payload).unwrap_or_default() {
            if let Ok(perm) = Perm::parse(&word) {
                assert_eq!(Perm::parse(&perm.to_string()), Ok(perm));
            }
        }
        data = &data[count..];
    }
}

/// The store of what a clone has written to a volume. Input: pages of the volume u16, then the store.
pub fn store(mut data: &[u8]) {
    let pages = u64::from(u16::from_le_bytes(take(&mut data))) + 1;
    let (store, length) = (files::with(data), ByteCount(data.len() as u64));
    let Ok(changes) = Changes::read(&store, length, ByteCount(pages * PAGE)) else { return };
    let mut end = 0;
    for run in changes.ranges() {
        assert!(run.first.0 >= end && !run.is_empty());
        end = run.end().0;
    }
    assert!(end <= pages, "a page beyond the volume");
    let raw = files::holes(pages * PAGE);
    changes.copy(&store, &raw).expect("every content is in the store");
    assert_eq!(raw.metadata().expect("an open file").len(), pages * PAGE);
}
