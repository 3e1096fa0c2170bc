//! A launch, from request to exit status: find the savefile, restore (or boot cold and say so), run the command, close.

use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use engine::close;
use engine::host::Domain;
use engine::identity::{CloneNumber, Identity};
use engine::launch::{self, Clone, LaunchError};
use engine::timeline::Timeline;
use nix::sys::signal::Signal;
use qrexec::{Exec, Exit};
use serde_json::{json, Value};

use crate::agent_link::{AgentLink, Limits};
use crate::calls::Exchange;
use crate::clones::{Keeping, Lease};
use crate::daemon;
use crate::daemon::client::{Found, HandedOut, Lifeline};
use crate::daemon::protocol::Spare;
use crate::error::{Error, Kind, Result};
use crate::inputs::Guest;
use crate::machine::{self, Machine};
use crate::make::{launch_error, Connect, Maker, Rebuild};
use crate::output::error_text;
use crate::run::noted::Noted;
use crate::session::{Attended, Caller, Ending, Signals};
use crate::state::{self, State};

/// The launch itself failed.
pub const EXIT_FAILED: u8 = 125;
/// Policy or the host refused.
pub const EXIT_REFUSED: u8 = 126;

/// A spare wakes up in milliseconds. One that has not done so by now is given up.
const WAKE_LIMIT: Duration = Duration::from_secs(5);

/// What is asked for.
pub struct Request {
    /// The DVM template.
    pub dvm: String,
    /// The command to run.
    pub exec: Exec,
    /// The clone's label; without one, the DVM template's.
    pub label: Option<String>,
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
    /// Whether it was a spare.
    pub spare: bool,
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
            Ending::PoweredOff => EXIT_FAILED,
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
            "spare": self.spare,
            "cold_boot": self.generation.is_none(),
            "exit_status": self.exit_status(),
            "command_found": !matches!(self.ending, Ending::Exited(Exit::NotFound(_))),
            "phases_ms": phases,
        })
    }
}

/// A running clone, and what holds it.
enum Held {
    /// We do.
    Here { domain: Box<dyn Domain>, lease: Lease },
    /// A keeper does, as long as it has our lifeline.
    Kept { lifeline: Lifeline },
}

/// A clone that runs the command already.
struct Launched {
    number: CloneNumber,
    host: String,
    generation: Option<u64>,
    held: Held,
}

/// Launches a clone, runs the command in it, and destroys it.
pub fn run(state: &State, machine: &dyn Machine, request: Request, say: &dyn Fn(&str)) -> Result<Report> {
    let mut timeline = Timeline::since(request.start);
    machine::forbid_core_dump()?;
    let (mut launched, link) = launch(state, machine, request, say, &mut timeline)?;
    let ending = converse(state, &mut launched, link, &mut timeline);
    if let Held::Here { domain, .. } = &mut launched.held {
        timeline.weave(domain.steps());
    }
    let Launched { number, host, generation, held, .. } = launched;
    let spare = matches!(held, Held::Kept { .. });
    // Also when the conversation broke: whoever waits for us has waited for the clone's end.
    let ended = end(held);
    let ending = ending?;
    ended?;
    timeline.mark("closed");
    Ok(Report { name: number.to_string(), host, generation, spare, ending, timeline })
}

fn end(held: Held) -> Result<()> {
    let step = "end the clone";
    match held {
        Held::Here { domain, lease } => {
            close::close(Clone { domain, agent: () }).map_err(Error::failed(step))?;
            drop(lease);
            Ok(())
        }
        Held::Kept { lifeline } => lifeline.end().map_err(Error::failed(step)),
    }
}

/// A spare, if the daemon has one; else a clone of our own making. Spares have the DVM template's label, and keep it.
fn launch(
    state: &State,
    machine: &dyn Machine,
    request: Request,
    say: &dyn Fn(&str),
    timeline: &mut Timeline,
) -> Result<(Launched, AgentLink)> {
    if request.label.is_some() {
        return make(state, machine, request, true, say, timeline);
    }
    match daemon::client::spare(state, &request.dvm, machine.settings(), request.rebuild) {
        Found::Spare(found) => {
            let before = timeline.clone();
            take_over(found, request.exec.clone(), machine, timeline).or_else(|error| {
                // It was given the command along with its identity, and has not taken that on: the command has not run.
                say(&format!("a spare did not wake up, making a clone instead: {}", error_text(&error)));
                *timeline = before;
                make(state, machine, request, true, say, timeline)
            })
        }
        Found::None { rebuilding } => make(state, machine, request, !rebuilding, say, timeline),
        Found::NoDaemon => make(state, machine, request, true, say, timeline),
    }
}

/// Makes a spare ours: it is given the time, fresh entropy and the command, and goes on.
fn take_over(
    found: HandedOut,
    exec: Exec,
    machine: &dyn Machine,
    timeline: &mut Timeline,
) -> Result<(Launched, AgentLink)> {
    let HandedOut { spare, number, agent, lifeline } = found;
    let mut link = AgentLink::with_command(Box::new(agent), exec);
    link = wake(link, number, &spare, machine, timeline)?;
    let held = Held::Kept { lifeline };
    Ok((Launched { number, host: spare.host, generation: Some(spare.generation), held }, link))
}

/// Gives a spare the time and fresh entropy, and lets its programs run.
pub(crate) fn wake(
    link: AgentLink,
    number: CloneNumber,
    spare: &Spare,
    machine: &dyn Machine,
    timeline: &mut Timeline,
) -> Result<AgentLink> {
    timeline.mark("prepared");
    let identity = Identity::again(number, spare.machine_id).map_err(Error::failed("draw entropy"))?;
    let usual = machine.agent_limits();
    let limits = Limits { identify: usual.identify.min(WAKE_LIMIT), ..usual };
    let mut link = link.limited(limits);
    launch::become_somebody(&mut link, &identity, timeline)
        .map_err(|error| launch_error(LaunchError::Agent(error)))?;
    Ok(link)
}

/// Makes a clone: restores it, or boots it cold.
fn make(
    state: &State,
    machine: &dyn Machine,
    request: Request,
    may_rebuild: bool,
    say: &dyn Fn(&str),
    timeline: &mut Timeline,
) -> Result<(Launched, AgentLink)> {
    machine::sweep(state, machine)?;
    let in_use = state::lock_shared(&state.use_lock())?;
    let guest = Guest::load(state, &request.dvm)?;
    let host = machine.host(state, &guest.spec.kernel)?;
    let rebuild = match (request.rebuild, may_rebuild) {
        (false, _) => Rebuild::No,
        (true, true) => Rebuild::Start,
        (true, false) => Rebuild::UnderWay,
    };
    let maker = Maker { state, guest: &guest, host: &*host, rebuild, say };
    let image = maker.ready_image()?;
    let root_hash = image.as_ref().map_or(String::new(), |image| image.root_hash.clone());
    let template = (guest.dvm.template.clone(), guest.template.generation);
    let label = Some(request.label.as_ref().unwrap_or(&guest.label).as_str());
    let lease = Lease::take(state, &guest.dvm_name, &root_hash, template, Keeping::Launcher, label)?;
    drop(in_use);
    let confinement = machine::confinement(state, machine, lease.number());
    machine::check_memory(state, machine, &guest.spec, &confinement)?;
    let identity = Identity::fresh(lease.number()).map_err(Error::failed("draw an identity"))?;
    timeline.mark("prepared");

    let limits = machine.agent_limits();
    let connect = || -> Box<Connect> {
        let exec = request.exec.clone();
        Box::new(move |pipe| AgentLink::with_command(pipe, exec).limited(limits))
    };
    let (Clone { domain, agent: link }, generation) =
        maker.make(image, &confinement, &identity, connect, timeline)?;
    let (number, host) = (lease.number(), host.facts().kind.clone());
    Ok((Launched { number, host, generation, held: Held::Here { domain, lease } }, link))
}

/// Carries the command's streams until it ends, and those of whoever calls meanwhile.
fn converse(
    state: &State,
    launched: &mut Launched,
    link: AgentLink,
    timeline: &mut Timeline,
) -> Result<Ending> {
    let step = "run the command in the clone";
    let mut signals = Signals::block().map_err(Error::failed("block signals"))?;
    let mut exchange = Exchange::or_without_calls(state, &launched.number.to_string(), link);
    let (stdin, stdout, stderr) = (io::stdin(), io::stdout(), io::stderr());
    let caller = Caller { stdin: stdin.as_fd(), stdout: stdout.as_fd(), stderr: stderr.as_fd() };
    let mut noted;
    let attended: &mut dyn Attended = match &mut launched.held {
        Held::Here { domain, lease } => {
            noted = Noted::new(domain, lease);
            &mut noted
        }
        Held::Kept { lifeline } => lifeline,
    };
    match exchange.run(attended, Some(caller), &mut signals, timeline).map_err(Error::failed(step))? {
        Ending::PoweredOff => {
            Err(Error::new(Kind::Failed, format!("cannot {step}: the guest has switched itself off")))
        }
        ending => Ok(ending),
    }
}

/// The exit status of a launch that failed.
pub fn exit_of(error: &Error) -> u8 {
    match error.kind {
        Kind::Refused => EXIT_REFUSED,
        _ => EXIT_FAILED,
    }
}
