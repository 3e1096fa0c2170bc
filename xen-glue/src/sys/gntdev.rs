//! Grants of other domains, mapped: `/dev/xen/gntdev` (`include/uapi/xen/gntdev.h`).

use std::fs::File;
use std::io;
use std::mem::size_of;
use std::os::fd::AsFd;

use memmap2::{MmapOptions, MmapRaw};

use super::ioctl;
use crate::hypercalls::DomId;

const DEVICE: &str = "/dev/xen/gntdev";
const MAP_GRANT_REF: u64 = 0x184700;
const SET_UNMAP_NOTIFY: u64 = 0x104707;
/// UNMAP_NOTIFY_CLEAR_BYTE and UNMAP_NOTIFY_SEND_EVENT.
const CLEAR_AND_SEND: u32 = 3;
const PAGE_BYTES: usize = 4096;
/// More than any vchan has.
pub const GRANTS_MAX: usize = 64;

#[derive(Clone, Copy, Default)]
#[repr(C)]
struct GrantRef {
    domid: u32,
    reference: u32,
}

/// `struct ioctl_gntdev_map_grant_ref`, with room for as many as are mapped at once.
#[repr(C)]
struct MapGrantRef {
    count: u32,
    pad: u32,
    index: u64,
    refs: [GrantRef; GRANTS_MAX],
}

#[repr(C)]
struct UnmapNotify {
    index: u64,
    action: u32,
    port: u32,
}

const _: () = assert!(size_of::<MapGrantRef>() == 16 + 8 * GRANTS_MAX && size_of::<UnmapNotify>() == 16);

/// Mapped grants. What is told to the kernel of them holds until `pages` is unmapped.
pub struct Grants {
    device: File,
    index: u64,
}

/// Maps grants of a domain, readable and writable, one page after the other. Dropping the mapping unmaps them.
pub fn map(domid: DomId, references: &[u32]) -> io::Result<(Grants, MmapRaw)> {
    if references.is_empty() || references.len() > GRANTS_MAX {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let device = File::options().read(true).write(true).open(DEVICE)?;
    let mut argument = MapGrantRef {
        count: references.len() as u32,
        pad: 0,
        index: 0,
        refs: [GrantRef::default(); GRANTS_MAX],
    };
    for (slot, reference) in argument.refs.iter_mut().zip(references) {
        *slot = GrantRef { domid: domid.0.into(), reference: *reference };
    }
    // SAFETY: the request reads `count` entries of `refs`, which has at least as many, and writes `index`; the argument outlives it.
    unsafe { ioctl(device.as_fd(), MAP_GRANT_REF, &mut argument) }?;
    let index = argument.index;
    let pages = MmapOptions::new().offset(index).len(references.len() * PAGE_BYTES).map_raw(&device)?;
    Ok((Grants { device, index }, pages))
}

impl Grants {
    /// When they are unmapped, by whomever, the kernel clears the byte at `offset` of them and sends an event through `port`.
    pub fn on_unmap(&self, offset: usize, port: u32) -> io::Result<()> {
        let mut argument = UnmapNotify { index: self.index + offset as u64, action: CLEAR_AND_SEND, port };
        // SAFETY: the request reads the argument only, which outlives it.
        unsafe { ioctl(self.device.as_fd(), SET_UNMAP_NOTIFY, &mut argument) }?;
        Ok(())
    }
}
