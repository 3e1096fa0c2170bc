//! [`QemuHost`]: boots and restores guests.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use engine::host::{
    Base, BootPurpose, Confinement, Domain, GuestSpec, Host, HostError, HostFacts, Nic, VolumeSpec,
};
use engine::image::hot::{HotFiles, StackDelta};
use engine::savefile::{PageMap, VolumeInfo};
use engine::units::ByteCount;
use nix::fcntl::{fcntl, posix_fallocate, FcntlArg, SealFlag};
use serde_json::json;

use crate::domain::{Overlay, QemuDomain};
use crate::plan::{self, Chain, Link, Memory, Plan, Start, VolumeFds, MACHINE_ON_RECORD};
use crate::probe::Qemu;
use crate::process::{memfd, Launch, Process};
use crate::qcow2;
use crate::qmp::Qmp;
use crate::swap::{self, SwapGuard};
use crate::sys;
use crate::touched::FileId;

/// What a guest's QEMU takes beside the guest's memory and volumes, for the lock limit: code, heap, translated code.
const QEMU_OWN_BYTES: u64 = 2 << 30;

/// This machine's QEMU.
pub struct QemuHost {
    qemu: Qemu,
    facts: HostFacts,
}

impl QemuHost {
    /// With a QEMU that has been probed.
    pub fn new(qemu: Qemu) -> QemuHost {
        let facts = HostFacts {
            kind: "qemu".to_owned(),
            version: qemu.version.clone(),
            machine: MACHINE_ON_RECORD.to_owned(),
            cpu_model: qemu.accel.cpu_description(),
            accel: qemu.accel.name().to_owned(),
        };
        QemuHost { qemu, facts }
    }
}

impl StackDelta for QemuHost {
    fn file_name(&self, volume: &str) -> String {
        format!("{volume}.qcow2")
    }

    fn stack(&self, volume: &VolumeInfo, map: &PageMap, raw: &File, out: &File) -> io::Result<()> {
        qcow2::write_delta(out, ByteCount(volume.virtual_bytes), map, raw)
    }
}

impl Host for QemuHost {
    fn facts(&self) -> &HostFacts {
        &self.facts
    }

    fn boot(
        &self,
        spec: &GuestSpec,
        purpose: BootPurpose,
        confinement: &Confinement,
    ) -> Result<Box<dyn Domain>, HostError> {
        if purpose == BootPurpose::Capture {
            refuse_persistent(spec)?;
        }
        let memory = shared_memory(spec.memory)?;
        let (kernel, initrd) = (open_base(&spec.kernel)?, open_base(&spec.initrd)?);
        let start = Start::Boot { kernel: kernel.as_raw_fd(), initrd: initrd.as_raw_fd() };
        let nic = match purpose {
            BootPurpose::Capture => &Nic::None,
            BootPurpose::Clone => &spec.nic,
        };
        let keep_private = purpose == BootPurpose::Clone;
        let files =
            Files { memory: &memory, deltas: Vec::new(), further: vec![kernel, initrd], keep_private };
        let mut domain = self.start(spec, Memory::Shared, files, nic, start, confinement)?;
        domain.memory = (purpose == BootPurpose::Capture).then_some(memory);
        domain.running = true;
        Ok(Box::new(domain))
    }

    fn restore(
        &self,
        spec: &GuestSpec,
        image: HotFiles,
        confinement: &Confinement,
    ) -> Result<Box<dyn Domain>, HostError> {
        refuse_persistent(spec)?;
        let memory = match self.qemu.maps_read_only() {
            true => Memory::PrivateReadOnly,
            false => Memory::PrivateCaught,
        };
        let (deltas, further) = (image.deltas, vec![image.device_state]);
        let files = Files { memory: &image.memory, deltas, further, keep_private: true };
        let state = files.further[0].as_raw_fd();
        let mut domain = self.start(spec, memory, files, &spec.nic, Start::Incoming, confinement)?;
        load_state(&mut domain.qmp, state).map_err(HostError::io("load the device state"))?;
        Ok(Box::new(domain))
    }
}

/// What a guest is started from, kept open until QEMU has it.
struct Files<'a> {
    memory: &'a File,
    /// By volume name.
    deltas: Vec<(String, File)>,
    further: Vec<File>,
    /// Whether it must stay out of swap: a clone, not what goes into a savefile anyway.
    keep_private: bool,
}

impl QemuHost {
    fn start(
        &self,
        spec: &GuestSpec,
        memory: Memory,
        files: Files<'_>,
        nic: &Nic,
        start: Start,
        confinement: &Confinement,
    ) -> Result<QemuDomain, HostError> {
        let step = "start QEMU";
        let in_memory = spec.volumes.iter().filter(|volume| !volume.base.is_persistent()).count();
        let bytes_max = spec.memory.0 + QEMU_OWN_BYTES + in_memory as u64 * confinement.volume_memory_max.0;
        let guard = match files.keep_private && confinement.keep_from_swap {
            true => swap::guard(bytes_max, self.qemu.locks_on_fault())?,
            false => SwapGuard::NotNeeded,
        };
        let (qmp, qmp_theirs) = UnixStream::pair().map_err(HostError::io(step))?;
        let (agent, agent_theirs) = UnixStream::pair().map_err(HostError::io(step))?;
        let make_overlay = |volume: &VolumeSpec| match files.keep_private {
            true => overlay(volume, confinement, guard),
            false => growing_overlay(volume),
        };
        // What QEMU inherits of the volumes is kept open here until it has it; the overlays, as long as it lives.
        let (mut volumes, mut bases, mut overlays) = (Vec::new(), Vec::new(), Vec::new());
        for volume in &spec.volumes {
            let base = open_volume_base(volume)?;
            let base_fd = base.as_ref().map(AsRawFd::as_raw_fd);
            let chain = match base_fd.filter(|_| volume.base.is_persistent()) {
                Some(fd) => Chain::Persistent(fd),
                None => {
                    let overlay = make_overlay(volume)?;
                    let delta = files.deltas.iter().find(|(name, _)| *name == volume.name);
                    let chain = Chain::Overlay {
                        overlay: overlay.file.as_raw_fd(),
                        delta: delta.map(|(_, file)| file.as_raw_fd()),
                        base: base_fd,
                    };
                    overlays.push(overlay);
                    chain
                }
            };
            volumes.push(VolumeFds { name: volume.name.clone(), chain });
            bases.extend(base);
        }
        let (link, tap) = open_link(nic)?;

        let mut inherit: Vec<RawFd> =
            vec![files.memory.as_raw_fd(), qmp_theirs.as_raw_fd(), agent_theirs.as_raw_fd()];
        inherit.extend(volumes.iter().flat_map(|volume| volume.chain.fds()));
        inherit.extend(files.further.iter().map(AsRawFd::as_raw_fd));
        inherit.extend(tap.as_ref().map(AsRawFd::as_raw_fd));
        let memory_file = FileId::of(&files.memory.metadata().map_err(HostError::io(step))?);
        let lock_on_fault = guard == SwapGuard::LockOnFault;
        let arguments = plan::arguments(&Plan {
            spec,
            accel: self.qemu.accel,
            cpu_model: self.qemu.accel.cpu_model(),
            memory,
            memory_fd: files.memory.as_raw_fd(),
            lock_on_fault,
            qmp: qmp_theirs.as_raw_fd(),
            agent: agent_theirs.as_raw_fd(),
            volumes: &volumes,
            link,
            start,
        });
        let process = Process::start(Launch {
            program: &self.qemu.path,
            arguments,
            accel: self.qemu.accel,
            inherit,
            slot: confinement.slot,
            background: confinement.background,
            keep_ipc_lock: lock_on_fault && swap::has_ipc_lock(),
            catch_memory_open: (memory == Memory::PrivateCaught).then_some(files.memory),
        })
        .map_err(HostError::io(step))?;
        let qmp = Qmp::start(qmp).map_err(HostError::io(step))?;
        Ok(QemuDomain {
            process,
            qmp,
            agent: Some(agent),
            memory: None,
            memory_size: spec.memory,
            memory_file,
            overlays,
            confinement: confinement.clone(),
            version: self.qemu.number(),
            running: false,
            paused: false,
        })
    }
}

/// Asks for the device state to be loaded, without waiting: QEMU is still starting.
fn load_state(qmp: &mut Qmp, state: RawFd) -> io::Result<()> {
    let capabilities = json!([{ "capability": "x-ignore-shared", "state": true }]);
    qmp.post("migrate-set-capabilities", json!({ "capabilities": capabilities }))
        .map_err(io::Error::other)?;
    qmp.post("migrate-incoming", json!({ "uri": format!("fd:{state}") })).map_err(io::Error::other)
}

/// Guest memory that we can read when the guest has stopped.
fn shared_memory(size: ByteCount) -> Result<File, HostError> {
    let step = "make guest memory";
    let file = memfd("guest-memory").map_err(HostError::io(step))?;
    file.set_len(size.0).map_err(HostError::io(step))?;
    Ok(file)
}

/// An empty overlay in memory for a guest that is to be captured: all of what it writes goes into the savefile, and a
/// spill could not be read back.
fn growing_overlay(volume: &VolumeSpec) -> Result<Overlay, HostError> {
    let make = || {
        let file = memfd("overlay")?;
        qcow2::write_empty(&file, volume.size)?;
        Ok(Overlay { volume: volume.name.clone(), size: volume.size, file, spilled: false })
    };
    make().map_err(HostError::io("make an overlay"))
}

/// An empty overlay in memory which cannot grow past the limit: a write beyond it fails, and QEMU stops the guest.
fn overlay(volume: &VolumeSpec, confinement: &Confinement, guard: SwapGuard) -> Result<Overlay, HostError> {
    let make = || {
        let (size, data_max) = (volume.size, confinement.volume_memory_max);
        let file = match guard {
            SwapGuard::NotNeeded => memfd("overlay")?,
            SwapGuard::LockOnFault => {
                let (tables, all) = qcow2::limited_bytes(size, data_max)?;
                let file = swap::unswappable_file(all)?;
                // Data may not take the room of tables.
                posix_fallocate(file.as_raw_fd(), 0, tables.0 as i64)?;
                file
            }
        };
        qcow2::write_empty_limited(&file, size, data_max)?;
        if guard == SwapGuard::NotNeeded {
            let seals = SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_SEAL;
            fcntl(file.as_raw_fd(), FcntlArg::F_ADD_SEALS(seals))?;
        }
        Ok(Overlay { volume: volume.name.clone(), size, file, spilled: false })
    };
    make().map_err(HostError::io("make an overlay"))
}

/// A volume that is kept has no delta, so it cannot be captured, nor restored over a captured one.
fn refuse_persistent(spec: &GuestSpec) -> Result<(), HostError> {
    match spec.volumes.iter().find(|volume| volume.base.is_persistent()) {
        None => Ok(()),
        Some(volume) => Err(HostError::Refused {
            step: "start QEMU",
            reason: format!("the {} volume is to be kept, which only a boot can do", volume.name),
        }),
    }
}

fn open_volume_base(volume: &VolumeSpec) -> Result<Option<File>, HostError> {
    match &volume.base {
        Base::Empty => Ok(None),
        Base::Frozen(path) => open_base(path).map(Some),
        Base::Persistent(path) => File::options()
            .read(true)
            .write(true)
            .open(path)
            .map(Some)
            .map_err(HostError::io("open the volume that is to be kept")),
    }
}

fn open_base(path: &Path) -> Result<File, HostError> {
    File::open(path).map_err(|source| HostError::Io {
        step: "open a volume's base, the kernel or the initrd",
        source: io::Error::new(source.kind(), format!("{}: {source}", path.display())),
    })
}

fn open_link(nic: &Nic) -> Result<(Link, Option<OwnedFd>), HostError> {
    match nic {
        Nic::None => Ok((Link::Nowhere, None)),
        Nic::User => Ok((Link::User, None)),
        Nic::Tap(name) => {
            let tap = sys::open_tap(name).map_err(HostError::io("open the tap interface"))?;
            Ok((Link::Tap(tap.as_raw_fd()), Some(tap)))
        }
    }
}
