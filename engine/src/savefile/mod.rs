//! Savefile format 1: one file per generation, checked before it is used.
//!
//! Invariants:
//! - the root hash covers every byte of the file: the header's hash covers the section table, the table's hashes cover the
//!   sections, the chunk table's hashes cover the chunks, and nothing lies between or behind them;
//! - nothing is parsed before the bytes it lies in are verified, in this order: length, magic, version, checksum, bounds,
//!   arithmetic;
//! - no allocation is decided by a number in the file before that number is bounded by the file's own length or by a named
//!   limit of the format;
//! - a savefile is written aside and renamed, and never written again.
//!
//! The byte map, with the reason for each field, is in `docs/savefile-format.md`. Reading order of the modules: `header`,
//! `manifest`, `device_state`, `page_map`, `chunk` (the parts), `plan` (what goes where, pure), `aside` and `writer`, `reader`
//! and `decode`.

mod aside;
mod chunk;
mod decode;
mod device_state;
mod error;
mod header;
mod manifest;
mod page_map;
mod plan;
mod progress;
mod reader;
mod twins;
mod writer;

pub use aside::sweep;
pub use chunk::{Chunk, ChunkTable, Codec, CHUNK_PAGES, CHUNK_PAGES_MAX};
pub use decode::{ImageOutput, ReadBackend};
pub use device_state::{DeviceState, DEVICE_STATE_MAX};
pub use error::{Error, Fault};
pub use header::{
    Hash, Header, NotARootHash, RootHash, Section, SectionKind, FORMAT_VERSION, HEADER_LEN, MAGIC,
    ROOT_CONTEXT, SECTIONS_MAX,
};
pub use manifest::{HostIdentity, Manifest, VolumeInfo, MANIFEST_MAX, SCHEMA};
pub use page_map::{is_volume_name, Content, ImageId, PageMap, PageMapBuilder, Run, Slot};
pub use progress::{silent, OnProgress, Progress, Step};
pub use reader::{check_root, peek, Peek, Savefile};
pub use writer::{write, ImageInput, Written};

pub use crate::image::scan::Scope;
