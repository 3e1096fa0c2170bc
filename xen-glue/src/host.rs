//! [`XenHost`]: boots and restores PVH guests.
//!
//! A restore is a fan: filling the domain's frames, making its disks in dom0, and giving it its state, its xenstore nodes and its
//! devices go on side by side, and meet before its CPUs run.

use std::fs::File;
use std::io::{self, Read};
use std::sync::Arc;
use std::thread;

use engine::host::{BootPurpose, Confinement, Domain, GuestSpec, Host, HostError, HostFacts, Nic};
use engine::image::hot::{HotFiles, StackDelta};
use engine::savefile::{PageMap, VolumeInfo, DEVICE_STATE_MAX};
use engine::units::ByteCount;
use nix::errno::Errno;

use crate::boot::{self, BootError};
use crate::device_state::{self, DeviceState};
use crate::domain::{Parts, XenDomain};
use crate::error::{chain, life_error, store_error, xen_error};
use crate::hypercalls::{CallError, DomId, Hypercalls};
use crate::layout::Layout;
use crate::life::{self, Ports, Rings, Shell, ShellPlan};
use crate::owner::Owner;
use crate::steps::Steps;
use crate::sys::{OpenError, Privcmd};
use crate::volumes::{store, Volumes};
use crate::xenstore::{Nodes, Xenstore};

const RESTORE: &str = "restore the clone";
/// The machine type of every guest.
const MACHINE: &str = "pvh";
/// The console of a PVH guest: xenconsoled's.
const CONSOLE: &str = "console=hvc0";

/// The Xen we are dom0 of.
pub struct XenHost {
    xen: Arc<dyn Hypercalls>,
    owner: Owner,
    facts: HostFacts,
}

impl XenHost {
    /// The Xen under this system, for the domains of one state folder; `None` where there is none, or where we are not its dom0.
    pub fn open(owner: Owner) -> Result<Option<XenHost>, HostError> {
        let step = "open Xen";
        match Privcmd::open() {
            Ok(None) => Ok(None),
            // A guest of Xen, which may use it for nothing of this.
            Err(OpenError::NotAllowed(CallError::Refused { errno: Errno::EPERM, .. })) => Ok(None),
            Ok(Some(xen)) => XenHost::over(Arc::new(xen), owner).map(Some),
            Err(error) => Err(HostError::Refused { step, reason: chain(&error) }),
        }
    }

    /// Over any implementation of the hypercalls.
    pub fn over(xen: Arc<dyn Hypercalls>, owner: Owner) -> Result<XenHost, HostError> {
        let facts = facts(xen.as_ref())?;
        Ok(XenHost { xen, owner, facts })
    }

    /// Whose domains it makes.
    pub(crate) fn owner(&self) -> &Owner {
        &self.owner
    }

    /// The hypercalls.
    pub fn hypercalls(&self) -> &Arc<dyn Hypercalls> {
        &self.xen
    }

    /// Memory that no domain has.
    pub fn memory_free(&self) -> Result<ByteCount, HostError> {
        let info = self.xen.physinfo();
        info.map(|info| info.free).map_err(|error| xen_error("look for free memory", &error))
    }

    /// What a domain of this guest takes of it.
    pub fn memory_needed(spec: &GuestSpec) -> ByteCount {
        life::plan::needed_for(&Layout::fresh(spec.memory), spec.vcpus)
    }
}

impl StackDelta for XenHost {
    fn file_name(&self, volume: &str) -> String {
        format!("{volume}.cow")
    }

    fn stack(&self, volume: &VolumeInfo, map: &PageMap, raw: &File, out: &File) -> io::Result<()> {
        store::write_store(out, volume, map, raw)
    }
}

impl Host for XenHost {
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
        refuse_network(spec)?;
        let steps = Steps::default();
        let uuid = self.owner.uuid(confinement.slot).map_err(HostError::io("draw a uuid"))?;
        let store = open_store()?;
        let volumes = Volumes::assemble(&uuid, &spec.volumes, Vec::new(), &confinement.spill_dir)?;
        let plan = ShellPlan {
            uuid,
            vcpus: spec.vcpus,
            layout: Layout::fresh(spec.memory),
            memory: spec.memory,
            rings: Rings::default(),
            further: Vec::new(),
            tsc: None,
            policy: None,
        };
        let shell = self.shell(&plan, &store, &steps)?;
        load_kernel(spec, &shell)?;
        steps.mark("loaded");
        let parts = Parts { shell: Arc::new(shell), store, volumes, uuid, steps };
        let mut domain = XenDomain::assemble(parts, spec, confinement)?;
        domain.unpause()?;
        Ok(Box::new(domain))
    }

    fn restore(
        &self,
        spec: &GuestSpec,
        image: HotFiles,
        confinement: &Confinement,
    ) -> Result<Box<dyn Domain>, HostError> {
        refuse_persistent(spec)?;
        refuse_network(spec)?;
        let steps = Steps::default();
        let state = read_state(&image.device_state, spec)?;
        let uuid = self.owner.uuid(confinement.slot).map_err(HostError::io("draw a uuid"))?;
        let plan = life::shell_plan(uuid, &state, spec.memory).map_err(|error| life_error(RESTORE, error))?;
        let (memory, deltas) = (image.memory, image.deltas);
        thread::scope(|scope| {
            let disks =
                scope.spawn(|| Volumes::assemble(&uuid, &spec.volumes, deltas, &confinement.spill_dir));
            let store = open_store()?;
            let shell = Arc::new(self.shell(&plan, &store, &steps)?);
            let filling = (shell.clone(), steps.clone());
            let fill = scope.spawn(move || {
                let (shell, steps) = filling;
                life::fill(&shell, &memory).map(|()| steps.mark("filled"))
            });
            let domain = (|| {
                life::finish(&shell, &state).map_err(|error| life_error(RESTORE, error))?;
                let volumes = joined(disks)??;
                let parts = Parts { shell, store, volumes, uuid, steps };
                XenDomain::assemble(parts, spec, confinement)
            })();
            joined(fill)?.map_err(|error| life_error(RESTORE, error))?;
            Ok(Box::new(domain?) as Box<dyn Domain>)
        })
    }
}

impl XenHost {
    fn shell(&self, plan: &ShellPlan, store: &Xenstore, steps: &Steps) -> Result<Shell, HostError> {
        let shell = Shell::create(&self.xen, plan, backends(store)?)
            .map_err(|error| life_error("create the domain", error))?;
        steps.mark_at("created", shell.created_at());
        steps.mark("populated");
        Ok(shell)
    }
}

/// Puts kernel, initrd and all that the guest is told of its machine into a fresh domain.
fn load_kernel(spec: &GuestSpec, shell: &Shell) -> Result<(), HostError> {
    let step = "load the kernel";
    let refused = |error: BootError| match error {
        BootError::Call { .. } => HostError::Hypervisor { step, message: chain(&error) },
        error => HostError::Refused { step, reason: chain(&error) },
    };
    let files = boot::Files::read(&spec.kernel, &spec.initrd).map_err(refused)?;
    let cmdline = format!("{} {CONSOLE}", spec.cmdline);
    let image = files.plan(&cmdline, shell.layout(), spec.vcpus).map_err(refused)?;
    boot::load(shell, &image).map_err(refused)
}

/// The state in a hot image, which must be that of such a guest.
fn read_state(file: &File, spec: &GuestSpec) -> Result<DeviceState, HostError> {
    let step = "read the device state";
    let mut bytes = Vec::new();
    file.take(DEVICE_STATE_MAX.0).read_to_end(&mut bytes).map_err(HostError::io(step))?;
    let broken = |reason: String| HostError::Hypervisor { step, message: reason };
    let state = DeviceState::parse(&bytes).map_err(|fault| broken(fault.to_string()))?;
    if state.vcpus != spec.vcpus {
        return Err(broken(format!("it is of {} vCPUs, the qube has {}", state.vcpus, spec.vcpus)));
    }
    Ok(state)
}

fn facts(xen: &dyn Hypercalls) -> Result<HostFacts, HostError> {
    let version = xen.version();
    let policy = xen.max_policy().map_err(|error| xen_error("ask for the CPU policy", &error))?;
    let mut hash = blake3::Hasher::new();
    hash.update(&policy.leaves).update(&policy.msrs);
    let paging = xen.physinfo().map_err(|error| xen_error("ask for the machine's abilities", &error))?.hap;
    Ok(HostFacts {
        kind: device_state::KIND.to_owned(),
        version: format!("{}.{}{}", version.major, version.minor, version.extra),
        machine: MACHINE.to_owned(),
        cpu_model: format!("policy {}", &hash.finalize().to_hex()[..16]),
        accel: if paging { "hap" } else { "shadow" }.to_owned(),
    })
}

fn open_store() -> Result<Xenstore, HostError> {
    Xenstore::open().map_err(|error| store_error("reach xenstored", error))
}

/// Where xenstored and xenconsoled run: in dom0, unless they say otherwise.
fn backends(store: &Xenstore) -> Result<Ports, HostError> {
    let domid = |path: &str| -> Result<DomId, HostError> {
        let value = store.read(path).map_err(|error| store_error("look where the backends run", error))?;
        Ok(DomId(value.and_then(|value| value.parse().ok()).unwrap_or(0)))
    };
    Ok(Ports {
        store_domid: domid("/tool/xenstored/domid")?,
        console_domid: domid("/tool/xenconsoled/domid")?,
    })
}

fn joined<T>(thread: thread::ScopedJoinHandle<'_, T>) -> Result<T, HostError> {
    thread
        .join()
        .map_err(|_| HostError::Hypervisor { step: RESTORE, message: "a thread of ours panicked".to_owned() })
}

/// A volume that is kept has no delta, so it cannot be captured, nor restored over a captured one.
fn refuse_persistent(spec: &GuestSpec) -> Result<(), HostError> {
    match spec.volumes.iter().find(|volume| volume.base.is_persistent()) {
        None => Ok(()),
        Some(volume) => Err(HostError::Refused {
            step: RESTORE,
            reason: format!("the {} volume is to be kept, which only a boot can do", volume.name),
        }),
    }
}

/// A guest's network is behind a net qube on Xen; nobody plays that part yet.
fn refuse_network(spec: &GuestSpec) -> Result<(), HostError> {
    match spec.nic {
        Nic::None => Ok(()),
        Nic::User | Nic::Tap(_) => Err(HostError::Refused {
            step: "plug in the network card",
            reason: "on Xen a guest's card leads nowhere yet: set the qube's net to `none`".to_owned(),
        }),
    }
}
