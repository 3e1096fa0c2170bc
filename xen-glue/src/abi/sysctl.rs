//! `public/sysctl.h`, interface versions 0x15 (Xen 4.17) and 0x16 (4.21).

use std::mem::{offset_of, size_of};

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::{operation, Operation};

/// The interface versions we know, the newest first.
pub const VERSIONS: [u32; 2] = [0x16, 0x15];

pub const PHYSINFO: Operation = operation("XEN_SYSCTL_physinfo", 3);
pub const LIST: Operation = operation("XEN_SYSCTL_getdomaininfolist", 6);
pub const GET_POLICY: Operation = operation("XEN_SYSCTL_get_cpu_policy", 29);

/// Bytes of the union of all operations' arguments.
pub const ARGUMENT_BYTES: usize = 128;

/// struct xen_sysctl.
#[repr(C)]
#[derive(Clone, Copy, Debug, IntoBytes, FromBytes, Immutable)]
pub struct Sysctl {
    pub cmd: u32,
    pub interface_version: u32,
    pub argument: [u8; ARGUMENT_BYTES],
}
const _: () = assert!(size_of::<Sysctl>() == 136);

/// struct xen_sysctl_physinfo.
#[repr(C)]
#[derive(Clone, Copy, Debug, IntoBytes, FromBytes, Immutable)]
pub struct PhysInfo {
    pub threads_per_core: u32,
    pub cores_per_socket: u32,
    pub nr_cpus: u32,
    pub max_cpu_id: u32,
    pub nr_nodes: u32,
    pub max_node_id: u32,
    pub cpu_khz: u32,
    pub capabilities: u32,
    pub arch_capabilities: u32,
    pub pad: u32,
    pub total_pages: u64,
    pub free_pages: u64,
    pub scrub_pages: u64,
    pub outstanding_pages: u64,
    pub max_mfn: u64,
    pub hw_cap: [u32; 8],
}
const _: () = assert!(size_of::<PhysInfo>() == 112 && offset_of!(PhysInfo, total_pages) == 40);
/// A bit of its capabilities: HVM and PVH guests can be had.
pub const CAPABILITY_HVM: u32 = 1 << 0;
/// As [`CAPABILITY_HVM`]: with hardware-assisted paging.
pub const CAPABILITY_HAP: u32 = 1 << 3;
/// As [`CAPABILITY_HVM`]: with shadow page tables.
pub const CAPABILITY_SHADOW: u32 = 1 << 4;

/// struct xen_sysctl_getdomaininfolist; the buffer gets [`super::domctl::Info`]s.
#[repr(C)]
#[derive(Clone, Copy, Debug, IntoBytes, FromBytes, Immutable)]
pub struct List {
    pub first: u16,
    pub pad1: u16,
    pub max: u32,
    pub address: u64,
    pub count: u32,
    pub pad2: u32,
}
const _: () = assert!(size_of::<List>() == 24 && offset_of!(List, count) == 16);

/// struct xen_sysctl_cpu_policy.
#[repr(C)]
#[derive(Clone, Copy, Debug, IntoBytes, FromBytes, Immutable)]
pub struct Policy {
    pub index: u32,
    pub leaf_count: u32,
    pub msr_count: u32,
    pub pad: u32,
    pub leaves_address: u64,
    pub msrs_address: u64,
}
const _: () = assert!(size_of::<Policy>() == 32 && offset_of!(Policy, leaves_address) == 16);
/// XEN_SYSCTL_cpu_policy_hvm_max.
pub const POLICY_HVM_MAX: u32 = 3;
