//! The sending half.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use crate::header::{Header, Reply};
use crate::sum::Summed;
use crate::walk::{Content, Walk, WalkError};

/// Bytes read from a file at a time.
const PIECE_BYTES: usize = 64 << 10;

/// Why a transfer failed.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// Something cannot be read, or would not be taken.
    #[error(transparent)]
    Walk(#[from] WalkError),
    /// A file cannot be read to its end.
    #[error("cannot read {}: {cause}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// The receiver says that there is such a file already.
    #[error(
        "a file named {0} already exists in the target's QubesIncoming folder; rename or remove one of them"
    )]
    Exists(String),
    /// The receiver failed, or refused something.
    #[error("the target could not take {last_name}: {cause}")]
    Refused {
        /// What it was at.
        last_name: String,
        /// Why.
        cause: io::Error,
    },
    /// Not what was sent has come.
    #[error("what has come is not what was sent (the checksums differ)")]
    Checksum,
    /// The receiver is gone.
    #[error("the target ended the transfer without an answer")]
    NoAnswer,
}

/// Sends what the paths name, and waits for the answer. `progress` is told how many bytes of files were sent each time that some were.
pub fn send(
    paths: &[PathBuf],
    ignores_links: bool,
    to: impl Write,
    mut from: impl Read,
    progress: &mut dyn FnMut(u64),
) -> Result<(), SendError> {
    let mut to = Summed::new(to);
    let sent = send_all(paths, ignores_links, &mut to, progress);
    if let Err(Failed::Send(error)) = sent {
        return Err(error);
    }
    // Who does not take what is sent has said why, or has gone. Whoever reads on meanwhile sees the end here.
    let crc32 = to.crc32();
    drop(to);
    let reply = Reply::read(&mut from).ok().flatten().ok_or(SendError::NoAnswer)?;
    if reply.error != 0 {
        return Err(refusal(reply));
    }
    match sent.is_ok() && reply.crc32 == crc32 {
        true => Ok(()),
        false => Err(SendError::Checksum),
    }
}

enum Failed {
    Send(SendError),
    /// Nobody takes what is sent.
    Write,
}

impl From<WalkError> for Failed {
    fn from(error: WalkError) -> Failed {
        Failed::Send(error.into())
    }
}

fn send_all<W: Write>(
    paths: &[PathBuf],
    ignores_links: bool,
    to: &mut Summed<W>,
    progress: &mut dyn FnMut(u64),
) -> Result<(), Failed> {
    let write = |_| Failed::Write;
    Walk { ignores_links }.all(paths, &mut |entry| {
        to.write_all(&entry.header.encode()).map_err(write)?;
        to.write_all(entry.name.as_bytes()).map_err(write)?;
        to.write_all(&[0]).map_err(write)?;
        match entry.content {
            Content::Nothing => Ok(()),
            Content::Target(target) => to.write_all(target).map_err(write),
            Content::Of(file) => copy(file, entry.header.content_bytes, entry.path, to, progress),
        }
    })?;
    to.write_all(&Header::default().encode()).and_then(|()| to.flush()).map_err(write)
}

/// Copies as much of the file as its header says: what has grown meanwhile is cut, what has shrunk is an error.
fn copy(
    mut file: &File,
    bytes: u64,
    path: &Path,
    to: &mut impl Write,
    progress: &mut dyn FnMut(u64),
) -> Result<(), Failed> {
    let mut piece = vec![0; PIECE_BYTES];
    let mut left = bytes;
    while left > 0 {
        let len = usize::try_from(left).unwrap_or(PIECE_BYTES).min(PIECE_BYTES);
        let piece = piece.get_mut(..len).unwrap_or_default();
        let read = match file.read(piece) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Ok(0) => Err(io::Error::other("it has become shorter while it was sent")),
            read => read,
        };
        let read = read.map_err(|cause| Failed::Send(SendError::Read { path: path.into(), cause }))?;
        to.write_all(piece.get(..read).unwrap_or_default()).map_err(|_| Failed::Write)?;
        left = left.saturating_sub(read as u64);
        progress(read as u64);
    }
    Ok(())
}

fn refusal(reply: Reply) -> SendError {
    let last_name = reply.last_name.map_or("a file".into(), |name| {
        // It comes from another qube.
        name.strip_suffix(b"\0").unwrap_or(&name).escape_ascii().to_string()
    });
    let cause = io::Error::from_raw_os_error(i32::try_from(reply.error).unwrap_or(0));
    match cause.kind() {
        io::ErrorKind::AlreadyExists => SendError::Exists(last_name),
        _ => SendError::Refused { last_name, cause },
    }
}
