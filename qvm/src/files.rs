//! `qvm-copy-to-vm` and `qvm-move-to-vm`: files from dom0 into a qube's ~/QubesIncoming/dom0, by its service qubes.Filecopy. Nothing
//! is asked: what dom0 calls is not the policy's to decide.

use std::io::{self, IsTerminal};
use std::path::PathBuf;

use clap::Parser;
use filecopy::{Job, JobError};

use crate::api::{start, Common};
use crate::names;
use crate::outcome::{Failure, Outcome};
use crate::programs::{service, DEFAULT_USER};

/// Sends files and folders to a qube, into its folder QubesIncoming/dom0.
///
/// As qvm-move-to-vm it removes them here, once the qube has all of them.
///
/// Exit status: 0 when the qube has all of it, 1 when something failed, 125 when the qube could not be called, 126 when it refused.
#[derive(Parser)]
#[command(version)]
pub struct Options {
    #[command(flatten)]
    common: Common,
    /// Do not say how far it is
    #[arg(long)]
    without_progress: bool,
    /// Leave symbolic links out
    #[arg(long)]
    ignore_symlinks: bool,
    /// The qube
    #[arg(value_name = "VMNAME")]
    qube: String,
    /// What to send
    #[arg(value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
}

/// Runs `qvm-copy-to-vm`.
pub fn copy(options: Options) -> Outcome {
    send(&options, false)
}

/// Runs `qvm-move-to-vm`: what has arrived is removed here.
pub fn move_(options: Options) -> Outcome {
    send(&options, true)
}

fn send(options: &Options, moves: bool) -> Outcome {
    let api = options.common.api();
    let qube = &options.qube;
    names::one(&api.qubes()?, qube)?;
    start(&api, qube)?;
    let shows_progress = !options.without_progress && io::stderr().is_terminal();
    let job = Job { paths: &options.files, moves, ignores_links: options.ignore_symlinks, shows_progress };
    // What the qube complains of goes to our terminal, and it may be hostile.
    job.run(|name| service(qube, &["-T"], DEFAULT_USER, name)).map(|()| 0).map_err(failure)
}

fn failure(error: JobError) -> Failure {
    let status = error.status();
    Failure::Runtime(error.to_string(), status)
}
