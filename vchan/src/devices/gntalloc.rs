//! Pages of this domain's, granted to another one: `/dev/xen/gntalloc`.

use std::fs::File;
use std::io;
use std::mem::{offset_of, size_of};

use memmap2::MmapOptions;

use super::{ioctl, UnmapNotify};
use crate::layout::{ORDER_MAX, PAGE_BYTES, PAGE_ORDER};
use crate::shared::Shared;

const DEVICE: &str = "/dev/xen/gntalloc";
const ALLOC_GREF: u32 = 0x0018_4705;
const SET_UNMAP_NOTIFY: u32 = 0x0010_4707;
const WRITABLE: u16 = 1;

/// Grants that are asked for at once: the first page, and two of the largest rings.
pub const GRANTS_MAX: usize = 1 + (2 << (ORDER_MAX - PAGE_ORDER));

#[repr(C)]
struct AllocGref {
    domid: u16,
    flags: u16,
    count: u32,
    index: u64,
    grants: [u32; GRANTS_MAX],
}

const _: () = assert!(offset_of!(AllocGref, index) == 8 && offset_of!(AllocGref, grants) == 16);
const _: () = assert!(size_of::<AllocGref>() >= 16 + 4 * GRANTS_MAX);

/// The device. The grants end when it is dropped and nothing of them is mapped here any more.
#[derive(Debug)]
pub struct Gntalloc(File);

/// Pages that are granted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Granted {
    /// The place of the first in the device, in bytes; the others follow.
    pub place: u64,
    /// The grants, one a page.
    pub grants: Vec<u32>,
}

impl Gntalloc {
    /// Opens it.
    pub fn open() -> io::Result<Gntalloc> {
        File::options().read(true).write(true).open(DEVICE).map(Gntalloc)
    }

    /// Makes `count` pages of zeroes, and grants them to a domain.
    pub fn grant(&self, peer: u16, count: usize) -> io::Result<Granted> {
        if count > GRANTS_MAX {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut asked = AllocGref {
            domid: peer,
            flags: WRITABLE,
            count: count as u32,
            index: 0,
            grants: [0; GRANTS_MAX],
        };
        // SAFETY: the request reads the first 16 bytes, and writes `index` and `count` grants, of which there are as many by the check.
        unsafe { ioctl(&self.0, ALLOC_GREF, &mut asked) }?;
        Ok(Granted { place: asked.index, grants: asked.grants.into_iter().take(count).collect() })
    }

    /// Maps so many granted pages from a place on.
    pub fn map(&self, place: u64, pages: usize) -> io::Result<Shared> {
        MmapOptions::new().offset(place).len(pages * PAGE_BYTES).map_raw(&self.0).map(Shared::new)
    }

    /// Has the kernel clear the byte at this place and notify `port` when nobody has it mapped any more here, even if this process is
    /// killed.
    pub fn clear_at_end(&self, place: u64, port: u32) -> io::Result<()> {
        let mut notify = UnmapNotify::clear(place, port);
        // SAFETY: the request reads one `struct ioctl_gntalloc_unmap_notify`, which `notify` is by layout.
        unsafe { ioctl(&self.0, SET_UNMAP_NOTIFY, &mut notify) }.map(drop)
    }
}
