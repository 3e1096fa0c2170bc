//! [`SimDomain`]: a simulated guest that lives. Dropping it ends its agent's thread, and with that frees its memory.

use std::io::Read;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use engine::host::{AgentPipe, Capture, Confinement, Domain, HostError};
use engine::units::{ByteCount, PageRange};

use crate::agent::{Agent, THREAD};
use crate::context::Context;
use crate::plan::{Fault, StepKind};
use crate::vm::Vm;

/// A guest under a [`crate::host::SimHost`].
pub struct SimDomain {
    vm: Arc<Vm>,
    ours: Option<UnixStream>,
    theirs: UnixStream,
    events: UnixStream,
    spill_dir: PathBuf,
    agent: Option<JoinHandle<()>>,
}

/// Takes the step `name`; fails in it as the plan says.
pub fn fail(context: &Context, name: &str, step: &'static str) -> Result<(), HostError> {
    let io = |errno| Err(HostError::Io { step, source: std::io::Error::from_raw_os_error(errno) });
    match context.steps.at(StepKind::Host, name) {
        None => Ok(()),
        Some(Fault::Refused) => Err(HostError::Refused { step, reason: "the plan says so".to_owned() }),
        Some(Fault::NoSpace) => io(nix::libc::ENOSPC),
        Some(Fault::Io) => io(nix::libc::EIO),
        Some(Fault::NoMemory) => io(nix::libc::ENOMEM),
        Some(Fault::Gone) => Err(HostError::Gone { step, detail: ": the plan says so".to_owned() }),
        Some(Fault::Timeout) => Err(HostError::Timeout { step, limit: Duration::from_secs(1) }),
        Some(_) => Err(HostError::Hypervisor { step, message: "the plan says so".to_owned() }),
    }
}

impl SimDomain {
    /// A guest with both ends of its agent's channel and the host's end of its event line.
    pub fn new(
        vm: Arc<Vm>,
        ours: UnixStream,
        theirs: UnixStream,
        events: UnixStream,
        confinement: &Confinement,
    ) -> SimDomain {
        let spill_dir = confinement.spill_dir.clone();
        SimDomain { vm, ours: Some(ours), theirs, events, spill_dir, agent: None }
    }

    fn fail(&self, name: &str, step: &'static str) -> Result<(), HostError> {
        fail(&self.vm.context, name, step).inspect_err(|error| {
            if let HostError::Gone { .. } = error {
                self.end();
            }
        })
    }

    fn end(&self) {
        self.vm.change(|state| state.ended = true);
        let _ = self.theirs.shutdown(Shutdown::Both);
    }
}

impl Drop for SimDomain {
    fn drop(&mut self) {
        self.end();
        if let Some(agent) = self.agent.take() {
            if agent.join().is_err() {
                self.vm.context.violation("the simulated agent panicked");
            }
        }
    }
}

impl Domain for SimDomain {
    fn agent(&mut self) -> Result<Box<dyn AgentPipe>, HostError> {
        let step = "connect to the agent";
        self.fail("domain.agent", step)?;
        let Some(ours) = self.ours.take() else {
            self.vm.context.violation("the agent's channel was asked for twice");
            return Err(HostError::Refused { step, reason: "its channel has been taken already".to_owned() });
        };
        ours.set_nonblocking(true).map_err(HostError::io(step))?;
        let theirs = self.theirs.try_clone().map_err(HostError::io(step))?;
        let agent = Agent::new(self.vm.clone(), theirs);
        let spawned = Builder::new().name(THREAD.to_owned()).spawn(move || agent.run());
        self.agent = Some(spawned.map_err(HostError::io(step))?);
        Ok(Box::new(ours))
    }

    fn run(&mut self) -> Result<(), HostError> {
        self.fail("domain.run", "run the guest")?;
        self.vm.change(|state| state.running = true);
        Ok(())
    }

    fn pause(&mut self) -> Result<(), HostError> {
        self.fail("domain.pause", "pause the guest")?;
        self.vm.change(|state| state.running = false);
        Ok(())
    }

    fn reclaim_free_memory(&mut self, free: ByteCount) -> Result<(), HostError> {
        let step = "take back free memory";
        self.fail("domain.reclaim_free_memory", step)?;
        self.vm.change(|state| {
            if free != state.guest.free_bytes() {
                self.vm.context.violation("the host was told of other free memory than the guest has");
            }
            state.guest.reclaim().map_err(HostError::io(step))
        })
    }

    fn capture(&mut self) -> Result<Capture, HostError> {
        let step = "capture the guest";
        self.fail("domain.capture", step)?;
        let capture = self.vm.change(|state| {
            if !state.guest.frozen || !state.guest.warmed || state.guest.identity.is_some() {
                self.vm.context.violation("captured: a guest that is not warm, frozen and nobody");
            }
            state.guest.capture(&self.vm.context.memfd_name())
        });
        self.end();
        capture
    }

    fn touched(&mut self) -> Result<Vec<PageRange>, HostError> {
        self.fail("domain.touched", "ask which pages were touched")?;
        Ok(self.vm.change(|state| state.guest.touched()))
    }

    fn steps(&mut self) -> Vec<(&'static str, Instant)> {
        Vec::new()
    }

    fn events(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }

    fn serve(&mut self) -> Result<(), HostError> {
        let step = "serve the guest";
        let mut bytes = [0; 64];
        if !(&self.events).read(&mut bytes).is_ok_and(|count| count > 0) {
            return Ok(());
        }
        self.fail("domain.serve", step)?;
        if self.vm.stopped().off {
            self.end();
            return Err(HostError::PoweredOff { step });
        }
        self.vm.change(|state| state.guest.spill(&self.spill_dir)).map_err(HostError::io(step))
    }

    fn destroy(self: Box<Self>) -> Result<(), HostError> {
        self.fail("domain.destroy", "end the guest")
    }
}
