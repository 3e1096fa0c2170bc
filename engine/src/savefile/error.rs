//! What can go wrong with a savefile, each with its step and its place.
//!
//! Invariant: nothing in here is decided by reading text; callers match on variants. Parsers answer a [`Fault`] (they know
//! no path); the reader adds the path and makes it an [`Error`].

use std::io;
use std::path::{Path, PathBuf};

use crate::savefile::header::RootHash;
use crate::units::{ByteCount, ByteOffset, PageIndex};

/// Why a savefile or a hot image could not be written, opened, verified or decoded.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused a step.
    #[error("cannot {step} {path}: {source}")]
    Io {
        /// What was being done, with its place: "read chunk 17 at offset 0x7c000 of".
        step: String,
        /// The file or folder it was done to.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file does not begin like a savefile.
    #[error("{path} is not a savefile")]
    NotASavefile {
        /// The file.
        path: PathBuf,
    },
    /// The file is a savefile of a format this engine does not read.
    #[error("{path} is in savefile format {found}, this engine reads format {}", super::FORMAT_VERSION)]
    UnknownVersion {
        /// The file.
        path: PathBuf,
        /// The version it carries.
        found: u32,
    },
    /// The file's bytes contradict its checksums or the format's rules.
    #[error("{path} is damaged: {fault}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The first contradiction found.
        fault: Fault,
    },
    /// A sound savefile, but not the one that was pinned.
    #[error("{path} is not the savefile that was pinned: its root hash is {found}, pinned is {pinned}")]
    NotThePinned {
        /// The file.
        path: PathBuf,
        /// The root hash the caller expected.
        pinned: RootHash,
        /// The root hash the file has.
        found: RootHash,
    },
    /// What was asked for is not in the savefile, or does not fit it.
    #[error("{path}: {what}")]
    Mismatch {
        /// The savefile.
        path: PathBuf,
        /// What does not fit.
        what: String,
    },
    /// What was to be written breaks a limit or a rule of the format.
    #[error("cannot write {path}: {what}")]
    Unwritable {
        /// The savefile that was to be.
        path: PathBuf,
        /// The rule, and by what it is broken.
        what: String,
    },
}

impl Error {
    /// Makes an `io::Error` say its step and place.
    pub(crate) fn io(step: impl Into<String>, path: &Path) -> impl FnOnce(io::Error) -> Error {
        let (step, path) = (step.into(), path.to_owned());
        move |source| Error::Io { step, path, source }
    }

    /// Whether the file itself is at fault: damaged, foreign, of another format or not the pinned one. Everything else is
    /// the machine's (disk full, permission) or the caller's fault.
    pub fn is_bad_savefile(&self) -> bool {
        matches!(
            self,
            Error::NotASavefile { .. }
                | Error::UnknownVersion { .. }
                | Error::Damaged { .. }
                | Error::NotThePinned { .. }
        )
    }

    /// Whether a file that should be there is not.
    pub fn is_missing(&self) -> bool {
        matches!(self, Error::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }

    /// Whether the disk, or a quota or limit on it, was full.
    pub fn is_disk_full(&self) -> bool {
        use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
        matches!(self, Error::Io { source, .. }
            if matches!(source.kind(), StorageFull | QuotaExceeded | FileTooLarge))
    }
}

/// A contradiction inside a savefile.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// Not even a whole header.
    #[error("it has {found} bytes, the header alone has {}", super::header::HEADER_LEN)]
    TooShort {
        /// Length of the file.
        found: ByteCount,
    },
    /// The magic number is another's.
    #[error("it does not begin with the savefile magic")]
    Magic,
    /// The version is not this engine's.
    #[error("format version {0}")]
    Version(u32),
    /// The header's hash does not match its bytes.
    #[error("the header's bytes do not match its root hash")]
    Root,
    /// Truncated, or bytes appended.
    #[error("it has {found} bytes, its header says {stated}")]
    Length {
        /// Length in the header.
        stated: ByteCount,
        /// Length of the file.
        found: ByteCount,
    },
    /// Reserved bytes that are not zero.
    #[error("reserved bytes of {0} are not zero")]
    Reserved(&'static str),
    /// A mandatory section of a kind this engine does not know.
    #[error("section {index} is mandatory and of unknown kind {kind:#x}")]
    UnknownSection {
        /// Place in the section table.
        index: usize,
        /// The kind found there.
        kind: u32,
    },
    /// A section that must be there once is not, or is twice.
    #[error("it has {found} {what} sections instead of {wanted}")]
    SectionCount {
        /// Which section.
        what: &'static str,
        /// How many are there.
        found: usize,
        /// How many there must be.
        wanted: &'static str,
    },
    /// A section breaks the rules of the section table.
    #[error("section {index} at offset {offset}: {why}")]
    Section {
        /// Place in the section table.
        index: usize,
        /// Where it says to begin.
        offset: ByteOffset,
        /// The rule broken.
        why: &'static str,
    },
    /// A section is longer than its kind may be.
    #[error("the {what} section at offset {offset} has {found} bytes, at most {limit} are allowed")]
    SectionLimit {
        /// Which section.
        what: &'static str,
        /// Where it begins.
        offset: ByteOffset,
        /// Its length.
        found: ByteCount,
        /// The longest that is allowed.
        limit: ByteCount,
    },
    /// A section's bytes do not match its hash.
    #[error("the bytes of the {what} section at offset {offset} do not match their hash")]
    SectionHash {
        /// Which section.
        what: &'static str,
        /// Where it begins.
        offset: ByteOffset,
    },
    /// The manifest is not what its schema says.
    #[error("the manifest is not of schema {}: {why}", super::manifest::SCHEMA)]
    Manifest {
        /// What the JSON parser or the schema says.
        why: String,
    },
    /// The device state section is malformed.
    #[error("the device state: {0}")]
    DeviceState(&'static str),
    /// A page map is malformed.
    #[error("the page map of {image}, run {run} at page {page}: {why}")]
    PageMap {
        /// The image it maps.
        image: String,
        /// Which run.
        run: usize,
        /// Where that run begins.
        page: PageIndex,
        /// The rule broken.
        why: &'static str,
    },
    /// A page map's own head is malformed.
    #[error("a page map's head: {0}")]
    PageMapHead(&'static str),
    /// The chunk table is malformed.
    #[error("the chunk table, chunk {chunk}: {why}")]
    ChunkTable {
        /// Which chunk.
        chunk: usize,
        /// The rule broken.
        why: &'static str,
    },
    /// A chunk's bytes do not match its hash.
    #[error("the bytes of chunk {chunk} at offset {offset} do not match their hash")]
    ChunkHash {
        /// Which chunk.
        chunk: usize,
        /// Where it begins.
        offset: ByteOffset,
    },
    /// A chunk has the right hash, but is no frame that decodes to its length.
    #[error("chunk {chunk} at offset {offset} does not decode to {wanted} bytes: {why}")]
    ChunkDecode {
        /// Which chunk.
        chunk: usize,
        /// Where it begins.
        offset: ByteOffset,
        /// The length it must have.
        wanted: ByteCount,
        /// What the decoder says.
        why: String,
    },
    /// Stored pages that no page map uses.
    #[error("stored page {slot} is used by no image")]
    Orphan {
        /// The first such page.
        slot: u64,
    },
}

impl Fault {
    /// Adds the path; the two faults that mean "not ours to read" become errors of their own.
    pub(crate) fn at(self, path: &Path) -> Error {
        let path = path.to_owned();
        match self {
            Fault::Magic => Error::NotASavefile { path },
            Fault::Version(found) => Error::UnknownVersion { path, found },
            fault => Error::Damaged { path, fault },
        }
    }
}
