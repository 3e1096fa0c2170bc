//! Qubes removed, started and ended.

use std::time::{Duration, Instant};

use admin_api::Kind;

use super::answer::{exception, silent, Answer, Refusal};
use super::properties;
use super::settings;
use super::world::{Context, Vm, VmKind, World};
use crate::clones::{self, CloneRecord};
use crate::daemon::client;
use crate::error::Error;
use crate::templates;

/// Ending a clone is some milliseconds' work, unless its keeper is at a spill, whose steps have 20 s each.
const KILL_LIMIT: Duration = Duration::from_secs(30);
const KILL_POLL: Duration = Duration::from_millis(5);

/// Removes a qube that is halted and that nothing names.
pub(super) fn remove(context: &Context, name: &str) -> Answer<()> {
    let _lock = settings::lock(&context.state)?;
    let world = World::new(context);
    let vm = world.vm(name)?;
    if world.power_state(&vm)? != "Halted" {
        return Err(exception(Kind::VmNotHalted, format!("Domain is not powered off: {name:?}")));
    }
    let users = users(&world, &vm)?;
    if !users.is_empty() {
        let why = format!("Domain is in use: {name:?}; it is {}", users.join(", "));
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
    if matches!(vm.kind, VmKind::Admin) {
        return Err(silent("dom0 is not killed"));
    }
    let clone = world.running(&vm)?.ok_or_else(|| not_started(&vm.name))?;
    end(context, clone)?;
    // Of one that was killed in its first moments, the record that was to go with it is left.
    Ok(clones::sweep(&context.state)?)
}

fn not_started(name: &str) -> Refusal {
    exception(Kind::VmNotStarted, format!("Domain is powered off: {name:?}"))
}

/// Whoever keeps a clone ends it on SIGTERM: its launcher as well as a keeper of dispvmd's.
fn end(context: &Context, clone: &CloneRecord) -> Answer<()> {
    let lives = || clones::list(&context.state).map(|clones| clones.contains(clone));
    let pid = rustix::process::Pid::from_raw(clone.pid as i32);
    let process =
        pid.and_then(|pid| rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).ok());
    // The record's lock is still held, so the process we have got hold of is the one that holds it.
    if let Some(process) = process.filter(|_| lives().unwrap_or(false)) {
        rustix::process::pidfd_send_signal(process, rustix::process::Signal::TERM)
            .map_err(|error| Error::failed("end the clone's keeper")(std::io::Error::from(error)))?;
    }
    let deadline = Instant::now() + KILL_LIMIT;
    while lives()? {
        if Instant::now() >= deadline {
            let why = format!("{} has not ended within {} s", clone.name, KILL_LIMIT.as_secs());
            return Err(exception(Kind::Vm, why));
        }
        std::thread::sleep(KILL_POLL);
    }
    Ok(())
}
