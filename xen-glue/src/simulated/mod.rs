//! A small Xen in memory: domains with frames, parameters, CPU state, ports and grants, by Xen's own rules.
//!
//! It is deterministic, and goes wrong where it is told to: at the n-th call, counted from 1, in one of the ways of [`Fault`].
//! [`Machine::left`] tells what is there that was made: after a clean end, nothing.

mod domain;
mod mapping;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use engine::units::{ByteCount, PageCount, PAGE_BYTES};
use nix::errno::Errno;

use self::domain::Domain;
use self::mapping::SimulatedMapping;
use crate::device_state::TscInfo;
use crate::hypercalls::{
    CallError, CpuPolicy, DomId, DomainInfo, FrameKind, Hypercalls, Mapping, NewDomain, PhysInfo, Result,
    XenVersion,
};

/// How a call goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing is done, and this is answered.
    Refuse(Errno),
    /// Half of it is done, if it is a call that can be done in part; else it is refused with ENOMEM.
    Short,
    /// The domain it is about is gone before it is done.
    Vanish,
}

/// What is there that somebody made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Left {
    /// Domains, those included that only mappings keep.
    pub domains: Vec<DomId>,
    /// Mappings of their frames.
    pub mappings: usize,
    /// Their pages.
    pub pages: u64,
}

/// A simulated Xen.
pub struct Machine {
    version: XenVersion,
    state: Arc<Mutex<State>>,
}

struct State {
    domains: BTreeMap<u16, Domain>,
    /// Destroyed, and kept by mappings.
    dying: BTreeMap<u16, Domain>,
    mappings: BTreeMap<u16, usize>,
    next: u16,
    total_pages: u64,
    free_pages: u64,
    fresh_byte: u8,
    max_policy: CpuPolicy,
    calls: Vec<&'static str>,
    faults: BTreeMap<usize, Fault>,
}

impl Machine {
    /// One with so much memory, which answers fresh frames full of zeros.
    pub fn new(memory: ByteCount) -> Machine {
        let version = XenVersion {
            major: 4,
            minor: 17,
            extra: ".0-simulated".to_owned(),
            domctl: 0x15,
            capabilities: "hvm-3.0-x86_64".to_owned(),
            command_line: String::new(),
        };
        let pages = memory.pages_covering().0;
        let state = State {
            domains: BTreeMap::new(),
            dying: BTreeMap::new(),
            mappings: BTreeMap::new(),
            next: 1,
            total_pages: pages,
            free_pages: pages,
            fresh_byte: 0,
            max_policy: CpuPolicy { leaves: vec![7; 3 * 24], msrs: vec![1; 16] },
            calls: Vec::new(),
            faults: BTreeMap::new(),
        };
        Machine { version, state: Arc::new(Mutex::new(state)) }
    }

    /// As a debug build of Xen, which leaves this in freed memory: 0xc2.
    pub fn with_fresh_byte(self, byte: u8) -> Machine {
        self.state().fresh_byte = byte;
        self
    }

    /// Booted with this command line.
    pub fn with_command_line(mut self, line: &str) -> Machine {
        self.version.command_line = line.to_owned();
        self
    }

    /// The call of this number, counted from 1 over the machine's life, goes wrong.
    pub fn fail(&self, call: usize, fault: Fault) {
        self.state().faults.insert(call, fault);
    }

    /// The calls made so far, as Xen's headers name them.
    pub fn calls(&self) -> Vec<&'static str> {
        self.state().calls.clone()
    }

    /// What is there.
    pub fn left(&self) -> Left {
        let state = self.state();
        Left {
            domains: state.domains.keys().chain(state.dying.keys()).map(|domid| DomId(*domid)).collect(),
            mappings: state.mappings.values().sum(),
            pages: state.total_pages - state.free_pages,
        }
    }

    /// The guest suspends itself, as asked.
    pub fn suspend(&self, domid: DomId) {
        if let Some(domain) = self.state().domains.get_mut(&domid.0) {
            domain.suspended = true;
        }
    }

    /// The bytes of a frame; `None` where there is no such frame.
    pub fn frame(&self, domid: DomId, gfn: u64) -> Option<[u8; PAGE_BYTES]> {
        let state = self.state();
        let frame = state.domains.get(&domid.0)?.frames.get(&gfn)?;
        Some(frame.as_deref().copied().unwrap_or([state.fresh_byte; PAGE_BYTES]))
    }

    /// The guest hands a frame back.
    pub fn balloon_out(&self, domid: DomId, gfn: u64) {
        let mut state = self.state();
        if state.domains.get_mut(&domid.0).is_some_and(|domain| domain.frames.remove(&gfn).is_some()) {
            state.free_pages += 1;
        }
    }

    /// The parameters that were set.
    pub fn params(&self, domid: DomId) -> BTreeMap<u64, u64> {
        self.state().domains.get(&domid.0).map(|domain| domain.params.clone()).unwrap_or_default()
    }

    /// The entries of its grant table: number, to whom, frame.
    pub fn grants(&self, domid: DomId) -> Vec<(u32, DomId, u64)> {
        let state = self.state();
        let grants = state.domains.get(&domid.0).map(|domain| &domain.grants);
        grants.into_iter().flatten().map(|(index, (to, gfn))| (*index, *to, *gfn)).collect()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// One call about no domain.
    fn call<T>(
        &self,
        call: &'static str,
        work: impl FnOnce(&mut State) -> std::result::Result<T, Errno>,
    ) -> Result<T> {
        let mut state = self.state();
        let errno = |errno| CallError::Refused { call, domid: None, errno };
        match state.count(call) {
            Some(Fault::Refuse(refused)) => Err(errno(refused)),
            Some(Fault::Short | Fault::Vanish) => Err(errno(Errno::ENOMEM)),
            None => work(&mut state).map_err(errno),
        }
    }

    /// One call about a domain: `work` gets it, what is free, and the fault if it is one that `work` has to play.
    fn about<T>(
        &self,
        call: &'static str,
        domid: DomId,
        work: impl FnOnce(&mut Domain, &mut u64) -> std::result::Result<T, Errno>,
    ) -> Result<T> {
        let mut state = self.state();
        let errno = |errno| CallError::Refused { call, domid: Some(domid), errno };
        match state.count(call) {
            Some(Fault::Refuse(refused)) => return Err(errno(refused)),
            Some(Fault::Short) => return Err(errno(Errno::ENOMEM)),
            Some(Fault::Vanish) => state.destroy(domid.0),
            None => {}
        }
        let state = &mut *state;
        let domain = state.domains.get_mut(&domid.0).ok_or(errno(Errno::ESRCH))?;
        work(domain, &mut state.free_pages).map_err(errno)
    }
}

impl State {
    fn count(&mut self, call: &'static str) -> Option<Fault> {
        self.calls.push(call);
        self.faults.remove(&self.calls.len())
    }

    fn destroy(&mut self, domid: u16) {
        if let Some(domain) = self.domains.remove(&domid) {
            if self.mappings.get(&domid).is_some_and(|count| *count > 0) {
                self.dying.insert(domid, domain);
            } else {
                self.free_pages += domain.frames.len() as u64;
            }
        }
    }

    fn unmap(&mut self, domid: u16) {
        let count = self.mappings.entry(domid).or_default();
        *count -= 1;
        if *count == 0 {
            self.mappings.remove(&domid);
            if let Some(domain) = self.dying.remove(&domid) {
                self.free_pages += domain.frames.len() as u64;
            }
        }
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Hypercalls for Machine {
    fn version(&self) -> &XenVersion {
        &self.version
    }

    fn physinfo(&self) -> Result<PhysInfo> {
        self.call("XEN_SYSCTL_physinfo", |state| {
            Ok(PhysInfo {
                free: PageCount(state.free_pages).bytes(),
                total: PageCount(state.total_pages).bytes(),
                scrubbing: ByteCount::ZERO,
                hvm: true,
                hap: true,
            })
        })
    }

    fn max_policy(&self) -> Result<CpuPolicy> {
        self.call("XEN_SYSCTL_get_cpu_policy", |state| Ok(state.max_policy.clone()))
    }

    fn create(&self, new: &NewDomain) -> Result<DomId> {
        self.call("XEN_DOMCTL_createdomain", |state| {
            if !(1..=128).contains(&new.vcpus) {
                return Err(Errno::EINVAL);
            }
            let domid = state.next;
            state.next += 1;
            state.domains.insert(domid, Domain::new(new.uuid, new.vcpus, state.max_policy.clone()));
            Ok(DomId(domid))
        })
    }

    fn destroy(&self, domid: DomId) -> Result<()> {
        self.about("XEN_DOMCTL_destroydomain", domid, |_, _| Ok(()))?;
        self.state().destroy(domid.0);
        Ok(())
    }

    fn pause(&self, domid: DomId) -> Result<()> {
        self.about("XEN_DOMCTL_pausedomain", domid, |domain, _| {
            domain.pauses += 1;
            Ok(())
        })
    }

    fn unpause(&self, domid: DomId) -> Result<()> {
        self.about("XEN_DOMCTL_unpausedomain", domid, |domain, _| {
            domain.pauses = domain.pauses.checked_sub(1).ok_or(Errno::EINVAL)?;
            domain.ever_ran = true;
            Ok(())
        })
    }

    fn resume_cancelled(&self, domid: DomId) -> Result<()> {
        self.about("XEN_DOMCTL_resumedomain", domid, |domain, _| {
            domain.suspended = false;
            Ok(())
        })
    }

    fn info(&self, domid: DomId) -> Result<Option<DomainInfo>> {
        let info = self.about("XEN_DOMCTL_getdomaininfo", domid, |domain, _| Ok(info(domid.0, domain)));
        match info {
            Err(CallError::Refused { errno: Errno::ESRCH, .. }) => Ok(None),
            other => other.map(Some),
        }
    }

    fn list(&self) -> Result<Vec<DomainInfo>> {
        self.call("XEN_SYSCTL_getdomaininfolist", |state| {
            Ok(state.domains.iter().map(|(domid, domain)| info(*domid, domain)).collect())
        })
    }

    fn set_max_vcpus(&self, domid: DomId, vcpus: u32) -> Result<()> {
        self.about("XEN_DOMCTL_max_vcpus", domid, |domain, _| {
            if vcpus != domain.vcpus_max {
                return Err(Errno::EINVAL);
            }
            domain.vcpus = vcpus;
            domain.context = vec![0; domain.context_bytes()];
            Ok(())
        })
    }

    fn set_max_memory(&self, domid: DomId, max: ByteCount) -> Result<()> {
        self.about("XEN_DOMCTL_max_mem", domid, |domain, _| {
            domain.pages_max = max.pages_covering().0;
            Ok(())
        })
    }

    fn set_paging_pool(&self, domid: DomId, size: ByteCount) -> Result<()> {
        self.about("XEN_DOMCTL_set_paging_mempool_size", domid, |_, _| match size.whole_pages() {
            Some(_) => Ok(()),
            None => Err(Errno::EINVAL),
        })
    }

    fn set_memory_map(&self, domid: DomId, map: &[(u64, u64, u32)]) -> Result<()> {
        self.about("XENMEM_set_memory_map", domid, |domain, _| {
            domain.memory_map = map.to_vec();
            Ok(())
        })
    }

    fn populate(&self, domid: DomId, first: &[u64], order: u32) -> Result<()> {
        let call = "XENMEM_populate_physmap";
        // A fault that does half of it is played here: all else goes the usual way.
        let wanted = first.len();
        let short = {
            let mut state = self.state();
            let at = state.calls.len() + 1;
            let short = state.faults.get(&at) == Some(&Fault::Short);
            if short {
                state.faults.remove(&at);
            }
            short
        };
        let first = if short { &first[..wanted / 2] } else { first };
        let done = self.about(call, domid, |domain, free| {
            Ok(first.iter().take_while(|gfn| domain.populate(**gfn, 1 << order, free)).count())
        })?;
        match done == wanted {
            true => Ok(()),
            false => {
                Err(CallError::Short { call, domid: Some(domid), done: done as u64, wanted: wanted as u64 })
            }
        }
    }

    fn max_gfn(&self, domid: DomId) -> Result<u64> {
        self.about("XENMEM_maximum_gpfn", domid, |domain, _| {
            Ok(domain.frames.last_key_value().map_or(0, |(gfn, _)| *gfn))
        })
    }

    fn frame_kinds(&self, domid: DomId, gfns: &[u64]) -> Result<Vec<FrameKind>> {
        self.about("XEN_DOMCTL_getpageframeinfo3", domid, |domain, _| {
            if gfns.len() > 1024 {
                return Err(Errno::E2BIG);
            }
            let kind = |gfn| if domain.frames.contains_key(gfn) { FrameKind::Ram } else { FrameKind::None };
            Ok(gfns.iter().map(kind).collect())
        })
    }

    fn map(&self, domid: DomId, gfns: &[u64]) -> Result<Box<dyn Mapping>> {
        let missing = self.about("IOCTL_PRIVCMD_MMAPBATCH_V2", domid, |domain, _| {
            Ok(gfns.iter().find(|gfn| !domain.frames.contains_key(gfn)).copied())
        })?;
        if let Some(gfn) = missing {
            return Err(CallError::Frame { domid, gfn, errno: Errno::EINVAL });
        }
        *self.state().mappings.entry(domid.0).or_default() += 1;
        Ok(Box::new(SimulatedMapping::new(self.state.clone(), domid.0, gfns.to_vec())))
    }

    fn hvm_context(&self, domid: DomId) -> Result<Vec<u8>> {
        self.about("XEN_DOMCTL_gethvmcontext", domid, |domain, _| Ok(domain.context.clone()))
    }

    fn set_hvm_context(&self, domid: DomId, context: &[u8]) -> Result<()> {
        self.about("XEN_DOMCTL_sethvmcontext", domid, |domain, _| domain.set_context(context))
    }

    fn hvm_param(&self, domid: DomId, index: u64) -> Result<u64> {
        self.about("HVMOP_get_param", domid, |domain, _| {
            Ok(domain.params.get(&index).copied().unwrap_or_default())
        })
    }

    fn set_hvm_param(&self, domid: DomId, index: u64, value: u64) -> Result<()> {
        self.about("HVMOP_set_param", domid, |domain, _| domain.set_param(index, value))
    }

    fn cpu_policy(&self, domid: DomId) -> Result<CpuPolicy> {
        self.about("XEN_DOMCTL_get_cpu_policy", domid, |domain, _| Ok(domain.policy.clone()))
    }

    fn set_cpu_policy(&self, domid: DomId, policy: &CpuPolicy) -> Result<()> {
        let most = self.state().max_policy.leaves.len();
        self.about("XEN_DOMCTL_set_cpu_policy", domid, |domain, _| domain.set_policy(policy))?;
        if policy.leaves.len() > most {
            let leaf = Some(((most / 24) as u32, None));
            return Err(CallError::Policy { domid, leaf, msr: None, errno: Errno::EINVAL });
        }
        Ok(())
    }

    fn tsc(&self, domid: DomId) -> Result<TscInfo> {
        self.about("XEN_DOMCTL_gettscinfo", domid, |domain, _| Ok(domain.tsc))
    }

    fn set_tsc(&self, domid: DomId, tsc: &TscInfo) -> Result<()> {
        self.about("XEN_DOMCTL_settscinfo", domid, |domain, _| {
            domain.tsc = *tsc;
            Ok(())
        })
    }

    fn alloc_port(&self, domid: DomId, remote: DomId) -> Result<u32> {
        self.about("EVTCHNOP_alloc_unbound", domid, |domain, _| {
            domain.ports.push(remote);
            Ok(domain.ports.len() as u32)
        })
    }

    fn seed_grants(&self, domid: DomId, entries: &[(u32, DomId, u64)]) -> Result<()> {
        self.about("XENMEM_acquire_resource", domid, |domain, _| {
            domain.grants.extend(entries.iter().map(|(index, to, gfn)| (*index, (*to, *gfn))));
            Ok(())
        })
    }
}

fn info(domid: u16, domain: &Domain) -> DomainInfo {
    DomainInfo {
        domid: DomId(domid),
        uuid: domain.uuid,
        flags: domain.flags(),
        pages: PageCount(domain.frames.len() as u64),
        pages_max: PageCount(domain.pages_max),
    }
}
