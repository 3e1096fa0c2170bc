//! [`SimMachine`]: where simulated guests run.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use control_plane::agent_link::Limits;
use control_plane::calls::wire::Finder;
use control_plane::error::{Error, Kind, Result};
use control_plane::machine::{Budget, Machine};
use control_plane::state::State;
use engine::host::{Confinement, GuestSpec, Host};
use engine::units::ByteCount;

use crate::context::Context;
use crate::host::SimHost;
use crate::plan::StepKind;

/// What a volume may write to memory before it spills: so little that `fill 40` makes it.
pub const VOLUME_MEMORY_MAX: ByteCount = ByteCount(16 << 12);
/// How long an agent may be silent where one is to fall silent: simulated ones answer at once.
pub const SILENCE: Duration = Duration::from_millis(200);
/// And where none is, on a machine that may be busy with other things.
const BUSY: Duration = Duration::from_secs(20);

/// A simulated machine.
pub struct SimMachine {
    context: Arc<Context>,
}

impl SimMachine {
    /// Of this simulation.
    pub fn new(context: Arc<Context>) -> SimMachine {
        SimMachine { context }
    }
}

impl Machine for SimMachine {
    fn host(&self, _state: &State, _kernel: &Path) -> Result<Box<dyn Host>> {
        match self.context.steps.at(StepKind::Machine, "machine.host") {
            None => Ok(Box::new(SimHost::new(self.context.clone()))),
            Some(_) => Err(Error::new(Kind::Failed, "the simulated hypervisor is not there")),
        }
    }

    fn sweep(&self, _state: &State, _is_kept: &dyn Fn(u32) -> bool) -> Result<()> {
        Ok(())
    }

    fn budget(&self, _state: &State, spec: &GuestSpec, confinement: &Confinement) -> Budget {
        let available = match self.context.steps.at(StepKind::Machine, "machine.budget") {
            None => 1 << 40,
            Some(_) => 1 << 20,
        };
        Budget { available: Some(available), ..Budget::of_processes(spec, confinement) }
    }

    fn volume_memory_max(&self) -> ByteCount {
        VOLUME_MEMORY_MAX
    }

    fn settings(&self) -> String {
        "simulated".to_owned()
    }

    fn agent_limits(&self) -> Limits {
        let limit = if self.context.steps.has_silence() { SILENCE } else { BUSY };
        Limits { boot: limit, prerun: limit, settle: limit, identify: limit, rehearsal: limit }
    }

    fn call_channels(&self, _state: &State, _slot: u32) -> Option<Finder> {
        None
    }
}
