//! A simulated domain: what Xen keeps of it, and the rules by which it does.

use std::collections::BTreeMap;

use engine::units::PAGE_BYTES;
use nix::errno::Errno;

use crate::abi::hvm::param;
use crate::device_state::TscInfo;
use crate::hypercalls::{CpuPolicy, DomId, Uuid};

/// Flags of getdomaininfo: XEN_DOMINF_hvm_guest, shutdown, paused.
const HVM: u32 = 1 << 1;
const SHUTDOWN: u32 = 1 << 2;
const PAUSED: u32 = 1 << 3;
/// SHUTDOWN_suspend, where the flags have the reason.
const SUSPENDED: u32 = 2 << 16;

/// A domain.
#[derive(Debug)]
pub(super) struct Domain {
    pub uuid: Uuid,
    pub vcpus_max: u32,
    pub vcpus: u32,
    pub pages_max: u64,
    /// Its frames, `None` where nobody has written yet.
    pub frames: BTreeMap<u64, Option<Box<[u8; PAGE_BYTES]>>>,
    pub pauses: u32,
    pub suspended: bool,
    pub ever_ran: bool,
    pub params: BTreeMap<u64, u64>,
    pub context: Vec<u8>,
    pub policy: CpuPolicy,
    pub tsc: TscInfo,
    pub ports: Vec<DomId>,
    pub grants: BTreeMap<u32, (DomId, u64)>,
    pub memory_map: Vec<(u64, u64, u32)>,
}

impl Domain {
    pub fn new(uuid: Uuid, vcpus: u32, policy: CpuPolicy) -> Domain {
        Domain {
            uuid,
            vcpus_max: vcpus,
            vcpus: 0,
            pages_max: 0,
            frames: BTreeMap::new(),
            pauses: 1,
            suspended: false,
            ever_ran: false,
            params: BTreeMap::new(),
            context: Vec::new(),
            policy,
            tsc: TscInfo::default(),
            ports: Vec::new(),
            grants: BTreeMap::new(),
            memory_map: Vec::new(),
        }
    }

    pub fn flags(&self) -> u32 {
        let suspended = if self.suspended { SHUTDOWN | SUSPENDED } else { 0 };
        HVM | suspended | if self.pauses > 0 { PAUSED } else { 0 }
    }

    /// The size of the context follows from the vCPUs, so that one of another guest does not fit.
    pub fn context_bytes(&self) -> usize {
        64 + 256 * self.vcpus as usize
    }

    pub fn set_context(&mut self, context: &[u8]) -> Result<(), Errno> {
        if self.vcpus == 0 || self.pauses == 0 || context.len() != self.context_bytes() {
            return Err(Errno::EINVAL);
        }
        self.context = context.to_vec();
        Ok(())
    }

    pub fn set_param(&mut self, index: u64, value: u64) -> Result<(), Errno> {
        let once = matches!(index, param::IOREQ_PFN | param::BUFIOREQ_PFN);
        match self.params.get(&index) {
            _ if index > 38 => Err(Errno::EINVAL),
            Some(before) if once && *before != 0 && *before != value => Err(Errno::EEXIST),
            _ => {
                self.params.insert(index, value);
                Ok(())
            }
        }
    }

    /// A policy can be changed until the first unpause. Which one it may be the machine knows.
    pub fn set_policy(&mut self, policy: &CpuPolicy) -> Result<(), Errno> {
        if self.ever_ran {
            return Err(Errno::EEXIST);
        }
        self.policy = policy.clone();
        Ok(())
    }

    /// Adds frames as long as there is room for them; how many were added.
    pub fn populate(&mut self, first: u64, count: u64, free: &mut u64) -> bool {
        if self.frames.len() as u64 + count > self.pages_max || *free < count {
            return false;
        }
        for gfn in first..first + count {
            // Xen would put a second page in the place of the first one; who asks for that has lost count.
            if self.frames.insert(gfn, None).is_some() {
                return false;
            }
        }
        *free -= count;
        true
    }
}
