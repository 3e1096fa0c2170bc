//! A spare: a clone restored before anybody asks for one, and brought to where handing it out takes the least time.
//!
//! Under emulation most of a launch is the guest's own first execution of its code; with hardware virtualisation it is the first
//! touch of its pages. So a spare walks the way of a launch [`EXERCISES`] times: it becomes somebody, runs a small command,
//! thaws, and is frozen again. Then its CPUs are stopped. It keeps its names when it is handed out, and is given the time and fresh
//! entropy once more before anything in it runs.

use crate::agent::Agent;
use crate::host::{AgentPipe, Confinement, GuestSpec, Host};
use crate::identity::Identity;
use crate::image::hot::HotFiles;
use crate::image::working_set;
use crate::launch::{Clone, LaunchError};

/// How often a spare is exercised. Measured under emulation, exec to first byte: see benches/results/spare.jsonl.
pub const EXERCISES: u32 = 2;

/// Makes a spare from `image`. What comes back is frozen and paused.
pub fn prepare<A: Agent>(
    host: &dyn Host,
    spec: &GuestSpec,
    image: HotFiles,
    confinement: &Confinement,
    identity: &Identity,
    connect: impl FnOnce(Box<dyn AgentPipe>) -> A,
) -> Result<Clone<A>, LaunchError> {
    let _reading = working_set::read_ahead(&image);
    let mut domain = host.restore(spec, image, confinement)?;
    let mut agent = connect(domain.agent()?);
    domain.run()?;
    for _ in 0..EXERCISES {
        agent.rehearse(identity)?;
        agent.freeze()?;
    }
    domain.pause()?;
    // What happened until then is dealt with now: nobody looks before the spare is handed out.
    domain.serve()?;
    Ok(Clone { domain, agent })
}
