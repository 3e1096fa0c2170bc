//! The only `unsafe` of this crate: the devices through which Xen and the kernel are asked.
//!
//! Everything here is called with plain values and decides nothing.

pub mod buffer;
mod calls;
pub mod device_mapper;
pub mod loop_device;
pub mod mapping;
pub mod privcmd;

pub use privcmd::{OpenError, Privcmd};

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;

/// An ioctl with a pointer; its answer in full (`libc::ioctl` cuts it to 32 bits, and a frame number may need more).
///
/// # Safety
/// `argument` must point to what the request reads and writes, for the whole call.
unsafe fn ioctl<T>(fd: BorrowedFd<'_>, request: u64, argument: *mut T) -> Result<u64, Errno> {
    // SAFETY: by this function's contract.
    let answer = unsafe { libc::syscall(libc::SYS_ioctl, fd.as_raw_fd(), request, argument) };
    Errno::result(answer).map(|answer| answer as u64)
}
