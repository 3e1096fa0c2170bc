//! A living PVH domain: its frames, xenstore nodes, disks and the channel to its agent.
//!
//! Invariants:
//! - it is taken down in one place, [`XenDomain::take_down`], in one order: channel, devices, domain, nodes, disks. Dropping it
//!   does that too;
//! - what cannot be taken down is said and left to the sweep of the next command: the domain's handle names its owner.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use engine::host::{AgentPipe, Capture, Confinement, Domain, GuestSpec, HostError};
use engine::identity::CloneNumber;
use engine::units::{ByteCount, PageRange};

use crate::channel::offer::Place;
use crate::channel::Channel;
use crate::device_state;
use crate::error::{guest_error, life_error, store_error, xen_error};
use crate::hypercalls::{DomId, Hypercalls, Shutdown, Uuid};
use crate::life::{self, Shell};
use crate::steps::Steps;
use crate::threads;
use crate::volumes::Volumes;
use crate::xenstore::devices::{self, Device, DeviceError, DeviceId, Vif};
use crate::xenstore::domain::{self as nodes, Ask, DomainNodes, Ring};
use crate::xenstore::Xenstore;

/// How long a guest may take to acknowledge that it shall suspend itself, and then to have done so; libxl waits as long.
const SUSPEND_LIMIT: Duration = Duration::from_secs(60);
/// How long its agent may take to let go of the channel before.
const LET_GO_LIMIT: Duration = Duration::from_secs(10);
/// How long devices may take to connect, or to close. They are not waited for in a launch, only looked at.
const DEVICE_LIMIT: Duration = Duration::from_secs(20);
/// Free pages the balloon leaves to the guest, which must not have to push anything out.
const BALLOON_RESERVE: u64 = 80 << 20;
/// The balloon is given up on when it has not moved for this long.
const BALLOON_PATIENCE: Duration = Duration::from_secs(3);
/// And looked at so often.
const BALLOON_LOOK: Duration = Duration::from_millis(20);
/// There when dom0 carries packets (`drivers/net/xen-netback`); without, a card would wait for ever.
const NETBACK: &str = "/sys/bus/xen-backend/drivers/vif";
/// The watch that fires when any domain shuts down or is gone (`docs/misc/xenstore.txt`).
const RELEASE: &str = "@releaseDomain";

/// What a domain is put together from.
pub struct Parts {
    /// Its frames.
    pub shell: Arc<Shell>,
    /// A connection to xenstored.
    pub store: Xenstore,
    /// Its disks.
    pub volumes: Volumes,
    /// Its handle.
    pub uuid: Uuid,
    /// What has been done so far.
    pub steps: Steps,
}

/// A domain. Dropping it takes it down.
pub struct XenDomain {
    xen: Arc<dyn Hypercalls>,
    store: Arc<Xenstore>,
    /// A connection of its own: its descriptor is readable when a domain has ended.
    releases: Xenstore,
    domid: DomId,
    uuid: Uuid,
    vcpus: u32,
    memory: ByteCount,
    shell: Option<Arc<Shell>>,
    volumes: Option<Volumes>,
    devices: Vec<DeviceId>,
    unmapping: Option<JoinHandle<()>>,
    /// Whether the step has been told that its agent is ready.
    ready_told: bool,
    channel: Option<Channel>,
    steps: Steps,
}

impl XenDomain {
    /// Tells xenstore of the domain and its devices. From here on dropping it undoes everything.
    pub fn assemble(
        parts: Parts,
        spec: &GuestSpec,
        confinement: &Confinement,
    ) -> Result<XenDomain, HostError> {
        let step = "tell xenstore of the domain";
        let Parts { shell, store, volumes, uuid, steps } = parts;
        let xen = shell.xen().clone();
        let domid = shell.domid();
        let (xenstore_ring, console) = (ring(shell.store()), ring(shell.console()));
        let releases = Xenstore::open().map_err(|error| store_error(step, error))?;
        let mut domain = XenDomain {
            xen,
            store: Arc::new(store),
            releases,
            domid,
            uuid,
            vcpus: spec.vcpus,
            memory: spec.memory,
            shell: Some(shell),
            volumes: Some(volumes),
            devices: Vec::new(),
            unmapping: None,
            ready_told: false,
            channel: None,
            steps,
        };
        let nodes = DomainNodes {
            domid,
            uuid,
            name: format!("disp{}", confinement.slot),
            vcpus: spec.vcpus,
            memory_max: spec.memory,
            memory: spec.memory,
            store: xenstore_ring,
            console,
        };
        nodes.publish(&domain.store).map_err(|error| store_error(step, error))?;
        domain.add_devices(confinement.slot)?;
        domain.releases.watch(RELEASE, "release").map_err(|error| store_error(step, error))?;
        Ok(domain)
    }

    /// Its disks and its network card, whose address is the clone's.
    fn add_devices(&mut self, slot: u32) -> Result<(), HostError> {
        let disks = self.volumes.as_ref().map_or(&[][..], Volumes::disks);
        let number = CloneNumber::new(slot).filter(|_| Path::new(NETBACK).exists());
        let card = number.map(|number| Vif { number: 0, mac: number.mac(), backend: DomId(0) });
        let devices: Vec<Device> =
            disks.iter().map(Device::vbd).chain(card.iter().map(Device::vif)).collect();
        devices::attach(&self.store, self.domid, &devices)
            .map_err(|error| store_error("give the domain its devices", error))?;
        self.devices = devices.iter().map(|device| device.id).collect();
        Ok(())
    }

    /// Lets its CPUs run, and has somebody look when its devices are connected: nobody waits for them.
    pub fn unpause(&mut self) -> Result<(), HostError> {
        self.xen.unpause(self.domid).map_err(|error| xen_error("unpause the domain", &error))?;
        self.steps.mark("unpaused");
        self.unmap_meanwhile()?;
        let (domid, ids, steps) = (self.domid, self.devices.clone(), self.steps.clone());
        let look = move || {
            let connected = Xenstore::open()
                .map_err(DeviceError::from)
                .and_then(|store| devices::wait_connected(&store, domid, &ids, DEVICE_LIMIT));
            match connected {
                Ok(()) => steps.mark("devices connected"),
                Err(error) => tracing::debug!("the devices of domain {domid} did not connect: {error}"),
            }
        };
        let looking = threads::spawn("devices".to_owned(), look);
        looking.map(drop).map_err(HostError::io("watch the domain's devices"))
    }

    /// To unmap its frames takes about as long as to fill them: the guest does not wait for it.
    fn unmap_meanwhile(&mut self) -> Result<(), HostError> {
        let Some(shell) = self.shell.clone().filter(|_| self.unmapping.is_none()) else { return Ok(()) };
        let spawned = threads::spawn("unmap".to_owned(), move || shell.unmap());
        self.unmapping = Some(spawned.map_err(HostError::io("unmap the domain's frames"))?);
        Ok(())
    }

    /// Ends it, whatever state it is in. The first error is the answer; what can be done after it is done.
    fn take_down(&mut self) -> Result<(), HostError> {
        drop(self.channel.take());
        let Some(shell) = self.shell.take() else { return Ok(()) };
        // A guest that runs on would see its disks go first.
        let paused = self.xen.pause(self.domid).map_err(|error| xen_error("pause the domain", &error));
        let closed = devices::close(&self.store, self.domid, &self.devices, DEVICE_LIMIT);
        if let Some(unmapping) = self.unmapping.take() {
            let _ = unmapping.join();
        }
        // Somebody who still fills it destroys it when it has noticed.
        let destroyed = Arc::into_inner(shell).map_or(Ok(()), Shell::destroy);
        let withdrawn = nodes::withdraw(&self.store, self.domid, &self.uuid);
        let removed = self.volumes.take().map_or(Ok(()), |volumes| volumes.close().map_err(HostError::from));
        // That a domain which is gone cannot be paused is no failure of its end.
        drop(paused);
        destroyed
            .map_err(|error| life_error("destroy the domain", error))
            .and(closed.map_err(|error| store_error("close the domain's devices", error)))
            .and(withdrawn.map_err(|error| store_error("remove the domain's nodes", error)))
            .and(removed)
    }

    /// Waits until the guest has suspended itself.
    fn await_suspended(&self) -> Result<(), HostError> {
        let step = "wait for the guest to suspend itself";
        let deadline = Instant::now() + SUSPEND_LIMIT;
        loop {
            match self.shutdown(step)? {
                Some(Shutdown::Suspend) => return Ok(()),
                Some(other) => {
                    return Err(HostError::Gone {
                        step,
                        detail: format!(": it ended with {other:?} instead"),
                    })
                }
                None if Instant::now() >= deadline => {
                    return Err(HostError::Timeout { step, limit: SUSPEND_LIMIT })
                }
                // A watch tells; the pause is for an event that came before it was set.
                None => self.await_release(Duration::from_millis(500)).map_err(HostError::io(step))?,
            }
        }
    }

    fn await_release(&self, limit: Duration) -> io::Result<()> {
        use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
        let timeout = PollTimeout::try_from(limit.as_millis()).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(self.releases.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        while let Some(_event) = self.releases.next_event().map_err(io::Error::other)? {}
        Ok(())
    }

    /// Whether and why it has shut down.
    fn shutdown(&self, step: &'static str) -> Result<Option<Shutdown>, HostError> {
        let info = self.xen.info(self.domid).map_err(|error| xen_error(step, &error))?;
        let gone = || HostError::Gone { step, detail: String::new() };
        let info = info.filter(|info| info.uuid == self.uuid && !info.is_dying()).ok_or_else(gone)?;
        Ok(info.shutdown())
    }

    /// Sets the balloon so that the domain has `target` bytes, and waits until it has, or has stopped trying.
    fn balloon_to(&self, target: u64) -> Result<(), HostError> {
        let step = "take back free memory";
        nodes::set_memory_target(&self.store, self.domid, ByteCount(target))
            .map_err(|error| store_error(step, error))?;
        let pages = || -> Result<u64, HostError> {
            let info = self.xen.info(self.domid).map_err(|error| xen_error(step, &error))?;
            let gone = || HostError::Gone { step, detail: String::new() };
            Ok(info.ok_or_else(gone)?.pages.bytes().0)
        };
        let (mut now, mut moved) = (pages()?, Instant::now());
        // The special pages are not the guest's to count, and the balloon works in whole pages.
        while now.abs_diff(target) > 256 << 10 && moved.elapsed() < BALLOON_PATIENCE {
            thread::sleep(BALLOON_LOOK);
            let before = std::mem::replace(&mut now, pages()?);
            if before != now {
                moved = Instant::now();
            }
        }
        Ok(())
    }
}

impl Domain for XenDomain {
    fn agent(&mut self) -> Result<Box<dyn AgentPipe>, HostError> {
        let step = "connect to the agent";
        if self.channel.is_some() {
            return Err(HostError::Refused { step, reason: "its channel has been taken already".to_owned() });
        }
        let (pipe, channel) = Channel::open(self.domid, Place::agent()).map_err(HostError::io(step))?;
        pipe.set_nonblocking(true).map_err(HostError::io(step))?;
        self.channel = Some(channel);
        Ok(Box::new(pipe))
    }

    fn run(&mut self) -> Result<(), HostError> {
        self.unpause()
    }

    fn pause(&mut self) -> Result<(), HostError> {
        self.xen.pause(self.domid).map_err(|error| xen_error("pause the clone", &error))
    }

    /// What the guest has used and freed lies in its frames still; ballooned out and back they are fresh, and read as zero. A
    /// frame that reads as zero already needs no such way: so many are left where they are.
    fn reclaim_free_memory(&mut self, free: ByteCount) -> Result<(), HostError> {
        let Some(shell) = &self.shell else { return Ok(()) };
        let all = self.memory.0;
        let used = life::count_data(shell).map_err(|error| life_error("count the pages in use", error))?;
        let dirty_free = used.bytes().0.saturating_sub(all.saturating_sub(free.0));
        // The guest's allocator gives the balloon what was freed before what was never used.
        let inflate = (dirty_free + dirty_free / 2).min(free.0.saturating_sub(BALLOON_RESERVE));
        self.balloon_to(all - inflate.min(all))?;
        self.balloon_to(all)
    }

    fn capture(&mut self) -> Result<Capture, HostError> {
        let step = "capture the guest";
        if let Some(channel) = &mut self.channel {
            channel.let_go(LET_GO_LIMIT).map_err(|error| {
                HostError::io("have the agent let go of its channel")(io::Error::other(error))
            })?;
        }
        nodes::ask(&self.store, self.domid, Ask::Suspend, SUSPEND_LIMIT)
            .map_err(|error| guest_error("ask the guest to suspend itself", error))?;
        self.await_suspended()?;
        let captured = life::capture(self.xen.as_ref(), self.domid, self.vcpus, self.memory)
            .map_err(|error| life_error(step, error))?;
        let volumes = self.volumes.take();
        self.take_down()?;
        let deltas = volumes.map_or(Ok(Vec::new()), Volumes::read_deltas)?;
        let device_state = captured.state.to_bytes();
        Ok(Capture {
            memory: captured.memory,
            memory_size: self.memory,
            device_state,
            device_state_version: device_state::VERSION,
            deltas,
        })
    }

    /// Nobody can tell: Xen loads all memory ahead, so there is no working set to read.
    fn touched(&mut self) -> Result<Vec<PageRange>, HostError> {
        Ok(Vec::new())
    }

    fn steps(&mut self) -> Vec<(&'static str, Instant)> {
        if let Some(at) = self.channel.as_ref().and_then(Channel::connected_at).filter(|_| !self.ready_told) {
            self.ready_told = true;
            self.steps.mark_at("agent ready", at);
        }
        self.steps.take()
    }

    fn events(&self) -> BorrowedFd<'_> {
        self.releases.as_fd()
    }

    fn serve(&mut self) -> Result<(), HostError> {
        let step = "serve the clone";
        while let Some(_event) = self.releases.next_event().map_err(|error| store_error(step, error))? {}
        let gone = |detail: &str| Err(HostError::Gone { step, detail: detail.to_owned() });
        match self.shutdown(step)? {
            None => Ok(()),
            Some(Shutdown::PowerOff) => {
                // What it has written is on its disks when their backends have let go of them.
                self.take_down()?;
                Err(HostError::PoweredOff { step })
            }
            Some(Shutdown::Reboot) => gone(": the guest restarted itself"),
            Some(Shutdown::Suspend) => gone(": the guest suspended itself unasked"),
            Some(Shutdown::Crash) => gone(": the guest crashed"),
        }
    }

    fn destroy(mut self: Box<Self>) -> Result<(), HostError> {
        self.take_down()
    }
}

impl Drop for XenDomain {
    fn drop(&mut self) {
        if let Err(error) = self.take_down() {
            tracing::error!("domain {} is left behind: {error}", self.domid);
        }
    }
}

fn ring(ring: life::Ring) -> Ring {
    Ring { gfn: ring.gfn, port: ring.port }
}
