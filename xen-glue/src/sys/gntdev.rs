//! Pages that another domain has granted, mapped here: `/dev/xen/gntdev` (Linux's `include/uapi/xen/gntdev.h`).

use std::fs::File;
use std::io;
use std::mem::{offset_of, size_of};
use std::os::fd::AsFd;

use memmap2::{MmapOptions, MmapRaw};

use super::ioctl;
use crate::hypercalls::DomId;

const DEVICE: &str = "/dev/xen/gntdev";
const MAP_GRANT_REF: u64 = 0x18_4700;
const SET_UNMAP_NOTIFY: u64 = 0x10_4707;
const CLEAR_BYTE: u32 = 1;
const SEND_EVENT: u32 = 2;
const PAGE_BYTES: usize = 4096;

/// Grants that are mapped at once: a ring of 64 KiB.
pub const GRANTS_MAX: usize = 16;

#[repr(C)]
struct MapGrantRef {
    count: u32,
    pad: u32,
    index: u64,
    grants: [(u32, u32); GRANTS_MAX],
}

#[repr(C)]
struct UnmapNotify {
    index: u64,
    action: u32,
    port: u32,
}

const _: () = assert!(offset_of!(MapGrantRef, index) == 8 && offset_of!(MapGrantRef, grants) == 16);
const _: () = assert!(size_of::<MapGrantRef>() == 16 + 8 * GRANTS_MAX && size_of::<UnmapNotify>() == 16);

/// The device. What was mapped through it is the granting domain's again once it is unmapped and the device is dropped.
#[derive(Debug)]
pub struct Gntdev(File);

impl Gntdev {
    /// Opens it.
    pub fn open() -> io::Result<Gntdev> {
        File::options().read(true).write(true).open(DEVICE).map(Gntdev)
    }

    /// Maps pages of a domain, in this order: their place in the device, and the mapping.
    pub fn map(&self, domid: DomId, grants: &[u32]) -> io::Result<(u64, MmapRaw)> {
        if grants.is_empty() || grants.len() > GRANTS_MAX {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut asked =
            MapGrantRef { count: grants.len() as u32, pad: 0, index: 0, grants: [(0, 0); GRANTS_MAX] };
        for (to, grant) in asked.grants.iter_mut().zip(grants) {
            *to = (u32::from(domid.0), *grant);
        }
        // SAFETY: the request reads the first 16 bytes and `count` pairs of (domain, grant), of which there are as many by the
        // check, and writes `index`.
        unsafe { ioctl(self.0.as_fd(), MAP_GRANT_REF, &mut asked) }?;
        let mapping =
            MmapOptions::new().offset(asked.index).len(grants.len() * PAGE_BYTES).map_raw(&self.0)?;
        Ok((asked.index, mapping))
    }

    /// Has the kernel clear the byte at this place and notify `port` when the page is unmapped, even if this process is killed.
    pub fn clear_at_end(&self, place: u64, port: u32) -> io::Result<()> {
        let mut notify = UnmapNotify { index: place, action: CLEAR_BYTE | SEND_EVENT, port };
        // SAFETY: the request reads one `struct ioctl_gntdev_unmap_notify`, which `notify` is by layout.
        unsafe { ioctl(self.0.as_fd(), SET_UNMAP_NOTIFY, &mut notify) }?;
        Ok(())
    }
}
