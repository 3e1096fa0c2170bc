//! The persistent exception store of dm-snapshot (Linux, `drivers/md/dm-snap-persistent.c`): which chunks of an origin have
//! other content, and that content.
//!
//! All numbers are little-endian. Chunks here are one page (8 sectors of 512 bytes).
//!
//! | chunk | content |
//! |---|---|
//! | 0 | header: u32 magic 0x70416e53 ("SnAp"), u32 valid = 1, u32 version = 1, u32 chunk size in sectors; zeros |
//! | 1 + 257·a | area a: 256 entries of {u64 chunk of the origin, u64 chunk of the store} |
//! | others | the content of the chunks the entries of the area before them name, in any order |
//!
//! Entries are filled from the first on; one whose store chunk is 0 ends the list. So a last area that is full is followed
//! by one that is empty. The driver sets `valid` to 0 when the store has become useless, by want of room or an error.
//!
//! Invariants of what is read: every origin chunk lies within the volume and every store chunk within the store, none stands
//! in two entries, and no store chunk is a header or an area.

use std::fs::File;
use std::io;
use std::mem::size_of;
use std::os::unix::fs::FileExt;

use engine::image::scan::is_zero;
use engine::savefile::{Content, PageMap, VolumeInfo};
use engine::units::{ByteCount, PageRange, PAGE_BYTES, PAGE_SIZE};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

const MAGIC: u32 = 0x7041_6e53;
const VALID: u32 = 1;
const VERSION: u32 = 1;
const CHUNK_SECTORS: u32 = 8;
/// Entries in an area, and so the content chunks between two areas.
const ENTRIES: u64 = PAGE_SIZE / 16;
const FIRST_AREA: u64 = 1;
/// What is copied at once.
const BATCH_PAGES: u64 = 256;

/// The first chunks of an empty store: its header and an empty area.
pub const EMPTY_BYTES: usize = 2 * PAGE_BYTES;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Header {
    magic: U32,
    valid: U32,
    version: U32,
    chunk_sectors: U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct Entry {
    origin: U64,
    store: U64,
}

const _: () = assert!(size_of::<Header>() == 16 && size_of::<Entry>() as u64 * ENTRIES == PAGE_SIZE);

/// A store that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// It says something that cannot be.
    #[error("the store of a volume's changes is damaged: {0}")]
    Damaged(&'static str),
    /// The driver gave it up.
    #[error("the volume could not take all that was written to it, and what it has is useless")]
    GivenUp,
    /// The system failed.
    #[error("cannot read a volume's changes")]
    Io(#[from] io::Error),
}

/// How long a store must be to take every page of a volume.
pub const fn bytes_max(volume: ByteCount) -> ByteCount {
    let pages = volume.pages_covering().0;
    // The header, all pages, their areas, and the empty one that follows a full one.
    ByteCount((FIRST_AREA + pages + pages / ENTRIES + 1) * PAGE_SIZE)
}

/// The first bytes of an empty store.
pub fn empty() -> [u8; EMPTY_BYTES] {
    let mut bytes = [0; EMPTY_BYTES];
    for (to, from) in bytes.iter_mut().zip(header().as_bytes()) {
        *to = *from;
    }
    bytes
}

fn header() -> Header {
    Header {
        magic: MAGIC.into(),
        valid: VALID.into(),
        version: VERSION.into(),
        chunk_sectors: CHUNK_SECTORS.into(),
    }
}

/// The chunk of area `area`.
const fn area_chunk(area: u64) -> u64 {
    FIRST_AREA + area * (ENTRIES + 1)
}

/// The chunk of the content of entry `entry`, where contents follow in the order of their entries.
const fn content_chunk(entry: u64) -> u64 {
    FIRST_AREA + entry + entry / ENTRIES + 1
}

/// Writes a delta as a store: `map` says which pages of the volume it has, `raw` holds its data at the volume's own places.
/// Zero pages become content that is a hole in `out`, which must be empty.
pub fn write_store(out: &File, volume: &VolumeInfo, map: &PageMap, raw: &File) -> io::Result<()> {
    if map.pages() != ByteCount(volume.virtual_bytes).pages_covering() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "the changes are of a volume of another size",
        ));
    }
    let pages: u64 = map.runs().iter().map(|run| run.pages.count.0).sum();
    out.set_len((area_chunk(pages / ENTRIES) + 1).max(content_chunk(pages)) * PAGE_SIZE)?;
    out.write_all_at(header().as_bytes(), 0)?;
    let mut area = Vec::with_capacity(PAGE_BYTES);
    let mut entry = 0;
    for run in map.runs() {
        for page in run.pages.pages() {
            let made = Entry { origin: page.0.into(), store: content_chunk(entry).into() };
            area.extend_from_slice(made.as_bytes());
            entry += 1;
            if entry.is_multiple_of(ENTRIES) {
                out.write_all_at(&area, area_chunk(entry / ENTRIES - 1) * PAGE_SIZE)?;
                area.clear();
            }
        }
    }
    out.write_all_at(&area, area_chunk(entry / ENTRIES) * PAGE_SIZE)?;
    write_contents(out, map, raw)
}

fn write_contents(out: &File, map: &PageMap, raw: &File) -> io::Result<()> {
    let mut buffer = vec![0; (BATCH_PAGES * PAGE_SIZE) as usize];
    let mut entry = 0;
    for run in map.runs() {
        let mut rest = run.pages;
        while !rest.is_empty() {
            // Contents are contiguous up to the next area.
            let count = rest.count.0.min(BATCH_PAGES).min(ENTRIES - entry % ENTRIES);
            if let (Content::Data(_), Some(part)) =
                (run.content, buffer.get_mut(..(count * PAGE_SIZE) as usize))
            {
                raw.read_exact_at(part, rest.first.offset().0)?;
                out.write_all_at(part, content_chunk(entry) * PAGE_SIZE)?;
            }
            entry += count;
            rest = PageRange::new(rest.first.0 + count, rest.count.0 - count);
        }
    }
    Ok(())
}

/// Which pages of a volume a store has: (page of the volume, chunk of the store), sorted by page.
#[derive(Debug, PartialEq, Eq)]
pub struct Changes {
    entries: Vec<(u64, u64)>,
}

impl Changes {
    /// Reads the entries of the first `length` bytes of a store of a volume of `size` bytes.
    pub fn read(store: &File, length: ByteCount, size: ByteCount) -> Result<Changes, StoreError> {
        let chunks = length.0 / PAGE_SIZE;
        let pages = size.pages_covering().0;
        let mut chunk = vec![0; PAGE_BYTES];
        check_header(store, chunks, &mut chunk)?;
        let mut entries = Vec::new();
        for area in 0.. {
            if area_chunk(area) >= chunks {
                return Err(StoreError::Damaged("the list of its entries does not end"));
            }
            store.read_exact_at(&mut chunk, area_chunk(area) * PAGE_SIZE)?;
            let area = <[Entry]>::ref_from_bytes(&chunk).map_err(|_| StoreError::Damaged("an area"))?;
            for entry in area {
                let (page, at) = (entry.origin.get(), entry.store.get());
                if at == 0 {
                    return Changes::checked(entries);
                }
                if page >= pages {
                    return Err(StoreError::Damaged("an entry is of a page beyond the volume"));
                }
                if at >= chunks || at % (ENTRIES + 1) == FIRST_AREA {
                    return Err(StoreError::Damaged("an entry's content is where none can be"));
                }
                entries.push((page, at));
            }
            if entries.len() as u64 > pages {
                return Err(StoreError::Damaged("it has more pages than the volume"));
            }
        }
        Err(StoreError::Damaged("the list of its entries does not end"))
    }

    fn checked(mut entries: Vec<(u64, u64)>) -> Result<Changes, StoreError> {
        entries.sort_unstable_by_key(|(_, at)| *at);
        if entries.windows(2).any(|pair| matches!(pair, [(_, one), (_, other)] if one == other)) {
            return Err(StoreError::Damaged("two entries have one content"));
        }
        entries.sort_unstable();
        if entries.windows(2).any(|pair| matches!(pair, [(one, _), (other, _)] if one == other)) {
            return Err(StoreError::Damaged("two entries are of one page"));
        }
        Ok(Changes { entries })
    }

    /// Those that a later store does not have as well.
    pub fn without(mut self, later: &Changes) -> Changes {
        self.entries
            .retain(|(page, _)| later.entries.binary_search_by_key(page, |(known, _)| *known).is_err());
        self
    }

    /// Copies the contents from the store to the pages' own places in `raw`, which reads as zero there. Zeros stay holes.
    pub fn copy(&self, store: &File, raw: &File) -> io::Result<()> {
        let mut buffer = vec![0; (BATCH_PAGES * PAGE_SIZE) as usize];
        let mut rest = self.entries.as_slice();
        while let Some(&(page, at)) = rest.first() {
            let follows =
                |(next, (known, place)): (u64, &(u64, u64))| *known == page + next && *place == at + next;
            let count = (0..BATCH_PAGES).zip(rest).take_while(|pair| follows(*pair)).count();
            let (run, left) = rest.split_at(count);
            rest = left;
            let Some(part) = buffer.get_mut(..run.len() * PAGE_BYTES) else { break };
            store.read_exact_at(part, at * PAGE_SIZE)?;
            for (chunk, (page, _)) in part.chunks(PAGE_BYTES).zip(run) {
                if !is_zero(chunk) {
                    raw.write_all_at(chunk, page * PAGE_SIZE)?;
                }
            }
        }
        Ok(())
    }

    /// The pages as runs.
    pub fn ranges(&self) -> Vec<PageRange> {
        ranges(self.entries.iter().map(|(page, _)| *page))
    }

    /// The pages of both as runs.
    pub fn ranges_with(&self, other: &Changes) -> Vec<PageRange> {
        let both = self.entries.iter().chain(&other.entries);
        let mut pages: Vec<u64> = both.map(|(page, _)| *page).collect();
        pages.sort_unstable();
        pages.dedup();
        ranges(pages.into_iter())
    }
}

fn check_header(store: &File, chunks: u64, chunk: &mut [u8]) -> Result<(), StoreError> {
    if chunks <= FIRST_AREA {
        return Err(StoreError::Damaged("it is too short"));
    }
    store.read_exact_at(chunk, 0)?;
    let (header, _) = Header::ref_from_prefix(chunk).map_err(|_| StoreError::Damaged("it is too short"))?;
    if header.magic.get() != MAGIC {
        return Err(StoreError::Damaged("it is no store"));
    }
    if header.version.get() != VERSION || header.chunk_sectors.get() != CHUNK_SECTORS {
        return Err(StoreError::Damaged("it is of another version or chunk size"));
    }
    match header.valid.get() {
        VALID => Ok(()),
        0 => Err(StoreError::GivenUp),
        _ => Err(StoreError::Damaged("it is neither valid nor given up")),
    }
}

/// Sorted pages as runs.
fn ranges(pages: impl Iterator<Item = u64>) -> Vec<PageRange> {
    let mut runs: Vec<PageRange> = Vec::new();
    for page in pages {
        match runs.last_mut() {
            Some(last) if last.end().0 == page => last.count.0 += 1,
            _ => runs.push(PageRange::new(page, 1)),
        }
    }
    runs
}

#[cfg(test)]
mod tests;
