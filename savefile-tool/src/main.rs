//! `dispvm-savefile`: builds, lists, checks and removes the savefiles that disposables are restored from.

mod progress;
mod report;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use control_plane::cli::{fail, generate_if_asked, machine, Common};
use control_plane::daemon::client;
use control_plane::error::{Kind, Result};
use control_plane::inputs::Guest;
use control_plane::machine::{self, Machine};
use control_plane::qube::Qube;
use control_plane::savefiles::{self, Prerun, Standing};
use control_plane::state::State;

/// Builds, lists, checks and removes the savefiles that disposables are restored from.
///
/// Exit status: 0 done, 1 failed, 2 wrong usage, 3 the savefile is missing, corrupt or stale.
#[derive(Parser)]
#[command(name = "dispvm-savefile", version)]
struct Options {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Boot a DVM template, capture it, and make the result the savefile that serves
    Build {
        /// DVM template
        dvm: String,
        /// Executable to run in the guest before the capture, kept for rebuilds; `none` to run none any more
        #[arg(long, value_name = "FILE|none")]
        prerun: Option<PathBuf>,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
        /// End at once, successfully, when another build of it is under way
        #[arg(long, hide = true)]
        background: bool,
    },
    /// List the DVM templates and how their savefiles stand
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Say how a savefile stands: 0 when it is fresh, 3 when not
    Status {
        /// DVM template
        dvm: String,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Describe a savefile
    Info {
        /// DVM template
        dvm: String,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Check every byte of a savefile
    Verify {
        /// DVM template
        dvm: String,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Remove a savefile; running disposables go on
    Rm {
        /// DVM template
        dvm: String,
    },
    /// Remove what nothing needs any more: old savefiles, hot images, old template generations
    Gc {
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
}

fn main() -> ExitCode {
    generate_if_asked::<Options>();
    let options = Options::parse();
    match run(options) {
        Ok(status) => status,
        Err(error) => {
            let status = match error.kind {
                Kind::Usage => 2,
                Kind::Unusable => 3,
                Kind::Failed | Kind::Refused => 1,
            };
            fail("dispvm-savefile", &error, status)
        }
    }
}

fn run(options: Options) -> Result<ExitCode> {
    let state = options.common.state()?;
    match options.command {
        Command::Build { dvm, prerun, json, background } => build(&state, &dvm, prerun, json, background)?,
        Command::List { json } => list(&state, json)?,
        Command::Status { dvm, json } => return status(&state, &dvm, json),
        Command::Info { dvm, json } => {
            let description = savefiles::describe(&state, &machine()?, &dvm)?;
            report::print_info(&description, json);
        }
        Command::Verify { dvm, json } => {
            let bar = progress::Bar::new();
            let path = savefiles::verify(&state, &dvm, &|progress| bar.show(progress))?;
            bar.finish();
            report::print_verified(&dvm, &path, json);
        }
        Command::Rm { dvm } => {
            savefiles::remove(&state, &dvm)?;
            client::changed(&state);
        }
        Command::Gc { json } => {
            machine::sweep(&state, &machine()?)?;
            report::print_collected(&savefiles::collect(&state)?, json);
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn build(state: &State, dvm: &str, prerun: Option<PathBuf>, json: bool, background: bool) -> Result<()> {
    let prerun = match prerun {
        None => Prerun::Same,
        Some(path) if path.as_os_str() == "none" => Prerun::None,
        Some(path) => Prerun::File(path),
    };
    let mut watch = progress::BuildWatch::new();
    let built = savefiles::build(state, &machine()?, dvm, &prerun, !background, &mut watch)?;
    watch.finish();
    client::changed(state);
    if let Some(built) = built {
        report::print_built(dvm, &built, json);
    }
    Ok(())
}

fn list(state: &State, json: bool) -> Result<()> {
    let mut rows = Vec::new();
    for qube in Qube::all(state)?.into_iter().filter(|qube| qube.dvm().is_ok()) {
        let standing = standing(state, &qube.name)?;
        let pin = qube.dvm()?.savefile.clone();
        let bytes =
            pin.as_ref().and_then(|pin| std::fs::metadata(state.savefile(&qube.name, pin.generation)).ok());
        rows.push(report::Row {
            name: qube.name.clone(),
            generation: pin.map(|pin| pin.generation),
            stored_bytes: bytes.map(|meta| meta.len()),
            standing,
        });
    }
    report::print_list(&rows, json);
    Ok(())
}

fn status(state: &State, dvm: &str, json: bool) -> Result<ExitCode> {
    let standing = standing(state, dvm)?;
    report::print_status(dvm, &standing, &savefiles::rebuild(state, dvm), json);
    Ok(if standing == Standing::Fresh { ExitCode::SUCCESS } else { ExitCode::from(3) })
}

fn standing(state: &State, dvm: &str) -> Result<Standing> {
    let guest = Guest::load(state, dvm)?;
    let host = machine()?.host(state, &guest.spec.kernel)?;
    savefiles::standing(state, &guest, &*host)
}
