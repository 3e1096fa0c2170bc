//! The runner of a qube: one process, in a session of its own, which outlives whoever had it started.
//!
//! It takes the qube's lock, boots or restores it, says so, holds it, and ends with it. What it knows of the qube is in its record
//! and that record's lock, so that every daemon sees the same, the next one too.
//!
//! - A TemplateVM or AppVM that switches itself off keeps its volume; however else it ends (SIGTERM, the runner killed, the guest dead),
//!   nothing of the run is kept.
//! - Of a disposable nothing is ever kept; one with `auto_cleanup` goes with its record.
//! - The guest's processes die with the runner, however that dies; the record it leaves is swept like any other clone's.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Instant;

use engine::close;
use engine::host::Domain;
use engine::identity::Identity;
use engine::launch::Clone;
use engine::timeline::Timeline;
use nix::fcntl::Flock;

use super::impatient::Impatient;
use super::noted::Noted;
use super::prepare::Prepared;
use super::subject::{Overrides, Subject};
use super::{hostname, tell_stale};
use crate::agent_link::AgentLink;
use crate::calls::Exchange;
use crate::clones::{Claim, Keeping, Lease, Power};
use crate::daemon::channel::Channel;
use crate::daemon::protocol::RunnerSays;
use crate::error::{Error, Kind, Result};
use crate::inputs;
use crate::machine::{self, Machine};
use crate::make::{Connect, Maker, Rebuild};
use crate::output::error_text;
use crate::qube::{self, Class, Disposable, Qube};
use crate::savefiles;
use crate::session::{Ending, Signals};
use crate::state::{self, State};
use crate::templates;

/// A guest that has booted, or was restored.
struct Guest {
    domain: Box<dyn Domain>,
    link: AgentLink,
    lease: Lease,
    /// What is kept when it switches itself off.
    kept: Option<(Subject, File)>,
}

/// A qube that is up.
struct Held {
    domain: Box<dyn Domain>,
    exchange: Exchange,
    signals: Signals,
    lease: Lease,
    kept: Option<(Subject, File)>,
    /// That it runs.
    lock: Flock<File>,
}

/// Why a qube is not up.
enum Failure {
    RunsAlready,
    Other(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure::Other(error)
    }
}

/// Runs the qube `name` to its end. Our standard input is the channel to whoever had us started, and hears [`RunnerSays`].
/// With `rebuild`, savefiles that do not serve, or serve no more, are built anew.
pub fn run(state: &State, machine: &dyn Machine, name: &str, rebuild: bool) -> Result<()> {
    // Whose session we were in may end. Refused to who leads one, which is as good.
    let _ = nix::unistd::setsid();
    machine::forbid_core_dump()?;
    let starter = starter().map_err(Error::failed("take our standard input"))?;
    // That nobody waits for our word any more is no reason for anything.
    let _ = starter.send(&RunnerSays::Starting, &[]);
    match begin(state, machine, name, rebuild) {
        Ok(held) => {
            tell(starter, &RunnerSays::Up);
            let ended = hold(state, name, held, rebuild);
            templates::remove_ended(state, name)?;
            ended
        }
        Err(Failure::RunsAlready) => {
            tell(starter, &RunnerSays::RunsAlready);
            Ok(())
        }
        Err(Failure::Other(error)) => {
            // When it is told, a disposable that could not be started has gone.
            let removed = templates::remove_ended(state, name);
            tell(starter, &RunnerSays::Failed { reason: error_text(&error) });
            removed.and(Err(error))
        }
    }
}

/// Says how it went, and is done with the starter.
fn tell(starter: Channel, says: &RunnerSays) {
    if let Err(error) = starter.send(says, &[]) {
        tracing::debug!("who had the qube started has gone: {error}");
    }
}

/// Our standard input, which is nobody's afterwards: the guest's processes shall not hold it.
pub(crate) fn starter() -> io::Result<Channel> {
    let starter = io::stdin().as_fd().try_clone_to_owned()?;
    let nothing = File::open("/dev/null")?;
    nix::unistd::dup2(nothing.as_raw_fd(), io::stdin().as_raw_fd())?;
    Ok(Channel::from(starter))
}

fn begin(
    state: &State,
    machine: &dyn Machine,
    name: &str,
    rebuild: bool,
) -> std::result::Result<Held, Failure> {
    let impatient = Impatient::begin().map_err(Error::failed("block signals"))?;
    Qube::load(state, name)?;
    let lock = qube::hold_running(state, name).map_err(|error| match error.kind {
        Kind::Refused => Failure::RunsAlready,
        _ => Failure::Other(error),
    })?;
    machine::sweep(state, machine)?;
    // As it is now that nobody else starts or removes it.
    let qube = Qube::load(state, name)?;
    let guest = match &qube.class {
        Class::DispVM(disposable) => restore(state, machine, &qube, disposable, rebuild)?,
        Class::TemplateVM(_) | Class::AppVM(_) => boot(state, machine, name)?,
    };
    let signals = impatient.end().map_err(Error::failed("listen to signals"))?;
    let Guest { domain, link, mut lease, kept } = guest;
    let exchange = Exchange::new(state, name, link)?;
    lease.tell(Power::Running)?;
    Ok(Held { domain, exchange, signals, lease, kept, lock })
}

fn boot(state: &State, machine: &dyn Machine, name: &str) -> Result<Guest> {
    let prepared = Prepared::new(state, machine, name, &Overrides::default(), Keeping::Runner)?;
    let limits = machine.agent_limits();
    let connect = |pipe| AgentLink::new(pipe).limited(limits).named(hostname(name));
    let Clone { domain, agent } = prepared.boot(connect, &mut Timeline::since(Instant::now()))?;
    let Prepared { subject, lease, written, .. } = prepared;
    Ok(Guest { domain, link: agent, lease, kept: Some((subject, written)) })
}

/// As a launch does, but under the qube's own name, and without a command.
fn restore(
    state: &State,
    machine: &dyn Machine,
    qube: &Qube,
    disposable: &Disposable,
    rebuild: bool,
) -> Result<Guest> {
    let name = &qube.name;
    let in_use = state::lock_shared(&state.use_lock())?;
    let guest = inputs::Guest::load(state, &disposable.template)?;
    let host = machine.host(state, &guest.spec.kernel)?;
    let rebuild = if rebuild { Rebuild::Start } else { Rebuild::No };
    let maker = Maker { state, guest: &guest, host: &*host, rebuild, say: &say };
    let image = maker.ready_image()?;
    let claim = Claim {
        dvm: &guest.dvm_name,
        root_hash: image.as_ref().map_or("", |image| &image.root_hash),
        template: (guest.dvm.template.clone(), guest.template.generation),
        keeping: Keeping::Runner,
        label: Some(&qube.label),
        qube: Some(name),
    };
    let lease = Lease::claim(state, claim)?;
    drop(in_use);
    let confinement = machine::confinement(state, machine, lease.number());
    machine::check_memory(state, machine, &guest.spec, &confinement)?;
    let identity = Identity::fresh(lease.number()).map_err(Error::failed("draw an identity"))?;
    let limits = machine.agent_limits();
    let connect = || -> Box<Connect> {
        let hostname = hostname(name);
        Box::new(move |pipe| AgentLink::new(pipe).limited(limits).named(hostname))
    };
    let timeline = &mut Timeline::since(Instant::now());
    let (Clone { domain, agent }, _) = maker.make(image, &confinement, &identity, connect, timeline)?;
    Ok(Guest { domain, link: agent, lease, kept: None })
}

/// Carries calls into it until it ends, and keeps what is to be kept.
fn hold(state: &State, name: &str, held: Held, rebuild: bool) -> Result<()> {
    let Held { mut domain, mut exchange, mut signals, mut lease, kept, lock } = held;
    let mut timeline = Timeline::since(Instant::now());
    let ended = exchange.run(&mut Noted::new(&mut domain, &mut lease), None, &mut signals, &mut timeline);
    // No more calls, and no more guest, before its volume is anybody else's.
    drop(exchange);
    let off = matches!(ended, Ok(Ending::PoweredOff));
    let closed = close::close(Clone { domain, agent: () });
    if !off {
        closed.map_err(Error::failed("end the qube"))?;
    }
    let next = match (kept.filter(|_| off), &ended) {
        (Some((subject, written)), _) => subject.keep(state, name, &written)?,
        (None, Ok(Ending::Signal(signal))) => {
            say(&format!("{name} was ended by {signal}"));
            None
        }
        (None, _) => None,
    };
    templates::remove_ending(state, name, &lock)?;
    drop((lease, lock));
    if next.is_some() {
        savefiles::collect(state)?;
        tell_stale(state, name, rebuild, &say)?;
    }
    ended.map(drop).map_err(Error::failed("hold the qube"))
}

/// Our standard error is the qube's log.
fn say(text: &str) {
    eprintln!("dispvmd: {text}");
}
