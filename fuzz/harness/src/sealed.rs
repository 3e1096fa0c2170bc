//! Savefiles whose hashes are right, whatever is in them.
//!
//! The root hash would stop every mutation at the door, so these inputs are no savefiles but recipes for some: which sections
//! there are, with which bytes, and the hashes are made right here. Layout of a recipe: number of sections (low 4 bits of u8), then
//! per section its kind u8, [`flag`] bits u8 and length u16, then the sections' bytes in the same order, cut where the input ends.

use engine::savefile::{HEADER_LEN, MAGIC, ROOT_CONTEXT};

/// What a recipe says of a section.
pub mod flag {
    /// It is not mandatory.
    pub const OPTIONAL: u8 = 1;
    /// Of a chunk table: offsets and hashes are to be the recipe's own.
    pub const AS_IT_IS: u8 = 2;
}

const KIND_CHUNK_TABLE: u8 = 4;
const KIND_CHUNK_DATA: u8 = 5;
/// Bytes of a chunk table's head, and of each entry; where in an entry its fields are.
const TABLE_HEAD: usize = 32;
const TABLE_ENTRY: usize = 56;
const ENTRY_STORED: usize = 8;
const ENTRY_HASH: usize = 24;
/// Where in the header the section table begins, and bytes of an entry.
const SECTIONS_AT: usize = 128;
const SECTION_ENTRY: usize = 64;

/// A section of a recipe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// The number of its kind.
    pub kind: u8,
    /// Bits of [`flag`].
    pub flags: u8,
    /// Its bytes, at most 65535.
    pub bytes: Vec<u8>,
}

/// Reads a recipe; every input is one.
pub fn parse(mut data: &[u8]) -> Vec<Part> {
    let count = usize::from(crate::take::<1>(&mut data)[0] & 15);
    let heads: Vec<[u8; 4]> = (0..count).map(|_| crate::take(&mut data)).collect();
    let part = |[kind, flags, low, high]: [u8; 4]| {
        let len = usize::from(u16::from_le_bytes([low, high])).min(data.len());
        let (bytes, rest) = data.split_at(len);
        data = rest;
        Part { kind, flags, bytes: bytes.to_vec() }
    };
    heads.into_iter().map(part).collect()
}

/// The recipe's bytes, for seeds.
pub fn recipe(parts: &[Part]) -> Vec<u8> {
    let mut bytes = vec![parts.len() as u8 & 15];
    for part in parts {
        bytes.extend([part.kind, part.flags]);
        bytes.extend((part.bytes.len() as u16).to_le_bytes());
    }
    bytes.extend(parts.iter().flat_map(|part| &part.bytes));
    bytes
}

/// The savefile that a recipe describes: laid out without gaps, hashes right.
pub fn seal(mut parts: Vec<Part>) -> Vec<u8> {
    seal_chunks(&mut parts);
    let mut header = vec![0; HEADER_LEN];
    header[..8].copy_from_slice(&MAGIC);
    header[8..12].copy_from_slice(&1u32.to_le_bytes());
    header[12..16].copy_from_slice(&(parts.len() as u32).to_le_bytes());
    let mut end = HEADER_LEN as u64;
    for (entry, part) in header[SECTIONS_AT..].chunks_exact_mut(SECTION_ENTRY).zip(&parts) {
        entry[..4].copy_from_slice(&u32::from(part.kind).to_le_bytes());
        entry[4..8].copy_from_slice(&u32::from(part.flags & flag::OPTIONAL == 0).to_le_bytes());
        entry[8..16].copy_from_slice(&end.to_le_bytes());
        entry[16..24].copy_from_slice(&(part.bytes.len() as u64).to_le_bytes());
        if part.kind != KIND_CHUNK_DATA {
            entry[32..64].copy_from_slice(blake3::hash(&part.bytes).as_bytes());
        }
        end += part.bytes.len() as u64;
    }
    header[16..24].copy_from_slice(&end.to_le_bytes());
    seal_root(&mut header);
    parts.iter().for_each(|part| header.extend_from_slice(&part.bytes));
    header
}

/// Makes the root hash of a header right.
pub fn seal_root(header: &mut [u8]) {
    header[32..64].fill(0);
    let mut hasher = blake3::Hasher::new_derive_key(ROOT_CONTEXT);
    hasher.update(&header[..HEADER_LEN]);
    header[32..64].copy_from_slice(hasher.finalize().as_bytes());
}

/// Has the entries of the chunk table tile the chunk data, with the right hashes; the last one takes what is left.
fn seal_chunks(parts: &mut [Part]) {
    let start = |parts: &[Part], at: usize| {
        HEADER_LEN as u64 + parts[..at].iter().map(|part| part.bytes.len() as u64).sum::<u64>()
    };
    let Some(data_at) = parts.iter().position(|part| part.kind == KIND_CHUNK_DATA) else { return };
    let (mut offset, mut data) = (start(parts, data_at), std::mem::take(&mut parts[data_at].bytes));
    let whole = data.clone();
    let tables =
        parts.iter_mut().filter(|part| part.kind == KIND_CHUNK_TABLE && part.flags & flag::AS_IT_IS == 0);
    for table in tables {
        let entries = table.bytes.get_mut(TABLE_HEAD..).unwrap_or_default();
        let count = entries.len() / TABLE_ENTRY;
        for (nth, entry) in entries.chunks_exact_mut(TABLE_ENTRY).enumerate() {
            let stated = u32::from_le_bytes(std::array::from_fn(|at| entry[ENTRY_STORED + at])) as usize;
            let stored = if nth + 1 == count { data.len() } else { stated.min(data.len()) };
            let rest = data.split_off(stored);
            entry[..8].copy_from_slice(&offset.to_le_bytes());
            entry[ENTRY_STORED..ENTRY_STORED + 4].copy_from_slice(&(stored as u32).to_le_bytes());
            entry[ENTRY_HASH..].copy_from_slice(blake3::hash(&data).as_bytes());
            offset += stored as u64;
            data = rest;
        }
    }
    parts[data_at].bytes = whole;
}
