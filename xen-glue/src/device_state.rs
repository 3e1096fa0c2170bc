//! What of a captured PVH domain is neither memory nor volumes. In a savefile it is a device state of kind [`KIND`].
//!
//! The bytes are records framed as those of a libxc migration stream (u32 type, u32 length, body padded to 8 bytes,
//! little-endian; `docs/specs/libxc-migration-stream.pandoc`), with that stream's own types for what it has, and one of ours:
//! the [`Layout`]. So an exporter copies them, and an importer keeps them.

use crate::layout::Layout;

/// Its kind in a savefile.
pub const KIND: &str = "xen";
/// Its version.
pub const VERSION: u32 = 1;

/// The state of a PVH domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceState {
    /// Version of the Xen it was captured on: major, minor.
    pub xen: (u32, u32),
    /// How many vCPUs.
    pub vcpus: u32,
    /// Which frames the memory image holds.
    pub layout: Layout,
    /// XEN_DOMCTL_gettscinfo.
    pub tsc: TscInfo,
    /// XEN_DOMCTL_gethvmcontext, opaque.
    pub hvm_context: Vec<u8>,
    /// HVM parameters by index, those that are not zero and that a restore sets.
    pub hvm_params: Vec<(u64, u64)>,
    /// xen_cpuid_leaf_t entries, 24 bytes each; opaque.
    pub cpuid_policy: Vec<u8>,
    /// xen_msr_entry_t entries, 16 bytes each; opaque.
    pub msr_policy: Vec<u8>,
}

/// How the guest sees time-stamp counters: the body of a libxc X86_TSC_INFO record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TscInfo {
    /// XEN_CPUID_TSC_MODE_*.
    pub mode: u32,
    /// Frequency in kHz.
    pub khz: u32,
    /// Nanoseconds since the guest's creation.
    pub nsec: u64,
    /// How often it was moved.
    pub incarnation: u32,
}
