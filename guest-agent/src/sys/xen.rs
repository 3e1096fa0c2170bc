//! What a guest asks of Xen through its kernel: pages granted to dom0, an event channel.
//!
//! Sources: Linux's `include/uapi/xen/gntalloc.h` and `evtchn.h`.

use std::fs::File;
use std::io;
use std::mem::{offset_of, size_of};
use std::os::fd::{AsRawFd, BorrowedFd};

use memmap2::{MmapOptions, MmapRaw};

const ALLOC_GREF: u32 = 0x0018_4705;
const SET_UNMAP_NOTIFY: u32 = 0x0010_4707;
const BIND_UNBOUND_PORT: u32 = 0x0004_4502;
const NOTIFY: u32 = 0x0004_4504;

const WRITABLE: u16 = 1;
const CLEAR_BYTE: u32 = 1;
const SEND_EVENT: u32 = 2;

/// Dom0.
const HOST: u16 = 0;
/// Grants that are asked for at once.
pub const GRANTS_MAX: usize = 32;

#[repr(C)]
struct AllocGref {
    domid: u16,
    flags: u16,
    count: u32,
    index: u64,
    grants: [u32; GRANTS_MAX],
}

#[repr(C)]
struct UnmapNotify {
    index: u64,
    action: u32,
    port: u32,
}

const _: () = assert!(offset_of!(AllocGref, index) == 8 && offset_of!(AllocGref, grants) == 16);
const _: () = assert!(size_of::<UnmapNotify>() == 16);

/// Makes `count` pages of zeroes and grants them to dom0, for as long as `gntalloc` is open: the offset for mapping the first, and
/// the grants.
pub fn grant_pages(gntalloc: &File, count: usize) -> io::Result<(u64, Vec<u32>)> {
    if count > GRANTS_MAX {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut asked =
        AllocGref { domid: HOST, flags: WRITABLE, count: count as u32, index: 0, grants: [0; GRANTS_MAX] };
    // SAFETY: the request reads the first 16 bytes, and writes `index` and `count` grants, of which there are as many by the check.
    super::check_errno(unsafe { libc::ioctl(gntalloc.as_raw_fd(), ALLOC_GREF as _, &mut asked) })?;
    Ok((asked.index, asked.grants[..count].to_vec()))
}

/// Maps granted pages.
pub fn map_granted(gntalloc: &File, offset: u64, bytes: usize) -> io::Result<MmapRaw> {
    MmapOptions::new().offset(offset).len(bytes).map_raw(gntalloc)
}

/// Has the kernel clear the byte at `offset` of the granted pages and notify `port` when nobody has them mapped any more here, even
/// if this process is killed.
pub fn clear_at_end(gntalloc: &File, offset: u64, port: u32) -> io::Result<()> {
    let notify = UnmapNotify { index: offset, action: CLEAR_BYTE | SEND_EVENT, port };
    // SAFETY: the request reads one `struct ioctl_gntalloc_unmap_notify`, which `notify` is by layout.
    super::check_errno(unsafe { libc::ioctl(gntalloc.as_raw_fd(), SET_UNMAP_NOTIFY as _, &notify) })
}

/// A new event channel to which dom0 can bind. It is closed with the file.
pub fn bind_unbound(evtchn: &File) -> io::Result<u32> {
    let remote = u32::from(HOST);
    // SAFETY: the request reads one u32, `remote`, and answers with the port.
    let port = unsafe { libc::ioctl(evtchn.as_raw_fd(), BIND_UNBOUND_PORT as _, &remote) };
    super::check_errno(port)?;
    Ok(port as u32)
}

/// Notifies whoever is at the other end of the event channel.
pub fn notify(evtchn: BorrowedFd<'_>, port: u32) -> io::Result<()> {
    // SAFETY: the request reads one u32, `port`.
    super::check_errno(unsafe { libc::ioctl(evtchn.as_raw_fd(), NOTIFY as _, &port) })
}
