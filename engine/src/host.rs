//! The seam between the engine and a hypervisor.
//!
//! Invariants every implementation keeps:
//! - A [`Domain`] that is dropped is gone: its processes, mappings and memory with it. Dropping is the undo of every
//!   step, so no caller needs a clean-up path of its own.
//! - Nothing a domain writes reaches a disk in the clear: what it changes lives in memory or under a key that exists
//!   only in memory. A volume that is to be kept ([`Base::Persistent`]) is the one exception.
//! - Bases and hot images are opened read-only and cannot be opened for writing by the domain's processes.
//!
//! `Host` and `Domain` have thirteen required functions between them; a simulator or another hypervisor implements all of
//! them for real, there are no defaults that lie.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::image::hot::{HotFiles, StackDelta};
use crate::units::{ByteCount, PageRange};

/// What of the machine a savefile depends on; a savefile made under other facts is stale.
pub use crate::savefile::HostIdentity as HostFacts;

/// One of a guest's disks, in the order in which the guest sees them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeSpec {
    /// `root`, `private` or `volatile`.
    pub name: String,
    /// What is on it when the guest starts, and where what the guest writes goes.
    pub base: Base,
    /// The size the guest sees.
    pub size: ByteCount,
}

/// What a volume starts from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Base {
    /// Nothing: it reads as zero, and what the guest writes is gone with it.
    Empty,
    /// An immutable raw file; what the guest writes is gone with it.
    Frozen(PathBuf),
    /// A raw file of the volume's size which the guest writes to. Only for a [`Host::boot`] with [`BootPurpose::Clone`].
    ///
    /// It holds all that the guest has written when [`Domain::serve`] has answered [`HostError::PoweredOff`]; to bring it
    /// to the disk is then the caller's.
    Persistent(PathBuf),
}

impl Base {
    /// The file, if there is one.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Base::Empty => None,
            Base::Frozen(path) | Base::Persistent(path) => Some(path),
        }
    }

    /// Whether what the guest writes is kept.
    pub fn is_persistent(&self) -> bool {
        matches!(self, Base::Persistent(_))
    }
}

/// What a domain's network card is plugged into. The card itself is always there.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Nic {
    /// Into nothing.
    #[default]
    None,
    /// Into the hypervisor's own user-mode network.
    User,
    /// Into an existing tap interface of this name.
    Tap(String),
}

/// A guest as the hypervisor has to build it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestSpec {
    /// RAM in bytes, a whole number of MiB.
    pub memory: ByteCount,
    /// Number of vCPUs, at least 1.
    pub vcpus: u32,
    /// The kernel image booted directly.
    pub kernel: PathBuf,
    /// The initial RAM disk.
    pub initrd: PathBuf,
    /// The kernel command line.
    pub cmdline: String,
    /// Disks: root, private, volatile.
    pub volumes: Vec<VolumeSpec>,
    /// Where the network card leads; ignored while capturing, where it leads nowhere.
    pub nic: Nic,
}

/// Why a guest is booted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BootPurpose {
    /// To be captured: its memory must stay readable for [`Domain::capture`].
    Capture,
    /// To be used: as a clone, for want of a savefile, or as a qube whose volume is kept.
    Clone,
}

/// Who a domain runs as and what it may use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Confinement {
    /// A number below 10,000 no other living domain has: hosts derive the domain's own uid from it.
    pub slot: u32,
    /// How much each volume may write to memory before it spills to disk, encrypted.
    pub volume_memory_max: ByteCount,
    /// The folder on whose file system a spill is made (an unlinked, encrypted file).
    pub spill_dir: PathBuf,
    /// Whether it starts below foreground priority, until it is paused: a spare, which nobody waits for.
    pub background: bool,
    /// Whether what it writes must be kept out of a plaintext swap: of a clone, not of what goes into a savefile anyway.
    pub keep_from_swap: bool,
}

/// A two-way byte channel to the agent in the guest, not blocking. Its descriptor is readable when there may be
/// something to read, and when the other side has gone.
pub trait AgentPipe: io::Read + io::Write + AsFd + Send {}
impl<T: io::Read + io::Write + AsFd + Send> AgentPipe for T {}

/// What [`Domain::capture`] took, all of it at one instant.
pub struct Capture {
    /// Guest memory, byte 0 of the file being gfn 0 (hosts with holes in the guest's address space close them). Nobody
    /// writes to it any more.
    pub memory: File,
    /// Size of the memory image.
    pub memory_size: ByteCount,
    /// The state of CPUs and devices, opaque.
    pub device_state: Vec<u8>,
    /// The version of the device state's format, which only the host that wrote it understands.
    pub device_state_version: u32,
    /// What became of each volume since its base.
    pub deltas: Vec<CapturedDelta>,
}

/// One volume's changes since its base.
pub struct CapturedDelta {
    /// The volume's name.
    pub volume: String,
    /// The volume's size.
    pub size: ByteCount,
    /// A sparse file with the changed pages at their own offsets.
    pub raw: File,
    /// Which pages changed, those changed to zero included; sorted and disjoint.
    pub changed: Vec<PageRange>,
}

/// What went wrong in a host, by step.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The host refuses: a limit, a missing right. The message says what would have to change.
    #[error("{step}: {reason}")]
    Refused {
        /// What was being done.
        step: &'static str,
        /// What stands in the way and what mends it.
        reason: String,
    },
    /// The hypervisor answered with an error.
    #[error("{step}: {message}")]
    Hypervisor {
        /// What was being done.
        step: &'static str,
        /// The hypervisor's own words.
        message: String,
    },
    /// The system did.
    #[error("{step}")]
    Io {
        /// What was being done.
        step: &'static str,
        /// The system's error.
        source: io::Error,
    },
    /// The domain ended by itself.
    #[error("{step}: the domain has ended{detail}")]
    Gone {
        /// What was being waited for.
        step: &'static str,
        /// Its last words, if any, with a leading `: `.
        detail: String,
    },
    /// The guest switched itself off, and the hypervisor has brought it to its end: all it wrote is written.
    #[error("{step}: the guest has switched itself off")]
    PoweredOff {
        /// What was being done.
        step: &'static str,
    },
    /// Time ran out.
    #[error("{step}: nothing after {} s", limit.as_secs())]
    Timeout {
        /// What was being waited for.
        step: &'static str,
        /// How long.
        limit: Duration,
    },
}

impl HostError {
    /// For `map_err`: a system error in the named step.
    pub fn io(step: &'static str) -> impl FnOnce(io::Error) -> HostError {
        move |source| HostError::Io { step, source }
    }
}

/// A hypervisor on this machine. Also knows the file format in which a volume's delta is stacked on its base
/// ([`StackDelta`]).
pub trait Host: StackDelta {
    /// What a savefile made here depends on.
    fn facts(&self) -> &HostFacts;

    /// Boots a guest from its kernel on fresh overlays. Returns as soon as it runs, long before its agent is up.
    fn boot(
        &self,
        spec: &GuestSpec,
        purpose: BootPurpose,
        confinement: &Confinement,
    ) -> Result<Box<dyn Domain>, HostError>;

    /// Starts restoring a clone: copy-on-write memory and overlays over `image`. [`Domain::run`] tells when its CPUs
    /// run.
    fn restore(
        &self,
        spec: &GuestSpec,
        image: HotFiles,
        confinement: &Confinement,
    ) -> Result<Box<dyn Domain>, HostError>;
}

/// A guest under a [`Host`]. Dropping it destroys it.
pub trait Domain: Send {
    /// The channel to its agent. Called once.
    fn agent(&mut self) -> Result<Box<dyn AgentPipe>, HostError>;

    /// Returns when the guest's CPUs run: those of a restored guest once its state is loaded, those of a paused one now.
    fn run(&mut self) -> Result<(), HostError>;

    /// Stops the guest's CPUs until [`Domain::run`]. A guest that was started in the background
    /// ([`Confinement::background`]) has the caller's own priority from here on.
    fn pause(&mut self) -> Result<(), HostError>;

    /// Takes back the guest's free memory, of which the agent says there are `free` bytes, so that it reads as zero.
    fn reclaim_free_memory(&mut self, free: ByteCount) -> Result<(), HostError>;

    /// Stops the guest and takes memory, device state and deltas as they are at that instant. The domain is gone
    /// afterwards.
    fn capture(&mut self) -> Result<Capture, HostError>;

    /// The pages of the memory image that a restored guest has read or written so far, sorted and disjoint. A host may
    /// add pages that lie beside them.
    fn touched(&mut self) -> Result<Vec<PageRange>, HostError>;

    /// The host's own steps since it was last asked, each with the moment it was over; none where a restore is one step.
    fn steps(&mut self) -> Vec<(&'static str, Instant)>;

    /// Readable when [`Domain::serve`] has something to do.
    fn events(&self) -> BorrowedFd<'_>;

    /// Does what the events ask for (a volume that must spill). An error means that the domain cannot go on; a guest that
    /// switched itself off is [`HostError::PoweredOff`], one that reset itself or died [`HostError::Gone`].
    fn serve(&mut self) -> Result<(), HostError>;

    /// Ends it and waits until its memory is free.
    fn destroy(self: Box<Self>) -> Result<(), HostError>;
}
