//! The kernel's privcmd device: `include/uapi/xen/privcmd.h` of Linux.

use std::mem::{offset_of, size_of};

/// IOCTL_PRIVCMD_HYPERCALL.
pub const HYPERCALL: u64 = 0x305000;
/// IOCTL_PRIVCMD_MMAPBATCH_V2.
pub const MMAPBATCH_V2: u64 = 0x205004;
/// IOCTL_PRIVCMD_MMAP_RESOURCE.
pub const MMAP_RESOURCE: u64 = 0x205007;

/// struct privcmd_hypercall.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Hypercall {
    pub op: u64,
    pub arg: [u64; 5],
}
const _: () = assert!(size_of::<Hypercall>() == 48);

/// struct privcmd_mmapbatch_v2.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct MmapBatch {
    pub count: u32,
    pub domid: u16,
    pub address: u64,
    pub frames: *const u64,
    pub errors: *mut i32,
}
const _: () = assert!(size_of::<MmapBatch>() == 32 && offset_of!(MmapBatch, address) == 8);

/// struct privcmd_mmap_resource.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct MmapResource {
    pub domid: u16,
    pub kind: u32,
    pub id: u32,
    pub index: u32,
    pub count: u64,
    pub address: u64,
}
const _: () = assert!(size_of::<MmapResource>() == 32 && offset_of!(MmapResource, count) == 16);
