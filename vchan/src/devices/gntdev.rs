//! Pages that another domain has granted, mapped here: `/dev/xen/gntdev`.

use std::fs::File;
use std::io;
use std::mem::{offset_of, size_of};

use memmap2::MmapOptions;

use super::{ioctl, UnmapNotify};
use crate::layout::{ORDER_MAX, PAGE_BYTES, PAGE_ORDER};
use crate::shared::Shared;

const DEVICE: &str = "/dev/xen/gntdev";
const MAP_GRANT_REF: u32 = 0x0018_4700;
const SET_UNMAP_NOTIFY: u32 = 0x0010_4707;

/// Grants that are mapped at once: one of the largest rings.
pub const GRANTS_MAX: usize = 1 << (ORDER_MAX - PAGE_ORDER);

#[repr(C)]
struct MapGrantRef {
    count: u32,
    pad: u32,
    index: u64,
    grants: [(u32, u32); GRANTS_MAX],
}

const _: () = assert!(offset_of!(MapGrantRef, index) == 8 && offset_of!(MapGrantRef, grants) == 16);
const _: () = assert!(size_of::<MapGrantRef>() == 16 + 8 * GRANTS_MAX);

/// The device. What was mapped through it is the granting domain's again once it is unmapped and the device is dropped.
#[derive(Debug)]
pub struct Gntdev(File);

impl Gntdev {
    /// Opens it.
    pub fn open() -> io::Result<Gntdev> {
        File::options().read(true).write(true).open(DEVICE).map(Gntdev)
    }

    /// Maps pages of a domain, in this order: the place of the first in the device, in bytes, and the mapping.
    pub fn map(&self, peer: u16, grants: &[u32]) -> io::Result<(u64, Shared)> {
        if grants.is_empty() || grants.len() > GRANTS_MAX {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut asked =
            MapGrantRef { count: grants.len() as u32, pad: 0, index: 0, grants: [(0, 0); GRANTS_MAX] };
        for (to, grant) in asked.grants.iter_mut().zip(grants) {
            *to = (u32::from(peer), *grant);
        }
        // SAFETY: the request reads the first 16 bytes and `count` pairs of (domain, grant), of which there are as many by the
        // check, and writes `index`.
        unsafe { ioctl(&self.0, MAP_GRANT_REF, &mut asked) }?;
        let options = MmapOptions::new().offset(asked.index).len(grants.len() * PAGE_BYTES).to_owned();
        options.map_raw(&self.0).map(|mapping| (asked.index, Shared::new(mapping)))
    }

    /// Has the kernel clear the byte at this place and notify `port` when the page is unmapped, even if this process is killed.
    pub fn clear_at_end(&self, place: u64, port: u32) -> io::Result<()> {
        let mut notify = UnmapNotify::clear(place, port);
        // SAFETY: the request reads one `struct ioctl_gntdev_unmap_notify`, which `notify` is by layout.
        unsafe { ioctl(&self.0, SET_UNMAP_NOTIFY, &mut notify) }.map(drop)
    }
}
