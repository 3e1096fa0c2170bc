//! `qvm-kill`: forceful shutdown.

use admin_api::Kind;
use clap::Parser;

use crate::api::{is, Common};
use crate::names::Qubes;
use crate::outcome::{quoted, Outcome, FAILED};

/// Ends qubes at once, without asking them.
#[derive(Parser)]
#[command(version)]
pub struct Options {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    qubes: Qubes,
}

/// Runs `qvm-kill`.
pub fn run(options: Options) -> Outcome {
    let api = options.common.api();
    let mut status = 0;
    for qube in options.qubes.select(&api)? {
        match api.tell("admin.vm.Kill", &qube.name) {
            Err(error) if is(&error, Kind::VmNotStarted) || is(&error, Kind::VmNotRunning) => {}
            Err(error) => {
                eprintln!("Error: Failed to kill {}: {error}", quoted(&qube.name));
                status = FAILED;
            }
            Ok(()) => {}
        }
    }
    Ok(status)
}
