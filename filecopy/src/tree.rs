//! The folder that receives. Everything is looked up below it by the kernel, which refuses a way that leads out of it or through a
//! symbolic link (`openat2`, Linux 5.6): whoever moves things about meanwhile gets an error, not a file elsewhere.

use std::ffi::OsStr;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, Timestamps, CWD};
use rustix::io::Errno;

use crate::header::Header;
use crate::name::{Characters, Name};

/// Where what comes from other qubes lies, in the user's home.
const INCOMING: &str = "QubesIncoming";
/// Permissions of folders while they are filled.
const PRIVATE: Mode = Mode::RWXU;
/// Of a sent mode only who may read, write and execute: no set-user-ID of someone else's making.
const PERMISSIONS: u32 = 0o777;

/// A folder that receives.
#[derive(Debug)]
pub struct Tree {
    root: OwnedFd,
}

impl Tree {
    /// That there is.
    pub fn open(path: &Path) -> io::Result<Tree> {
        let root = rustix::fs::openat(CWD, path, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Tree { root })
    }

    /// QubesIncoming/SOURCE in a home, made if it is not there. Neither may be a symbolic link.
    pub fn incoming(home: &Path, source: &str) -> io::Result<Tree> {
        let source = Name::parse(source.as_bytes(), Characters::Displayable)
            .ok()
            .filter(|name| !name.as_bytes().contains(&b'/'))
            .ok_or_else(|| io::Error::other(format!("{source:?} is no qube's name")))?;
        let home = Tree::open(home)?;
        home.below(OsStr::new(INCOMING))?.below(OsStr::from_bytes(source.as_bytes()))
    }

    fn below(&self, name: &OsStr) -> io::Result<Tree> {
        match rustix::fs::mkdirat(&self.root, name, PRIVATE) {
            Err(error) if error != Errno::EXIST => return Err(error.into()),
            _ => {}
        }
        Ok(Tree { root: open_folder(&self.root, name, OFlags::empty())? })
    }

    /// Makes a file with what `content` writes. It gets its name once that is done.
    pub(crate) fn file<E: From<Errno>>(
        &self,
        name: &Name,
        header: &Header,
        content: impl FnOnce(&mut dyn Write) -> Result<(), E>,
    ) -> Result<(), E> {
        let times = header.times().ok_or(Errno::INVAL)?;
        let (folder, last) = self.place(name)?;
        // Known to be in vain, it need not be sent first.
        if rustix::fs::statat(&folder, last, AtFlags::SYMLINK_NOFOLLOW).is_ok() {
            return Err(Errno::EXIST.into());
        }
        let flags = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&folder, ".", flags, Mode::RUSR | Mode::WUSR)?;
        let mut file = std::fs::File::from(file);
        content(&mut file)?;
        dress(&file, header, &times)?;
        let open = format!("/proc/self/fd/{}", file.as_raw_fd());
        Ok(rustix::fs::linkat(CWD, &open[..], &folder, last, AtFlags::SYMLINK_FOLLOW)?)
    }

    /// Makes a folder. One that is there, as it is when it is sent for the second time, gets its mode and times.
    pub(crate) fn folder(&self, name: &Name, header: &Header) -> Result<(), Errno> {
        let times = header.times().ok_or(Errno::INVAL)?;
        let (above, last) = self.place(name)?;
        match rustix::fs::mkdirat(&above, last, PRIVATE) {
            Err(Errno::EXIST) => {}
            made => return made,
        }
        let folder = match open_folder(&above, last, OFlags::empty()) {
            Err(Errno::NOTDIR | Errno::LOOP) => return Err(Errno::EXIST),
            folder => folder?,
        };
        dress(folder, header, &times)
    }

    /// Makes a symbolic link.
    pub(crate) fn link(&self, name: &Name, header: &Header, target: &[u8]) -> Result<(), Errno> {
        let times = header.times().ok_or(Errno::INVAL)?;
        let (folder, last) = self.place(name)?;
        rustix::fs::symlinkat(OsStr::from_bytes(target), &folder, last)?;
        rustix::fs::utimensat(&folder, last, &times, AtFlags::SYMLINK_NOFOLLOW)
    }

    /// Has all of it written to the disk: a sender that moves removes its own when it hears that all went well.
    pub(crate) fn sync(&self) -> Result<(), Errno> {
        rustix::fs::syncfs(&self.root)
    }

    /// The folder of a name, and its last component.
    fn place<'n>(&self, name: &'n Name) -> Result<(OwnedFd, &'n OsStr), Errno> {
        let (folder, last) = name.split();
        Ok((open_folder(&self.root, folder, OFlags::PATH)?, last))
    }
}

fn open_folder(root: impl AsFd, path: &OsStr, flags: OFlags) -> Result<OwnedFd, Errno> {
    let flags = flags | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    rustix::fs::openat2(root, path, flags, Mode::empty(), resolve)
}

fn dress(file: impl AsFd, header: &Header, times: &Timestamps) -> Result<(), Errno> {
    rustix::fs::fchmod(&file, Mode::from_raw_mode(header.mode & PERMISSIONS))?;
    rustix::fs::futimens(&file, times)
}
