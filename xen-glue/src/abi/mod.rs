//! The layouts and numbers of Xen's public headers (`xen/include/public/`, x86-64), as far as we use them.
//!
//! Invariants:
//! - every struct has exactly the size and the offsets of the C one, checked at compile time, with its padding spelt out and
//!   written as zero: so it can be copied to and from a hypercall's buffer as bytes;
//! - an address in a struct is that of a buffer that cannot fault (`sys::buffer`), as a plain number.

pub mod domctl;
pub mod hvm;
pub mod memory;
pub mod privcmd;
pub mod sysctl;

/// An operation of one of the hypercalls that are many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operation {
    /// As Xen's headers name it.
    pub name: &'static str,
    /// Its number.
    pub number: u32,
}

const fn operation(name: &'static str, number: u32) -> Operation {
    Operation { name, number }
}

/// The numbers of the hypercalls themselves: `public/xen.h`.
pub mod hypercall {
    /// HYPERVISOR_memory_op.
    pub const MEMORY_OP: u64 = 12;
    /// HYPERVISOR_xen_version.
    pub const XEN_VERSION: u64 = 17;
    /// HYPERVISOR_event_channel_op.
    pub const EVENT_CHANNEL_OP: u64 = 32;
    /// HYPERVISOR_hvm_op.
    pub const HVM_OP: u64 = 34;
    /// HYPERVISOR_sysctl.
    pub const SYSCTL: u64 = 35;
    /// HYPERVISOR_domctl.
    pub const DOMCTL: u64 = 36;
}

/// `public/version.h`.
pub mod version {
    /// XENVER_version: no argument; answers major and minor, 16 bits each.
    pub const VERSION: u64 = 0;
    /// XENVER_extraversion: 16 bytes of text.
    pub const EXTRAVERSION: u64 = 1;
    /// Its size.
    pub const EXTRAVERSION_BYTES: usize = 16;
    /// XENVER_capabilities: 1024 bytes of text.
    pub const CAPABILITIES: u64 = 3;
    /// Its size.
    pub const CAPABILITIES_BYTES: usize = 1024;
    /// XENVER_commandline: 1024 bytes of text.
    pub const COMMAND_LINE: u64 = 9;
    /// Its size.
    pub const COMMAND_LINE_BYTES: usize = 1024;
}
