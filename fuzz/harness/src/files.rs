//! Files in memory without a name.

use std::ffi::CString;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use nix::sys::memfd::{memfd_create, MemFdCreateFlag};

/// An empty file in memory.
pub fn empty() -> File {
    let name = CString::new("fuzz").unwrap_or_default();
    File::from(memfd_create(&name, MemFdCreateFlag::MFD_CLOEXEC).expect("a file in memory"))
}

/// A file in memory with these bytes.
pub fn with(bytes: &[u8]) -> File {
    let file = empty();
    file.write_all_at(bytes, 0).expect("room for an input");
    file
}

/// A file in memory of this length, of holes.
pub fn holes(len: u64) -> File {
    let file = empty();
    file.set_len(len).expect("a length that the file system has");
    file
}

/// A path under which an open file can be opened once more.
pub fn path(file: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}
