//! Chunks: what stored pages are packed into.
//!
//! Invariants of a [`ChunkTable`] (only [`ChunkTable::parse`] and the writer make one):
//! - slots fill the chunks in order: chunk `n` holds the slots from `n * chunk_pages` on, every chunk is full but the last;
//! - chunks tile the chunk data section in order, without gaps;
//! - `0 < stored <= raw <= chunk_pages * 4096`: a buffer of a chunk's size holds either form, and a chunk that does not
//!   shrink is stored as it is;
//! - each chunk is on its own: no chunk needs another to decode. So they encode and decode in parallel;
//! - a chunk's hash is over its stored bytes, and is checked before the decoder sees one of them.

use std::io;
use std::mem::size_of;

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use zstd::zstd_safe::{CParameter, Strategy};

use super::error::Fault;
use super::header::{Hash, Section};
use super::page_map::Slot;
use crate::units::{ByteCount, ByteOffset, PageCount, IMAGE_PAGES_MAX, PAGE_SIZE};

/// Pages in a chunk as this engine writes them: 1 MiB. On the memory of a Debian guest the same search finds 1.6 % less in 256 KiB
/// chunks; 119 MB still are more chunks than any machine has processors.
pub const CHUNK_PAGES: PageCount = PageCount(256);
/// The largest chunk a file may ask a reader to make a buffer for: 4 MiB.
pub const CHUNK_PAGES_MAX: PageCount = PageCount(1024);
/// How this engine searches for matches; readers need not know it. Between zstd's levels 1 and 3: on the memory of a Debian guest
/// (1 MiB chunks) it stores 39.83 MB where `zstd -3` of the whole image, whose window sees more, has 40.10. With tables of 2^14 entries it
/// were 40.35, 7 % sooner; with 2^15, 40.02. Four-byte matches find the pointers that memory is full of.
const SEARCH: [CParameter; 7] = [
    CParameter::Strategy(Strategy::ZSTD_dfast),
    CParameter::WindowLog(20),
    CParameter::HashLog(16),
    CParameter::ChainLog(16),
    CParameter::MinMatch(4),
    CParameter::SearchLog(1),
    CParameter::TargetLength(0),
];

const CODEC_RAW: u32 = 0;
const CODEC_ZSTD: u32 = 1;

const _: () = assert!(size_of::<RawHead>() == 32);
const _: () = assert!(size_of::<RawEntry>() == 56);

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHead {
    chunk_pages: U32,
    working_set_chunks: U32,
    slots: U64,
    reserved: [u8; 16],
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawEntry {
    offset: U64,
    stored: U32,
    raw: U32,
    codec: U32,
    reserved: U32,
    hash: Hash,
}

/// How a chunk is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codec {
    /// As it is.
    Raw,
    /// One zstd frame that states its content size.
    Zstd,
}

/// One chunk: where it is, how it is stored, what it hashes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Where it begins in the file.
    pub offset: ByteOffset,
    /// Its length in the file.
    pub stored: ByteCount,
    /// Its length decoded.
    pub raw: ByteCount,
    /// How it is stored.
    pub codec: Codec,
    /// blake3 of its stored bytes.
    pub hash: Hash,
}

/// All chunks of a savefile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChunkTable {
    chunk_pages: PageCount,
    working_set_chunks: u32,
    slots: PageCount,
    chunks: Vec<Chunk>,
}

impl ChunkTable {
    /// A table over chunks that the writer has laid out.
    pub(crate) fn new(slots: PageCount, working_set_chunks: u32, chunks: Vec<Chunk>) -> ChunkTable {
        ChunkTable { chunk_pages: CHUNK_PAGES, working_set_chunks, slots, chunks }
    }

    /// Pages in every chunk but the last.
    pub fn chunk_pages(&self) -> PageCount {
        self.chunk_pages
    }

    /// How many chunks, from the first on, hold the recorded working set; 0 while none is recorded.
    pub fn working_set_chunks(&self) -> u32 {
        self.working_set_chunks
    }

    /// Number of stored pages.
    pub fn slots(&self) -> PageCount {
        self.slots
    }

    /// The chunks, in the file's order.
    pub fn chunks(&self) -> &[Chunk] {
        &self.chunks
    }

    /// The chunk that holds a slot, and the slot's page in it.
    pub fn locate(&self, slot: Slot) -> (usize, PageCount) {
        ((slot.0 / self.chunk_pages.0) as usize, PageCount(slot.0 % self.chunk_pages.0))
    }

    /// Reads a chunk table section; `data` is the chunk data section it must tile.
    pub fn parse(section: &[u8], data: &Section) -> Result<ChunkTable, Fault> {
        let fault = |chunk, why| Fault::ChunkTable { chunk, why };
        let (head, entries) =
            RawHead::ref_from_prefix(section).map_err(|_| fault(0, "the table is too short for its head"))?;
        let entries = <[RawEntry]>::ref_from_bytes(entries)
            .map_err(|_| fault(0, "the table's length is no whole number of chunks"))?;
        if head.reserved != [0; 16] {
            return Err(Fault::Reserved("the chunk table"));
        }
        let (chunk_pages, slots) = (PageCount(head.chunk_pages.get().into()), PageCount(head.slots.get()));
        if !(1..=CHUNK_PAGES_MAX.0).contains(&chunk_pages.0) {
            return Err(fault(0, "the chunk size is none the format allows"));
        }
        if slots.0 > IMAGE_PAGES_MAX || slots.0.div_ceil(chunk_pages.0) != entries.len() as u64 {
            return Err(fault(entries.len(), "there are not as many chunks as the stored pages need"));
        }
        let working_set_chunks = head.working_set_chunks.get();
        if working_set_chunks as usize > entries.len() {
            return Err(fault(entries.len(), "the working set has more chunks than there are"));
        }
        let chunks = parse_entries(entries, chunk_pages, slots, data)?;
        Ok(ChunkTable { chunk_pages, working_set_chunks, slots, chunks })
    }

    /// The chunk table section's bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let head = RawHead {
            chunk_pages: (self.chunk_pages.0 as u32).into(),
            working_set_chunks: self.working_set_chunks.into(),
            slots: self.slots.0.into(),
            reserved: [0; 16],
        };
        let mut bytes = head.as_bytes().to_vec();
        for chunk in &self.chunks {
            bytes.extend_from_slice(RawEntry::new(chunk).as_bytes());
        }
        bytes
    }

    /// The length of the section for a number of slots: it is known before any chunk is encoded.
    pub(crate) fn section_len(slots: PageCount) -> ByteCount {
        let chunks = slots.0.div_ceil(CHUNK_PAGES.0);
        ByteCount(size_of::<RawHead>() as u64 + chunks * size_of::<RawEntry>() as u64)
    }
}

fn parse_entries(
    entries: &[RawEntry],
    chunk_pages: PageCount,
    slots: PageCount,
    data: &Section,
) -> Result<Vec<Chunk>, Fault> {
    let mut chunks = Vec::with_capacity(entries.len());
    let mut end = data.offset;
    let mut left = slots;
    for (index, entry) in entries.iter().enumerate() {
        let fault = |why| Fault::ChunkTable { chunk: index, why };
        let chunk = entry.parse().map_err(fault)?;
        if chunk.offset != end {
            return Err(fault("it does not begin where the one before it ends"));
        }
        let pages = left.min(chunk_pages);
        if chunk.raw != pages.bytes() {
            return Err(fault("its raw length is not that of the pages it holds"));
        }
        if chunk.stored == ByteCount::ZERO || chunk.stored > chunk.raw {
            return Err(fault("it is stored in no byte, or in more than it has"));
        }
        if chunk.codec == Codec::Raw && chunk.stored != chunk.raw {
            return Err(fault("it is stored raw, but not in its raw length"));
        }
        end = chunk.offset.checked_add(chunk.stored).ok_or_else(|| fault("its length is beyond 64 bits"))?;
        left.0 -= pages.0;
        chunks.push(chunk);
    }
    if end.0 != data.offset.0.saturating_add(data.length.0) {
        return Err(Fault::ChunkTable { chunk: entries.len(), why: "the chunks do not fill the chunk data" });
    }
    Ok(chunks)
}

impl RawEntry {
    fn new(chunk: &Chunk) -> RawEntry {
        let codec = match chunk.codec {
            Codec::Raw => CODEC_RAW,
            Codec::Zstd => CODEC_ZSTD,
        };
        RawEntry {
            offset: chunk.offset.0.into(),
            stored: (chunk.stored.0 as u32).into(),
            raw: (chunk.raw.0 as u32).into(),
            codec: codec.into(),
            reserved: 0.into(),
            hash: chunk.hash,
        }
    }

    fn parse(&self) -> Result<Chunk, &'static str> {
        if self.reserved.get() != 0 {
            return Err("its reserved bytes are not zero");
        }
        let codec = match self.codec.get() {
            CODEC_RAW => Codec::Raw,
            CODEC_ZSTD => Codec::Zstd,
            _ => return Err("its codec is unknown"),
        };
        Ok(Chunk {
            offset: ByteOffset(self.offset.get()),
            stored: ByteCount(self.stored.get().into()),
            raw: ByteCount(self.raw.get().into()),
            codec,
            hash: self.hash,
        })
    }
}

/// A chunk's stored form, before it has a place in the file.
pub(crate) struct Encoded {
    pub codec: Codec,
    pub raw: ByteCount,
    pub hash: Hash,
    pub bytes: Vec<u8>,
}

/// Encodes chunks; one per thread, its tables are used again from chunk to chunk.
pub(crate) struct Encoder {
    zstd: zstd::bulk::Compressor<'static>,
    frame: Vec<u8>,
}

impl Encoder {
    pub fn new() -> io::Result<Encoder> {
        let mut zstd = zstd::bulk::Compressor::new(0)?;
        SEARCH.into_iter().try_for_each(|parameter| zstd.set_parameter(parameter))?;
        Ok(Encoder { zstd, frame: vec![0; CHUNK_PAGES.buffer_len()] })
    }

    /// The stored form of `raw`, at most a chunk: a zstd frame where that is smaller, else the bytes themselves.
    pub fn encode(&mut self, raw: &[u8]) -> Encoded {
        // A frame that does not fit one byte less than the raw bytes is an error of the compressor: then it is no gain.
        let room = self.frame.len().min(raw.len().saturating_sub(1));
        let (codec, stored) = match self.zstd.compress_to_buffer(raw, &mut self.frame[..room]) {
            Ok(len) => (Codec::Zstd, &self.frame[..len]),
            Err(_) => (Codec::Raw, raw),
        };
        let hash = *blake3::hash(stored).as_bytes();
        Encoded { codec, raw: ByteCount(raw.len() as u64), hash, bytes: stored.to_vec() }
    }
}

/// Verifies and decodes chunks; one per thread.
pub(crate) struct Decoder {
    zstd: zstd::bulk::Decompressor<'static>,
    raw: Vec<u8>,
}

impl Decoder {
    pub fn new(chunk_pages: PageCount) -> io::Result<Decoder> {
        Ok(Decoder { zstd: zstd::bulk::Decompressor::new()?, raw: vec![0; chunk_pages.buffer_len()] })
    }

    /// The pages of a chunk, from its stored bytes. The hash is checked first.
    pub fn decode<'a>(
        &'a mut self,
        index: usize,
        chunk: &Chunk,
        stored: &'a [u8],
    ) -> Result<&'a [u8], Fault> {
        if blake3::hash(stored).as_bytes() != &chunk.hash {
            return Err(Fault::ChunkHash { chunk: index, offset: chunk.offset });
        }
        if chunk.codec == Codec::Raw {
            return Ok(stored);
        }
        let fault = |why| Fault::ChunkDecode { chunk: index, offset: chunk.offset, wanted: chunk.raw, why };
        let wanted = chunk.raw.0 as usize;
        let raw =
            self.raw.get_mut(..wanted).ok_or_else(|| fault("its raw length is beyond a chunk's".into()))?;
        match self.zstd.decompress_to_buffer(stored, raw) {
            Ok(len) if len == wanted => Ok(raw),
            Ok(len) => Err(fault(format!("it decodes to {len}"))),
            Err(err) => Err(fault(err.to_string())),
        }
    }
}

const _: () = assert!(CHUNK_PAGES.0 <= CHUNK_PAGES_MAX.0 && CHUNK_PAGES_MAX.0 * PAGE_SIZE <= u32::MAX as u64);
