//! Files written aside, then renamed.
//!
//! Invariants:
//! - until [`Aside::commit`] renames it, the final name keeps what it held before;
//! - the writer holds a lock on its temporary file for as long as it lives; the kernel drops the lock when the writer dies. So
//!   a temporary file that can be locked has no writer, and only such a file is swept;
//! - a committed file is on the disk, name included, when `commit` returns.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::error::Error;

const SUFFIX: &str = ".tmp";
/// A writer whose fresh file was swept before it could lock it tries again; twice in a row is already hard to arrange.
const CREATE_ATTEMPTS: u32 = 16;

/// A file being written aside; dropped without [`Aside::commit`], it is removed.
#[derive(Debug)]
pub(crate) struct Aside {
    file: Flock<File>,
    temporary: PathBuf,
    target: PathBuf,
    committed: bool,
}

impl Aside {
    /// Creates the temporary file in the folder of `target`, readable and writable by its owner only.
    pub fn create(target: &Path) -> Result<Aside, Error> {
        for attempt in 0..CREATE_ATTEMPTS {
            let temporary = temporary_name(target, attempt);
            let opened =
                OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&temporary);
            let file = match opened {
                Err(err) if err.kind() == io::ErrorKind::AlreadyExists => continue,
                opened => opened.map_err(Error::io("create", &temporary))?,
            };
            let file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(file) => file,
                Err((_, Errno::EWOULDBLOCK)) => continue, // a sweep has it, and removes it
                Err((_, errno)) => return Err(Error::io("lock", &temporary)(errno.into())),
            };
            let links = file.metadata().map_err(Error::io("look at", &temporary))?.nlink();
            if links > 0 {
                return Ok(Aside { file, temporary, target: target.to_owned(), committed: false });
            }
        }
        let exists = io::Error::from(io::ErrorKind::AlreadyExists);
        Err(Error::io("find a free temporary name beside", target)(exists))
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Its name while it is written.
    pub fn path(&self) -> &Path {
        &self.temporary
    }

    /// Makes the file read-only, puts it on the disk, gives it its final name.
    pub fn commit(mut self) -> Result<(), Error> {
        let path = &self.temporary;
        self.file
            .set_permissions(Permissions::from_mode(0o444))
            .map_err(Error::io("make read-only", path))?;
        self.file.sync_all().map_err(Error::io("write to the disk", path))?;
        fs::rename(path, &self.target).map_err(Error::io("rename to its final name", path))?;
        self.committed = true;
        sync_folder(folder_of(&self.target))
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        if !self.committed {
            if let Err(err) = fs::remove_file(&self.temporary) {
                tracing::warn!(path = %self.temporary.display(), %err, "cannot remove a temporary file");
            }
        }
    }
}

/// Removes the temporary files in `folder` whose writer is gone; answers how many. Those of living writers stay.
pub fn sweep(folder: &Path) -> Result<usize, Error> {
    let mut swept = 0;
    for entry in fs::read_dir(folder).map_err(Error::io("list", folder))? {
        let entry = entry.map_err(Error::io("list", folder))?;
        let path = entry.path();
        if is_temporary(&entry.file_name())
            && remove_if_abandoned(&path).map_err(Error::io("sweep", &path))?
        {
            swept += 1;
        }
    }
    Ok(swept)
}

/// Puts a folder's names on the disk.
pub(crate) fn sync_folder(folder: &Path) -> Result<(), Error> {
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(Error::io("write to the disk the folder", folder))
}

fn remove_if_abandoned(path: &Path) -> io::Result<bool> {
    let file = match OpenOptions::new().read(true).custom_flags(nix::libc::O_NOFOLLOW).open(path) {
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(false), // committed or swept meanwhile
        opened => opened?,
    };
    let Ok(locked) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else { return Ok(false) };
    // The name may have been given to another file between open and lock; remove it only while it is this one.
    let (ours, named) = (locked.metadata()?, fs::symlink_metadata(path));
    match named {
        Ok(named) if (named.dev(), named.ino()) == (ours.dev(), ours.ino()) => {
            fs::remove_file(path).map(|()| true)
        }
        _ => Ok(false),
    }
}

fn temporary_name(target: &Path, attempt: u32) -> PathBuf {
    let name = target.file_name().unwrap_or(OsStr::new("savefile")).to_string_lossy();
    let nanos = std::time::UNIX_EPOCH.elapsed().map_or(0, |since| since.subsec_nanos());
    let unique = format!("{}-{nanos:08x}-{attempt}", std::process::id());
    folder_of(target).join(format!(".{name}.{unique}{SUFFIX}"))
}

fn is_temporary(name: &OsStr) -> bool {
    let name = name.to_string_lossy();
    name.starts_with('.') && name.ends_with(SUFFIX)
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_living_writers_file_survives_the_sweep_and_a_dead_ones_does_not() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("vm.save");
        let living = Aside::create(&target).unwrap();
        fs::write(folder.path().join(".vm.save.999-0-0.tmp"), b"left by a killed writer").unwrap();
        fs::write(folder.path().join("vm.save.tmp"), b"a user's own file").unwrap();

        assert_eq!(sweep(folder.path()).unwrap(), 1);
        assert!(living.path().exists());
        assert!(folder.path().join("vm.save.tmp").exists());
    }

    #[test]
    fn an_aborted_write_leaves_the_old_file_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("vm.save");
        fs::write(&target, b"old").unwrap();
        let aside = Aside::create(&target).unwrap();
        aside.file().write_all(b"half of the n").unwrap();
        drop(aside);
        assert_eq!(fs::read(&target).unwrap(), b"old");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_commit_replaces_the_old_file_by_a_read_only_one() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("vm.save");
        fs::write(&target, b"old").unwrap();
        let aside = Aside::create(&target).unwrap();
        aside.file().write_all(b"new").unwrap();
        aside.commit().unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"new");
        assert_eq!(fs::metadata(&target).unwrap().permissions().mode() & 0o777, 0o444);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
