//! What is asked of Xen: the seam between everything above and `sys`.
//!
//! Each function is one hypercall (or one mapping) and has no policy of its own. `sys::Privcmd` asks the Xen under us;
//! `simulated::Machine` is a small one in memory, which fails at any call it is told to. None has a default.
//!
//! Sources: Xen's public headers (`xen/include/public/{domctl,memory,event_channel,version,sysctl}.h`,
//! `hvm/{hvm_op,params}.h`), interface versions 0x15 to 0x18 of domctl.

use std::fmt;
use std::fs::File;
use std::io;

use engine::units::{ByteCount, PageCount};

use crate::device_state::TscInfo;

/// A domain's number. Xen gives it; it is free for the next one as soon as the domain is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DomId(pub u16);

impl fmt::Display for DomId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A domain's handle: sixteen bytes its creator chose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Uuid(pub [u8; 16]);

impl fmt::Display for Uuid {
    /// As xenstore has it: 8-4-4-4-12.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, byte) in self.0.iter().enumerate() {
            if matches!(at, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl Uuid {
    /// From the text xenstore has; `None` where it is none.
    pub fn parse(text: &str) -> Option<Uuid> {
        let digits: Vec<u8> = text.bytes().filter(|byte| *byte != b'-').collect();
        // from_str_radix would take a sign for a digit.
        if text.len() != 36 || digits.len() != 32 || !digits.iter().all(u8::is_ascii_hexdigit) {
            return None;
        }
        let mut bytes = [0; 16];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
        }
        Some(Uuid(bytes))
    }
}

/// A hypercall that did not do what it was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// Xen or the kernel answered with an error.
    #[error("{call}{}: {errno}", of(.domid))]
    Refused {
        /// The hypercall, as Xen's headers name it.
        call: &'static str,
        /// The domain it was about.
        domid: Option<DomId>,
        /// The error.
        errno: nix::errno::Errno,
    },
    /// A frame could not be mapped.
    #[error("map gfn {gfn:#x} of domain {domid}: {errno}")]
    Frame {
        /// The domain.
        domid: DomId,
        /// The first such frame.
        gfn: u64,
        /// Why: EINVAL where there is no RAM, ENOENT where it is paged out.
        errno: nix::errno::Errno,
    },
    /// Xen says that this machine cannot give a guest these CPUs, and where.
    #[error("XEN_DOMCTL_set_cpu_policy of domain {domid}: {errno}{}", place(.leaf, .msr))]
    Policy {
        /// The domain.
        domid: DomId,
        /// The CPUID leaf it does not like, and its subleaf.
        leaf: Option<(u32, Option<u32>)>,
        /// The MSR it does not like.
        msr: Option<u32>,
        /// The error.
        errno: nix::errno::Errno,
    },
    /// It did a part of it.
    #[error("{call}{}: {done} of {wanted} done", of(.domid))]
    Short {
        /// The hypercall, as Xen's headers name it.
        call: &'static str,
        /// The domain it was about.
        domid: Option<DomId>,
        /// What was done.
        done: u64,
        /// Of how many.
        wanted: u64,
    },
}

fn of(domid: &Option<DomId>) -> String {
    domid.map_or(String::new(), |domid| format!(" of domain {domid}"))
}

fn place(leaf: &Option<(u32, Option<u32>)>, msr: &Option<u32>) -> String {
    let mut place = String::new();
    if let Some((leaf, subleaf)) = leaf {
        place += &format!(", at CPUID leaf {leaf:#x}");
        place += &subleaf.map_or(String::new(), |subleaf| format!(", subleaf {subleaf:#x}"));
    }
    place + &msr.map_or(String::new(), |msr| format!(", at MSR {msr:#x}"))
}

/// The result of a hypercall.
pub type Result<T> = std::result::Result<T, CallError>;

/// A Xen, as it says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct XenVersion {
    /// XENVER_version, upper half.
    pub major: u32,
    /// Lower half.
    pub minor: u32,
    /// XENVER_extraversion: ".7+13-g2445b30a44-0+deb12u1".
    pub extra: String,
    /// The domctl interface version it answers to.
    pub domctl: u32,
    /// XENVER_capabilities: "xen-3.0-x86_64 hvm-3.0-x86_32 …".
    pub capabilities: String,
    /// The command line it was booted with.
    pub command_line: String,
}

/// What a new domain is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewDomain {
    /// Its handle.
    pub uuid: Uuid,
    /// Number of vCPUs.
    pub vcpus: u32,
}

/// What is known of a domain: XEN_DOMCTL_getdomaininfo.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DomainInfo {
    /// Its number.
    pub domid: DomId,
    /// Its handle.
    pub uuid: Uuid,
    /// XEN_DOMINF_*.
    pub flags: u32,
    /// The pages it has.
    pub pages: PageCount,
    /// The most it may have.
    pub pages_max: PageCount,
}

/// Why a domain has shut down: `xen/include/public/sched.h`, SHUTDOWN_*.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shutdown {
    /// It switched itself off.
    PowerOff,
    /// It wants to start anew.
    Reboot,
    /// It suspended itself, as asked.
    Suspend,
    /// It crashed, or gave a reason nobody knows.
    Crash,
}

impl DomainInfo {
    /// Whether it is being taken down.
    pub fn is_dying(&self) -> bool {
        self.flags & 1 != 0
    }

    /// Whether its CPUs are stopped by the toolstack.
    pub fn is_paused(&self) -> bool {
        self.flags & 1 << 3 != 0
    }

    /// Whether it has shut down, and why.
    pub fn shutdown(&self) -> Option<Shutdown> {
        if self.flags & 1 << 2 == 0 {
            return None;
        }
        Some(match self.flags >> 16 & 0xff {
            0 => Shutdown::PowerOff,
            1 => Shutdown::Reboot,
            2 => Shutdown::Suspend,
            _ => Shutdown::Crash,
        })
    }
}

/// The machine: XEN_SYSCTL_physinfo.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PhysInfo {
    /// Memory no domain has.
    pub free: ByteCount,
    /// All of it.
    pub total: ByteCount,
    /// Freed, not yet scrubbed; part of [`PhysInfo::free`] once it is.
    pub scrubbing: ByteCount,
    /// Whether guests can run as HVM or PVH.
    pub hvm: bool,
    /// Whether with hardware-assisted paging.
    pub hap: bool,
}

/// CPUID leaves and MSRs a domain sees, as arrays of Xen's own entries (24 and 16 bytes each).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuPolicy {
    /// xen_cpuid_leaf_t.
    pub leaves: Vec<u8>,
    /// xen_msr_entry_t.
    pub msrs: Vec<u8>,
}

/// Frames of a domain, mapped into this process. Dropping it unmaps them: a domain whose frames are mapped cannot go.
pub trait Mapping: Send + Sync {
    /// Their bytes, in the order in which the frames were named.
    ///
    /// The guest may be running: what is read may change while it is read, so it is copied before it is looked at.
    fn copy_to(&self, offset: usize, to: &mut [u8]);
    /// Writes bytes into them.
    fn copy_from(&self, offset: usize, from: &[u8]);
    /// Makes bytes of them zero.
    fn zero(&self, offset: usize, length: usize);
    /// Reads `length` bytes of a file, from `at` on, into them. Error: the file's, or UnexpectedEof where it is too short.
    fn read_from(&self, offset: usize, file: &File, at: u64, length: usize) -> io::Result<()>;
    /// How many bytes there are.
    fn len(&self) -> usize;
    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What a frame is, for a capture: XEN_DOMCTL_getpageframeinfo3.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameKind {
    /// RAM.
    Ram,
    /// Nothing a capture takes: a hole, a shared page of Xen's, a broken frame.
    None,
}

/// A Xen and what it can be asked.
pub trait Hypercalls: Send + Sync {
    /// What it says of itself; asked once.
    fn version(&self) -> &XenVersion;
    /// The machine's memory and abilities.
    fn physinfo(&self) -> Result<PhysInfo>;
    /// The CPU policy a PVH domain can have at most here (XEN_SYSCTL_get_cpu_policy, hvm max).
    fn max_policy(&self) -> Result<CpuPolicy>;

    /// Makes a PVH domain: paused, empty.
    fn create(&self, domain: &NewDomain) -> Result<DomId>;
    /// Takes a domain down; returns when it is gone or only mappings of others keep it.
    fn destroy(&self, domid: DomId) -> Result<()>;
    /// Stops its CPUs, once more each time.
    fn pause(&self, domid: DomId) -> Result<()>;
    /// Undoes one [`Hypercalls::pause`].
    fn unpause(&self, domid: DomId) -> Result<()>;
    /// Lets a domain that suspended itself go on as if the suspend had been cancelled.
    fn resume_cancelled(&self, domid: DomId) -> Result<()>;
    /// What is known of a domain; `None` where there is none of that number.
    fn info(&self, domid: DomId) -> Result<Option<DomainInfo>>;
    /// All domains but dom0.
    fn list(&self) -> Result<Vec<DomainInfo>>;

    /// XEN_DOMCTL_max_vcpus: makes its vCPUs, all of them down.
    fn set_max_vcpus(&self, domid: DomId, vcpus: u32) -> Result<()>;
    /// XEN_DOMCTL_max_mem.
    fn set_max_memory(&self, domid: DomId, max: ByteCount) -> Result<()>;
    /// XEN_DOMCTL_set_paging_mempool_size; [`errno ENOSYS or EOPNOTSUPP`](CallError) where this Xen has none.
    fn set_paging_pool(&self, domid: DomId, size: ByteCount) -> Result<()>;
    /// XENMEM_set_memory_map is not needed by PVH guests that get theirs in hvm_start_info, but E820 calls ask for it.
    fn set_memory_map(&self, domid: DomId, map: &[(u64, u64, u32)]) -> Result<()>;
    /// Populates frames, `1 << order` from each of `first` on. A short count is an error.
    fn populate(&self, domid: DomId, first: &[u64], order: u32) -> Result<()>;
    /// The highest frame there is.
    fn max_gfn(&self, domid: DomId) -> Result<u64>;
    /// What these frames are; at most 1024.
    fn frame_kinds(&self, domid: DomId, gfns: &[u64]) -> Result<Vec<FrameKind>>;
    /// Maps frames for reading and writing.
    fn map(&self, domid: DomId, gfns: &[u64]) -> Result<Box<dyn Mapping>>;

    /// XEN_DOMCTL_gethvmcontext.
    fn hvm_context(&self, domid: DomId) -> Result<Vec<u8>>;
    /// XEN_DOMCTL_sethvmcontext.
    fn set_hvm_context(&self, domid: DomId, context: &[u8]) -> Result<()>;
    /// HVMOP_get_param.
    fn hvm_param(&self, domid: DomId, index: u64) -> Result<u64>;
    /// HVMOP_set_param.
    fn set_hvm_param(&self, domid: DomId, index: u64, value: u64) -> Result<()>;
    /// XEN_DOMCTL_get_cpu_policy.
    fn cpu_policy(&self, domid: DomId) -> Result<CpuPolicy>;
    /// XEN_DOMCTL_set_cpu_policy.
    fn set_cpu_policy(&self, domid: DomId, policy: &CpuPolicy) -> Result<()>;
    /// XEN_DOMCTL_gettscinfo.
    fn tsc(&self, domid: DomId) -> Result<TscInfo>;
    /// XEN_DOMCTL_settscinfo.
    fn set_tsc(&self, domid: DomId, tsc: &TscInfo) -> Result<()>;

    /// EVTCHNOP_alloc_unbound: a port of `domid` to which `remote` may bind.
    fn alloc_port(&self, domid: DomId, remote: DomId) -> Result<u32>;
    /// Lets `frame`s be mapped by their `domid`s: the first entries of the domain's grant table (XENMEM_acquire_resource).
    fn seed_grants(&self, domid: DomId, entries: &[(u32, DomId, u64)]) -> Result<()>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_is_read_as_it_is_written() {
        let uuid = Uuid(*b"\x00\x01\x02\x03\x04\x05\x86\x07\x88\x09\x0a\x0b\x0c\x0d\xee\xff");
        assert_eq!(uuid.to_string(), "00010203-0405-8607-8809-0a0b0c0deeff");
        assert_eq!(Uuid::parse(&uuid.to_string()), Some(uuid));
        for bad in [
            "",
            "00010203-0405-8607-8809-0a0b0c0deef",
            "00010203-0405-8607-8809-0a0b0c0deefg",
            "+1010203-0405-8607-8809-0a0b0c0deeff",
        ] {
            assert_eq!(Uuid::parse(bad), None, "{bad}");
        }
    }
}
