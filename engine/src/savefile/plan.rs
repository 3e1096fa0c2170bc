//! What is stored where, and what is decoded to where. Pure: no I/O, no decisions left to those who execute.
//!
//! Invariants of a [`StorePlan`]:
//! - every data page of every image has a slot; equal pages (as `twins` says) of all images share one;
//! - every slot has exactly one source page, and sources are in slot order;
//! - the pages asked for first have the first slots.
//!
//! Invariants of a decode plan ([`plan_decode`]): chunks are in the file's order, each at most once, and each only if one of
//! the images needs it; every data page of every image is the target of exactly one place.

use super::chunk::{ChunkTable, CHUNK_PAGES};
use super::error::Fault;
use super::page_map::{Content, ImageId, PageMap, PageMapBuilder, Run, Slot};
use crate::image::scan::Scan;
use crate::units::{PageCount, PageIndex, PageRange};

/// A data page's number over all images of a savefile, in the order of images and pages.
pub(crate) type Ordinal = u32;

/// An image as the planner sees it.
#[derive(Clone, Debug)]
pub(crate) struct Scanned {
    pub id: ImageId,
    pub pages: PageCount,
    pub scan: Scan,
    /// The pages to store first, in this order.
    pub first: Vec<PageRange>,
}

/// A run of pages of one image, to be stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Source {
    /// Which of the plan's images.
    pub image: usize,
    pub pages: PageRange,
}

/// What is stored where.
#[derive(Clone, Debug)]
pub(crate) struct StorePlan {
    /// One per image.
    pub maps: Vec<PageMap>,
    /// What fills the slots, in slot order.
    pub sources: Vec<Source>,
    pub slots: PageCount,
    /// The first slots, those of pages asked for first.
    pub first_slots: PageCount,
}

/// Gives every data page its slot. `twins[n]` is the ordinal of the first page equal to page `n`: `n` itself for most.
pub(crate) fn plan_store(images: &[Scanned], twins: &[Ordinal]) -> Result<StorePlan, Fault> {
    let mut slots = SlotAllocator::new(twins);
    let bases = ordinal_bases(images);
    let data: Vec<DataRuns> =
        images.iter().zip(&bases).map(|(scanned, base)| DataRuns::new(&scanned.scan.data, *base)).collect();
    for (image, (scanned, data)) in images.iter().zip(&data).enumerate() {
        scanned.first.iter().for_each(|wanted| slots.assign(image, data, *wanted));
    }
    let first_slots = slots.next;
    for (image, (scanned, data)) in images.iter().zip(&data).enumerate() {
        slots.assign(image, data, PageRange { first: PageIndex(0), count: scanned.pages });
    }
    let maps = images
        .iter()
        .zip(&bases)
        .map(|(scanned, base)| build_map(scanned, *base, &slots))
        .collect::<Result<_, Fault>>()?;
    Ok(StorePlan {
        maps,
        slots: PageCount(slots.next.into()),
        first_slots: PageCount(first_slots.into()),
        sources: slots.sources,
    })
}

/// Gives out slots in order, one per set of twins.
struct SlotAllocator<'a> {
    twins: &'a [Ordinal],
    /// The slot of each ordinal that is its set's first; `UNASSIGNED` until it has one.
    slots: Vec<u32>,
    next: u32,
    sources: Vec<Source>,
}

const UNASSIGNED: u32 = u32::MAX;

impl SlotAllocator<'_> {
    fn new(twins: &[Ordinal]) -> SlotAllocator<'_> {
        SlotAllocator { twins, slots: vec![UNASSIGNED; twins.len()], next: 0, sources: Vec::new() }
    }

    /// Gives a slot to every data page within `wanted` whose set has none yet.
    fn assign(&mut self, image: usize, data: &DataRuns, wanted: PageRange) {
        for (pages, ordinal) in data.within(wanted) {
            for (page, ordinal) in pages.pages().zip(ordinal..) {
                let twin = self.twins[ordinal as usize] as usize;
                if self.slots[twin] == UNASSIGNED {
                    self.slots[twin] = self.next;
                    self.next += 1;
                    self.add_source(image, page);
                }
            }
        }
    }

    fn add_source(&mut self, image: usize, page: PageIndex) {
        match self.sources.last_mut() {
            Some(last) if last.image == image && last.pages.end() == page => last.pages.count.0 += 1,
            _ => self.sources.push(Source { image, pages: PageRange { first: page, count: PageCount(1) } }),
        }
    }

    fn slot(&self, ordinal: Ordinal) -> Slot {
        Slot(self.slots[self.twins[ordinal as usize] as usize].into())
    }
}

/// The ordinal of each image's first data page.
pub(crate) fn ordinal_bases(images: &[Scanned]) -> Vec<Ordinal> {
    let mut next = 0;
    images
        .iter()
        .map(|image| {
            let base = next;
            next += image.scan.prints.len() as Ordinal;
            base
        })
        .collect()
}

/// The data runs of an image, each with the ordinal of its first page: found by page without a walk over all of them.
struct DataRuns(Vec<(PageRange, Ordinal)>);

impl DataRuns {
    fn new(data: &[PageRange], base: Ordinal) -> DataRuns {
        let mut next = base;
        let numbered = data.iter().map(|run| {
            let first = next;
            next += run.count.0 as Ordinal;
            (*run, first)
        });
        DataRuns(numbered.collect())
    }

    /// The parts that lie within `wanted`, each with the ordinal of its first page.
    fn within(&self, wanted: PageRange) -> impl Iterator<Item = (PageRange, Ordinal)> + '_ {
        let begin = self.0.partition_point(|(run, _)| run.end() <= wanted.first);
        self.0[begin..].iter().map_while(move |(run, ordinal)| {
            let part = run.intersection(wanted)?;
            Some((part, ordinal + (part.first.0 - run.first.0) as Ordinal))
        })
    }
}

fn build_map(scanned: &Scanned, base: Ordinal, slots: &SlotAllocator) -> Result<PageMap, Fault> {
    let Scan { data, zero, .. } = &scanned.scan;
    let mut builder = PageMapBuilder::new(scanned.id.clone(), scanned.pages, data.len() + zero.len());
    let mut zero = zero.iter().copied().peekable();
    let mut ordinal = base;
    for run in data {
        while let Some(pages) = zero.next_if(|zeros| zeros.first < run.first) {
            builder.push(Run { pages, content: Content::Zero });
        }
        for page in run.pages() {
            let pages = PageRange { first: page, count: PageCount(1) };
            builder.push(Run { pages, content: Content::Data(slots.slot(ordinal)) });
            ordinal += 1;
        }
    }
    zero.for_each(|pages| builder.push(Run { pages, content: Content::Zero }));
    builder.finish(PageCount(slots.next.into()))
}

/// Cuts the sources into chunks: what each chunk is gathered from, in order.
pub(crate) fn plan_chunks(sources: &[Source]) -> Vec<Vec<Source>> {
    let mut chunks = Vec::new();
    let mut chunk = Vec::new();
    let mut room = CHUNK_PAGES.0;
    for &source in sources {
        let mut rest = source;
        while !rest.pages.is_empty() {
            let count = rest.pages.count.0.min(room);
            chunk.push(Source { pages: PageRange { count: PageCount(count), ..rest.pages }, ..rest });
            rest.pages = PageRange::new(rest.pages.first.0 + count, rest.pages.count.0 - count);
            room -= count;
            if room == 0 {
                chunks.push(std::mem::take(&mut chunk));
                room = CHUNK_PAGES.0;
            }
        }
    }
    if !chunk.is_empty() {
        chunks.push(chunk);
    }
    chunks
}

/// Where pages of a chunk go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// The first page, counted within the chunk.
    pub from: PageCount,
    /// Which of the decoded images.
    pub image: usize,
    /// Which pages of that image.
    pub pages: PageRange,
}

/// A chunk to read, and where its pages go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ChunkJob {
    pub chunk: usize,
    pub places: Vec<Place>,
}

/// What to read and where it goes, to decode the images of these maps.
pub(crate) fn plan_decode(maps: &[&PageMap], table: &ChunkTable) -> Vec<ChunkJob> {
    let mut places: Vec<(usize, Place)> = Vec::new();
    for (image, map) in maps.iter().enumerate() {
        for (pages, slot) in map.data_runs() {
            cut_at_chunks(pages, slot, table, |chunk, from, pages| {
                places.push((chunk, Place { from, image, pages }));
            });
        }
    }
    // Stable: within a chunk, places stay in the order of images and pages.
    places.sort_by_key(|&(chunk, _)| chunk);
    let mut jobs: Vec<ChunkJob> = Vec::new();
    for (chunk, place) in places {
        match jobs.last_mut() {
            Some(job) if job.chunk == chunk => job.places.push(place),
            _ => jobs.push(ChunkJob { chunk, places: vec![place] }),
        }
    }
    jobs
}

fn cut_at_chunks(
    mut pages: PageRange,
    Slot(mut slot): Slot,
    table: &ChunkTable,
    mut place: impl FnMut(usize, PageCount, PageRange),
) {
    while !pages.is_empty() {
        let (chunk, from) = table.locate(Slot(slot));
        let count = pages.count.0.min(table.chunk_pages().0 - from.0);
        place(chunk, from, PageRange { first: pages.first, count: PageCount(count) });
        pages = PageRange::new(pages.first.0 + count, pages.count.0 - count);
        slot += count;
    }
}

/// Every chunk, going nowhere: to verify all of them.
pub(crate) fn plan_verify(table: &ChunkTable) -> Vec<ChunkJob> {
    (0..table.chunks().len()).map(|chunk| ChunkJob { chunk, places: Vec::new() }).collect()
}

/// Refuses stored pages that no map uses: they would be bytes that nobody accounts for.
pub(crate) fn check_no_orphans(maps: &[PageMap], slots: PageCount) -> Result<(), Fault> {
    let mut used: Vec<(u64, u64)> = maps
        .iter()
        .flat_map(PageMap::data_runs)
        .map(|(pages, Slot(slot))| (slot, slot + pages.count.0))
        .collect();
    used.sort_unstable();
    let mut covered = 0;
    for (first, end) in used {
        if first > covered {
            break;
        }
        covered = covered.max(end);
    }
    if covered < slots.0 {
        return Err(Fault::Orphan { slot: covered });
    }
    Ok(())
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
