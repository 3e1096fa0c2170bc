//! The devices by which a kernel lends pages and event channels between domains: Linux's `include/uapi/xen/{gntalloc,gntdev,evtchn}.h`.
//!
//! Invariants: here are ioctls and nothing that decides; each takes plain values and the peer's number. A file is closed on exec, and what was
//! had through it ends with it: grants end, pages that are unmapped go back, event channels close.

pub mod evtchn;
pub mod gntalloc;
pub mod gntdev;

use std::fs::File;
use std::io;
use std::mem::size_of;
use std::os::fd::AsRawFd;

const CLEAR_BYTE: u32 = 1;
const SEND_EVENT: u32 = 2;

/// `struct ioctl_gntalloc_unmap_notify` and `struct ioctl_gntdev_unmap_notify`, which are the same.
#[repr(C)]
struct UnmapNotify {
    index: u64,
    action: u32,
    port: u32,
}

const _: () = assert!(size_of::<UnmapNotify>() == 16);

impl UnmapNotify {
    /// The byte at this place is cleared, and `port` notified.
    fn clear(index: u64, port: u32) -> UnmapNotify {
        UnmapNotify { index, action: CLEAR_BYTE | SEND_EVENT, port }
    }
}

/// One request of a device, and its answer.
///
/// # Safety
/// `argument` must point to what the request reads and writes, for the whole call.
unsafe fn ioctl<T>(device: &File, request: u32, argument: *mut T) -> io::Result<u32> {
    // SAFETY: by this function's contract.
    let answer = unsafe { libc::ioctl(device.as_raw_fd(), request as _, argument) };
    // Negative is -1, an error.
    u32::try_from(answer).map_err(|_| io::Error::last_os_error())
}
