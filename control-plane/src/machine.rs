//! The hypervisor of this machine and the limits of a clone on it.

use std::path::{Path, PathBuf};

use engine::host::{Confinement, GuestSpec, Host};
use engine::identity::CloneNumber;
use engine::units::ByteCount;
use nix::sys::resource::{setrlimit, Resource};
use qemu_glue::host::QemuHost;
use qemu_glue::probe::{self, ProbeError, Qemu};

use crate::agent_link::Limits;
use crate::error::{Error, Kind, Result};
use crate::state::State;

/// What each of a clone's volumes may write to memory before it spills, encrypted, to the disk of the state folder. An office
/// document or a browser's cache stays below it; three volumes are well below what a host of 8 GiB can spare.
pub const VOLUME_MEMORY_MAX: ByteCount = ByteCount(512 << 20);
/// The least memory a host keeps for itself when a clone has taken all it may.
pub const HOST_RESERVE: u64 = 256 << 20;

/// A machine on which clones run: its hypervisor and its memory. [`ThisMachine`] is the real one, a simulator another.
pub trait Machine: Send + Sync {
    /// Its hypervisor, probed with `kernel` if it is not known yet.
    fn host(&self, state: &State, kernel: &Path) -> Result<Box<dyn Host>>;

    /// Bytes a new process could take without anything being swapped out; `None` where nobody knows.
    fn memory_available(&self) -> Option<u64>;

    /// How much each of a clone's volumes may write to memory.
    fn volume_memory_max(&self) -> ByteCount;

    /// What of its settings a clone depends on, as a text that is compared: a spare made under others does not serve.
    fn settings(&self) -> String;

    /// How long the agents of its guests may take.
    fn agent_limits(&self) -> Limits;
}

/// The machine we are on, as the environment describes it.
#[derive(Debug, Clone, Default)]
pub struct ThisMachine {
    /// DISPVM_QEMU: the QEMU to use instead of the one in PATH.
    pub qemu: Option<PathBuf>,
    /// PATH.
    pub path: std::ffi::OsString,
    /// DISPVM_VOLUME_MEMORY_MIB: another limit than [`VOLUME_MEMORY_MAX`].
    pub volume_memory_mib: Option<u64>,
}

impl Machine for ThisMachine {
    fn host(&self, state: &State, kernel: &Path) -> Result<Box<dyn Host>> {
        let program = self.qemu.clone().or_else(|| probe::in_path(&self.path));
        let program = program.ok_or_else(|| {
            Error::new(Kind::Failed, "QEMU is not there").hint(
                "`apt install qemu-system-x86`, or name another with DISPVM_QEMU=/path/to/qemu-system-x86_64",
            )
        })?;
        let qemu = Qemu::find(&program, &state.qemu_cache(), kernel).map_err(|error| match error {
            ProbeError::Io { ref path, .. } if path == kernel => Error::failed("find out about QEMU")(error),
            error => Error::new(Kind::Failed, "QEMU cannot be used").because(error),
        })?;
        Ok(Box::new(QemuHost::new(qemu)))
    }

    fn memory_available(&self) -> Option<u64> {
        let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
        Some(line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()? << 10)
    }

    fn volume_memory_max(&self) -> ByteCount {
        self.volume_memory_mib.map_or(VOLUME_MEMORY_MAX, |mib| ByteCount(mib << 20))
    }

    fn settings(&self) -> String {
        format!("{:?}", (&self.qemu, self.volume_memory_max()))
    }

    fn agent_limits(&self) -> Limits {
        Limits::default()
    }
}

/// No core dump of this process: the key of a spill is in its memory, and what its clone reads and writes.
pub fn forbid_core_dump() -> Result<()> {
    // A limit of 1 forbids a file (too small) and, by the kernel's own convention (fs/coredump.c), a pipe as well.
    setrlimit(Resource::RLIMIT_CORE, 1, 1).map_err(Error::failed("forbid core dumps"))
}

/// The limits of a clone.
pub fn confinement(state: &State, machine: &dyn Machine, number: CloneNumber) -> Confinement {
    Confinement {
        slot: number.get(),
        volume_memory_max: machine.volume_memory_max(),
        spill_dir: state.root().to_owned(),
        background: false,
        keep_from_swap: true,
    }
}

/// The most a clone may come to use.
pub fn memory_needed(spec: &GuestSpec, confinement: &Confinement) -> u64 {
    let in_memory = spec.volumes.iter().filter(|volume| !volume.base.is_persistent()).count();
    spec.memory.0 + in_memory as u64 * confinement.volume_memory_max.0
}

/// Refuses a clone for which there would not be enough memory if it took all it may: the host's OOM killer shall never
/// have to choose.
pub fn check_memory(machine: &dyn Machine, spec: &GuestSpec, confinement: &Confinement) -> Result<()> {
    let needed = memory_needed(spec, confinement) + HOST_RESERVE;
    match machine.memory_available() {
        Some(available) if available < needed => Err(Error::new(
            Kind::Refused,
            format!(
                "too little memory: the clone may come to use {}, {} are available",
                crate::output::bytes_text(needed),
                crate::output::bytes_text(available)
            ),
        )
        .hint("close other programs, give the DVM template less memory, or lower DISPVM_VOLUME_MEMORY_MIB")),
        _ => Ok(()),
    }
}
