//! A small Xen in memory: domains with frames, parameters, CPU state, ports and grants, by Xen's own rules.
//!
//! It is deterministic, and goes wrong where it is told to: at the n-th call, counted from 1, in one of the ways of [`Fault`].
//! [`Machine::left`] tells what is there that was made: after a clean end, nothing.

mod calls;
mod domain;
mod mapping;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use engine::units::{ByteCount, PAGE_BYTES};
use nix::errno::Errno;

use self::domain::Domain;
use crate::hypercalls::{CallError, CpuPolicy, DomId, Result, XenVersion};

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
