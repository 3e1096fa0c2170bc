//! Qubes' Admin API: what Qubes knows of a qube, and qubesd's socket on which its tools read and change it.
//!
//! Who does what:
//! - **records**: `settings` (what is set by hand, one file a qube and one for the system) beside the qubes' own ([`crate::qube`]);
//! - **reading**: `world` (the qubes of one moment), `properties` (what each class has, and what holds where nothing is set),
//!   `features`, `firewall`, `volumes`;
//! - **changing**: `change` (properties), `features`, `volume_change`, `create`, `lives` (remove, start, end);
//! - **serving**: `api` (method by method), `events`, `lobby` (room for callers), [`server`] (the socket).
//!
//! Invariants:
//! - The disk is the truth: each request reads the records it needs, and nothing is remembered between two
//!   requests, but for half a second which clones are spares, and which volumes somebody is about to clone.
//! - Only what was set by hand is written; defaults are computed when asked for, so that they follow what they inherit from.
//! - What makes a savefile stale (memory, vCPUs, template, label, `template_for_dispvms`, spares) is in `qube.toml`, where the
//!   engine reads it; a property of that kind is written through.
//! - Changes are made one at a time, under one lock, checks included. One that cannot be written leaves everything as it was.
//! - Names and limits are checked before anything is looked up by them; a request allocates no more than its own size and that
//!   of the records it touches.

mod answer;
mod api;
mod change;
mod create;
mod events;
mod features;
mod firewall;
mod lives;
mod lobby;
mod pools;
pub mod properties;
pub mod server;
pub mod settings;
mod system_info;
mod volume_change;
mod volumes;
mod world;

use std::io::BufRead;

use admin_api::Reply;

use crate::error::{Error, Kind, Result};
use crate::state::State;

pub use system_info::system_info;

/// The services `admin.vm.volume.Import` and `ImportWithSize`: fills a volume of a qube with what is read, and answers `caller` as the API
/// does. `None`: it says nothing, as the API hangs up.
pub fn import_volume(
    state: &State,
    caller: &str,
    name: &str,
    volume: &str,
    data: &mut impl BufRead,
    with_size: bool,
) -> Option<Reply> {
    let context = world::Context::new(state.clone());
    match volume_change::import(&context, name, volume, data, with_size) {
        Ok(()) => Some(Reply::Ok(Vec::new())),
        Err(answer::Refusal::Exception(exception)) => {
            Some(Reply::Exception(answer::told(exception, caller, state)))
        }
        Err(answer::Refusal::Silent(why)) => {
            tracing::warn!("{why}");
            None
        }
    }
}

/// Starts a qube as `admin.vm.Start` does, its netvm first, unless it runs. Who listens to events hears of it when the daemon sees them run.
pub fn start(state: &State, name: &str) -> Result<()> {
    match lives::start(&world::Context::new(state.clone()), name) {
        Err(answer::Refusal::Exception(exception)) if exception.kind == admin_api::Kind::VmNotHalted => {
            Ok(())
        }
        started => started.map_err(|refusal| Error::new(Kind::Failed, refusal.to_string())),
    }
}
