//! `qvm-start`, `qvm-pause`, `qvm-unpause`, `qvm-kill`: one thing done to each of some qubes. What fails with one is told, and the others
//! have their turn.

use admin_api::lines::Qube;
use admin_api::{ApiError, Kind};
use clap::Parser;

use crate::api::{is, is_running, Api};
use crate::names::Qubes;
use crate::outcome::{quoted, Failure, Outcome, FAILED};

/// Starts qubes.
#[derive(Parser)]
#[command(version)]
pub struct Start {
    /// Do not fail if a qube is already running
    #[arg(long)]
    skip_if_running: bool,
    #[command(flatten)]
    drive: Drive,
    #[command(flatten)]
    qubes: Qubes,
}

/// What the stock client can attach for one run.
#[derive(clap::Args)]
#[group(multiple = false)]
struct Drive {
    /// Not possible: a qube has the volumes of its record, and no others
    #[arg(long, value_name = "DRIVE")]
    drive: Option<String>,
    /// Not possible, as --drive
    #[arg(long, value_name = "IMAGE")]
    hddisk: Option<String>,
    /// Not possible, as --drive
    #[arg(long, value_name = "IMAGE")]
    cdrom: Option<String>,
    /// Not possible, as --drive
    #[arg(long)]
    install_windows_tools: bool,
}

/// Pauses qubes. Paused qubes are killed when the system shuts down.
#[derive(Parser)]
#[command(version)]
pub struct Pause {
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
    qubes: Qubes,
}

/// Ends qubes at once, without asking them.
#[derive(Parser)]
#[command(version)]
pub struct Kill {
    #[command(flatten)]
    qubes: Qubes,
}

/// Runs `qvm-start`.
pub fn start(options: Start) -> Outcome {
    let Drive { drive, hddisk, cdrom, install_windows_tools } = &options.drive;
    if install_windows_tools | [drive, hddisk, cdrom].into_iter().any(Option::is_some) {
        let message = "a drive cannot be attached: a qube has the volumes of its record, and no others";
        return Err(Failure::error(message));
    }
    let api = options.qubes.api();
    let mut qubes = options.qubes.select(&api)?;
    qubes.retain(|qube| !(options.skip_if_running && is_running(&qube.state)));
    // As with the stock client, the first that runs ends it: those in front of it are started.
    let first = qubes.iter().position(|qube| is_running(&qube.state));
    let (halted, running) = qubes.split_at(first.unwrap_or(qubes.len()));
    let status = each(halted, |qube| api.tell("admin.vm.Start", &qube.name), |_, error| error.to_string());
    match running.first() {
        Some(qube) => Err(Failure::Error(format!("domain {} is already running", qube.name))),
        None => Ok(status),
    }
}

/// Runs `qvm-pause`.
pub fn pause(options: Pause) -> Outcome {
    let api = options.qubes.api();
    let method = if options.suspend { "admin.vm.Suspend" } else { "admin.vm.Pause" };
    let qubes = options.qubes.select(&api)?;
    Ok(each(&qubes, |qube| api.tell(method, &qube.name), |_, error| error.to_string()))
}

/// Runs `qvm-unpause`.
pub fn unpause(options: Unpause) -> Outcome {
    let api = options.qubes.api();
    let method = |state: &str| if state == "Suspended" { "admin.vm.Resume" } else { "admin.vm.Unpause" };
    let qubes = options.qubes.select(&api)?;
    Ok(each(&qubes, |qube| api.tell(method(&qube.state), &qube.name), |_, error| error.to_string()))
}

/// Runs `qvm-kill`.
pub fn kill(options: Kill) -> Outcome {
    let api = options.qubes.api();
    let qubes = options.qubes.select(&api)?;
    let told = |name: &str, error: &ApiError| format!("Failed to kill {}: {error}", quoted(name));
    Ok(each(&qubes, |qube| end(&api, qube), told))
}

/// One that does not run is as it should be.
fn end(api: &Api, qube: &Qube) -> Result<(), ApiError> {
    match api.tell("admin.vm.Kill", &qube.name) {
        Err(error) if is(&error, Kind::VmNotStarted) || is(&error, Kind::VmNotRunning) => Ok(()),
        ended => ended,
    }
}

/// The status: whether there was an error.
fn each(
    qubes: &[Qube],
    act: impl Fn(&Qube) -> Result<(), ApiError>,
    told: impl Fn(&str, &ApiError) -> String,
) -> u8 {
    let errors = qubes.iter().filter_map(|qube| act(qube).err().map(|error| (qube, error)));
    errors.fold(0, |_, (qube, error)| {
        eprintln!("Error: {}", told(&qube.name, &error));
        FAILED
    })
}
