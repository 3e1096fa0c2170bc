//! A run for one command, to change the qube from inside: boot, command, shutdown, next generation.

use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use engine::host::AgentPipe;
use engine::launch::Clone;
use engine::timeline::Timeline;
use nix::sys::signal::Signal;
use qrexec::{Exec, Exit, HostFrame};

use super::off::await_off;
use super::prepare::Prepared;
use super::subject::Overrides;
use super::{hostname, tell_stale};
use crate::agent_link::AgentLink;
use crate::clones::{Keeping, Power};
use crate::error::{Error, Result};
use crate::machine::{self, Machine};
use crate::qube::{self, Qube};
use crate::savefiles;
use crate::session::{self, Caller, Ending, SessionError, Signals};
use crate::state::State;

/// How long a guest may take to shut down: twice what systemd gives a service that does not want to end.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(180);
/// How long a domain may take to tell that it has ended once its agent's channel has closed.
const END_LIMIT: Duration = Duration::from_secs(10);
/// What is asked for.
pub struct Request {
    /// The TemplateVM or DVM template.
    pub name: String,
    /// The command to run in it.
    pub exec: Exec,
    /// What of its settings is another.
    pub instead: Overrides,
    /// Whether savefiles that become stale are rebuilt in the background.
    pub rebuild: bool,
}

/// How a run ended.
enum Finish {
    /// The guest switched itself off; how the command ended, if that was before.
    Off(Option<Exit>),
    /// Something else came first: what, and the exit status that says so.
    Cut(String, u8),
}

/// Runs a qube itself. Answers the exit status: the command's own, as a shell gives it.
pub fn run(state: &State, machine: &dyn Machine, request: Request, say: &dyn Fn(&str)) -> Result<u8> {
    machine::forbid_core_dump()?;
    let name = request.name.clone();
    Qube::load(state, &name)?;
    let running = qube::hold_running(state, &name)?;
    machine::sweep(state, machine)?;
    let mut prepared = Prepared::new(state, machine, &name, &request.instead, Keeping::Launcher)?;

    let stays = format!(
        "{name} stays at {} generation {}, nothing of this run is kept",
        prepared.subject.kept, prepared.subject.generation
    );
    let connect = |pipe| AgentLink::with_command(pipe, request.exec).named(hostname(&name));
    let status = match live(&mut prepared, connect) {
        Ok(Finish::Off(exit)) => exit.map_or(0, Exit::status),
        Ok(Finish::Cut(what, status)) => {
            say(&format!("{what}; {stays}"));
            return Ok(status);
        }
        Err(error) => return Err(error.hint(stays)),
    };
    let Prepared { subject, lease, written, .. } = prepared;
    let next = subject.keep(state, &name, &written)?;
    drop((written, lease, running));
    match next {
        None => say(&format!(
            "nothing was changed: {name} stays at {} generation {}",
            subject.kept, subject.generation
        )),
        Some(generation) => {
            say(&format!("{name} is at {} generation {generation} now", subject.kept));
            savefiles::collect(state)?;
            tell_stale(state, &name, request.rebuild, say)?;
        }
    }
    Ok(status)
}

/// Boots the guest, runs the command in it, and has it shut down.
fn live(prepared: &mut Prepared, connect: impl FnOnce(Box<dyn AgentPipe>) -> AgentLink) -> Result<Finish> {
    let mut timeline = Timeline::since(Instant::now());
    let Clone { mut domain, mut agent } = prepared.boot(connect, &mut timeline)?;
    prepared.lease.tell(Power::Running)?;
    let mut signals = Signals::block().map_err(Error::failed("block signals"))?;
    let (stdin, stdout, stderr) = (io::stdin(), io::stdout(), io::stderr());
    let caller = Caller { stdin: stdin.as_fd(), stdout: stdout.as_fd(), stderr: stderr.as_fd() };
    let (exit, off) = match session::run(&mut agent, &mut domain, &caller, &mut signals, &mut timeline) {
        Ok(Ending::Exited(exit)) => {
            agent.queue(&HostFrame::Shutdown).map_err(Error::failed("ask the qube to shut down"))?;
            (Some(exit), await_off(&mut *domain, Some(&mut agent), &mut signals, SHUTDOWN_LIMIT))
        }
        Ok(Ending::Signal(signal)) => return Ok(cut_by(signal)),
        Ok(Ending::HungUp) => {
            let what = "nobody reads the command's output any more".to_owned();
            return Ok(Finish::Cut(what, 128 + Signal::SIGPIPE as u8));
        }
        Ok(Ending::PoweredOff) => (None, Ok(None)),
        // The agent's channel may close before the host tells that the guest has switched itself off.
        Err(SessionError::Agent(error)) => {
            let off = await_off(&mut *domain, None, &mut signals, END_LIMIT);
            (None, off.map_err(|_| SessionError::Agent(error)))
        }
        Err(error) => (None, Err(error)),
    };
    match off.map_err(Error::failed("run the qube to its end"))? {
        None => Ok(Finish::Off(exit)),
        Some(signal) => Ok(cut_by(signal)),
    }
}

fn cut_by(signal: Signal) -> Finish {
    Finish::Cut(format!("{signal} came before the qube had shut down"), 128 + signal as u8)
}
