//! `qvm-pause` and `qvm-unpause`.

use admin_api::ApiError;
use clap::Parser;

use crate::api::Common;
use crate::names::Qubes;
use crate::outcome::{Outcome, FAILED};

/// Pauses qubes. Paused qubes are killed when the system shuts down.
#[derive(Parser)]
#[command(version)]
pub struct Pause {
    #[command(flatten)]
    common: Common,
    /// Suspend the qubes (S3) instead
    #[arg(long, short = 'S')]
    suspend: bool,
    #[command(flatten)]
    qubes: Qubes,
}

/// Lets paused and suspended qubes go on.
#[derive(Parser)]
#[command(version)]
pub struct Unpause {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    qubes: Qubes,
}

/// Runs `qvm-pause`.
pub fn pause(options: Pause) -> Outcome {
    let api = options.common.api();
    let method = if options.suspend { "admin.vm.Suspend" } else { "admin.vm.Pause" };
    let qubes = options.qubes.select(&api)?;
    Ok(status(qubes.iter().map(|qube| api.tell(method, &qube.name))))
}

/// Runs `qvm-unpause`.
pub fn unpause(options: Unpause) -> Outcome {
    let api = options.common.api();
    let method = |state: &str| if state == "Suspended" { "admin.vm.Resume" } else { "admin.vm.Unpause" };
    let qubes = options.qubes.select(&api)?;
    Ok(status(qubes.iter().map(|qube| api.tell(method(&qube.state), &qube.name))))
}

/// Tells every error, and whether there was one.
fn status(done: impl Iterator<Item = Result<(), ApiError>>) -> u8 {
    done.filter_map(Result::err).fold(0, |_, error| {
        eprintln!("Error: {error}");
        FAILED
    })
}
