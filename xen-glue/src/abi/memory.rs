//! `public/memory.h` and `public/event_channel.h`, `public/grant_table.h`.

use std::mem::{offset_of, size_of};

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::{operation, Operation};

pub const POPULATE: Operation = operation("XENMEM_populate_physmap", 6);
pub const SET_MAP: Operation = operation("XENMEM_set_memory_map", 13);
pub const MAXIMUM_GPFN: Operation = operation("XENMEM_maximum_gpfn", 14);
/// The number is that of XENMEM_acquire_resource, which the kernel's MMAP_RESOURCE ioctl calls.
pub const ACQUIRE_RESOURCE: Operation = operation("XENMEM_acquire_resource", 28);
pub const ALLOC_UNBOUND: Operation = operation("EVTCHNOP_alloc_unbound", 6);

/// struct xen_memory_reservation.
#[repr(C)]
#[derive(Clone, Copy, Debug, IntoBytes, FromBytes, Immutable)]
pub struct Reservation {
    pub extents_address: u64,
    pub extent_count: u64,
    pub extent_order: u32,
    pub mem_flags: u32,
    pub domid: u16,
    pub pad: [u16; 3],
}
const _: () = assert!(size_of::<Reservation>() == 32 && offset_of!(Reservation, domid) == 24);

/// struct xen_foreign_memory_map.
#[repr(C)]
#[derive(Clone, Copy, Debug, IntoBytes, FromBytes, Immutable)]
pub struct ForeignMemoryMap {
    pub domid: u16,
    pub pad1: [u16; 3],
    pub entry_count: u32,
    pub pad2: u32,
    pub entries_address: u64,
}
const _: () = assert!(size_of::<ForeignMemoryMap>() == 24 && offset_of!(ForeignMemoryMap, entry_count) == 8);
/// Bytes of an E820 entry: u64 address, u64 size, u32 type, packed.
pub const E820_ENTRY_BYTES: usize = 20;

/// struct evtchn_alloc_unbound.
#[repr(C)]
#[derive(Clone, Copy, Debug, IntoBytes, FromBytes, Immutable)]
pub struct AllocUnbound {
    pub domid: u16,
    pub remote: u16,
    pub port: u32,
}
const _: () = assert!(size_of::<AllocUnbound>() == 8);

/// XENMEM_resource_grant_table.
pub const RESOURCE_GRANT_TABLE: u32 = 1;
/// Bytes of a grant_entry_v1_t: u16 flags, u16 domid, u32 frame.
pub const GRANT_ENTRY_BYTES: usize = 8;
/// GTF_permit_access.
pub const GRANT_PERMIT_ACCESS: u16 = 1;
