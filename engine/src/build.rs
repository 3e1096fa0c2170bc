//! From a DVM template to a savefile: boot it once, bring its guest to rest, take everything at one instant, store it.
//!
//! [`build`] reads as the list of its steps. What a step made is undone when a later one fails: the domain is
//! destroyed when dropped, and the savefile appears under its name only once it is whole and on the disk. The old
//! generation is not touched.

use std::path::Path;
use std::time::Duration;

use crate::agent::{Agent, AgentError};
use crate::host::{AgentPipe, BootPurpose, Capture, Confinement, Domain, GuestSpec, Host, HostError};
use crate::launch::{more_of, LaunchError};
use crate::rehearse::rehearse;
use crate::savefile::{self, DeviceState, ImageId, ImageInput, Manifest, Scope, Written};
use crate::timeline::Timeline;

/// How long a guest may take from power-on to a ready agent. A Debian guest under emulation on a busy
/// two-core machine has been seen to take 60 s.
pub const BOOT_LIMIT: Duration = Duration::from_secs(180);

/// How often a boot is tried: stock kernels under emulation now and then hang while they calibrate their timers.
pub const BOOT_TRIES: u32 = 2;

/// The steps of a build, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Power-on to a ready agent.
    Boot,
    /// The template's own hook.
    Prerun,
    /// Sync, drop caches, give free memory back.
    Settle,
    /// Run once what a launch runs.
    Warm,
    /// Stop every program but the agent.
    Freeze,
    /// Memory, device state and deltas.
    Capture,
    /// Restore a clone from what was captured, as a launch does, and see what it touches.
    Rehearse,
    /// Encode and write.
    Write,
}

impl Step {
    /// The step's name, as users read it.
    pub fn name(self) -> &'static str {
        match self {
            Step::Boot => "boot",
            Step::Prerun => "prerun",
            Step::Settle => "settle",
            Step::Warm => "warm",
            Step::Freeze => "freeze",
            Step::Capture => "capture",
            Step::Rehearse => "rehearse",
            Step::Write => "write",
        }
    }
}

/// Why there is no savefile.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The host's part failed.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The guest's part failed.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// What was captured does not come to life again.
    #[error("the rehearsal of a launch from what was captured failed")]
    Rehearsal(#[source] LaunchError),
    /// Storing failed.
    #[error(transparent)]
    Savefile(#[from] savefile::Error),
}

/// What to build.
pub struct Order<'a> {
    /// The guest.
    pub spec: &'a GuestSpec,
    /// Its limits while it boots.
    pub confinement: &'a Confinement,
    /// The template's hook, an executable's bytes.
    pub prerun: Option<&'a [u8]>,
    /// Everything of the manifest that is known before the boot.
    pub manifest: Manifest,
    /// Where the savefile goes.
    pub path: &'a Path,
}

/// Who watches a build.
pub trait Watch {
    /// `step` begins.
    fn step(&mut self, step: Step);
    /// While writing: what has been encoded so far.
    fn wrote(&self, progress: savefile::Progress);
}

/// Builds a savefile. `connect` speaks the agent's language over a fresh channel.
pub fn build<A: Agent>(
    host: &dyn Host,
    order: Order<'_>,
    connect: impl Fn(Box<dyn AgentPipe>) -> A,
    watch: &mut dyn Watch,
    timeline: &mut Timeline,
) -> Result<Written, BuildError> {
    watch.step(Step::Boot);
    let (mut domain, mut agent, version) = boot(host, &order, &connect)?;
    timeline.mark(Step::Boot.name());

    watch.step(Step::Prerun);
    if let Some(program) = order.prerun {
        agent.prerun(program)?;
    }
    timeline.mark(Step::Prerun.name());

    watch.step(Step::Settle);
    let free = agent.settle()?;
    domain.reclaim_free_memory(free)?;
    timeline.mark(Step::Settle.name());

    watch.step(Step::Warm);
    agent.warm()?;
    timeline.mark(Step::Warm.name());

    watch.step(Step::Freeze);
    agent.freeze()?;
    timeline.mark(Step::Freeze.name());

    watch.step(Step::Capture);
    let capture = domain.capture()?;
    domain.destroy()?;
    timeline.mark(Step::Capture.name());

    watch.step(Step::Rehearse);
    let touched = rehearse(host, &order, &capture, &connect).map_err(BuildError::Rehearsal)?;
    timeline.mark(Step::Rehearse.name());

    watch.step(Step::Write);
    let working_set = touched.iter().map(|run| (run.first.0, run.count.0)).collect();
    let manifest = Manifest { agent_version: version, working_set, ..order.manifest };
    let written = write(order.path, &manifest, &host.facts().kind, &capture, &*watch)?;
    timeline.mark(Step::Write.name());
    Ok(written)
}

/// Boots the guest until its agent is ready, a second time if the first hangs.
fn boot<A: Agent>(
    host: &dyn Host,
    order: &Order<'_>,
    connect: impl Fn(Box<dyn AgentPipe>) -> A,
) -> Result<(Box<dyn Domain>, A, String), BuildError> {
    let mut tries = 1;
    loop {
        let mut domain = host.boot(order.spec, BootPurpose::Capture, order.confinement)?;
        let mut agent = connect(domain.agent()?);
        match agent.ready(BOOT_LIMIT) {
            Ok(facts) => return Ok((domain, agent, facts.version)),
            Err(AgentError::Silent { .. }) if tries < BOOT_TRIES => {
                tracing::warn!("the guest did not come up within {BOOT_LIMIT:?}, trying once more");
                tries += 1;
            }
            Err(error) => return Err(more_of(&mut *domain, error).into()),
        }
    }
}

fn write(
    path: &Path,
    manifest: &Manifest,
    host_kind: &str,
    capture: &Capture,
    watch: &dyn Watch,
) -> Result<Written, savefile::Error> {
    let memory = ImageInput {
        id: ImageId::Memory,
        file: &capture.memory,
        size: capture.memory_size,
        scope: Scope::Whole,
    };
    let deltas = capture.deltas.iter().map(|delta| ImageInput {
        id: ImageId::Volume(delta.volume.clone()),
        file: &delta.raw,
        size: delta.size,
        scope: Scope::Runs(delta.changed.clone()),
    });
    let images: Vec<ImageInput<'_>> = std::iter::once(memory).chain(deltas).collect();
    let state = DeviceState {
        kind: host_kind.to_owned(),
        version: capture.device_state_version,
        bytes: capture.device_state.clone(),
    };
    savefile::write(path, manifest, &state, &images, &|progress| watch.wrote(progress))
}
