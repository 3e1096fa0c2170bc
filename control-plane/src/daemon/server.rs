//! The daemon: one thread, one poll over the listener, its callers and its keepers.
//!
//! Invariants:
//! - nothing here takes long: admission, restore and rebuild are other processes' work;
//! - what a launch is given is checked against the records as they are at that moment, not as they were;
//! - a caller that says nothing is let go after [`HELLO_LIMIT`], and there are at most [`CALLERS_MAX`] of them.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use engine::savefile::RootHash;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{waitpid, WaitPidFlag, WaitStatus};

use super::channel::{Channel, Listener};
use super::policy::Memory;
use super::protocol::{Answer, Hello, HolderSays, KeeperHears, KeeperSays, RunnerSays, Spare, PROTOCOL};
use super::{starter, systemd};
use crate::clones::{self, Keeping};
use crate::error::{Error, Kind, Result};
use crate::machine::{self, Machine};
use crate::qube::check_name;
use crate::savefiles::Serving;
use crate::state::{self, State};

/// A connection without a word is no launcher.
const HELLO_LIMIT: Duration = Duration::from_secs(2);
/// More callers at once than this wait until others were heard.
const CALLERS_MAX: usize = 256;
/// After a caller that could not be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);
/// How often the records are looked at, for those who change them without telling us.
const SURVEY_EVERY: Duration = Duration::from_secs(2);

/// How the daemon is to work.
#[derive(Debug, Clone)]
pub struct Options {
    /// Spares of each DVM template whose record does not say how many.
    pub spares: u32,
    /// The age at which a spare is replaced.
    pub age_max: Duration,
}

/// Serves until SIGTERM or SIGINT. Clones that run stay; spares go.
pub fn run(state: &State, machine: &dyn Machine, options: Options) -> Result<()> {
    let signals = block_signals().map_err(Error::failed("block signals"))?;
    let lock_path = state.daemon_lock();
    let _lock = state::try_lock(&lock_path)?.ok_or_else(|| {
        Error::new(Kind::Refused, format!("a dispvmd runs on {} already", state.root().display()))
            .hint("`dispvmd status` tells what it does")
    })?;
    let path = state.daemon_socket();
    let listener = Listener::bind(&path).map_err(Error::io("listen on", &path))?;
    machine::sweep(state, machine)?;
    call_keepers(state)?;
    let mut daemon = Daemon {
        state,
        machine,
        options,
        callers: Vec::new(),
        keepers: Vec::new(),
        children: HashMap::new(),
        dvms: BTreeMap::new(),
        surveyed: None,
        outdated: false,
    };
    tracing::info!("listening on {}", path.display());
    systemd::ready();
    let served = daemon.serve(&listener, &signals);
    daemon.end_spares(None);
    let _ = std::fs::remove_file(&path);
    served
}

pub(super) struct Daemon<'a> {
    pub(super) state: &'a State,
    pub(super) machine: &'a dyn Machine,
    pub(super) options: Options,
    pub(super) callers: Vec<(Channel, Instant)>,
    pub(super) keepers: Vec<Keeper>,
    pub(super) children: HashMap<i32, Child>,
    pub(super) dvms: BTreeMap<String, Dvm>,
    pub(super) surveyed: Option<Instant>,
    /// Whether a spare was ended whose savefile is not the one that serves.
    pub(super) outdated: bool,
}

/// A keeper's connection.
pub(super) struct Keeper {
    pub(super) channel: Channel,
    pub(super) dvm: String,
    pub(super) pid: u32,
    pub(super) phase: Phase,
}

pub(super) enum Phase {
    Making,
    Waiting { spare: Spare, agent: OwnedFd, lifeline: OwnedFd, since: Instant },
    Running(Spare),
}

/// A process we have started.
pub(super) struct Child {
    pub(super) dvm: String,
    pub(super) what: Work,
    pub(super) since: Instant,
    /// Whether the keeper has had a spare.
    pub(super) ready: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Work {
    Keeper,
    Rebuild,
    /// Removing what nothing needs any more.
    Collect,
    /// Making the hot image of a template that has no spares, so that no launch has to.
    Admit,
}

/// What we know of a DVM template.
#[derive(Default)]
pub(super) struct Dvm {
    pub(super) wanted: u32,
    /// The savefile that serves, or why none does.
    pub(super) serving: Option<std::result::Result<Serving, String>>,
    pub(super) memory: Option<Memory>,
    pub(super) last_launch: Option<Instant>,
    pub(super) too_few_since: Option<Instant>,
    /// Until when no spare is wanted: the template is being removed.
    pub(super) let_go_until: Option<Instant>,
    pub(super) failures: Option<(u32, Instant)>,
    pub(super) last_failure: Option<String>,
    /// The savefile whose admission we have started, once.
    pub(super) admitted: Option<RootHash>,
    /// When the last rebuild was started, and for which inputs.
    pub(super) rebuilt: Option<(Instant, String)>,
}

impl Daemon<'_> {
    fn serve(&mut self, listener: &Listener, signals: &SignalFd) -> Result<()> {
        loop {
            if self.surveyed.is_none_or(|at| at.elapsed() >= SURVEY_EVERY) {
                self.survey_all();
            }
            let again = self.act();
            let ready = self.wait(listener, signals, again)?;
            if ready.signal && self.heed(signals) {
                return Ok(());
            }
            // From the last to the first: serving one may remove it.
            for at in ready.keepers.into_iter().rev() {
                self.hear_keeper(at);
            }
            for at in ready.callers.into_iter().rev() {
                let (caller, _) = self.callers.remove(at);
                self.hear_caller(caller);
            }
            if ready.listener {
                self.accept(listener)?;
            }
            self.callers.retain(|(_, since)| since.elapsed() < HELLO_LIMIT);
        }
    }

    fn wait(&self, listener: &Listener, signals: &SignalFd, again: Option<Instant>) -> Result<Ready> {
        // Callers we have no room for stay in the listener's queue.
        let listens = if self.callers.len() < CALLERS_MAX { PollFlags::POLLIN } else { PollFlags::empty() };
        let mut fds =
            vec![PollFd::new(signals.as_fd(), PollFlags::POLLIN), PollFd::new(listener.as_fd(), listens)];
        fds.extend(self.keepers.iter().map(|keeper| PollFd::new(keeper.channel.as_fd(), PollFlags::POLLIN)));
        fds.extend(self.callers.iter().map(|(caller, _)| PollFd::new(caller.as_fd(), PollFlags::POLLIN)));
        let survey = self.surveyed.map_or_else(Instant::now, |at| at + SURVEY_EVERY);
        let next = again.map_or(survey, |again| again.min(survey));
        let left = next.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(Error::failed("wait for callers")(io::Error::from(error))),
        }
        let is_ready = |fd: &PollFd<'_>| fd.revents().is_some_and(|flags| !flags.is_empty());
        let (keepers, callers) = fds[2..].split_at(self.keepers.len());
        let places = |fds: &[PollFd<'_>]| (0..fds.len()).filter(|at| is_ready(&fds[*at])).collect();
        Ok(Ready {
            signal: is_ready(&fds[0]),
            listener: is_ready(&fds[1]),
            keepers: places(keepers),
            callers: places(callers),
        })
    }

    fn accept(&mut self, listener: &Listener) -> Result<()> {
        while self.callers.len() < CALLERS_MAX {
            match listener.accept() {
                Ok(Some(caller)) => self.callers.push((caller, Instant::now())),
                Ok(None) => break,
                // Out of descriptors: those who wait are heard when others have gone.
                Err(error) => {
                    tracing::warn!("cannot accept a caller: {error}");
                    std::thread::sleep(ACCEPT_PAUSE);
                    break;
                }
            }
        }
        Ok(())
    }

    fn hear_caller(&mut self, caller: Channel) {
        let hello = match caller.receive::<Hello>() {
            Ok(Some((hello, _))) => hello,
            Ok(None) => return,
            Err(error) => return tracing::warn!("a caller that makes no sense: {error}"),
        };
        let answered = match hello {
            Hello::Spare { dvm, settings, rebuild } => {
                let theirs = settings == self.machine.settings();
                self.hand_out(&caller, &dvm, theirs, rebuild)
            }
            Hello::LetGo { dvm } => {
                self.let_go(&dvm);
                caller.send(&Answer::Noted, &[])
            }
            Hello::Status => caller.send(&Answer::Status(self.status()), &[]),
            Hello::Changed => {
                self.surveyed = None;
                caller.send(&Answer::Noted, &[])
            }
            Hello::Start { qube } => self.start_qube(&caller, &qube),
            Hello::Hold { dvm } => self.hold_spare(&caller, &dvm),
            Hello::Keeper { protocol, .. } if protocol != PROTOCOL => Ok(()),
            Hello::Keeper { dvm, pid, .. } => {
                self.keepers.push(Keeper { channel: caller, dvm, pid, phase: Phase::Making });
                Ok(())
            }
        };
        if let Err(error) = answered {
            tracing::info!("a caller went away: {error}");
        }
    }

    /// Starts the runner of a qube, which answers the caller itself.
    fn start_qube(&self, caller: &Channel, qube: &str) -> io::Result<()> {
        let started = check_name(qube)
            .map_err(io::Error::other)
            .and_then(|()| starter::runner(self.state, qube, caller.as_fd()));
        started.or_else(|error| caller.send(&RunnerSays::Failed { reason: error.to_string() }, &[]))
    }

    /// Starts the holder of a spare, if there is one; it asks for it as a launch does, and answers the caller itself.
    fn hold_spare(&self, caller: &Channel, dvm: &str) -> io::Result<()> {
        if self.oldest_spare(dvm).is_none() {
            return caller.send(&HolderSays::NoSpare, &[]);
        }
        let started = starter::holder(self.state, dvm, caller.as_fd());
        started.or_else(|error| caller.send(&HolderSays::Failed { reason: error.to_string() }, &[]))
    }

    /// Gives the caller a spare, if there is one that is right at this moment. (Also when memory is short: the spare has its own.)
    fn hand_out(
        &mut self,
        caller: &Channel,
        name: &str,
        same_settings: bool,
        rebuild: bool,
    ) -> io::Result<()> {
        self.survey(name);
        if self.dvms.contains_key(name) {
            self.end_unfit(name);
        }
        let Some(dvm) = self.dvms.get_mut(name) else {
            return caller.send(&Answer::None { rebuilding: false }, &[]);
        };
        dvm.last_launch = Some(Instant::now());
        if !same_settings {
            return caller.send(&Answer::None { rebuilding: false }, &[]);
        }
        if !matches!(dvm.serving, Some(Ok(_))) {
            let rebuilding = rebuild && self.rebuild(name, true);
            return caller.send(&Answer::None { rebuilding }, &[]);
        }
        while let Some(at) = self.oldest_spare(name) {
            if caller.is_hung_up() {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            // Told first: whatever becomes of us or the caller now, this is no spare any more.
            if self.keepers[at].channel.send(&KeeperHears::HandedOut, &[]).is_err() {
                self.keepers.remove(at);
                continue;
            }
            let Phase::Waiting { spare, agent, lifeline, .. } =
                std::mem::replace(&mut self.keepers[at].phase, Phase::Making)
            else {
                continue;
            };
            self.keepers[at].phase = Phase::Running(spare.clone());
            return caller.send(&Answer::Spare(spare), &[agent.as_fd(), lifeline.as_fd()]);
        }
        caller.send(&Answer::None { rebuilding: false }, &[])
    }

    fn oldest_spare(&self, name: &str) -> Option<usize> {
        let waiting = self.keepers.iter().enumerate().filter(|(_, keeper)| keeper.dvm == name);
        waiting
            .filter_map(|(at, keeper)| match &keeper.phase {
                Phase::Waiting { since, .. } => Some((*since, at)),
                _ => None,
            })
            .min()
            .map(|(_, at)| at)
    }

    fn hear_keeper(&mut self, at: usize) {
        let keeper = &mut self.keepers[at];
        match keeper.channel.receive::<KeeperSays>() {
            Ok(Some((KeeperSays::Ready(spare), fds))) => {
                let Ok([agent, lifeline]) = <[OwnedFd; 2]>::try_from(fds) else {
                    tracing::warn!("keeper {} sent no clone", keeper.pid);
                    self.keepers.remove(at);
                    return;
                };
                let since = Instant::now().checked_sub(spare.age()).unwrap_or_else(Instant::now);
                keeper.phase = Phase::Waiting { spare, agent, lifeline, since };
                if let Some(child) = self.children.get_mut(&(keeper.pid as i32)) {
                    child.ready = true;
                }
                if let Some(dvm) = self.dvms.get_mut(&keeper.dvm) {
                    dvm.failures = None;
                    dvm.last_failure = None;
                }
            }
            Ok(Some((KeeperSays::Running(spare), _))) => keeper.phase = Phase::Running(spare),
            Ok(Some((KeeperSays::Failed { reason }, _))) => {
                let name = keeper.dvm.clone();
                self.keepers.remove(at);
                self.note_failure(&name, reason);
            }
            Ok(None) | Err(_) => {
                let Keeper { dvm, phase, .. } = self.keepers.remove(at);
                if matches!(phase, Phase::Making) {
                    self.note_failure(&dvm, "its keeper ended".to_owned());
                }
            }
        }
    }

    pub(super) fn note_failure(&mut self, name: &str, reason: String) {
        tracing::warn!("no spare of {name}: {reason}");
        if let Some(dvm) = self.dvms.get_mut(name) {
            let times = dvm.failures.map_or(0, |(times, _)| times) + 1;
            dvm.failures = Some((times, Instant::now()));
            dvm.last_failure = Some(reason);
        }
    }

    /// Whether to stop.
    fn heed(&mut self, signals: &SignalFd) -> bool {
        let signal = signals.read_signal().ok().flatten();
        let signal = signal.and_then(|info| Signal::try_from(info.ssi_signo as i32).ok());
        if signal != Some(Signal::SIGCHLD) {
            return signal.is_some_and(|signal| signal != Signal::SIGHUP);
        }
        while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            let Some(pid) = status.pid() else { break };
            let Some(child) = self.children.remove(&pid.as_raw()) else { continue };
            let heard_of = self.keepers.iter().any(|keeper| keeper.pid as i32 == pid.as_raw());
            let failed = !matches!(status, WaitStatus::Exited(_, 0));
            match child.what {
                // One that has greeted is missed when its connection ends.
                Work::Keeper if failed && !heard_of && !child.ready => {
                    self.note_failure(&child.dvm, "its keeper did not get to say why".to_owned());
                }
                // The last user of a hot image that no record names any more may have gone.
                Work::Keeper if self.outdated => self.collect(),
                Work::Rebuild if failed => tracing::warn!("the rebuild of {} failed", child.dvm),
                Work::Admit if failed => tracing::warn!("the hot image of {} could not be made", child.dvm),
                _ => {}
            }
            self.surveyed = None;
        }
        false
    }
}

/// What poll found.
struct Ready {
    signal: bool,
    listener: bool,
    keepers: Vec<usize>,
    callers: Vec<usize>,
}

/// Calls the keepers an earlier daemon has left: they greet as new ones do.
fn call_keepers(state: &State) -> Result<()> {
    for clone in clones::list(state)?.into_iter().filter(|clone| clone.keeping == Keeping::Keeper) {
        let Some(pid) = rustix::process::Pid::from_raw(clone.pid as i32) else { continue };
        let Ok(process) = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()) else {
            continue;
        };
        // Its record's lock is still held, so the process we have got hold of is the one that holds it.
        if clones::list(state)?.contains(&clone) {
            let _ = rustix::process::pidfd_send_signal(process, rustix::process::Signal::USR1);
        }
    }
    Ok(())
}

fn block_signals() -> io::Result<SignalFd> {
    let mut set = SigSet::empty();
    for signal in [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        set.add(signal);
    }
    set.thread_block()?;
    Ok(SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?)
}
