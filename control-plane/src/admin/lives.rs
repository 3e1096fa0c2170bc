//! Qubes removed, started, paused and ended.
//!
//! Checks, their order, exceptions and events as in QubesOS/qubes-core-admin `qubes/vm/qubesvm.py` (start, shutdown, kill, pause, unpause)
//! and `qubes/vm/mix/net.py` (on_domain_pre_shutdown: a QubesVMError), R4.1 and later; but one that is asked to start and is not halted is told so,
//! as by R4.0, which later releases take silently for done. No lock is held while a qube starts or ends.

use std::time::{Duration, Instant};

use admin_api::{Event, Kind};

use super::answer::{enforce, exception, quoted, Answer, Refusal};
use super::properties;
use super::settings;
use super::world::{Context, Vm, VmKind, World};
use crate::calls;
use crate::calls::message::Control;
use crate::clones::{self, CloneRecord};
use crate::daemon::client;
use crate::error::Error;
use crate::templates;

/// Ending a clone is some milliseconds' work, unless its keeper is at a spill, whose steps have 20 s each.
const KILL_LIMIT: Duration = Duration::from_secs(30);
const END_POLL: Duration = Duration::from_millis(5);
/// Where its property cannot be read as one.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(60);

/// Removes a qube that is halted and that nothing names.
pub(super) fn remove(context: &Context, name: &str) -> Answer<()> {
    let _lock = settings::lock(&context.state)?;
    let world = World::new(context);
    let vm = world.vm(name)?;
    if world.power_state(&vm)? != "Halted" {
        return Err(exception(Kind::VmNotHalted, format!("Domain is not powered off: {}", quoted(name))));
    }
    let users = users(&world, &vm)?;
    if !users.is_empty() {
        let why = format!("Domain is in use: {}; it is {}", quoted(name), users.join(", "));
        return Err(exception(Kind::VmInUse, why));
    }
    templates::remove(&context.state, &vm.name)?;
    client::changed(&context.state);
    Ok(())
}

/// What names a qube, itself aside.
fn users(world: &World<'_>, vm: &Vm) -> Answer<Vec<String>> {
    let mut users = properties::naming(world.system()?, &vm.name);
    for other in world.all()?.into_iter().filter(|other| other.name != vm.name) {
        let is_template = other.template() == Some(&vm.name) && !world.is_spare(&other);
        users.extend(is_template.then(|| format!("template of {}", other.name)));
        let named = properties::of(Some(&other)).filter(|property| {
            property.kind == admin_api::lines::Type::Vm
                && property.name != "template"
                && other.settings.properties.get(property.name).is_some_and(|set| *set == vm.name)
        });
        users.extend(named.map(|property| format!("{} of {}", property.name, other.name)));
    }
    Ok(users)
}

/// Ends a disposable, or a qube that runs itself, and waits until it is gone.
pub(super) fn kill(context: &Context, name: &str) -> Answer<()> {
    let world = World::new(context);
    let vm = world.vm(name)?;
    refuse_dom0(&vm, "kill")?;
    let clone = world.running(&vm)?.ok_or_else(|| not_started(&vm.name))?;
    end(context, clone)?;
    // Of one that was killed in its first moments, the record that was to go with it is left.
    Ok(clones::sweep(&context.state)?)
}

/// Starts a qube, its netvm first, and waits until its agent is up.
pub(super) fn start(context: &Context, name: &str) -> Answer<()> {
    match start_after_netvm(context, name, &mut Vec::new())? {
        true => Ok(()),
        false => Err(exception(Kind::VmNotHalted, format!("Domain is not powered off: {}", quoted(name)))),
    }
}

/// Whether it was halted. `clients` are the qubes for which it is started.
fn start_after_netvm(context: &Context, name: &str, clients: &mut Vec<String>) -> Answer<bool> {
    let world = World::new(context);
    let vm = world.vm(name)?;
    if world.power_state(&vm)? != "Halted" {
        return Ok(false);
    }
    let tell = |event: Event| context.events.fire(&event);
    tell(Event::new(&vm.name, "domain-pre-start").detail("start_guid", "True"));
    let netvm = start_netvm(&world, &vm, clients);
    let started = netvm.and_then(|()| Ok(client::start(&context.state, &vm.name)?));
    started.inspect_err(|refusal| {
        tell(Event::new(&vm.name, "domain-start-failed").detail("reason", refusal.to_string()));
    })
}

/// Has the netvm of a qube that is to start run before it. dom0 runs, and so does a disposable without a record.
fn start_netvm(world: &World<'_>, vm: &Vm, clients: &mut Vec<String>) -> Answer<()> {
    let name = world.value(vm, "netvm")?;
    if name.is_empty() {
        return Ok(());
    }
    let cannot = |why: String| exception(Kind::QubesException, format!("the netvm of {} {why}", vm.name));
    let netvm = world.find(&name)?.ok_or_else(|| cannot(format!("is not there: {name}")))?;
    clients.push(vm.name.clone());
    // Properties that are set one by one make no loop; records that were edited may.
    if clients.contains(&netvm.name) {
        return Err(cannot(format!(
            "is {name}, which has its network from it: loops in network are unsupported"
        )));
    }
    let started = match world.power_state(&netvm)? {
        "Halted" => start_after_netvm(world.context, &netvm.name, clients),
        // Somebody else starts it: it is waited for.
        "Transient" => client::start(world.state, &netvm.name).map_err(Refusal::from),
        _ => Ok(false),
    };
    started.map(drop).map_err(|refusal| cannot(format!("does not start: {refusal}")))
}

/// Asks a qube to shut down (`force`: also if others have their network from it; `wait`: until it has).
pub(super) fn shutdown(context: &Context, name: &str, flags: &str) -> Answer<()> {
    let flags: Vec<&str> = flags.split('+').filter(|flag| !flag.is_empty()).collect();
    enforce(flags.iter().all(|flag| matches!(*flag, "force" | "wait")), "unknown flags")?;
    let world = World::new(context);
    let vm = world.vm(name)?;
    refuse_dom0(&vm, "shut down")?;
    let clone = world.running(&vm)?.ok_or_else(|| not_started(&vm.name))?;
    refuse_spare(&world, &vm)?;
    let limit = world.value(&vm, "shutdown_timeout")?.parse().map_or(SHUTDOWN_LIMIT, Duration::from_secs);
    context.events.fire(&Event::new(&vm.name, "domain-pre-shutdown"));
    let may = if flags.contains(&"force") { Ok(()) } else { check_no_clients(&world, &vm) };
    let ask = || Ok(calls::client::control(&context.state, &vm.name, Control::Shutdown)?);
    let done = may.and_then(|()| ask()).and_then(|()| match flags.contains(&"wait") {
        true if !await_end(context, clone, limit)? => Err(exception(
            Kind::VmShutdownTimeout,
            format!("Domain shutdown timed out: {}", quoted(&vm.name)),
        )),
        _ => Ok(()),
    });
    done.inspect_err(|refusal| {
        let reason = refusal.to_string();
        context.events.fire(&Event::new(&vm.name, "domain-shutdown-failed").detail("reason", reason));
    })
}

fn check_no_clients(world: &World<'_>, vm: &Vm) -> Answer<()> {
    let mut clients = Vec::new();
    for other in world.all()? {
        if world.power_state(&other)? != "Halted" && world.value(&other, "netvm")? == vm.name {
            clients.push(other.name.clone());
        }
    }
    match clients.is_empty() {
        true => Ok(()),
        false => Err(exception(
            Kind::Vm,
            format!("There are other VMs connected to this VM: {}", clients.join(", ")),
        )),
    }
}

/// Stops a qube's CPUs.
pub(super) fn pause(context: &Context, name: &str) -> Answer<()> {
    let world = World::new(context);
    let vm = world.vm(name)?;
    refuse_dom0(&vm, "pause")?;
    if world.power_state(&vm)? != "Running" {
        let why = format!("Domain not running (either powered off or paused): {}", quoted(&vm.name));
        return Err(exception(Kind::VmNotRunning, why));
    }
    Ok(calls::client::control(&context.state, &vm.name, Control::Pause)?)
}

/// Lets them run again.
pub(super) fn unpause(context: &Context, name: &str) -> Answer<()> {
    let world = World::new(context);
    let vm = world.vm(name)?;
    if world.power_state(&vm)? != "Paused" {
        return Err(exception(Kind::VmNotPaused, format!("Domain is not paused: {}", quoted(&vm.name))));
    }
    refuse_spare(&world, &vm)?;
    Ok(calls::client::control(&context.state, &vm.name, Control::Unpause)?)
}

/// That dom0 is on, whoever would start it is told as of any other qube; `qvm-run dom0` relies on it.
fn refuse_dom0(vm: &Vm, to: &str) -> Answer<()> {
    match vm.kind {
        VmKind::Admin => Err(exception(Kind::Vm, format!("Cannot {to} dom0"))),
        _ => Ok(()),
    }
}

fn refuse_spare(world: &World<'_>, vm: &Vm) -> Answer<()> {
    match world.is_spare(vm) {
        true => Err(exception(
            Kind::QubesException,
            format!("{} is kept ready for whoever asks for a disposable next", vm.name),
        )),
        false => Ok(()),
    }
}

fn not_started(name: &str) -> Refusal {
    exception(Kind::VmNotStarted, format!("Domain is powered off: {}", quoted(name)))
}

/// Whoever keeps a clone ends it on SIGTERM: its launcher as well as a keeper of dispvmd's.
fn end(context: &Context, clone: &CloneRecord) -> Answer<()> {
    let pid = rustix::process::Pid::from_raw(clone.pid as i32);
    let process =
        pid.and_then(|pid| rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).ok());
    // The record's lock is still held, so the process we have got hold of is the one that holds it.
    if let Some(process) = process.filter(|_| is_alive(context, clone).unwrap_or(false)) {
        rustix::process::pidfd_send_signal(process, rustix::process::Signal::TERM)
            .map_err(|error| Error::failed("end the clone's keeper")(std::io::Error::from(error)))?;
    }
    match await_end(context, clone, KILL_LIMIT)? {
        true => Ok(()),
        false => {
            let why = format!("{} has not ended within {} s", clone.name, KILL_LIMIT.as_secs());
            Err(exception(Kind::Vm, why))
        }
    }
}

/// Waits until a clone has gone; whether it has.
fn await_end(context: &Context, clone: &CloneRecord, limit: Duration) -> Answer<bool> {
    // A limit beyond what clocks count is none.
    let deadline = Instant::now().checked_add(limit);
    while is_alive(context, clone)? {
        if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            return Ok(false);
        }
        std::thread::sleep(END_POLL);
    }
    Ok(true)
}

/// Whether this clone, and no later one of its name, lives.
fn is_alive(context: &Context, clone: &CloneRecord) -> Answer<bool> {
    let is_it = |other: &CloneRecord| {
        (&other.name, other.started, other.pid) == (&clone.name, clone.started, clone.pid)
    };
    Ok(clones::list(&context.state)?.iter().any(is_it))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clones::{Keeping, Lease};
    use crate::state::State;

    #[test]
    fn a_shutdown_timeout_of_any_number_of_seconds_is_a_limit() {
        let folder = tempfile::tempdir().unwrap();
        let context = Context::new(State::open(folder.path()).unwrap());
        let template = ("debian-12".to_owned(), 1);
        let lease = Lease::take(&context.state, "d", "", template, Keeping::Launcher, None).unwrap();
        let clone = clones::list(&context.state).unwrap().remove(0);
        assert!(!await_end(&context, &clone, Duration::ZERO).unwrap());
        drop(lease);
        assert!(await_end(&context, &clone, Duration::from_secs(u64::MAX)).unwrap());
    }
}
