//! The daemon and the runners it starts, on the simulated machine: the product's own, but for the guests.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use control_plane::admin;
use control_plane::daemon::server;
use control_plane::error::{Error, Kind, Result};
use control_plane::run::runner;
use control_plane::state::State;
use nix::sys::signal::{SigSet, Signal};

use crate::context::Context;
use crate::machine::SimMachine;
use crate::operate::{notes, own_error, state_root};
use crate::plan::Plan;
use crate::steps::Steps;

/// What follows from a seed is the same in all of them: nothing goes wrong here but by kills.
const SEED: u64 = 1;

/// Serves until SIGTERM, without spares.
pub fn daemon(world: &Path, api_socket: &Path) -> Result<()> {
    let state = State::open(&state_root(world))?;
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        signals.add(signal);
    }
    signals.thread_block().map_err(Error::failed("block signals"))?;
    let _api = admin::server::serve(&state, api_socket)?;
    let options = server::Options { spares: 0, age_max: Duration::from_secs(3600) };
    server::run(&state, &machine(world)?, options)
}

/// Runs a qube to its end.
pub fn runner(root: Option<&Path>, name: &str) -> Result<()> {
    let world = root.and_then(Path::parent);
    let world = world.ok_or_else(|| Error::new(Kind::Usage, "a runner needs --root, in a world"))?;
    runner::run(&State::open(&state_root(world))?, &machine(world)?, name, false)
}

fn machine(world: &Path) -> Result<SimMachine> {
    let steps = Steps::new(Plan::Nothing, None).map_err(own_error("count steps"))?;
    let context =
        Context::new(&notes(world), SEED, steps).map_err(own_error("open the simulation's notes"))?;
    Ok(SimMachine::new(Arc::new(context)))
}
