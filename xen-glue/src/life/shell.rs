//! A domain without content: made, with its vCPUs, its frames and its two rings, paused.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use engine::image::scan::is_zero;
use engine::units::{ByteCount, PageRange};
use nix::errno::Errno;

use super::{plan, LifeError};
use crate::abi::hvm::param;
use crate::device_state::TscInfo;
use crate::hypercalls::{CallError, CpuPolicy, DomId, Hypercalls, Mapping, NewDomain, Uuid};
use crate::layout::{Layout, CONSOLE_GFN, STORE_GFN};

/// HVMPTM_no_delay_for_missed_ticks, which libxl gives every PVH guest: `public/hvm/params.h`.
const TIMER_MODE: u64 = 1;
/// Entries of a grant table that every guest has for its rings: `public/grant_table.h`, GNTTAB_RESERVED_*.
const GRANT_CONSOLE: u32 = 0;
const GRANT_STORE: u32 = 1;

/// What a domain is to be.
#[derive(Clone, Debug)]
pub struct ShellPlan {
    /// Its handle.
    pub uuid: Uuid,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// The RAM it has at first.
    pub layout: Layout,
    /// The RAM it may have; less than its layout's counts as that.
    pub memory: ByteCount,
    /// Where its rings are.
    pub rings: Rings,
    /// Further frames it has, of which Xen was told.
    pub further: Vec<u64>,
    /// How it sees time-stamp counters; `None` leaves that to Xen.
    pub tsc: Option<TscInfo>,
    /// The CPUs it sees; `None` leaves that to Xen.
    pub policy: Option<CpuPolicy>,
}

/// The frames of the rings to xenstored and xenconsoled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rings {
    /// That to xenstored.
    pub store: u64,
    /// That to xenconsoled.
    pub console: u64,
}

impl Default for Rings {
    fn default() -> Rings {
        Rings { store: STORE_GFN, console: CONSOLE_GFN }
    }
}

/// The domains in which xenstored and xenconsoled run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ports {
    /// That of xenstored.
    pub store_domid: DomId,
    /// That of xenconsoled.
    pub console_domid: DomId,
}

/// One of the two rings: what its backend has to be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ring {
    /// The ring's frame.
    pub gfn: u64,
    /// The guest's event channel.
    pub port: u32,
    /// The domain to which both are open.
    pub remote: DomId,
}

/// A domain. Dropping it destroys it.
pub struct Shell {
    xen: Arc<dyn Hypercalls>,
    domid: DomId,
    uuid: Uuid,
    vcpus: u32,
    layout: Layout,
    store: Ring,
    console: Ring,
    fresh_is_zero: bool,
    /// What of it is mapped into this process, to be unmapped when there is time.
    mapped: Mutex<Vec<Box<dyn Mapping>>>,
    ended: bool,
    created: Instant,
}

impl Shell {
    /// Makes it. Errors: too little memory, or Xen's; after any, there is no domain.
    pub fn create(xen: &Arc<dyn Hypercalls>, plan: &ShellPlan, remotes: Ports) -> Result<Shell, LifeError> {
        let named = [plan.rings.store, plan.rings.console];
        let named: Vec<u64> = named.into_iter().chain(plan.further.iter().copied()).collect();
        let special = plan::special_frames(&plan.layout, &named);
        let max = plan::max_memory(&plan.layout, plan.memory, special.len());
        check_room(xen.as_ref(), plan::needed(max, plan.vcpus))?;

        let new = NewDomain { uuid: plan.uuid, vcpus: plan.vcpus };
        let domid = xen.create(&new).map_err(LifeError::call("create the domain"))?;
        let ring = |gfn, remote| Ring { gfn, port: 0, remote };
        let mut shell = Shell {
            xen: xen.clone(),
            domid,
            uuid: plan.uuid,
            vcpus: plan.vcpus,
            layout: plan.layout.clone(),
            store: ring(plan.rings.store, remotes.store_domid),
            console: ring(plan.rings.console, remotes.console_domid),
            fresh_is_zero: false,
            mapped: Mutex::new(Vec::new()),
            ended: false,
            created: Instant::now(),
        };
        shell.set_up(plan, max)?;
        shell.created = Instant::now();
        shell.populate(&special)?;
        Ok(shell)
    }

    fn set_up(&mut self, plan: &ShellPlan, max: ByteCount) -> Result<(), LifeError> {
        let (xen, domid) = (&self.xen, self.domid);
        let call = LifeError::call;
        xen.set_max_vcpus(domid, plan.vcpus).map_err(call("make its vCPUs"))?;
        xen.set_max_memory(domid, max).map_err(call("limit its memory"))?;
        let port = |remote| xen.alloc_port(domid, remote).map_err(call("open its event channels"));
        self.store.port = port(self.store.remote)?;
        self.console.port = port(self.console.remote)?;
        xen.set_hvm_param(domid, param::TIMER_MODE, TIMER_MODE).map_err(call("set its timer mode"))?;
        match xen.set_paging_pool(domid, plan::paging_pool(max, plan.vcpus)) {
            // A Xen that has no such limit.
            Err(CallError::Refused { errno: Errno::ENOSYS | Errno::EOPNOTSUPP, .. }) => {}
            other => other.map_err(call("give Xen pages for its tables"))?,
        }
        if let Some(policy) = &plan.policy {
            xen.set_cpu_policy(domid, policy).map_err(call("set its CPU policy"))?;
        }
        if let Some(tsc) = &plan.tsc {
            xen.set_tsc(domid, tsc).map_err(call("set its time-stamp counters"))?;
        }
        Ok(())
    }

    /// Populates its RAM and the special pages, which it clears.
    fn populate(&mut self, special: &[u64]) -> Result<(), LifeError> {
        for extents in plan::populate(self.layout.runs()) {
            self.populate_extents(&extents)?;
        }
        if special.is_empty() {
            return Ok(());
        }
        self.populate_extents(&plan::Extents { order: 0, first: special.to_vec() })?;
        let pages = self.xen.map(self.domid, special).map_err(LifeError::call("map its special pages"))?;
        let mut bytes = vec![0; pages.len()];
        pages.copy_to(0, &mut bytes);
        // Debug builds of Xen scrub to something else than zero.
        self.fresh_is_zero = plan::scrubs_all(&self.xen.version().command_line) && is_zero(&bytes);
        bytes.fill(0);
        pages.copy_from(0, &bytes);
        Ok(())
    }

    fn populate_extents(&self, extents: &plan::Extents) -> Result<(), LifeError> {
        let (order, first) = (extents.order, &extents.first);
        let failed = |source| LifeError::Populate {
            domid: self.domid,
            first: first.first().copied().unwrap_or_default(),
            frames: (first.len() as u64) << order,
            source,
        };
        match self.xen.populate(self.domid, first, order) {
            Err(CallError::Short { done, .. }) if order > 0 => {
                let left = plan::in_single_frames(extents, done);
                left.iter().try_for_each(|extents| self.populate_extents(extents))
            }
            other => other.map_err(failed),
        }
    }

    /// Opens its rings to their backends: the first entries of its grant table. Before xenstored is told of it.
    pub fn grant_rings(&self) -> Result<(), LifeError> {
        let entries = [
            (GRANT_CONSOLE, self.console.remote, self.console.gfn),
            (GRANT_STORE, self.store.remote, self.store.gfn),
        ];
        self.xen.seed_grants(self.domid, &entries).map_err(LifeError::call("grant its rings"))
    }

    /// Keeps frames mapped until [`Shell::unmap`].
    pub(super) fn keep_mapped(&self, frames: Box<dyn Mapping>) {
        self.mapped.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(frames);
    }

    /// Unmaps what [`fill`](super::fill()) mapped. After unpausing it, so that the guest does not wait for it.
    pub fn unmap(&self) {
        self.mapped.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clear();
    }

    /// The Xen it is a domain of.
    pub fn xen(&self) -> &Arc<dyn Hypercalls> {
        &self.xen
    }

    /// Its number.
    pub fn domid(&self) -> DomId {
        self.domid
    }

    /// Its handle.
    pub fn uuid(&self) -> Uuid {
        self.uuid
    }

    /// How many vCPUs it has.
    pub fn vcpus(&self) -> u32 {
        self.vcpus
    }

    /// Its RAM.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Its ring to xenstored.
    pub fn store(&self) -> Ring {
        self.store
    }

    /// Its ring to xenconsoled.
    pub fn console(&self) -> Ring {
        self.console
    }

    /// Whether frames nobody has written to are known to read as zero; see [`plan::scrubs_all`].
    pub fn fresh_is_zero(&self) -> bool {
        self.fresh_is_zero
    }

    /// When it was there with its vCPUs and limits, before its frames.
    pub fn created_at(&self) -> Instant {
        self.created
    }

    /// Destroys it; returns when it is gone, or only mappings of others keep it.
    pub fn destroy(mut self) -> Result<(), LifeError> {
        self.end().map_err(LifeError::call("destroy it"))
    }

    /// Destroys it, once. Somebody else may have done so before, and another domain may have its number since: it has the
    /// number that it was made with, but not the handle.
    fn end(&mut self) -> Result<(), CallError> {
        if std::mem::replace(&mut self.ended, true) {
            return Ok(());
        }
        self.unmap();
        if let Ok(None) = self.xen.info(self.domid).map(|info| info.filter(|info| info.uuid == self.uuid)) {
            return Ok(());
        }
        match self.xen.destroy(self.domid) {
            Err(CallError::Refused { errno: Errno::ESRCH, .. }) => Ok(()),
            other => other,
        }
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            tracing::error!(domid = self.domid.0, %error, "a domain is left behind");
        }
    }
}

/// Whether Xen has so much free. What is being scrubbed counts: Xen scrubs it when it is asked for it.
fn check_room(xen: &dyn Hypercalls, needed: ByteCount) -> Result<(), LifeError> {
    let free = xen.physinfo().map_err(LifeError::call("look for free memory"))?.free;
    if free < needed {
        return Err(LifeError::TooLittleMemory { needed, free });
    }
    Ok(())
}

/// All frames of some runs, in order.
pub(super) fn frames_of(runs: &[PageRange]) -> Vec<u64> {
    runs.iter().flat_map(|run| run.pages()).map(|page| page.0).collect()
}
