//! Each function of [`Hypercalls`] as the simulated machine does it.

use engine::units::{ByteCount, PageCount};
use nix::errno::Errno;

use super::domain::Domain;
use super::mapping::SimulatedMapping;
use super::{Fault, Machine};
use crate::device_state::TscInfo;
use crate::hypercalls::{
    CallError, CpuPolicy, DomId, DomainInfo, FrameKind, Hypercalls, Mapping, NewDomain, PhysInfo, Result,
    XenVersion,
};

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
