//! The state folder: where everything stands in it.
//!
//! ```text
//! ROOT/qubes/NAME/qube.toml                  one record per qube
//! ROOT/qubes/TEMPLATE/root/GEN/{root.img,vmlinuz,initrd}    immutable, one folder per generation
//! ROOT/qubes/DVM/private/GEN.img             immutable
//! ROOT/qubes/DVM/savefile/GEN.savefile       immutable
//! ROOT/qubes/NAME/settings.toml              what Qubes knows of it beyond its record (crate::admin::settings)
//! ROOT/qubes/NAME/start.lock                 held while the qube runs itself (crate::run)
//! ROOT/hot/HASH/                             admitted savefiles, by root hash
//! ROOT/clones/dispN                          one record per living clone, locked by its keeper
//! ROOT/calls/NAME.sock                       where the holder of a running guest listens (crate::calls)
//! ROOT/{system,dom0}.toml                    the system's settings, and dom0's
//! ROOT/disposables/dispN-STARTED.begun       what was set of its template when a disposable that runs became somebody's
//! ROOT/disposables/dispN-STARTED.toml        its own settings, once there are some
//! ROOT/settings.lock                         held by whoever changes settings
//! ROOT/use.lock                              see State::use_lock
//! ROOT/dispvmd.{sock,lock}                   where the daemon listens, and that there is one
//! ROOT/names                                 when each name was last in use
//! ROOT/qemu.json                             what was found out about QEMU
//! ```

use std::fs::{self, DirBuilder, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

use crate::error::{Error, Result};

/// A state folder that exists, readable by its owner alone.
#[derive(Debug, Clone)]
pub struct State {
    root: PathBuf,
}

impl State {
    /// Opens the folder, making it if it is not there.
    pub fn open(root: &Path) -> Result<State> {
        let make = |path: &Path| DirBuilder::new().recursive(true).mode(0o700).create(path);
        for folder in ["qubes", "clones", "hot", "calls"] {
            let path = root.join(folder);
            if !path.is_dir() {
                make(&path).map_err(Error::io("make the state folder", &path))?;
            }
        }
        let root = fs::canonicalize(root).map_err(Error::io("open the state folder", root))?;
        Ok(State { root })
    }

    /// The folder itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// All qubes' folders.
    pub fn qubes(&self) -> PathBuf {
        self.root.join("qubes")
    }

    /// One qube's folder.
    pub fn qube(&self, name: &str) -> PathBuf {
        self.qubes().join(name)
    }

    /// A template's files of one generation.
    pub fn root_generation(&self, template: &str, generation: u64) -> PathBuf {
        self.qube(template).join("root").join(generation.to_string())
    }

    /// A qube's private base of one generation.
    pub fn private_image(&self, qube: &str, generation: u64) -> PathBuf {
        self.qube(qube).join("private").join(format!("{generation}.img"))
    }

    /// The folder of a DVM template's savefiles.
    pub fn savefiles(&self, dvm: &str) -> PathBuf {
        self.qube(dvm).join("savefile")
    }

    /// One savefile.
    pub fn savefile(&self, dvm: &str, generation: u64) -> PathBuf {
        self.savefiles(dvm).join(format!("{generation}.savefile"))
    }

    /// The admitted savefiles.
    pub fn hot(&self) -> PathBuf {
        self.root.join("hot")
    }

    /// The living clones' records.
    pub fn clones(&self) -> PathBuf {
        self.root.join("clones")
    }

    /// Where the holder of the running guest `name` takes calls into it.
    pub fn call_socket(&self, name: &str) -> PathBuf {
        self.root.join("calls").join(format!("{name}.sock"))
    }

    /// The system's settings.
    pub fn system_settings(&self) -> PathBuf {
        self.root.join("system.toml")
    }

    /// Dom0's settings.
    pub fn admin_settings(&self) -> PathBuf {
        self.root.join("dom0.toml")
    }

    /// Settings of disposables that run.
    pub fn disposables(&self) -> PathBuf {
        self.root.join("disposables")
    }

    /// Held by whoever changes settings.
    pub fn settings_lock(&self) -> PathBuf {
        self.root.join("settings.lock")
    }

    /// The ledger of names.
    pub fn names(&self) -> PathBuf {
        self.root.join("names")
    }

    /// Held shared from the reading of a record until what it names is in use or pinned, and exclusively by whoever removes
    /// what nothing names.
    pub fn use_lock(&self) -> PathBuf {
        self.root.join("use.lock")
    }

    /// Where `dispvmd` listens.
    pub fn daemon_socket(&self) -> PathBuf {
        self.root.join("dispvmd.sock")
    }

    /// Held by the one `dispvmd` of this folder.
    pub fn daemon_lock(&self) -> PathBuf {
        self.root.join("dispvmd.lock")
    }

    /// What was found out about QEMU.
    pub fn qemu_cache(&self) -> PathBuf {
        self.root.join("qemu.json")
    }
}

/// Makes a folder for its owner alone, and those above it.
pub fn make_folder(path: &Path) -> Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(Error::io("make", path))
}

/// Replaces a file as a whole: written aside, synced, renamed, the folder synced. A reader sees the old or the new.
///
/// What is aside has a name and a lock by which [`engine::savefile::sweep`] knows it, should its writer be killed.
pub fn replace_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let aside = path.with_file_name(format!(".{name}.{}.tmp", std::process::id()));
    let written = (|| {
        let mut file = create_aside(&aside)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&aside, path)?;
        File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
    })();
    written.map_err(|error| {
        let _ = fs::remove_file(&aside);
        Error::io("write", path)(error)
    })
}

/// A new, locked file. One that a sweep has taken away between its making and its locking is made anew.
fn create_aside(path: &Path) -> io::Result<Flock<File>> {
    loop {
        let file = File::options().write(true).create(true).truncate(true).mode(0o600).open(path)?;
        let file = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, error)| io::Error::from(error))?;
        if file.metadata()?.nlink() > 0 {
            return Ok(file);
        }
    }
}

/// Takes the exclusive lock of a file (made if need be), waiting for it.
pub fn lock(path: &Path) -> Result<Flock<File>> {
    let file = open_lock(path).map_err(Error::io("open", path))?;
    lock_file(file, path)
}

/// Takes the shared lock of a file (made if need be), waiting for it.
pub fn lock_shared(path: &Path) -> Result<Flock<File>> {
    let file = open_lock(path).map_err(Error::io("open", path))?;
    Flock::lock(file, FlockArg::LockShared).map_err(|(_, error)| Error::io("lock", path)(error.into()))
}

/// Takes the exclusive lock of a file if nobody has it.
pub fn try_lock(path: &Path) -> Result<Option<Flock<File>>> {
    let file = open_lock(path).map_err(Error::io("open", path))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, nix::errno::Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, error)) => Err(Error::io("lock", path)(error.into())),
    }
}

fn lock_file(file: File, path: &Path) -> Result<Flock<File>> {
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, error)| Error::io("lock", path)(error.into()))
}

/// As [`try_lock`], but not put off by somebody who only wants to know: those let go at once.
pub fn try_lock_patiently(path: &Path) -> Result<Option<Flock<File>>> {
    for _ in 0..5 {
        if let Some(lock) = try_lock(path)? {
            return Ok(Some(lock));
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    try_lock(path)
}

/// Whether somebody has the exclusive lock of a file. Asked with a shared lock, so that those who ask do not see each other.
pub fn is_locked(path: &Path) -> Result<bool> {
    let file = open_lock(path).map_err(Error::io("open", path))?;
    match Flock::lock(file, FlockArg::LockSharedNonblock) {
        Ok(_) => Ok(false),
        Err((_, nix::errno::Errno::EWOULDBLOCK)) => Ok(true),
        Err((_, error)) => Err(Error::io("lock", path)(error.into())),
    }
}

fn open_lock(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
}

/// Takes the exclusive lock of a file in a folder, which is made if need be and may be removed by who has the lock before us.
pub fn lock_in(folder: &Path, name: &str) -> Result<Flock<File>> {
    let path = folder.join(name);
    loop {
        make_folder(folder)?;
        let locked = match open_lock(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            opened => lock_file(opened.map_err(Error::io("open", &path))?, &path)?,
        };
        let ours = locked.metadata().map_err(Error::io("look at", &path))?;
        if fs::metadata(&path).is_ok_and(|there| (there.dev(), there.ino()) == (ours.dev(), ours.ino())) {
            return Ok(locked);
        }
    }
}

/// Makes a file read-only for everybody: QEMU, under a uid of its own, is handed a descriptor and opens it again.
pub fn make_immutable(file: &File) -> io::Result<()> {
    file.set_permissions(Permissions::from_mode(0o444))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_whole_and_nothing_is_left_beside_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("qube.toml");
        replace_file(&path, b"old").unwrap();
        replace_file(&path, b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_lock_is_held_by_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        let held = try_lock(&path).unwrap();
        assert!(held.is_some());
        assert!(try_lock(&path).unwrap().is_none());
        drop(held);
        assert!(try_lock(&path).unwrap().is_some());
    }
}
