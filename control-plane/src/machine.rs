//! The hypervisor of this machine and the limits of a clone on it.

use std::io;
use std::path::{Path, PathBuf};

use engine::host::{Confinement, GuestSpec, Host};
use engine::identity::CloneNumber;
use engine::units::ByteCount;
use nix::sys::resource::{setrlimit, Resource};
use qemu_glue::host::QemuHost;
use qemu_glue::probe::{self, ProbeError, Qemu};
use xen_glue::host::XenHost;
use xen_glue::owner::Owner;

use crate::agent_link::Limits;
use crate::calls::carriage;
use crate::calls::wire::{Finder, Vchans};
use crate::clones;
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

    /// Ends what clones of this folder have left behind that does not end with their keeper: domains and their devices.
    /// `is_kept` tells of a slot whether its keeper lives.
    fn sweep(&self, state: &State, is_kept: &dyn Fn(u32) -> bool) -> Result<()>;

    /// What a clone may come to take of the machine's memory, and what there is.
    fn budget(&self, state: &State, spec: &GuestSpec, confinement: &Confinement) -> Budget;

    /// How much each of a clone's volumes may write to memory.
    fn volume_memory_max(&self) -> ByteCount;

    /// What of its settings a clone depends on, as a text that is compared: a spare made under others does not serve.
    fn settings(&self) -> String;

    /// How long the agents of its guests may take.
    fn agent_limits(&self) -> Limits;

    /// Finds the guest of a slot where calls have a channel each; `None`: this machine has none such.
    fn call_channels(&self, state: &State, slot: u32) -> Option<Finder>;
}

/// Memory where clones take it from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// The most that one clone may come to use, in bytes.
    pub one: u64,
    /// What nobody uses, in bytes; `None` where nobody knows.
    pub available: Option<u64>,
    /// What has to be left over, in bytes.
    pub reserve: u64,
    /// What the user can do about too little of it.
    pub advice: &'static str,
}

impl Budget {
    /// Of clones that are processes of this system: what is available to them is yet to be found out.
    pub fn of_processes(spec: &GuestSpec, confinement: &Confinement) -> Budget {
        let in_memory = spec.volumes.iter().filter(|volume| !volume.base.is_persistent()).count();
        Budget {
            one: spec.memory.0 + in_memory as u64 * confinement.volume_memory_max.0,
            available: None,
            reserve: HOST_RESERVE,
            advice:
                "close other programs, give the DVM template less memory, or lower DISPVM_VOLUME_MEMORY_MIB",
        }
    }

    /// What has to be available for so many clones.
    pub fn needed_for(&self, clones: u64) -> u64 {
        self.one.saturating_mul(clones).saturating_add(self.reserve)
    }
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
        if let Some(xen) = xen(state)? {
            return Ok(Box::new(xen));
        }
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

    fn sweep(&self, state: &State, is_kept: &dyn Fn(u32) -> bool) -> Result<()> {
        match xen(state)? {
            Some(xen) => {
                xen.sweep(is_kept).map(drop).map_err(Error::failed("end what is left of dead clones"))
            }
            // A process of QEMU's ends with its keeper.
            None => Ok(()),
        }
    }

    fn budget(&self, state: &State, spec: &GuestSpec, confinement: &Confinement) -> Budget {
        match xen(state) {
            Ok(Some(xen)) => Budget {
                one: XenHost::memory_needed(spec).0,
                available: xen.memory_free().ok().map(|free| free.0),
                reserve: 0,
                advice: "shut down other qubes, give the DVM template less memory, or have dom0 give some back (`xl mem-set 0 …`)",
            },
            _ => Budget { available: memory_available(), ..Budget::of_processes(spec, confinement) },
        }
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

    fn call_channels(&self, state: &State, slot: u32) -> Option<Finder> {
        let state = state.clone();
        Some(Box::new(move || {
            // What cannot serve them would refuse the guest's.
            if !carriage::can_serve() {
                return Ok(None);
            }
            let Some(xen) = xen(&state).map_err(io::Error::other)? else { return Ok(None) };
            Ok(xen.call_guest(slot)?.map(|guest| Box::new(guest) as Box<dyn Vchans>))
        }))
    }
}

/// The Xen under us, if this is dom0.
fn xen(state: &State) -> Result<Option<XenHost>> {
    XenHost::open(Owner::of(state.root())).map_err(|error| {
        Error::new(Kind::Failed, "Xen cannot be used")
            .because(error)
            .hint("`dispvm-savefile doctor` looks what is wrong")
    })
}

/// Bytes a new process could take without anything being swapped out; `None` where nobody knows.
fn memory_available() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()? << 10)
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

/// Removes what dead clones have left: what the hypervisor still has of them, and their records.
///
/// That the hypervisor cannot be asked is no reason not to launch: it is said, and the next sweep tries again.
pub fn sweep(state: &State, machine: &dyn Machine) -> Result<()> {
    if let Err(error) = machine.sweep(state, &|slot| clones::is_kept(state, slot)) {
        tracing::warn!("cannot remove what dead clones have left: {}", crate::output::error_text(&error));
    }
    clones::sweep(state)
}

/// Refuses a clone for which there would not be enough memory if it took all it may: the host's OOM killer shall never
/// have to choose.
pub fn check_memory(
    state: &State,
    machine: &dyn Machine,
    spec: &GuestSpec,
    confinement: &Confinement,
) -> Result<()> {
    let budget = machine.budget(state, spec, confinement);
    let needed = budget.needed_for(1);
    match budget.available {
        Some(available) if available < needed => Err(Error::new(
            Kind::Refused,
            format!(
                "too little memory: the clone may come to use {}, {} are available",
                crate::output::bytes_text(needed),
                crate::output::bytes_text(available)
            ),
        )
        .hint(budget.advice)),
        _ => Ok(()),
    }
}
