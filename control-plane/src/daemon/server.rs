//! The daemon: one thread, one poll over the listener, its callers and its keepers.
//!
//! Invariants:
//! - nothing here takes long: admission, restore and rebuild are other processes' work;
//! - what a launch is given is checked against the records as they are at that moment, not as they were;
//! - a caller that says nothing is let go after [`HELLO_LIMIT`], and there are at most [`CALLERS_MAX`] of them.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use engine::image::hot::HotImage;
use engine::savefile::RootHash;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{waitpid, WaitPidFlag, WaitStatus};

use super::channel::{Channel, Listener};
use super::policy::{self, Memory, Situation, Waiting};
use super::protocol::{Answer, DvmStatus, Hello, KeeperHears, KeeperSays, Spare, Status};
use crate::clones::{self, Keeping};
use crate::error::{Error, Kind, Result};
use crate::inputs::Guest;
use crate::machine::{self, Machine};
use crate::qube::Qube;
use crate::savefiles::{self, Serving};
use crate::state::{self, State};

/// A connection without a word is no launcher.
const HELLO_LIMIT: Duration = Duration::from_secs(2);
/// More callers at once than this are let go unheard: they launch without us.
const CALLERS_MAX: usize = 256;
/// A keeper that is told to end its spare does so within some milliseconds.
const END_LIMIT: Duration = Duration::from_secs(5);
/// How often the records are looked at, for those who change them without telling us.
const SURVEY_EVERY: Duration = Duration::from_secs(2);
/// A rebuild that failed is tried again after this time, or when the inputs have changed.
const REBUILD_AGAIN: Duration = Duration::from_secs(600);

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
    clones::sweep(state)?;
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
    };
    tracing::info!("listening on {}", path.display());
    let served = daemon.serve(&listener, &signals);
    daemon.dismiss_spares();
    let _ = std::fs::remove_file(&path);
    served
}

struct Daemon<'a> {
    state: &'a State,
    machine: &'a dyn Machine,
    options: Options,
    callers: Vec<(Channel, Instant)>,
    keepers: Vec<Keeper>,
    children: HashMap<i32, Child>,
    dvms: BTreeMap<String, Dvm>,
    surveyed: Option<Instant>,
}

/// A keeper's connection.
struct Keeper {
    channel: Channel,
    dvm: String,
    pid: u32,
    phase: Phase,
}

enum Phase {
    Making,
    Waiting { spare: Spare, agent: OwnedFd, lifeline: OwnedFd, since: Instant },
    Running(Spare),
}

/// A process we have started.
struct Child {
    dvm: String,
    what: Work,
    /// Whether the keeper has had a spare.
    ready: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Work {
    Keeper,
    Rebuild,
    /// Making the hot image of a template that has no spares, so that no launch has to.
    Admit,
}

/// What we know of a DVM template.
#[derive(Default)]
struct Dvm {
    wanted: u32,
    /// The savefile that serves, or why none does.
    serving: Option<std::result::Result<Serving, String>>,
    memory: Option<Memory>,
    last_launch: Option<Instant>,
    too_few_since: Option<Instant>,
    failures: Option<(u32, Instant)>,
    last_failure: Option<String>,
    /// The savefile whose admission we have started, once.
    admitted: Option<RootHash>,
    /// When the last rebuild was started, and for which inputs.
    rebuilt: Option<(Instant, String)>,
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
        let mut fds = vec![
            PollFd::new(signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(listener.as_fd(), PollFlags::POLLIN),
        ];
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
            Hello::Spare { dvm } => self.hand_out(&caller, &dvm),
            Hello::Status => caller.send(&Answer::Status(self.status()), &[]),
            Hello::Changed => {
                self.surveyed = None;
                caller.send(&Answer::Noted, &[])
            }
            Hello::Keeper { dvm, pid } => {
                self.keepers.push(Keeper { channel: caller, dvm, pid, phase: Phase::Making });
                Ok(())
            }
        };
        if let Err(error) = answered {
            tracing::info!("a caller went away: {error}");
        }
    }

    /// Gives the caller a spare, if there is one that is right at this moment.
    fn hand_out(&mut self, caller: &Channel, name: &str) -> io::Result<()> {
        self.survey(name);
        self.end_unfit(name);
        let Some(dvm) = self.dvms.get_mut(name) else {
            return caller.send(&Answer::None { rebuilding: false }, &[]);
        };
        dvm.last_launch = Some(Instant::now());
        let serves = matches!(dvm.serving, Some(Ok(_)));
        if dvm.memory == Some(Memory::Short) || !serves {
            let rebuilding = !serves && self.rebuild(name, true);
            return caller.send(&Answer::None { rebuilding }, &[]);
        }
        while let Some(at) = self.oldest_spare(name) {
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
                let now_ms =
                    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64;
                let age = Duration::from_millis(now_ms.saturating_sub(spare.ready_ms));
                let since = Instant::now().checked_sub(age).unwrap_or_else(Instant::now);
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

    fn note_failure(&mut self, name: &str, reason: String) {
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
                Work::Keeper if failed && !heard_of => {
                    self.note_failure(&child.dvm, "its keeper did not get to say why".to_owned());
                }
                Work::Rebuild if failed => tracing::warn!("the rebuild of {} failed", child.dvm),
                Work::Admit if failed => tracing::warn!("the hot image of {} could not be made", child.dvm),
                _ => {}
            }
            self.surveyed = None;
        }
        false
    }

    /// Looks at every DVM template's records.
    fn survey_all(&mut self) {
        self.surveyed = Some(Instant::now());
        let qubes = match Qube::all(self.state) {
            Ok(qubes) => qubes,
            Err(error) => return tracing::warn!("cannot read the qubes: {error}"),
        };
        let names: Vec<String> =
            qubes.into_iter().filter(|qube| qube.dvm().is_ok()).map(|qube| qube.name).collect();
        self.dvms.retain(|name, _| names.contains(name));
        for name in &names {
            self.survey(name);
            // A savefile that was removed is not missed before somebody launches.
            if matches!(self.dvms[name].serving, Some(Err(_))) && self.has_savefile(name) {
                self.rebuild(name, false);
            }
        }
    }

    /// Looks at one DVM template's records, as they are now.
    fn survey(&mut self, name: &str) {
        let guest = match Guest::load(self.state, name) {
            Ok(guest) => guest,
            Err(_) => return drop(self.dvms.remove(name)),
        };
        let dvm = self.dvms.entry(name.to_owned()).or_default();
        dvm.wanted = guest.dvm.spares.unwrap_or(self.options.spares);
        let host = self.machine.host(self.state, &guest.spec.kernel);
        dvm.serving = Some(match host.and_then(|host| savefiles::serving(self.state, &guest, &*host)) {
            Ok(serving) => serving,
            Err(error) => Err(crate::output::error_text(&error)),
        });
        dvm.memory = Some(memory(self.state, self.machine, &guest));
    }

    fn has_savefile(&self, name: &str) -> bool {
        Guest::load(self.state, name).is_ok_and(|guest| guest.dvm.savefile.is_some())
    }

    /// Has the savefile built, unless that was just tried in vain. Says whether it is being built.
    fn rebuild(&mut self, name: &str, asked: bool) -> bool {
        let rebuilding = self.children.values().any(|child| child.what == Work::Rebuild && child.dvm == name);
        if rebuilding || savefiles::is_building(self.state, name) {
            return true;
        }
        let Some(dvm) = self.dvms.get_mut(name) else { return false };
        let Ok(inputs) = Guest::load(self.state, name).and_then(|guest| {
            let host = self.machine.host(self.state, &guest.spec.kernel)?;
            crate::inputs::hash(&guest.manifest(host.facts()))
        }) else {
            return false;
        };
        let tried = dvm.rebuilt.as_ref();
        if !asked && tried.is_some_and(|(at, what)| *what == inputs && at.elapsed() < REBUILD_AGAIN) {
            return false;
        }
        match savefiles::start_rebuild(self.state, name) {
            Ok(child) => {
                tracing::info!("rebuilding the savefile of {name}");
                dvm.rebuilt = Some((Instant::now(), inputs));
                self.children.insert(
                    child.id() as i32,
                    Child { dvm: name.to_owned(), what: Work::Rebuild, ready: false },
                );
                true
            }
            Err(error) => {
                tracing::warn!("cannot start the rebuild of {name}: {error}");
                false
            }
        }
    }

    /// Does what the policy says. Answers when to look again.
    fn act(&mut self) -> Option<Instant> {
        let names: Vec<String> = self.dvms.keys().cloned().collect();
        let mut again = None;
        for name in &names {
            let (places, situation) = self.situation(name);
            let decision = policy::decide(&situation, Instant::now());
            let mut ended: Vec<usize> = decision.end.iter().map(|at| places[*at]).collect();
            ended.sort_unstable();
            for at in ended.into_iter().rev() {
                self.dismiss(at);
            }
            if decision.make {
                self.start(name, Work::Keeper);
            } else if situation.fresh && situation.wanted == 0 && !situation.making_somewhere {
                self.admit(name);
            }
            again = again.into_iter().chain(decision.again).min();
        }
        self.end_of_the_unknown();
        again
    }

    /// Ends what a launch must not be given.
    fn end_unfit(&mut self, name: &str) {
        let (places, mut situation) = self.situation(name);
        situation.wanted = u32::MAX;
        situation.memory = Memory::Plenty;
        let mut ended: Vec<usize> =
            policy::decide(&situation, Instant::now()).end.iter().map(|at| places[*at]).collect();
        ended.sort_unstable();
        for at in ended.into_iter().rev() {
            self.dismiss(at);
        }
    }

    /// Ends the spares of templates that are no more.
    fn end_of_the_unknown(&mut self) {
        for at in (0..self.keepers.len()).rev() {
            let keeper = &self.keepers[at];
            if matches!(keeper.phase, Phase::Waiting { .. }) && !self.dvms.contains_key(&keeper.dvm) {
                self.dismiss(at);
            }
        }
    }

    fn dismiss(&mut self, at: usize) {
        let keeper = self.keepers.remove(at);
        let _ = keeper.channel.send(&KeeperHears::End, &[]);
    }

    /// Ends all spares, those being made too, and waits until they are gone.
    fn dismiss_spares(&mut self) {
        let mut ending = Vec::new();
        for keeper in std::mem::take(&mut self.keepers) {
            if matches!(keeper.phase, Phase::Waiting { .. })
                && keeper.channel.send(&KeeperHears::End, &[]).is_ok()
            {
                ending.push(keeper);
            }
        }
        // One that is still making a spare does not listen. With it goes its QEMU; it holds nothing else. It is our child and not
        // waited for yet, so the number is still its own.
        for (pid, _) in self.children.iter().filter(|(_, child)| child.what != Work::Rebuild && !child.ready)
        {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(*pid), Signal::SIGKILL);
            let _ = waitpid(nix::unistd::Pid::from_raw(*pid), None);
        }
        for keeper in ending {
            let _ = keeper.channel.receive_within::<KeeperSays>(END_LIMIT);
        }
        let _ = clones::sweep(self.state);
    }

    /// One template as the policy sees it, and where its spares are among the keepers.
    fn situation(&mut self, name: &str) -> (Vec<usize>, Situation) {
        let making_somewhere = self.making(None) > 0;
        let making = self.making(Some(name));
        let (mut places, mut waiting) = (Vec::new(), Vec::new());
        let serving = self.dvms.get(name).and_then(|dvm| dvm.serving.as_ref()?.as_ref().ok()).cloned();
        for (at, keeper) in self.keepers.iter().enumerate().filter(|(_, keeper)| keeper.dvm == name) {
            if let Phase::Waiting { spare, since, .. } = &keeper.phase {
                let current = serving.as_ref().is_some_and(|serving| {
                    spare.root_hash == serving.root_hash && spare.inputs == serving.inputs
                });
                places.push(at);
                waiting.push(Waiting { since: *since, current });
            }
        }
        let dvm = self.dvms.entry(name.to_owned()).or_default();
        let enough = waiting.len() as u32 + making >= dvm.wanted;
        dvm.too_few_since = if enough { None } else { dvm.too_few_since.or_else(|| Some(Instant::now())) };
        let situation = Situation {
            wanted: dvm.wanted,
            age_max: self.options.age_max,
            fresh: serving.is_some(),
            memory: dvm.memory.unwrap_or(Memory::Enough),
            making_somewhere,
            making,
            waiting,
            last_launch: dvm.last_launch,
            too_few_since: dvm.too_few_since,
            failures: dvm.failures,
        };
        (places, situation)
    }

    /// How many spares (or hot images) of this template, or of any, are being made.
    fn making(&self, name: Option<&str>) -> u32 {
        let wanted = |dvm: &str| name.is_none_or(|name| name == dvm);
        let ours = self.children.values();
        let ours = ours.filter(|child| child.what != Work::Rebuild && !child.ready && wanted(&child.dvm));
        // An earlier daemon's keeper may still be at it.
        let others = self.keepers.iter().filter(|keeper| {
            let adopted = !self.children.contains_key(&(keeper.pid as i32));
            adopted && matches!(keeper.phase, Phase::Making) && wanted(&keeper.dvm)
        });
        (ours.count() + others.count()) as u32
    }

    /// Has the hot image made, if it is not there.
    fn admit(&mut self, name: &str) {
        let serving = self.dvms.get(name).and_then(|dvm| dvm.serving.as_ref()?.as_ref().ok());
        let Some(root) = serving.map(|serving| serving.root) else { return };
        let tried = self.dvms.get(name).is_some_and(|dvm| dvm.admitted == Some(root));
        if tried || HotImage::list(&self.state.hot()).is_ok_and(|admitted| admitted.contains(&root)) {
            return;
        }
        if let Some(dvm) = self.dvms.get_mut(name) {
            dvm.admitted = Some(root);
        }
        self.start(name, Work::Admit);
    }

    fn start(&mut self, name: &str, what: Work) {
        match start_helper(self.state, name, what) {
            Ok(pid) => drop(self.children.insert(pid, Child { dvm: name.to_owned(), what, ready: false })),
            Err(error) => self.note_failure(name, format!("cannot start a keeper: {error}")),
        }
    }

    fn status(&mut self) -> Status {
        self.survey_all();
        let names: Vec<String> = self.dvms.keys().cloned().collect();
        let dvms = names.iter().map(|name| self.dvm_status(name)).collect();
        let kept = self.keepers.iter().filter_map(|keeper| match &keeper.phase {
            Phase::Running(spare) => Some(format!("disp{}", spare.number)),
            _ => None,
        });
        Status { pid: std::process::id(), dvms, kept: kept.collect() }
    }

    fn dvm_status(&mut self, name: &str) -> DvmStatus {
        let (places, situation) = self.situation(name);
        let dvm = &self.dvms[name];
        DvmStatus {
            dvm: name.to_owned(),
            savefile: match &dvm.serving {
                Some(Ok(_)) => "fresh".to_owned(),
                Some(Err(reason)) => reason.clone(),
                None => "unknown".to_owned(),
            },
            spares_wanted: dvm.wanted,
            spares_ready: places.len() as u32,
            spares_preparing: situation.making,
            rebuilding: savefiles::is_building(self.state, name),
            last_failure: dvm.last_failure.clone(),
        }
    }
}

/// What poll found.
struct Ready {
    signal: bool,
    listener: bool,
    keepers: Vec<usize>,
    callers: Vec<usize>,
}

fn memory(state: &State, machine: &dyn Machine, guest: &Guest) -> Memory {
    let Some(number) = engine::identity::CloneNumber::new(0) else { return Memory::Enough };
    let one = machine::memory_needed(&guest.spec, &machine::confinement(state, machine, number));
    match machine.memory_available() {
        Some(available) if available < one + machine::HOST_RESERVE => Memory::Short,
        Some(available) if available < 2 * one + machine::HOST_RESERVE => Memory::Enough,
        _ => Memory::Plenty,
    }
}

/// Calls the keepers an earlier daemon has left: they greet as new ones do.
fn call_keepers(state: &State) -> Result<()> {
    for clone in clones::list(state)?.into_iter().filter(|clone| clone.keeping == Keeping::Keeper) {
        let Some(pid) = rustix::process::Pid::from_raw(clone.pid as i32) else { continue };
        let Ok(process) = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()) else {
            continue;
        };
        // Its record's lock is still held, so the process we have got hold of is the one that holds it.
        if clones::list(state)?.iter().any(|living| *living == clone) {
            let _ = rustix::process::pidfd_send_signal(process, rustix::process::Signal::USR1);
        }
    }
    Ok(())
}

/// Starts ourselves for one piece of work, in a process group of its own: a terminal's Ctrl-C is for us, not for clones that run.
fn start_helper(state: &State, dvm: &str, what: Work) -> io::Result<i32> {
    use std::os::unix::process::CommandExt;
    let mut command = Command::new(std::env::current_exe()?);
    let word = if what == Work::Admit { "admit" } else { "keeper" };
    command.arg("--root").arg(state.root()).args([word, dvm]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).process_group(0);
    Ok(command.spawn()?.id() as i32)
}

fn block_signals() -> io::Result<SignalFd> {
    let mut set = SigSet::empty();
    for signal in [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        set.add(signal);
    }
    set.thread_block()?;
    Ok(SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?)
}
