//! `qvm-start`: starts qubes.

use clap::Parser;

use crate::api::{is_running, Common};
use crate::names::Qubes;
use crate::outcome::{Failure, Outcome, FAILED};

/// Starts qubes.
#[derive(Parser)]
#[command(version)]
pub struct Options {
    #[command(flatten)]
    common: Common,
    /// Do not fail if a qube is already running
    #[arg(long)]
    skip_if_running: bool,
    #[command(flatten)]
    qubes: Qubes,
}

/// Runs `qvm-start`.
pub fn run(options: Options) -> Outcome {
    let api = options.common.api();
    let mut status = 0;
    for qube in options.qubes.select(&api)? {
        match is_running(&qube.state) {
            true if options.skip_if_running => {}
            true => return Err(Failure::Error(format!("domain {} is already running", qube.name))),
            false => {
                if let Err(error) = api.tell("admin.vm.Start", &qube.name) {
                    eprintln!("Error: {error}");
                    status = FAILED;
                }
            }
        }
    }
    Ok(status)
}
