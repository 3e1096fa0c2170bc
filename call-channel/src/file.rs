//! Files of callers' that may hang: of somebody's program (FUSE), of a server elsewhere, of a device. Reading and writing them is a thread's each, which no
//! call waits for but the one whose file it is.
//!
//! Files of this machine's own disks and memory are used directly: no call goes on for long where they hang, as its guest is made of them.

use std::fs::File;
use std::io::{self, pipe, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread;

use nix::errno::Errno;
use rustix::fs::{fstat, fstatfs, FileType, FsWord};

/// A pipe's worth.
const PIECE_BYTES: usize = 64 << 10;
/// Stack of a thread that copies by way of the heap.
const STACK_BYTES: usize = 128 << 10;
/// ext2 to ext4, XFS, Btrfs, F2FS, ZFS, bcachefs, overlayfs; tmpfs, ramfs; squashfs, EROFS (linux/magic.h).
const OWN: [u64; 11] = [
    0xef53,
    0x5846_5342,
    0x9123_683e,
    0xf2f5_2010,
    0x2fc1_2fc1,
    0xca45_1a4e,
    0x794c_7630,
    0x0102_1994,
    0x8584_58f6,
    0x7371_7368,
    0xe0f5_e1e2,
];

/// Whether it is a file, and using it may take for ever.
pub(crate) fn may_hang(fd: impl AsFd) -> io::Result<bool> {
    let kind = |kind: FsWord| u64::from(kind as u32);
    Ok(match FileType::from_raw_mode(fstat(&fd)?.st_mode) {
        FileType::BlockDevice => true,
        FileType::RegularFile => !fstatfs(fd).is_ok_and(|there| OWN.contains(&kind(there.f_type))),
        _ => false,
    })
}

/// What to read in the file's place.
pub(crate) fn reader(file: OwnedFd) -> io::Result<OwnedFd> {
    let (ours, mut theirs) = pipe()?;
    let mut file = File::from(file);
    // What cannot be read has ended.
    spawn(move || drop(copy(&mut file, &mut theirs)))?;
    Ok(ours.into())
}

/// What to write to in the file's place. It hangs up when the file has all that was written until it was shut down, or takes no more, and then it says
/// why not: the system's number, as an i32.
pub(crate) fn writer(file: OwnedFd) -> io::Result<OwnedFd> {
    let (ours, mut theirs) = UnixStream::pair()?;
    let mut file = File::from(file);
    spawn(move || {
        if let Err(error) = copy(&mut theirs, &mut file) {
            let number = error.raw_os_error().unwrap_or(Errno::EIO as i32);
            let _ = theirs.write_all(&number.to_ne_bytes());
        }
    })?;
    Ok(ours.into())
}

fn spawn(work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread::Builder::new().name("file".into()).stack_size(STACK_BYTES).spawn(work).map(drop)
}

fn copy(from: &mut impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut buffer = vec![0; PIECE_BYTES];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => to.write_all(buffer.get(..count).unwrap_or_default())?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
