//! A keeper: one process that owns one clone, from before anybody asks for it to its end.
//!
//! Phases: *making* (restore, exercise, freeze, pause) → *waiting* (a spare) → *running* (somebody's) → gone. It ends
//! - while waiting: when the daemon says so, or has been gone for [`ADOPTION_LIMIT`];
//! - while running: when its lifeline ends, when its clone cannot go on, on SIGTERM.
//!
//! The clone's QEMU dies with the keeper, however that dies; the record it leaves is swept like any other clone's.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use engine::close;
use engine::host::{Confinement, HostError};
use engine::identity::Identity;
use engine::launch::{Clone, LaunchError};
use engine::spare;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::channel::Channel;
use super::protocol::{
    since_boot_ms, Hello, KeeperHears, KeeperSays, LifelineHears, LifelineSays, Spare, PROTOCOL,
};
use crate::agent_link::AgentLink;
use crate::clones::{Keeping, Lease};
use crate::error::{Error, Kind, Result};
use crate::inputs::{self, Guest};
use crate::machine::{self, Machine};
use crate::output::error_text;
use crate::run::noted::Noted;
use crate::savefiles::{self, Readiness};
use crate::session::Attended;
use crate::state::{self, State};

/// How long a spare waits for a daemon after its own has gone: longer than a daemon takes to be started again.
pub const ADOPTION_LIMIT: Duration = Duration::from_secs(30);
/// A connection that breaks within this time breaks again: the daemon does not understand us, or has no descriptors left. It is not
/// sought anew until it calls.
const RECONNECT_AFTER: Duration = Duration::from_secs(1);

/// A clone and who may want it.
struct Keeper<'a> {
    state: &'a State,
    dvm: String,
    spare: Spare,
    clone: Clone<Option<AgentLink>>,
    lease: Lease,
    /// Our end; the other goes out with the clone.
    lifeline: Option<Channel>,
    daemon: Option<Channel>,
    connected: Instant,
    alone_since: Option<Instant>,
    running: bool,
}

/// Whether the keeper goes on.
#[derive(PartialEq, Eq)]
enum Go {
    On,
    End,
}

/// Makes a spare of `dvm` for the daemon, and keeps it to its end.
pub fn run(state: &State, machine: &dyn Machine, dvm: &str) -> Result<()> {
    machine::forbid_core_dump()?;
    let mut signals = block_signals().map_err(Error::failed("block signals"))?;
    let path = state.daemon_socket();
    let daemon = Channel::connect(&path).map_err(Error::io("reach dispvmd at", &path))?;
    daemon.send(&greeting(dvm), &[]).map_err(Error::failed("greet dispvmd"))?;
    let (clone, spare, lease) = match make(state, machine, dvm) {
        Ok(made) => made,
        Err(error) => {
            let _ = daemon.send(&KeeperSays::Failed { reason: error_text(&error) }, &[]);
            return Err(error);
        }
    };
    let Clone { domain, agent } = clone;
    let mut keeper = Keeper {
        state,
        dvm: dvm.to_owned(),
        spare,
        clone: Clone { domain, agent: Some(agent) },
        lease,
        lifeline: None,
        daemon: Some(daemon),
        connected: Instant::now(),
        alone_since: None,
        running: false,
    };
    if keeper.report().is_err() {
        keeper.lose_daemon();
    }
    let outcome = keeper.keep(&mut signals);
    let Keeper { clone, mut lease, lifeline, running, .. } = keeper;
    if !running {
        lease.forget_name();
    }
    let closed = close::close(clone).map_err(Error::failed("end the clone"));
    drop(lease);
    if let Some(lifeline) = lifeline {
        let _ = lifeline.send(&LifelineSays::Gone, &[]);
    }
    outcome.and(closed.map(drop))
}

/// Makes the hot image of `dvm`, if it is not there. At the usual priority: a launch that comes meanwhile waits for it.
pub fn admit(state: &State, machine: &dyn Machine, dvm: &str) -> Result<()> {
    let _in_use = state::lock_shared(&state.use_lock())?;
    let guest = Guest::load(state, dvm)?;
    let host = machine.host(state, &guest.spec.kernel)?;
    match savefiles::ready(state, &guest, &*host)? {
        Readiness::Ready { .. } => Ok(()),
        Readiness::Not { reason } => Err(Error::new(Kind::Unusable, reason)),
    }
}

/// As a launch does, but for nobody yet.
fn make(state: &State, machine: &dyn Machine, dvm: &str) -> Result<(Clone<AgentLink>, Spare, Lease)> {
    let in_use = state::lock_shared(&state.use_lock())?;
    let guest = Guest::load(state, dvm)?;
    let host = machine.host(state, &guest.spec.kernel)?;
    let inputs = inputs::hash(&guest.manifest(host.facts()))?;
    let (generation, root_hash, files) = match savefiles::ready(state, &guest, &*host)? {
        Readiness::Ready { generation, root_hash, files } => (generation, root_hash, files),
        Readiness::Not { reason } => return Err(Error::new(Kind::Unusable, reason)),
    };
    let template = (guest.dvm.template.clone(), guest.template.generation);
    let lease = Lease::take(state, dvm, &root_hash, template, Keeping::Keeper, None)?;
    drop(in_use);
    let confinement =
        Confinement { background: true, ..machine::confinement(state, machine, lease.number()) };
    machine::check_memory(state, machine, &guest.spec, &confinement)?;
    let identity = Identity::fresh(lease.number()).map_err(Error::failed("draw an identity"))?;
    let connect = |pipe| AgentLink::new(pipe).limited(machine.agent_limits());
    let clone =
        spare::prepare(&*host, &guest.spec, files, &confinement, &identity, connect).map_err(make_error)?;
    if !clone.agent.is_quiet() {
        // Whoever gets the spare would take it for the answer to what was asked.
        return Err(Error::new(Kind::Failed, "cannot make a spare: its agent goes on talking unasked"));
    }
    let spare = Spare {
        number: lease.number().get(),
        machine_id: identity.machine_id,
        host: host.facts().kind.clone(),
        generation,
        root_hash,
        inputs,
        ready_ms: since_boot_ms(),
        protocol: PROTOCOL,
    };
    Ok((clone, spare, lease))
}

fn greeting(dvm: &str) -> Hello {
    Hello::Keeper { protocol: PROTOCOL, dvm: dvm.to_owned(), pid: std::process::id() }
}

fn with_source(error: &HostError) -> String {
    std::error::Error::source(error).map_or(error.to_string(), |source| format!("{error}: {source}"))
}

fn make_error(error: LaunchError) -> Error {
    Error::new(Kind::Failed, "cannot make a spare").because(error)
}

impl Keeper<'_> {
    fn keep(&mut self, signals: &mut SignalFd) -> Result<()> {
        loop {
            let ready = self.wait(signals)?;
            let go = [
                ready.signal.then(|| self.heed(signals)),
                ready.daemon.then(|| self.listen()),
                ready.lifeline.then(|| self.obey()),
                ready.domain.then(|| self.serve()),
                self.is_forgotten().then_some(Go::End),
            ];
            if go.contains(&Some(Go::End)) {
                return Ok(());
            }
        }
    }

    fn wait(&self, signals: &SignalFd) -> Result<Ready> {
        let nobody = signals.as_fd();
        let interest = |on: bool| if on { PollFlags::POLLIN } else { PollFlags::empty() };
        fn watched<'a>(channel: Option<&'a Channel>, nobody: BorrowedFd<'a>) -> (bool, BorrowedFd<'a>) {
            channel.map_or((false, nobody), |channel| (true, channel.as_fd()))
        }
        // The lifeline of a clone that waits is the daemon's to hold: it ends with the daemon, and the clone does not.
        let lifeline = watched(self.lifeline.as_ref().filter(|_| self.running), nobody);
        let daemon = watched(self.daemon.as_ref(), nobody);
        let mut fds = [
            PollFd::new(signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.clone.domain.events(), PollFlags::POLLIN),
            PollFd::new(daemon.1, interest(daemon.0)),
            PollFd::new(lifeline.1, interest(lifeline.0)),
        ];
        let timeout = match self.alone_since.filter(|_| !self.running) {
            None => PollTimeout::NONE,
            Some(since) => {
                let left = ADOPTION_LIMIT.saturating_sub(since.elapsed());
                PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX)
            }
        };
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(Error::failed("wait for the clone")(io::Error::from(error))),
        }
        let is_ready = |at: usize| fds[at].revents().is_some_and(|flags| !flags.is_empty());
        Ok(Ready {
            signal: is_ready(0),
            domain: is_ready(1),
            daemon: daemon.0 && is_ready(2),
            lifeline: lifeline.0 && is_ready(3),
        })
    }

    fn heed(&mut self, signals: &mut SignalFd) -> Go {
        let signal = signals.read_signal().ok().flatten();
        match signal.and_then(|info| Signal::try_from(info.ssi_signo as i32).ok()) {
            // A daemon calls those that an earlier one has left behind.
            Some(Signal::SIGUSR1) if self.daemon.is_none() => self.look_for_daemon(),
            Some(Signal::SIGTERM | Signal::SIGINT | Signal::SIGQUIT) => return Go::End,
            _ => {}
        }
        Go::On
    }

    fn listen(&mut self) -> Go {
        let Some(daemon) = &self.daemon else { return Go::On };
        match daemon.receive::<KeeperHears>() {
            Ok(Some((KeeperHears::HandedOut, _))) => {
                self.running = true;
                self.clone.agent = None;
                if let Err(error) = self.clone.domain.run() {
                    return self.give_up(&error);
                }
                // Its owner does not wait for this.
                if let Err(error) = self.lease.hand_out() {
                    tracing::warn!("disp{}: {}", self.spare.number, error_text(&error));
                }
            }
            Ok(Some((KeeperHears::End, _))) => return Go::End,
            Ok(None) | Err(_) => self.lose_daemon(),
        }
        Go::On
    }

    /// Does what the clone's owner asks; its end is the clone's.
    fn obey(&mut self) -> Go {
        let Some(lifeline) = &self.lifeline else { return Go::On };
        let Ok(Some((asked, _))) = lifeline.receive::<LifelineHears>() else { return Go::End };
        let mut noted = Noted::new(&mut self.clone.domain, &mut self.lease);
        let done = match asked {
            LifelineHears::Pause => noted.pause().map(|()| LifelineSays::Paused),
            LifelineHears::Unpause => noted.unpause().map(|()| LifelineSays::Running),
        };
        let says = done.unwrap_or_else(|error| LifelineSays::Refused { reason: with_source(&error) });
        // One that has gone is heard of at the next turn.
        let _ = lifeline.send(&says, &[]);
        Go::On
    }

    fn serve(&mut self) -> Go {
        match self.clone.domain.serve() {
            Ok(()) => Go::On,
            Err(error) => self.give_up(&error),
        }
    }

    fn give_up(&self, error: &HostError) -> Go {
        tracing::info!("disp{} cannot go on: {error}", self.spare.number);
        if let Some(lifeline) = self.lifeline.as_ref().filter(|_| self.running) {
            let _ = lifeline.send(&LifelineSays::Failed { reason: with_source(error) }, &[]);
        }
        Go::End
    }

    fn lose_daemon(&mut self) {
        self.daemon = None;
        self.alone_since = Some(Instant::now());
        // It may have been replaced already.
        if self.connected.elapsed() >= RECONNECT_AFTER {
            self.look_for_daemon();
        }
    }

    fn look_for_daemon(&mut self) {
        let Ok(daemon) = Channel::connect(&self.state.daemon_socket()) else { return };
        if daemon.send(&greeting(&self.dvm), &[]).is_ok() {
            self.daemon = Some(daemon);
            self.connected = Instant::now();
            self.alone_since = None;
            if self.report().is_err() {
                self.daemon = None;
                self.alone_since = Some(Instant::now());
            }
        }
    }

    /// Tells the daemon what there is. A clone that waits goes with a lifeline of its own, so that none is left with an earlier daemon.
    fn report(&mut self) -> io::Result<()> {
        let Some(daemon) = &self.daemon else { return Ok(()) };
        if self.running {
            return daemon.send(&KeeperSays::Running(self.spare.clone()), &[]);
        }
        let (ours, theirs) = Channel::pair()?;
        self.lifeline = Some(ours);
        let Some(link) = &self.clone.agent else { return Ok(()) };
        daemon.send(&KeeperSays::Ready(self.spare.clone()), &[link.as_fd(), theirs.as_fd()])
    }

    fn is_forgotten(&self) -> bool {
        !self.running && self.alone_since.is_some_and(|since| since.elapsed() >= ADOPTION_LIMIT)
    }
}

/// What poll found.
struct Ready {
    signal: bool,
    domain: bool,
    daemon: bool,
    lifeline: bool,
}

fn block_signals() -> io::Result<SignalFd> {
    let mut set = SigSet::empty();
    for signal in [Signal::SIGUSR1, Signal::SIGTERM, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGHUP] {
        set.add(signal);
    }
    set.thread_block()?;
    Ok(SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?)
}
