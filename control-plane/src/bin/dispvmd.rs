//! `dispvmd`: keeps clones ready, so that `dispvm-launch` has one in milliseconds, and serves the Admin API.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use admin_api::{Reply, ADMIN_VM};
use clap::{Parser, Subcommand};
use control_plane::admin;
use control_plane::cli::{fail, generate_if_asked, machine, start_log, Common};
use control_plane::daemon::protocol::Status;
use control_plane::daemon::{client, holder, keeper, server, systemd};
use control_plane::error::{Error, Kind, Result};
use control_plane::run::runner;
use control_plane::state::State;
use nix::sys::signal::{SigSet, Signal};

/// Keeps clones ready (spares), so that dispvm-launch has one in milliseconds, and savefiles fresh; starts qubes and serves Qubes'
/// Admin API.
///
/// Runs in the foreground until SIGTERM or SIGINT; running qubes and disposables go on without it. What it has to say it says on standard
/// error.
///
/// Exit status: 0 done, 1 failed, 2 wrong usage.
#[derive(Parser)]
#[command(name = "dispvmd", version)]
struct Options {
    #[command(flatten)]
    common: Common,
    /// Spares of each DVM template that was not given a number of its own
    #[arg(long, value_name = "N", default_value_t = 1)]
    spares: u32,
    /// Age in seconds at which a spare is replaced
    #[arg(long, value_name = "S", default_value_t = 3600, value_parser = clap::value_parser!(u64).range(1..))]
    spare_age: u64,
    /// Serve Qubes' Admin API on a socket at this path, as qubesd does at /var/run/qubesd.sock [default: the socket systemd has made, if
    /// it has]
    #[arg(long, value_name = "PATH")]
    api_socket: Option<PathBuf>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Say what the running dispvmd has: savefiles, spares, clones
    Status {
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Keep one spare (started by dispvmd itself)
    #[command(hide = true)]
    Keeper {
        /// DVM template
        dvm: String,
    },
    /// Run a qube until it ends (started by dispvmd itself, or by who wants the qube, with a socket as standard input)
    #[command(hide = true)]
    Runner {
        /// Qube
        name: String,
    },
    /// Hold a spare as a disposable that runs by itself (started by dispvmd itself, with a socket as standard input)
    #[command(hide = true)]
    Holder {
        /// DVM template
        dvm: String,
    },
    /// Fill a volume with standard input (the services admin.vm.volume.Import and ImportWithSize)
    #[command(hide = true)]
    Import {
        /// Whether a line with the size comes first
        #[arg(long)]
        with_size: bool,
        /// Qube
        name: String,
        /// Its volume
        volume: String,
    },
    /// Make the hot image of a savefile (started by dispvmd itself)
    #[command(hide = true)]
    Admit {
        /// DVM template
        dvm: String,
    },
}

fn main() -> ExitCode {
    generate_if_asked::<Options>();
    let options = Options::parse();
    start_log();
    match run(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let status = if error.kind == Kind::Usage { 2 } else { 1 };
            fail("dispvmd", &error, status)
        }
    }
}

fn run(options: Options) -> Result<()> {
    let state = options.common.state()?;
    match options.command {
        None => {
            let age_max = Duration::from_secs(options.spare_age);
            // Before there are other threads, which would end the process at the first of them.
            block_signals().map_err(Error::failed("block signals"))?;
            let _api = match (systemd::listener()?, options.api_socket) {
                (Some(listener), _) => Some(admin::server::serve_handed_over(&state, listener)?),
                (None, Some(path)) => Some(admin::server::serve(&state, &path)?),
                (None, None) => None,
            };
            server::run(&state, &machine()?, server::Options { spares: options.spares, age_max })
        }
        Some(Command::Admit { dvm }) => keeper::admit(&state, &machine()?, &dvm),
        Some(Command::Runner { name }) => runner::run(&state, &machine()?, &name, true),
        Some(Command::Holder { dvm }) => holder::run(&state, &machine()?, &dvm),
        Some(Command::Import { with_size, name, volume }) => import(&state, with_size, &name, &volume),
        Some(Command::Keeper { dvm }) => keeper::run(&state, &machine()?, &dvm),
        Some(Command::Status { json }) => {
            let answered = client::status(&state)
                .map_err(|error| Error::new(Kind::Failed, "dispvmd does not answer").because(error))?;
            let status = answered.ok_or_else(|| {
                Error::new(Kind::Failed, format!("no dispvmd runs on {}", state.root().display()))
                    .hint("`dispvmd` starts one")
            })?;
            print_status(&status, json)
        }
    }
}

/// A refusal is the service's answer, and told by its status beside.
fn import(state: &State, with_size: bool, name: &str, volume: &str) -> Result<()> {
    // As a service it is told who calls; whoever runs it by hand is in dom0.
    let caller = std::env::var_os("QREXEC_REMOTE_DOMAIN");
    let caller = caller.map_or(ADMIN_VM.into(), |caller| caller.to_string_lossy().into_owned());
    let reply = admin::import_volume(state, &caller, name, volume, &mut io::stdin().lock(), with_size);
    let bytes = reply.as_ref().map_or(Vec::new(), Reply::encode);
    io::stdout().write_all(&bytes).map_err(Error::failed("answer"))?;
    match reply {
        Some(Reply::Ok(_)) => Ok(()),
        _ => Err(Error::new(Kind::Refused, format!("{name}:{volume} was not imported"))),
    }
}

/// Those the daemon waits for: a thread that has them blocked leaves them to it.
fn block_signals() -> nix::Result<()> {
    let mut set = SigSet::empty();
    for signal in [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        set.add(signal);
    }
    set.thread_block()
}

fn print_status(status: &Status, json: bool) -> Result<()> {
    if json {
        println!("{}", serde_json::to_string(status).map_err(Error::failed("write JSON"))?);
        return Ok(());
    }
    for dvm in &status.dvms {
        let rebuilding = if dvm.rebuilding { ", being rebuilt" } else { "" };
        println!(
            "{:20} {} of {} spares ready; savefile: {}{rebuilding}",
            dvm.dvm, dvm.spares_ready, dvm.spares_wanted, dvm.savefile
        );
        if let Some(failure) = &dvm.last_failure {
            println!("{:20} the last spare could not be made: {failure}", "");
        }
    }
    if !status.kept.is_empty() {
        println!("running: {}", status.kept.join(", "));
    }
    Ok(())
}
