//! The first 4096 bytes: magic, version, section table, root hash.
//!
//! Invariants of a [`Header`] (only [`Header::parse`] and [`Header::seal`] make one):
//! - its root hash is the hash of the header with the root's own bytes as zero, so it covers every other byte of it;
//! - the sections tile the file: the first begins at 4096, each next one where the one before ends, the last one ends at the
//!   file's end. So there is no padding between sections, and nothing is outside them;
//! - every section has its hash in the table, but for the chunk data, which the chunk table's hashes cover: the root covers
//!   every byte of the file;
//! - manifest, device state, chunk table and chunk data are there exactly once, page maps once per image.

use std::fmt;
use std::mem::size_of;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::error::Fault;
use crate::units::{ByteCount, ByteOffset};

/// Length of the header in bytes.
pub const HEADER_LEN: usize = 4096;
/// The version this engine writes and reads.
pub const FORMAT_VERSION: u32 = 1;
/// As in PNG: a byte above 127, a name, CR LF and ^Z, so that a text-mode copy cannot pass.
pub const MAGIC: [u8; 8] = *b"\x8dDVM\r\n\x1a\n";
/// As many as fit the header.
pub const SECTIONS_MAX: usize = 62;
/// The context that keeps a root hash from being any other blake3 hash.
pub const ROOT_CONTEXT: &str = "dispvm 2025 savefile format 1 root";
/// A reader that does not know the section's kind must refuse the file.
const FLAG_MANDATORY: u32 = 1;
const FLAGS_KNOWN: u32 = FLAG_MANDATORY;

const _: () = assert!(size_of::<RawHeader>() == HEADER_LEN);
const _: () = assert!(size_of::<RawSection>() == 64);

/// The header as it lies in the file.
#[derive(Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 8],
    version: U32,
    section_count: U32,
    file_len: U64,
    reserved_a: [u8; 8],
    root: [u8; 32],
    reserved_b: [u8; 64],
    sections: [RawSection; SECTIONS_MAX],
}

/// An entry of the section table as it lies in the file.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawSection {
    kind: U32,
    flags: U32,
    offset: U64,
    length: U64,
    reserved: U64,
    hash: [u8; 32],
}

/// The root of a savefile: it covers every byte, and it is what a qube's record pins. 32 bytes, shown as 64 hex digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RootHash(pub [u8; 32]);

/// A blake3 hash of a section's or a chunk's bytes.
pub type Hash = [u8; 32];

/// What a section holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SectionKind {
    /// JSON, see [`super::Manifest`].
    Manifest,
    /// Opaque bytes of the host, see [`super::DeviceState`].
    DeviceState,
    /// Where the pages of one image are, see [`super::PageMap`].
    PageMap,
    /// Where the chunks are and what they hash to.
    ChunkTable,
    /// The chunks' bytes.
    ChunkData,
    /// A section of a later minor revision; optional, or the file would have been refused.
    Unknown(u32),
}

/// One section: its kind, where it is, and the hash of its bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// What it holds.
    pub kind: SectionKind,
    /// Where it begins in the file.
    pub offset: ByteOffset,
    /// Its length.
    pub length: ByteCount,
    /// blake3 of its bytes; all zero for [`SectionKind::ChunkData`], whose chunks have each their own.
    pub hash: Hash,
}

/// A checked header.
#[derive(Clone, Debug)]
pub struct Header {
    root: RootHash,
    file_len: ByteCount,
    sections: Vec<Section>,
}

impl Header {
    /// Checks the first 4096 bytes of a file that is `file_len` long.
    pub fn parse(bytes: &[u8], file_len: ByteCount) -> Result<Header, Fault> {
        let raw = RawHeader::ref_from_bytes(bytes).map_err(|_| Fault::TooShort { found: file_len })?;
        if raw.magic != MAGIC {
            return Err(Fault::Magic);
        }
        if raw.version.get() != FORMAT_VERSION {
            return Err(Fault::Version(raw.version.get()));
        }
        let root = raw.compute_root();
        if root.0 != raw.root {
            return Err(Fault::Root);
        }
        if raw.file_len.get() != file_len.0 {
            return Err(Fault::Length { stated: ByteCount(raw.file_len.get()), found: file_len });
        }
        if raw.reserved_a != [0; 8] || raw.reserved_b != [0; 64] {
            return Err(Fault::Reserved("the header"));
        }
        let sections = parse_sections(raw, file_len)?;
        check_counts(&sections)?;
        Ok(Header { root, file_len, sections })
    }

    /// Lays the sections out from offset 4096 on, in this order, and seals them with the root hash. Answers the header and
    /// its bytes. Offsets of the given sections are ignored.
    pub(crate) fn seal(sections: Vec<Section>) -> Result<(Header, Vec<u8>), Fault> {
        if sections.len() > SECTIONS_MAX {
            return Err(Fault::SectionCount { what: "table", found: sections.len(), wanted: "at most 62" });
        }
        let mut raw = RawHeader::new_zeroed();
        raw.magic = MAGIC;
        raw.version = FORMAT_VERSION.into();
        raw.section_count = (sections.len() as u32).into();
        let mut end = HEADER_LEN as u64;
        for (entry, section) in raw.sections.iter_mut().zip(&sections) {
            *entry = RawSection {
                kind: section.kind.code().into(),
                flags: FLAG_MANDATORY.into(),
                offset: end.into(),
                length: section.length.0.into(),
                reserved: 0.into(),
                hash: section.hash,
            };
            end = end.saturating_add(section.length.0);
        }
        raw.file_len = end.into();
        raw.root = raw.compute_root().0;
        let bytes = raw.as_bytes().to_vec();
        let header = Header::parse(&bytes, ByteCount(end))?;
        Ok((header, bytes))
    }

    /// The root hash.
    pub fn root(&self) -> RootHash {
        self.root
    }

    /// Length of the whole file.
    pub fn file_len(&self) -> ByteCount {
        self.file_len
    }

    /// All sections, in the file's order.
    pub fn sections(&self) -> &[Section] {
        &self.sections
    }

    /// The sections of a kind.
    pub fn of_kind(&self, kind: SectionKind) -> impl Iterator<Item = &Section> {
        self.sections.iter().filter(move |section| section.kind == kind)
    }

    /// The one section of a kind that is there exactly once.
    pub fn the(&self, kind: SectionKind) -> Result<&Section, Fault> {
        let missing = Fault::SectionCount { what: kind.name(), found: 0, wanted: "one" };
        self.of_kind(kind).next().ok_or(missing)
    }
}

impl RawHeader {
    /// The hash over the header with its root field as zero.
    fn compute_root(&self) -> RootHash {
        let mut unsealed = self.clone();
        unsealed.root = [0; 32];
        let mut hasher = blake3::Hasher::new_derive_key(ROOT_CONTEXT);
        hasher.update(unsealed.as_bytes());
        RootHash(*hasher.finalize().as_bytes())
    }
}

fn parse_sections(raw: &RawHeader, file_len: ByteCount) -> Result<Vec<Section>, Fault> {
    let count = raw.section_count.get() as usize;
    let Some((used, unused)) = raw.sections.split_at_checked(count) else {
        return Err(Fault::SectionCount { what: "table", found: count, wanted: "at most 62" });
    };
    if unused.as_bytes().iter().any(|&byte| byte != 0) {
        return Err(Fault::Reserved("the section table"));
    }
    let mut sections = Vec::with_capacity(count);
    let mut end = ByteOffset(HEADER_LEN as u64);
    for (index, entry) in used.iter().enumerate() {
        let section = entry.parse(index)?;
        let fault = |why| Fault::Section { index, offset: section.offset, why };
        if section.offset != end {
            return Err(fault("it does not begin where the one before it ends"));
        }
        end = section
            .offset
            .checked_add(section.length)
            .ok_or_else(|| fault("its length is beyond 64 bits"))?;
        if end.0 > file_len.0 {
            return Err(fault("it ends beyond the file"));
        }
        sections.push(section);
    }
    if end.0 != file_len.0 {
        return Err(Fault::Length { stated: ByteCount(end.0), found: file_len });
    }
    Ok(sections)
}

impl RawSection {
    fn parse(&self, index: usize) -> Result<Section, Fault> {
        let offset = ByteOffset(self.offset.get());
        let fault = |why| Fault::Section { index, offset, why };
        if self.reserved.get() != 0 || self.flags.get() & !FLAGS_KNOWN != 0 {
            return Err(Fault::Reserved("the section table"));
        }
        let mandatory = self.flags.get() & FLAG_MANDATORY != 0;
        let kind = SectionKind::from_code(self.kind.get());
        match kind {
            SectionKind::Unknown(kind) if mandatory => return Err(Fault::UnknownSection { index, kind }),
            SectionKind::Unknown(_) => {}
            _ if !mandatory => return Err(fault("a section of this kind must be marked mandatory")),
            SectionKind::ChunkData if self.hash != [0; 32] => {
                return Err(fault("chunk data is covered by the chunk table and must have no hash here"));
            }
            _ => {}
        }
        Ok(Section { kind, offset, length: ByteCount(self.length.get()), hash: self.hash })
    }
}

fn check_counts(sections: &[Section]) -> Result<(), Fault> {
    use SectionKind::{ChunkData, ChunkTable, DeviceState, Manifest, PageMap};
    let count = |kind| sections.iter().filter(|section| section.kind == kind).count();
    for kind in [Manifest, DeviceState, ChunkTable, ChunkData] {
        if count(kind) != 1 {
            return Err(Fault::SectionCount { what: kind.name(), found: count(kind), wanted: "one" });
        }
    }
    if count(PageMap) == 0 {
        return Err(Fault::SectionCount { what: PageMap.name(), found: 0, wanted: "at least one" });
    }
    Ok(())
}

impl SectionKind {
    fn from_code(code: u32) -> SectionKind {
        match code {
            1 => SectionKind::Manifest,
            2 => SectionKind::DeviceState,
            3 => SectionKind::PageMap,
            4 => SectionKind::ChunkTable,
            5 => SectionKind::ChunkData,
            other => SectionKind::Unknown(other),
        }
    }

    fn code(self) -> u32 {
        match self {
            SectionKind::Manifest => 1,
            SectionKind::DeviceState => 2,
            SectionKind::PageMap => 3,
            SectionKind::ChunkTable => 4,
            SectionKind::ChunkData => 5,
            SectionKind::Unknown(other) => other,
        }
    }

    /// The name used in messages.
    pub fn name(self) -> &'static str {
        match self {
            SectionKind::Manifest => "manifest",
            SectionKind::DeviceState => "device state",
            SectionKind::PageMap => "page map",
            SectionKind::ChunkTable => "chunk table",
            SectionKind::ChunkData => "chunk data",
            SectionKind::Unknown(_) => "unknown",
        }
    }
}

impl fmt::Display for RootHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for RootHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RootHash({self})")
    }
}

/// A text that is not 64 hex digits.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a root hash has 64 lower-case hex digits")]
pub struct NotARootHash;

impl FromStr for RootHash {
    type Err = NotARootHash;

    fn from_str(text: &str) -> Result<RootHash, NotARootHash> {
        let digit = |byte: u8| match byte {
            b'0'..=b'9' => Ok(byte - b'0'),
            b'a'..=b'f' => Ok(byte - b'a' + 10),
            _ => Err(NotARootHash),
        };
        if text.len() != 64 {
            return Err(NotARootHash);
        }
        let mut hash = [0; 32];
        for (byte, pair) in hash.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
            *byte = (digit(pair[0])? << 4) | digit(pair[1])?;
        }
        Ok(RootHash(hash))
    }
}

impl Serialize for RootHash {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for RootHash {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<RootHash, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}
