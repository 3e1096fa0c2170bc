//! From a hot image (or, for want of one, a cold boot) to a clone that is somebody.
//!
//! [`restore`] and [`cold`] read as the list of their steps and end alike: a running domain whose agent has applied
//! a fresh identity. If a step fails, dropping what the earlier ones made is the undo.

use std::time::{Duration, Instant};

use crate::agent::{Agent, AgentError};
use crate::build::BOOT_LIMIT;
use crate::host::{AgentPipe, BootPurpose, Confinement, Domain, GuestSpec, Host, HostError};
use crate::identity::Identity;
use crate::image::hot::HotFiles;
use crate::image::working_set;
use crate::timeline::Timeline;

/// How long the host may take to load a hot image; two orders of magnitude above the usual.
pub const RESTORE_LIMIT: Duration = Duration::from_secs(30);

/// How long a guest whose channel has gone may take to end.
const END_LIMIT: Duration = Duration::from_secs(1);

/// Why there is no clone.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The host's part failed.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The guest's part failed.
    #[error(transparent)]
    Agent(#[from] AgentError),
}

/// A clone that runs under its own identity. Dropping it destroys it; see [`crate::close`] for the orderly end.
pub struct Clone<A> {
    /// Its domain.
    pub domain: Box<dyn Domain>,
    /// Its agent.
    pub agent: A,
}

/// Restores a clone from `image` and gives it `identity`. What of the image a launch reads first is read from the disk
/// meanwhile, if it has to be.
pub fn restore<A: Agent>(
    host: &dyn Host,
    spec: &GuestSpec,
    image: HotFiles,
    confinement: &Confinement,
    identity: &Identity,
    connect: impl FnOnce(Box<dyn AgentPipe>) -> A,
    timeline: &mut Timeline,
) -> Result<Clone<A>, LaunchError> {
    let _reading = working_set::read_ahead(&image);
    let mut domain = host.restore(spec, image, confinement)?;
    timeline.mark("spawned");
    let mut agent = connect(domain.agent()?);
    domain.run()?;
    timeline.mark("restored");
    become_somebody(&mut agent, identity, timeline)?;
    timeline.weave(domain.steps());
    Ok(Clone { domain, agent })
}

/// Boots a clone from its kernel and gives it `identity`.
pub fn cold<A: Agent>(
    host: &dyn Host,
    spec: &GuestSpec,
    confinement: &Confinement,
    identity: &Identity,
    connect: impl FnOnce(Box<dyn AgentPipe>) -> A,
    timeline: &mut Timeline,
) -> Result<Clone<A>, LaunchError> {
    let mut domain = host.boot(spec, BootPurpose::Clone, confinement)?;
    timeline.mark("spawned");
    let mut agent = connect(domain.agent()?);
    agent.ready(BOOT_LIMIT).map_err(|error| more_of(&mut *domain, error))?;
    timeline.mark("booted");
    become_somebody(&mut agent, identity, timeline).map_err(|error| more_of(&mut *domain, error))?;
    timeline.weave(domain.steps());
    Ok(Clone { domain, agent })
}

/// Why an agent's channel broke, with what the host knows of it where the guest has ended; of an end that is under way the channel is told first.
pub(crate) fn more_of(domain: &mut dyn Domain, error: AgentError) -> AgentError {
    let AgentError::Broken { step, reason } = error else { return error };
    let deadline = Instant::now() + END_LIMIT;
    let more = loop {
        match domain.serve() {
            Ok(()) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
            Err(HostError::Gone { detail, .. }) => break detail,
            Err(HostError::PoweredOff { .. }) => break ": it has switched itself off".to_owned(),
            _ => break String::new(),
        }
    };
    AgentError::Broken { step, reason: format!("{reason}{more}") }
}

/// Gives a clone its identity, and lets it go on.
pub fn become_somebody(
    agent: &mut impl Agent,
    identity: &Identity,
    timeline: &mut Timeline,
) -> Result<(), AgentError> {
    agent.identify(identity)?;
    timeline.mark("identity");
    agent.thaw()
}
