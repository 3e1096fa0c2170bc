//! The receiving half.

use std::io::{self, ErrorKind, Read, Write};

use rustix::fs::FileType;
use rustix::io::Errno;

use crate::header::{Header, Reply, HEADER_BYTES};
use crate::name::{check_link, BadName, Characters, Name, NAME_BYTES_MAX};
use crate::sum::Summed;
use crate::tree::Tree;

/// Bytes written to a file at a time.
const PIECE_BYTES: usize = 64 << 10;

/// How much is taken in one transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Files, folders and links.
    pub entries: u64,
    /// Bytes in files.
    pub bytes: u64,
}

impl Default for Limits {
    /// As many as a disk of a usual size can have inodes for, and as long as files can be: what there is room for is the disk's to say.
    fn default() -> Limits {
        Limits { entries: 1 << 24, bytes: i64::MAX as u64 }
    }
}

/// What has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Received {
    /// Files, folders and links; folders count twice.
    pub entries: u64,
    /// Bytes in files.
    pub bytes: u64,
}

/// Why a transfer failed. The sender was told the number, and the name.
#[derive(Debug, thiserror::Error)]
#[error("cannot receive {}: {}", self.name(), cause)]
pub struct ReceiveError {
    /// The name it was at, as it was sent.
    pub last_name: Option<Vec<u8>>,
    /// What the sender was told.
    pub cause: Errno,
}

impl ReceiveError {
    fn name(&self) -> String {
        self.last_name.as_ref().map_or("files".into(), |name| name.escape_ascii().to_string())
    }
}

/// Takes what is sent into the folder, and answers how that went.
pub fn receive(
    from: impl Read,
    mut to: impl Write,
    tree: &Tree,
    characters: Characters,
    limits: &Limits,
) -> Result<Received, ReceiveError> {
    let mut transfer =
        Transfer { from: Summed::new(from), tree, characters, limits, done: Received::default(), last: None };
    let result = transfer.all().and_then(|()| tree.sync());
    let Transfer { from, done, last, .. } = transfer;
    let error = result.err().map_or(0, |cause| cause.raw_os_error().unsigned_abs());
    let reply = Reply { error, crc32: from.crc32(), last_name: last };
    let answered = reply.write(&mut to);
    let last_name = reply.last_name;
    match (result, answered) {
        (Err(cause), _) => Err(ReceiveError { last_name, cause }),
        (Ok(()), Err(error)) => Err(ReceiveError { last_name, cause: errno(&error) }),
        (Ok(()), Ok(())) => Ok(done),
    }
}

struct Transfer<'a, R> {
    from: Summed<R>,
    tree: &'a Tree,
    characters: Characters,
    limits: &'a Limits,
    done: Received,
    /// The last name that came.
    last: Option<Vec<u8>>,
}

impl<R: Read> Transfer<'_, R> {
    fn all(&mut self) -> Result<(), Errno> {
        loop {
            let mut bytes = [0; HEADER_BYTES];
            read(&mut self.from, &mut bytes)?;
            let header = Header::decode(&bytes);
            if header.name_bytes == 0 {
                return Ok(());
            }
            self.count(1, 0)?;
            self.one(&header)?;
        }
    }

    fn one(&mut self, header: &Header) -> Result<(), Errno> {
        let name = self.name(header)?;
        let is_empty = header.content_bytes == 0;
        match FileType::from_raw_mode(header.mode) {
            FileType::RegularFile => self.file(&name, header),
            FileType::Directory if is_empty => self.tree.folder(&name, header),
            FileType::Symlink => self.link(&name, header),
            _ => Err(Errno::INVAL),
        }
    }

    fn name(&mut self, header: &Header) -> Result<Name, Errno> {
        let len = usize::try_from(header.name_bytes).unwrap_or(usize::MAX);
        let mut bytes = self.bytes(len, NAME_BYTES_MAX + 1)?;
        if bytes.last() == Some(&0) {
            bytes.pop();
        }
        let name = Name::parse(&bytes, self.characters);
        self.last = Some(bytes);
        name.map_err(BadName::errno)
    }

    fn file(&mut self, name: &Name, header: &Header) -> Result<(), Errno> {
        self.count(0, header.content_bytes)?;
        let from = &mut self.from;
        self.tree.file(name, header, |to| copy(from, to, header.content_bytes))
    }

    fn link(&mut self, name: &Name, header: &Header) -> Result<(), Errno> {
        let len = usize::try_from(header.content_bytes).unwrap_or(usize::MAX);
        let target = self.bytes(len, NAME_BYTES_MAX)?;
        check_link(name, &target, self.characters).map_err(BadName::errno)?;
        self.tree.link(name, header, &target)
    }

    fn bytes(&mut self, len: usize, max: usize) -> Result<Vec<u8>, Errno> {
        if len > max {
            return Err(Errno::NAMETOOLONG);
        }
        let mut bytes = vec![0; len];
        read(&mut self.from, &mut bytes)?;
        Ok(bytes)
    }

    fn count(&mut self, entries: u64, bytes: u64) -> Result<(), Errno> {
        let Received { entries: had, bytes: had_bytes } = self.done;
        let done = Received { entries: had.saturating_add(entries), bytes: had_bytes.saturating_add(bytes) };
        if done.entries > self.limits.entries || done.bytes > self.limits.bytes {
            return Err(Errno::DQUOT);
        }
        self.done = done;
        Ok(())
    }
}

fn read(from: &mut impl Read, bytes: &mut [u8]) -> Result<(), Errno> {
    from.read_exact(bytes).map_err(|error| errno(&error))
}

fn copy(from: &mut impl Read, to: &mut dyn Write, bytes: u64) -> Result<(), Errno> {
    let mut piece = vec![0; PIECE_BYTES];
    let mut left = bytes;
    while left > 0 {
        let len = usize::try_from(left).unwrap_or(PIECE_BYTES).min(PIECE_BYTES);
        let piece = piece.get_mut(..len).unwrap_or_default();
        let read = match from.read(piece) {
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => return Err(errno(&error)),
            Ok(0) => return Err(Errno::REMOTEIO),
            Ok(read) => read,
        };
        to.write_all(piece.get(..read).unwrap_or_default()).map_err(|error| errno(&error))?;
        left = left.saturating_sub(read as u64);
    }
    Ok(())
}

/// What the sender is told. A stream that ends too early was ended by the sender, who knows why.
fn errno(error: &io::Error) -> Errno {
    match error.kind() {
        ErrorKind::UnexpectedEof => Errno::REMOTEIO,
        _ => Errno::from_io_error(error).unwrap_or(Errno::IO),
    }
}
