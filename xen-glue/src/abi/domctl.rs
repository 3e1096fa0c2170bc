//! `public/domctl.h`, interface versions 0x15 (Xen 4.17) to 0x18 (4.22).

use std::mem::{offset_of, size_of};

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::{operation, Operation};

/// The interface versions we know, the newest first.
pub const VERSIONS: [u32; 4] = [0x18, 0x17, 0x16, 0x15];

/// The interface version of a Xen by its own version; `None` for one we do not know.
pub fn version_of(major: u32, minor: u32) -> Option<u32> {
    match (major, minor) {
        (4, 17) => Some(0x15),
        (4, 18) => Some(0x16),
        (4, 19..=21) => Some(0x17),
        (4, 22) => Some(0x18),
        _ => None,
    }
}

/// From this version on createdomain has altp2m options in its middle.
pub const VERSION_WITH_ALTP2M: u32 = 0x17;

pub const CREATE: Operation = operation("XEN_DOMCTL_createdomain", 1);
pub const DESTROY: Operation = operation("XEN_DOMCTL_destroydomain", 2);
pub const PAUSE: Operation = operation("XEN_DOMCTL_pausedomain", 3);
pub const UNPAUSE: Operation = operation("XEN_DOMCTL_unpausedomain", 4);
pub const INFO: Operation = operation("XEN_DOMCTL_getdomaininfo", 5);
pub const MAX_MEM: Operation = operation("XEN_DOMCTL_max_mem", 11);
pub const SET_VCPU_CONTEXT: Operation = operation("XEN_DOMCTL_setvcpucontext", 12);
pub const GET_VCPU_CONTEXT: Operation = operation("XEN_DOMCTL_getvcpucontext", 13);
pub const MAX_VCPUS: Operation = operation("XEN_DOMCTL_max_vcpus", 15);
pub const RESUME: Operation = operation("XEN_DOMCTL_resumedomain", 27);
pub const GET_HVM_CONTEXT: Operation = operation("XEN_DOMCTL_gethvmcontext", 33);
pub const SET_HVM_CONTEXT: Operation = operation("XEN_DOMCTL_sethvmcontext", 34);
pub const SET_TSC: Operation = operation("XEN_DOMCTL_settscinfo", 59);
pub const GET_TSC: Operation = operation("XEN_DOMCTL_gettscinfo", 60);
pub const FRAME_KINDS: Operation = operation("XEN_DOMCTL_getpageframeinfo3", 61);
pub const GET_POLICY: Operation = operation("XEN_DOMCTL_get_cpu_policy", 82);
pub const SET_POLICY: Operation = operation("XEN_DOMCTL_set_cpu_policy", 83);
pub const SET_PAGING_POOL: Operation = operation("XEN_DOMCTL_set_paging_mempool_size", 86);

/// Bytes of the union of all operations' arguments.
pub const ARGUMENT_BYTES: usize = 128;

/// struct xen_domctl.
#[repr(C)]
#[derive(Clone, Copy, Debug, IntoBytes, FromBytes, Immutable)]
pub struct Domctl {
    pub cmd: u32,
    pub interface_version: u32,
    pub domain: u16,
    pub pad: [u16; 3],
    pub argument: [u8; ARGUMENT_BYTES],
}
const _: () = assert!(size_of::<Domctl>() == 144 && offset_of!(Domctl, argument) == 16);

/// Bits of createdomain's flags.
pub const CDF_HVM: u32 = 1 << 0;
/// As [`CDF_HVM`].
pub const CDF_HAP: u32 = 1 << 1;
/// XEN_X86_EMU_LAPIC: all that a PVH guest has emulated.
pub const EMULATE_LAPIC: u32 = 1 << 0;
/// XEN_DOMCTL_GRANT_version: the highest version of grant tables the guest may choose.
pub const GRANT_VERSIONS: [u32; 2] = [2, 1];

/// What createdomain begins with in every version: struct xen_domctl_createdomain up to grant_opts.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, IntoBytes, FromBytes, Immutable)]
pub struct CreateCommon {
    pub ssidref: u32,
    pub handle: [u8; 16],
    pub flags: u32,
    pub iommu_opts: u32,
    pub max_vcpus: u32,
    pub max_evtchn_port: u32,
    pub max_grant_frames: i32,
    pub max_maptrack_frames: i32,
    pub grant_opts: u32,
}
const _: () = assert!(size_of::<CreateCommon>() == 48 && offset_of!(CreateCommon, flags) == 20);

/// What it ends with in every version.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, IntoBytes, FromBytes, Immutable)]
pub struct CreateRest {
    pub vmtrace_size: u32,
    pub cpupool_id: u32,
    pub emulation_flags: u32,
    pub misc_flags: u32,
}
const _: () = assert!(size_of::<CreateRest>() == 16);

/// struct xen_domctl_createdomain up to version 0x16.
#[repr(C)]
#[derive(Clone, Copy, Debug, IntoBytes, FromBytes, Immutable)]
pub struct Create {
    pub common: CreateCommon,
    pub rest: CreateRest,
}
const _: () = assert!(size_of::<Create>() == 64 && offset_of!(Create, rest) == 48);

/// struct xen_domctl_createdomain from [`VERSION_WITH_ALTP2M`] on.
#[repr(C)]
#[derive(Clone, Copy, Debug, IntoBytes, FromBytes, Immutable)]
pub struct CreateAltp2m {
    pub common: CreateCommon,
    pub altp2m: u32,
    pub rest: CreateRest,
}
const _: () = assert!(size_of::<CreateAltp2m>() == 68 && offset_of!(CreateAltp2m, rest) == 52);

/// struct xen_domctl_getdomaininfo.
#[repr(C)]
#[derive(Clone, Copy, Debug, IntoBytes, FromBytes, Immutable)]
pub struct Info {
    pub domain: u16,
    pub pad1: u16,
    pub flags: u32,
    pub tot_pages: u64,
    pub max_pages: u64,
    pub outstanding_pages: u64,
    pub shr_pages: u64,
    pub paged_pages: u64,
    pub shared_info_frame: u64,
    pub cpu_time: u64,
    pub nr_online_vcpus: u32,
    pub max_vcpu_id: u32,
    pub ssidref: u32,
    pub handle: [u8; 16],
    pub cpupool: u32,
    pub gpaddr_bits: u8,
    pub pad2: [u8; 7],
    pub emulation_flags: u32,
    pub misc_flags: u32,
}
const _: () = assert!(size_of::<Info>() == 112 && offset_of!(Info, handle) == 76);
const _: () = assert!(offset_of!(Info, shared_info_frame) == 48 && offset_of!(Info, emulation_flags) == 104);

/// struct xen_domctl_vcpucontext.
#[repr(C)]
#[derive(Clone, Copy, Debug, IntoBytes, FromBytes, Immutable)]
pub struct VcpuContext {
    pub vcpu: u32,
    pub pad: u32,
    pub address: u64,
}
const _: () = assert!(size_of::<VcpuContext>() == 16);
/// Bytes of vcpu_guest_context_t, opaque but for one register.
pub const VCPU_CONTEXT_BYTES: usize = 5168;
/// Where it has user_regs.rax: in it a guest that suspended itself finds how that went.
pub const VCPU_CONTEXT_RAX: usize = 600;

/// struct xen_domctl_hvmcontext.
#[repr(C)]
#[derive(Clone, Copy, Debug, IntoBytes, FromBytes, Immutable)]
pub struct HvmContext {
    pub size: u32,
    pub pad: u32,
    pub address: u64,
}
const _: () = assert!(size_of::<HvmContext>() == 16);

/// struct xen_domctl_tsc_info.
#[repr(C)]
#[derive(Clone, Copy, Debug, IntoBytes, FromBytes, Immutable)]
pub struct Tsc {
    pub mode: u32,
    pub khz: u32,
    pub incarnation: u32,
    pub pad: u32,
    pub elapsed_nsec: u64,
}
const _: () = assert!(size_of::<Tsc>() == 24 && offset_of!(Tsc, elapsed_nsec) == 16);

/// struct xen_domctl_getpageframeinfo3: the array has frames going in and types coming out, 8 bytes each.
#[repr(C)]
#[derive(Clone, Copy, Debug, IntoBytes, FromBytes, Immutable)]
pub struct FrameInfo {
    pub count: u64,
    pub address: u64,
}
const _: () = assert!(size_of::<FrameInfo>() == 16);
/// The most frames asked about at once.
pub const FRAMES_MAX: usize = 1024;
/// Types from this one on are broken, not there or not mapped: XEN_DOMCTL_PFINFO_BROKEN, XALLOC, XTAB.
pub const FRAME_BROKEN: u64 = 0xd000_0000;

/// struct xen_domctl_cpu_policy.
#[repr(C)]
#[derive(Clone, Copy, Debug, IntoBytes, FromBytes, Immutable)]
pub struct Policy {
    pub leaf_count: u32,
    pub msr_count: u32,
    pub leaves_address: u64,
    pub msrs_address: u64,
    pub err_leaf: u32,
    pub err_subleaf: u32,
    pub err_msr: u32,
    pub pad: u32,
}
const _: () = assert!(size_of::<Policy>() == 40 && offset_of!(Policy, err_leaf) == 24);
/// What an err_ field has when it was not that.
pub const POLICY_NOT_THAT: u32 = u32::MAX;
