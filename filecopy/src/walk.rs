//! What is to be sent, in the order in which it is: a folder in front of what is in it, and once more behind it, so that its mode and
//! times hold (do_fs_walk of the stock pack.c). Names are looked up in folders that are open, and no symbolic link is followed.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat, CWD};
use rustix::io::Errno;

use crate::header::Header;
use crate::name::{check_link, BadName, Characters, Name, NAME_BYTES_MAX};

/// Folders within each other: each is open while what it contains is sent.
const DEPTH_MAX: usize = 512;

/// Why something cannot be sent.
#[derive(Debug, thiserror::Error)]
pub enum WalkError {
    /// It cannot be read.
    #[error("cannot read {}: {cause}", path.display())]
    Read {
        /// What.
        path: PathBuf,
        /// Why.
        cause: Errno,
    },
    /// The receiver would not take it.
    #[error("cannot send {}: {cause}", path.display())]
    Name {
        /// What.
        path: PathBuf,
        /// Why.
        cause: BadName,
    },
    /// It is a socket, a device, a pipe.
    #[error("cannot send {}: it is no file, folder or symbolic link", .0.display())]
    Kind(PathBuf),
    /// It is in too many folders.
    #[error("cannot send {}: it is in more than {DEPTH_MAX} folders", .0.display())]
    Depth(PathBuf),
}

/// Something to send.
pub(crate) struct Entry<'a> {
    pub path: &'a Path,
    pub name: &'a Name,
    pub header: Header,
    pub content: Content<'a>,
}

/// What follows its name.
pub(crate) enum Content<'a> {
    Nothing,
    Of(&'a File),
    Target(&'a [u8]),
}

/// What there is to send.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Survey {
    /// Bytes in files.
    pub bytes: u64,
    /// Whether there are names that the receiver takes only when told to ([`UNSAFE_CHARACTERS`](crate::UNSAFE_CHARACTERS)).
    pub has_unsafe_names: bool,
}

/// Looks at everything that is to be sent, and says what cannot be while nothing was.
pub fn survey(paths: &[PathBuf], ignores_links: bool) -> Result<Survey, WalkError> {
    let mut survey = Survey::default();
    Walk { ignores_links }.all(paths, &mut |entry| {
        let Entry { name, header, content, .. } = entry;
        let mut is_shown = Name::parse(name.as_bytes(), Characters::Displayable).is_ok();
        match content {
            Content::Of(_) => survey.bytes = survey.bytes.saturating_add(header.content_bytes),
            Content::Target(target) => {
                is_shown &= check_link(name, target, Characters::Displayable).is_ok();
            }
            Content::Nothing => {}
        }
        survey.has_unsafe_names |= !is_shown;
        Ok::<(), WalkError>(())
    })?;
    Ok(survey)
}

/// A way through files and folders.
pub(crate) struct Walk {
    pub ignores_links: bool,
}

impl Walk {
    /// Visits what the paths name. Each is sent under its last component alone.
    pub(crate) fn all<E: From<WalkError>>(
        &self,
        paths: &[PathBuf],
        visit: &mut impl FnMut(Entry) -> Result<(), E>,
    ) -> Result<(), E> {
        for path in paths {
            let bad_name = |cause| WalkError::Name { path: path.clone(), cause };
            let last = path.file_name().ok_or_else(|| bad_name(BadName::Illegal))?;
            let name = Name::parse(last.as_bytes(), Characters::Any).map_err(bad_name)?;
            let above = path.parent().filter(|above| !above.as_os_str().is_empty()).unwrap_or(Path::new("."));
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let above = rustix::fs::openat(CWD, above, flags, Mode::empty()).map_err(failed(path))?;
            self.one(&above, last, path, &name, DEPTH_MAX, visit)?;
        }
        Ok(())
    }

    fn one<E: From<WalkError>>(
        &self,
        above: &OwnedFd,
        last: &OsStr,
        path: &Path,
        name: &Name,
        depth: usize,
        visit: &mut impl FnMut(Entry) -> Result<(), E>,
    ) -> Result<(), E> {
        let stat = rustix::fs::statat(above, last, AtFlags::SYMLINK_NOFOLLOW).map_err(failed(path))?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => {
                let (file, stat) = open(above, last, FileType::RegularFile).map_err(failed(path))?;
                let header = header(name, &stat, u64::try_from(stat.st_size).unwrap_or(0));
                visit(Entry { path, name, header, content: Content::Of(&file.into()) })
            }
            FileType::Symlink if self.ignores_links => Ok(()),
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(above, last, Vec::new()).map_err(failed(path))?;
                let target = target.as_bytes();
                let bad = |cause| WalkError::Name { path: path.into(), cause };
                check_link(name, target, Characters::Any).map_err(bad)?;
                let header = header(name, &stat, target.len() as u64);
                visit(Entry { path, name, header, content: Content::Target(target) })
            }
            FileType::Directory => {
                let depth = depth.checked_sub(1).ok_or_else(|| WalkError::Depth(path.into()))?;
                let (folder, stat) = open(above, last, FileType::Directory).map_err(failed(path))?;
                let header = header(name, &stat, 0);
                visit(Entry { path, name, header, content: Content::Nothing })?;
                for last in names(&folder).map_err(failed(path))? {
                    let path = path.join(OsStr::from_bytes(&last));
                    let bad = |cause| WalkError::Name { path: path.clone(), cause };
                    let name = name.join(&last, Characters::Any).map_err(bad)?;
                    self.one(&folder, OsStr::from_bytes(&last), &path, &name, depth, visit)?;
                }
                visit(Entry { path, name, header, content: Content::Nothing })
            }
            _ => Err(WalkError::Kind(path.into()).into()),
        }
    }
}

fn failed(path: &Path) -> impl Fn(Errno) -> WalkError + '_ {
    |cause| WalkError::Read { path: path.into(), cause }
}

/// Opens what was seen to be of that kind. What has become something else since is not read.
fn open(above: impl AsFd, last: &OsStr, kind: FileType) -> Result<(OwnedFd, Stat), Errno> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = rustix::fs::openat(above, last, flags, Mode::empty())?;
    let stat = rustix::fs::fstat(&file)?;
    match FileType::from_raw_mode(stat.st_mode) == kind {
        true => Ok((file, stat)),
        false => Err(Errno::STALE),
    }
}

/// What is in a folder, in order.
fn names(folder: &OwnedFd) -> Result<Vec<Vec<u8>>, Errno> {
    let mut names = Vec::new();
    for entry in Dir::read_from(folder)? {
        let name = entry?.file_name().to_bytes().to_vec();
        if !matches!(&name[..], b"." | b"..") {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

fn header(name: &Name, stat: &Stat, content_bytes: u64) -> Header {
    // Times before 1970 and after 2106 do not fit.
    let time = |seconds: i64, nanoseconds| {
        let seconds = u32::try_from(seconds.max(0)).unwrap_or(u32::MAX);
        (seconds, u32::try_from(nanoseconds).unwrap_or(0))
    };
    const _: () = assert!(NAME_BYTES_MAX < u32::MAX as usize);
    Header {
        name_bytes: name.as_bytes().len() as u32 + 1,
        mode: stat.st_mode,
        content_bytes,
        accessed: time(stat.st_atime, stat.st_atime_nsec),
        modified: time(stat.st_mtime, stat.st_mtime_nsec),
    }
}
