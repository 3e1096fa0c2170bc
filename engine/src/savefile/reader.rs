//! Opens a savefile: what is behind a [`Savefile`] is checked.
//!
//! Invariants:
//! - header, manifest, page maps and chunk table of a [`Savefile`] match their hashes and the format's rules;
//! - device state is verified when it is read, chunks when they are decoded;
//! - no section is read into memory before its length is bounded by the file's and by its kind's limit.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::chunk::ChunkTable;
use super::decode::{decode_images, verify_chunks, ImageOutput, ReadBackend};
use super::device_state::{DeviceState, DEVICE_STATE_MAX};
use super::error::{Error, Fault};
use super::header::{Header, RootHash, Section, SectionKind, HEADER_LEN};
use super::manifest::{Manifest, MANIFEST_MAX};
use super::page_map::{ImageId, PageMap};
use super::plan::check_no_orphans;
use super::OnProgress;
use crate::units::ByteCount;

/// A page map of 64 Mi runs, or a chunk table of 4 TiB of stored pages: nothing larger is read into memory.
const TABLE_MAX: ByteCount = ByteCount(1 << 30);
/// What is hashed at a time where a section is verified but not kept.
const HASH_PIECE: usize = 256 << 10;

/// An open, checked savefile.
#[derive(Debug)]
pub struct Savefile {
    path: PathBuf,
    file: File,
    header: Header,
    manifest: Manifest,
    maps: Vec<PageMap>,
    table: ChunkTable,
}

/// What a list of savefiles needs of each.
#[derive(Clone, Debug)]
pub struct Peek {
    /// The file's root hash.
    pub root: RootHash,
    /// Length of the file.
    pub stored_bytes: ByteCount,
    /// Its manifest.
    pub manifest: Manifest,
}

/// Reads and checks header and manifest only.
pub fn peek(path: &Path, expected: Option<&RootHash>) -> Result<Peek, Error> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    let (header, manifest) = read_head(&file, path, expected)?;
    Ok(Peek { root: header.root(), stored_bytes: header.file_len(), manifest })
}

impl Savefile {
    /// Opens the savefile at `path`; refuses any but the one whose root hash is `expected`, where that is given.
    pub fn open(path: &Path, expected: Option<&RootHash>) -> Result<Savefile, Error> {
        let file = File::open(path).map_err(Error::io("open", path))?;
        Savefile::from_file(file, path, expected)
    }

    /// The same from an open file; `path` is for messages.
    pub fn from_file(file: File, path: &Path, expected: Option<&RootHash>) -> Result<Savefile, Error> {
        let (header, manifest) = read_head(&file, path, expected)?;
        let at = |fault: Fault| fault.at(path);
        let data = header.the(SectionKind::ChunkData).map_err(at)?;
        let table = header.the(SectionKind::ChunkTable).map_err(at)?;
        let table = ChunkTable::parse(&read_section(&file, path, table, TABLE_MAX)?, data).map_err(at)?;
        let mut maps: Vec<PageMap> = Vec::new();
        for section in header.of_kind(SectionKind::PageMap) {
            let map =
                PageMap::parse(&read_section(&file, path, section, TABLE_MAX)?, table.slots()).map_err(at)?;
            if maps.iter().any(|other| other.image() == map.image()) {
                return Err(at(Fault::PageMapHead("its image has another page map already")));
            }
            maps.push(map);
        }
        Ok(Savefile { path: path.to_owned(), file, header, manifest, maps, table })
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its root hash.
    pub fn root(&self) -> RootHash {
        self.header.root()
    }

    /// Length of the file.
    pub fn stored_bytes(&self) -> ByteCount {
        self.header.file_len()
    }

    /// Its header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Its manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The page maps of all images, in the file's order.
    pub fn page_maps(&self) -> &[PageMap] {
        &self.maps
    }

    /// The images it holds, in the file's order.
    pub fn images(&self) -> impl Iterator<Item = &ImageId> {
        self.maps.iter().map(PageMap::image)
    }

    /// The page map of one image. Error: [`Error::Mismatch`] when it has no such image.
    pub fn page_map(&self, id: &ImageId) -> Result<&PageMap, Error> {
        let found = self.maps.iter().find(|map| map.image() == id);
        found.ok_or_else(|| self.mismatch(format!("it has no image of {id}")))
    }

    /// Its chunk table.
    pub fn chunk_table(&self) -> &ChunkTable {
        &self.table
    }

    /// Reads and verifies the device state.
    pub fn device_state(&self) -> Result<DeviceState, Error> {
        let section = self.header.the(SectionKind::DeviceState).map_err(|fault| fault.at(&self.path))?;
        let bytes = read_section(&self.file, &self.path, section, DEVICE_STATE_MAX)?;
        DeviceState::parse(&bytes).map_err(|fault| fault.at(&self.path))
    }

    /// Reads every byte of the file and decodes every chunk: when it answers `Ok`, the file restores, and no bit of it differs
    /// from what was written.
    pub fn verify(&self, backend: ReadBackend, progress: OnProgress) -> Result<(), Error> {
        // The file may have changed since it was opened.
        let (header, _) = read_head(&self.file, &self.path, Some(&self.root()))?;
        for section in header.sections().iter().filter(|section| section.kind != SectionKind::ChunkData) {
            self.verify_section(section)?;
        }
        self.device_state()?;
        check_no_orphans(&self.maps, self.table.slots()).map_err(|fault| fault.at(&self.path))?;
        verify_chunks(self, backend, progress)
    }

    /// Decodes images, each chunk read and verified once, also where images share pages.
    ///
    /// Each output must be as long as its image and hold nothing but holes: zero pages are not written, and in a delta neither
    /// are the pages that are as the base. Errors: [`Error::Mismatch`] for an image that is not in it or an output of
    /// another length; those of reading, verifying and writing.
    pub fn decode(
        &self,
        outputs: &[ImageOutput],
        backend: ReadBackend,
        progress: OnProgress,
    ) -> Result<(), Error> {
        decode_images(self, outputs, backend, progress)
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    pub(super) fn mismatch(&self, what: String) -> Error {
        Error::Mismatch { path: self.path.clone(), what }
    }

    fn verify_section(&self, section: &Section) -> Result<(), Error> {
        let mut hasher = blake3::Hasher::new();
        let mut piece = vec![0; HASH_PIECE];
        let (mut at, mut left) = (section.offset, section.length);
        while left > ByteCount::ZERO {
            let len = left.0.min(HASH_PIECE as u64);
            let bytes = &mut piece[..len as usize];
            let step = format!("read the {} section at offset {at} of", section.kind.name());
            self.file.read_exact_at(bytes, at.0).map_err(Error::io(step, &self.path))?;
            hasher.update(bytes);
            at.0 += len;
            left.0 -= len;
        }
        check_hash(section, hasher.finalize()).map_err(|fault| fault.at(&self.path))
    }
}

/// Whether the file at `path` is the savefile with this root hash, by its header alone: what a launch can afford, and enough to
/// notice that a file was replaced. Errors: [`Error::NotThePinned`], and those of a header that is none.
pub fn check_root(path: &Path, pinned: &RootHash) -> Result<(), Error> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    read_header(&file, path, Some(pinned)).map(drop)
}

fn read_head(file: &File, path: &Path, expected: Option<&RootHash>) -> Result<(Header, Manifest), Error> {
    let header = read_header(file, path, expected)?;
    let section = header.the(SectionKind::Manifest).map_err(|fault| fault.at(path))?;
    let manifest = Manifest::parse(&read_section(file, path, section, MANIFEST_MAX)?);
    Ok((header, manifest.map_err(|fault| fault.at(path))?))
}

fn read_header(file: &File, path: &Path, expected: Option<&RootHash>) -> Result<Header, Error> {
    let file_len = ByteCount(file.metadata().map_err(Error::io("look at", path))?.len());
    if file_len.0 < HEADER_LEN as u64 {
        return Err(Fault::TooShort { found: file_len }.at(path));
    }
    let mut head = [0; HEADER_LEN];
    file.read_exact_at(&mut head, 0).map_err(Error::io("read the header of", path))?;
    let header = Header::parse(&head, file_len).map_err(|fault| fault.at(path))?;
    if let Some(&pinned) = expected.filter(|&&pinned| pinned != header.root()) {
        return Err(Error::NotThePinned { path: path.to_owned(), pinned, found: header.root() });
    }
    Ok(header)
}

/// Reads a section whole and checks its hash. The header has bounded it by the file's length.
fn read_section(file: &File, path: &Path, section: &Section, limit: ByteCount) -> Result<Vec<u8>, Error> {
    let Section { kind, offset, length, .. } = section;
    if *length > limit {
        let fault = Fault::SectionLimit { what: kind.name(), offset: *offset, found: *length, limit };
        return Err(fault.at(path));
    }
    let step = format!("read the {} section at offset {offset} of", kind.name());
    let mut bytes = vec![0; length.0 as usize];
    file.read_exact_at(&mut bytes, offset.0).map_err(Error::io(step, path))?;
    check_hash(section, blake3::hash(&bytes)).map_err(|fault| fault.at(path))?;
    Ok(bytes)
}

fn check_hash(section: &Section, found: blake3::Hash) -> Result<(), Fault> {
    if found.as_bytes() == &section.hash {
        return Ok(());
    }
    Err(Fault::SectionHash { what: section.kind.name(), offset: section.offset })
}
