//! Files of volumes: raw images whose zeros are holes.
//!
//! Invariants: a volume's file gets its name only when it is whole, on the disk and read-only. Until then it has none, so that
//! nothing is left of it when whoever makes it is killed.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::AtFlags;
use nix::libc;
use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::state;

/// Copied, compared and hashed piece by piece; a piece of zeros becomes a hole.
const PIECE: usize = 1 << 20;
/// To hash a hole with.
static ZEROS: [u8; PIECE] = [0; PIECE];

/// A copy of `base` to write to, without a name, on the file system of `folder`. Shares the blocks of `base` where the
/// file system can.
pub fn unnamed_copy(base: &Path, folder: &Path) -> Result<File> {
    let copy = || -> io::Result<File> {
        let from = File::open(base)?;
        let to = open_unnamed(folder)?;
        if rustix::fs::ioctl_ficlone(&to, &from).is_err() {
            copy_data(&from, &to)?;
        }
        Ok(to)
    };
    copy().map_err(Error::io("make a copy to write to of", base))
}

/// An empty file without a name on the file system of `folder`.
pub fn unnamed(folder: &Path) -> Result<File> {
    open_unnamed(folder).map_err(Error::io("make a file in", folder))
}

fn open_unnamed(folder: &Path) -> io::Result<File> {
    File::options().read(true).write(true).custom_flags(libc::O_TMPFILE).mode(0o600).open(folder)
}

/// The path under which this process, as long as it has it open, can open a file without a name again.
pub fn path_of(file: &File) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

/// Gives a file without a name its name, once it is read-only and on the disk. What stood there is removed.
pub fn publish(file: &File, to: &Path) -> Result<()> {
    let publish = || -> io::Result<()> {
        state::make_immutable(file)?;
        file.sync_all()?;
        match fs::remove_file(to) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        Ok(nix::unistd::linkat(None, path_of(file).as_path(), None, to, AtFlags::AT_SYMLINK_FOLLOW)?)
    };
    publish().map_err(Error::io("keep", to))
}

/// Whether two files have the same bytes.
pub fn same_bytes(one: &File, other: &File) -> io::Result<bool> {
    let size = one.metadata()?.len();
    if other.metadata()?.len() != size {
        return Ok(false);
    }
    let (mut left, mut right) = (vec![0u8; PIECE], vec![0u8; PIECE]);
    let mut at = 0;
    loop {
        at = next_data(one, at, size)?.min(next_data(other, at, size)?);
        if at == size {
            return Ok(true);
        }
        let count = (size - at).min(PIECE as u64) as usize;
        one.read_exact_at(&mut left[..count], at)?;
        other.read_exact_at(&mut right[..count], at)?;
        if left[..count] != right[..count] {
            return Ok(false);
        }
        at += count as u64;
    }
}

/// The blake3 of a file's bytes, hexadecimal.
pub fn hash(file: &File) -> io::Result<String> {
    let size = file.metadata()?.len();
    let mut hasher = blake3::Hasher::new();
    let mut piece = vec![0u8; PIECE];
    let (mut at, mut data) = (0, 0);
    while at < size {
        data = if data > at { data } else { next_data(file, at, size)? };
        let count = (size - at).min(PIECE as u64) as usize;
        if data - at >= count as u64 {
            hasher.update(&ZEROS[..count]);
        } else {
            file.read_exact_at(&mut piece[..count], at)?;
            hasher.update(&piece[..count]);
        }
        at += count as u64;
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// Copies a file to a new one that is then read-only and on the disk. Answers the blake3 of its bytes, and how many there
/// are.
pub fn copy_immutable(from: &Path, to: &Path) -> Result<(String, u64)> {
    let copy = || -> io::Result<(String, u64)> {
        let mut source = File::open(from)?;
        let target = File::options().write(true).create_new(true).open(to)?;
        let (mut hasher, mut at) = (blake3::Hasher::new(), 0u64);
        let mut piece = vec![0u8; PIECE];
        loop {
            let count = source.read(&mut piece)?;
            if count == 0 {
                break;
            }
            hasher.update(&piece[..count]);
            if piece[..count].iter().any(|byte| *byte != 0) {
                target.write_all_at(&piece[..count], at)?;
            }
            at += count as u64;
        }
        target.set_len(at)?;
        state::make_immutable(&target)?;
        target.sync_all()?;
        Ok((hasher.finalize().to_hex().to_string(), at))
    };
    copy().map_err(Error::io("copy", from))
}

/// A second name for an immutable file; a copy where the file system has no such thing.
pub fn link_immutable(from: &Path, to: &Path) -> Result<()> {
    match fs::hard_link(from, to) {
        Ok(()) => Ok(()),
        Err(_) => copy_immutable(from, to).map(drop),
    }
}

/// Brings the names in a folder to the disk.
pub fn sync_folder(path: &Path) -> Result<()> {
    File::open(path).and_then(|folder| folder.sync_all()).map_err(Error::io("sync", path))
}

fn copy_data(from: &File, to: &File) -> io::Result<()> {
    let size = from.metadata()?.len();
    to.set_len(size)?;
    let mut piece = vec![0u8; PIECE];
    let mut at = next_data(from, 0, size)?;
    while at < size {
        let end = rustix::fs::seek(from, SeekFrom::Hole(at))?.min(size);
        while at < end {
            let count = (end - at).min(PIECE as u64) as usize;
            from.read_exact_at(&mut piece[..count], at)?;
            to.write_all_at(&piece[..count], at)?;
            at += count as u64;
        }
        at = next_data(from, at, size)?;
    }
    Ok(())
}

/// Where the next bytes are that may not be zero, `at` or later; `size` when there are none.
fn next_data(file: &File, at: u64, size: u64) -> io::Result<u64> {
    if at >= size {
        return Ok(size);
    }
    match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Ok(found) => Ok(found.min(size)),
        Err(Errno::NXIO) => Ok(size),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    /// Data at both ends of holes, and a last piece that is none.
    fn sample(folder: &Path) -> (PathBuf, Vec<u8>) {
        let mut bytes = vec![0u8; (9 << 20) + 4096];
        for at in [0, 4095, (2 << 20) - 1, (5 << 20) + 77, (9 << 20) + 4095] {
            bytes[at] = 1 + (at % 251) as u8;
        }
        let path = folder.join("sample");
        let file = File::create(&path).unwrap();
        file.set_len(bytes.len() as u64).unwrap();
        for (number, block) in
            bytes.chunks(4096).enumerate().filter(|(_, block)| block.iter().any(|b| *b != 0))
        {
            file.write_all_at(block, number as u64 * 4096).unwrap();
        }
        (path, bytes)
    }

    #[test]
    fn a_copy_is_the_same_and_sparse_and_becomes_immutable_under_its_name() {
        let folder = tempfile::tempdir().unwrap();
        let (path, bytes) = sample(folder.path());
        let copy = unnamed_copy(&path, folder.path()).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "it has no name");
        assert!(copy.metadata().unwrap().blocks() * 512 < 1 << 20, "holes stay holes");
        let target = folder.path().join("copy");
        fs::write(&target, "left over").unwrap();
        publish(&copy, &target).unwrap();
        assert_eq!(fs::read(&target).unwrap(), bytes);
        assert!(fs::metadata(&target).unwrap().permissions().readonly());
    }

    #[test]
    fn the_hash_of_a_sparse_file_is_that_of_its_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let (path, bytes) = sample(folder.path());
        let expected = blake3::hash(&bytes).to_hex().to_string();
        assert_eq!(hash(&File::open(&path).unwrap()).unwrap(), expected);
        let copied = copy_immutable(&path, &folder.path().join("copy")).unwrap();
        assert_eq!(copied, (expected, bytes.len() as u64));
        let empty = File::create(folder.path().join("empty")).unwrap();
        empty.set_len(3 << 20).unwrap();
        let zeros = blake3::hash(&vec![0; 3 << 20]).to_hex().to_string();
        assert_eq!(hash(&File::open(folder.path().join("empty")).unwrap()).unwrap(), zeros);
    }

    #[test]
    fn one_byte_makes_a_difference_and_a_written_zero_does_not() {
        let folder = tempfile::tempdir().unwrap();
        let (path, _) = sample(folder.path());
        let (base, copy) = (File::open(&path).unwrap(), unnamed_copy(&path, folder.path()).unwrap());
        copy.write_all_at(&[0; 8192], 7 << 20).unwrap();
        assert!(same_bytes(&base, &copy).unwrap());
        for at in [0, (7 << 20) + 5, (9 << 20) + 4095] {
            let mut before = [0];
            copy.read_exact_at(&mut before, at).unwrap();
            copy.write_all_at(&[before[0] ^ 1], at).unwrap();
            assert!(!same_bytes(&base, &copy).unwrap(), "byte {at}");
            assert_ne!(hash(&base).unwrap(), hash(&copy).unwrap(), "byte {at}");
            copy.write_all_at(&before, at).unwrap();
        }
        assert!(same_bytes(&base, &copy).unwrap());
    }
}
