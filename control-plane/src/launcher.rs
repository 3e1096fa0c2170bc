//! A launch, from request to exit status: find the savefile, restore (or boot cold and say so), run the command, close.

use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

use engine::close;
use engine::host::Host;
use engine::identity::Identity;
use engine::image::hot::HotFiles;
use engine::launch::{self, Clone, LaunchError};
use engine::timeline::Timeline;
use nix::sys::signal::Signal;
use qrexec::{Exec, Exit};
use serde_json::{json, Value};

use crate::agent_link::AgentLink;
use crate::clones::{self, Lease};
use crate::error::{Error, Kind, Result};
use crate::inputs::Guest;
use crate::machine::{self, Machine};
use crate::savefiles::{self, Readiness};
use crate::session::{self, Caller, Ending, Signals};
use crate::state::{self, State};

/// The launch itself failed.
pub const EXIT_FAILED: u8 = 125;
/// Policy or the host refused.
pub const EXIT_REFUSED: u8 = 126;

/// What is asked for.
pub struct Request {
    /// The DVM template.
    pub dvm: String,
    /// The command to run.
    pub exec: Exec,
    /// When the request came.
    pub start: Instant,
    /// Whether a missing or stale savefile is rebuilt meanwhile.
    pub rebuild: bool,
}

/// What came of it.
pub struct Report {
    /// The clone's name.
    pub name: String,
    /// The host's kind.
    pub host: String,
    /// The savefile's generation; `None` after a cold boot.
    pub generation: Option<u64>,
    /// How the command ended.
    pub ending: Ending,
    /// The phases.
    pub timeline: Timeline,
}

impl Report {
    /// The exit status for the caller: the command's own, as a shell gives it.
    pub fn exit_status(&self) -> u8 {
        match &self.ending {
            Ending::Exited(exit) => exit.status(),
            Ending::HungUp => 128 + Signal::SIGPIPE as u8,
            Ending::Signal(signal) => 128 + *signal as u8,
        }
    }

    /// For `--json`: one object.
    pub fn json(&self) -> Value {
        let phases: serde_json::Map<String, Value> = self
            .timeline
            .phases_ms()
            .map(|(phase, ms)| (phase.to_owned(), json!((ms * 1e3).round() / 1e3)))
            .collect();
        json!({
            "name": self.name,
            "host": self.host,
            "generation": self.generation,
            "spare": false,
            "cold_boot": self.generation.is_none(),
            "exit_status": self.exit_status(),
            "command_found": !matches!(self.ending, Ending::Exited(Exit::NotFound(_))),
            "phases_ms": phases,
        })
    }
}

/// Launches a clone, runs the command in it, and destroys it.
pub fn run(state: &State, machine: &dyn Machine, request: Request, say: &dyn Fn(&str)) -> Result<Report> {
    let mut timeline = Timeline::since(request.start);
    machine::forbid_core_dump()?;
    clones::sweep(state)?;
    let in_use = state::lock_shared(&state.use_lock())?;
    let guest = Guest::load(state, &request.dvm)?;
    let host = machine.host(state, &guest.spec.kernel)?;
    let image = ready_image(state, &guest, &*host, request.rebuild, say)?;
    let generation = image.as_ref().map(|(generation, ..)| *generation);
    let root_hash = image.as_ref().map_or(String::new(), |(_, root_hash, _)| root_hash.clone());
    let template = (guest.dvm.template.clone(), guest.template.generation);
    let lease = Lease::take(state, &guest.dvm_name, &root_hash, template)?;
    drop(in_use);
    let confinement = machine::confinement(state, machine, lease.number());
    machine::check_memory(machine, &guest.spec, &confinement)?;
    let identity = Identity::fresh(lease.number()).map_err(Error::failed("draw an identity"))?;
    timeline.mark("prepared");

    let connect = |pipe| AgentLink::with_command(pipe, request.exec).limited(machine.agent_limits());
    let spec = &guest.spec;
    let launched = match image {
        Some((.., files)) => {
            launch::restore(&*host, spec, files, &confinement, &identity, connect, &mut timeline)
        }
        None => launch::cold(&*host, spec, &confinement, &identity, connect, &mut timeline),
    };
    let mut clone = launched.map_err(launch_error)?;
    let ending = converse(&mut clone, &mut timeline)?;
    close::close(clone).map_err(Error::failed("end the clone"))?;
    let name = lease.number().to_string();
    drop(lease);
    timeline.mark("closed");
    Ok(Report { name, host: host.facts().kind.clone(), generation, ending, timeline })
}

/// The admitted image of a fresh savefile. Without one: says why, starts the rebuild, and answers `None`.
fn ready_image(
    state: &State,
    guest: &Guest,
    host: &dyn Host,
    rebuild: bool,
    say: &dyn Fn(&str),
) -> Result<Option<(u64, String, HotFiles)>> {
    match savefiles::ready(state, guest, host)? {
        Readiness::Ready { generation, root_hash, files } => Ok(Some((generation, root_hash, files))),
        Readiness::Not { reason } if !rebuild => {
            say(&format!("{reason}; booting cold"));
            Ok(None)
        }
        Readiness::Not { reason } => {
            say(&format!("{reason}; booting cold, a savefile is being built for the next launch"));
            if let Err(error) = start_rebuild(state, guest) {
                say(&format!("cannot start the rebuild: {error}"));
            }
            Ok(None)
        }
    }
}

/// Starts `dispvm-savefile build` in a session of its own, at low priority: it outlives us and our terminal. It ends by
/// itself when another build of the same template is under way.
fn start_rebuild(state: &State, guest: &Guest) -> io::Result<()> {
    let program = std::env::current_exe()?.with_file_name("dispvm-savefile");
    let mut command = Command::new("setsid");
    command.args(["nice", "-n", "10"]).arg(program).arg("--root").arg(state.root());
    command.args(["build", "--background"]).arg(&guest.dvm_name);
    std::fs::create_dir_all(state.savefiles(&guest.dvm_name))?;
    let log = std::fs::File::create(rebuild_log(state, guest))?;
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().map(drop)
}

/// What the last rebuild had to say.
fn rebuild_log(state: &State, guest: &Guest) -> PathBuf {
    state.savefiles(&guest.dvm_name).join("build.log")
}

/// Carries the command's streams until it ends.
fn converse(clone: &mut Clone<AgentLink>, timeline: &mut Timeline) -> Result<Ending> {
    let mut signals = Signals::block().map_err(Error::failed("block signals"))?;
    let (stdin, stdout, stderr) = (io::stdin(), io::stdout(), io::stderr());
    let caller = Caller { stdin: stdin.as_fd(), stdout: stdout.as_fd(), stderr: stderr.as_fd() };
    session::run(&mut clone.agent, &mut clone.domain, &caller, &mut signals, timeline)
        .map_err(Error::failed("run the command in the clone"))
}

fn launch_error(error: LaunchError) -> Error {
    let kind = match &error {
        LaunchError::Host(engine::host::HostError::Refused { .. }) => Kind::Refused,
        _ => Kind::Failed,
    };
    Error::new(kind, "cannot launch a clone").because(error)
}

/// The exit status of a launch that failed.
pub fn exit_of(error: &Error) -> u8 {
    match error.kind {
        Kind::Refused => EXIT_REFUSED,
        _ => EXIT_FAILED,
    }
}
