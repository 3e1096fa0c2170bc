//! Qubes made, removed and killed.

use std::fs::File;
use std::io::Read;
use std::time::{Duration, Instant};

use admin_api::lines::pairs;
use admin_api::Kind;

use super::answer::{enforce, exception, silent, Answer};
use super::properties;
use super::settings::{self, Owner, Settings};
use super::world::{uuid_text, Context, Vm, VmKind, World};
use crate::clones::{self, CloneRecord};
use crate::daemon::client;
use crate::error::Error;
use crate::qube::{check_name, Dvm, LABELS};
use crate::templates;

/// Volumes of a new AppVM in MiB, as `dispvm-qube add-dvm` makes them.
const PRIVATE_MIB: u64 = 2048;
const VOLATILE_MIB: u64 = 1024;
/// Ending a clone is some milliseconds' work, unless its keeper is at a spill, whose steps have 20 s each.
const KILL_LIMIT: Duration = Duration::from_secs(30);
const KILL_POLL: Duration = Duration::from_millis(5);

/// Makes an AppVM (`admin.vm.Create.AppVM+TEMPLATE`, payload `name=NAME label=LABEL`).
pub(super) fn create_app(context: &Context, source: &str, template: &str, payload: &[u8]) -> Answer<()> {
    let (name, label) = name_and_label(payload)?;
    check_name(&name).map_err(|_| exception(Kind::Value, format!("Illegal qube name: {name:?}")))?;
    if !LABELS.contains(&label.as_str()) {
        return Err(exception(Kind::LabelNotFound, format!("Invalid label: {label:?}")));
    }
    let _lock = settings::lock(&context.state)?;
    let world = World::new(context);
    let template = match template {
        "" => world.system_value("default_template")?,
        template => template.to_owned(),
    };
    if template.is_empty() {
        return Err(exception(
            Kind::NoTemplate,
            "Template for this domain not found: there is no default_template",
        ));
    }
    // A template that is not there is not this caller's to ask about.
    let based_on = world.find(&template)?.ok_or_else(|| silent("a template that is not there"))?;
    if !matches!(based_on.kind, VmKind::Template(_)) {
        return Err(exception(Kind::Value, format!("{template} is no TemplateVM")));
    }
    // A disposable's name, free now, may be drawn at any time.
    let is_drawn = name.strip_prefix("disp").is_some_and(|rest| rest.parse::<u16>().is_ok());
    if is_drawn || name == admin_api::ADMIN_VM || world.find(&name)?.is_some() {
        return Err(exception(Kind::VmAlreadyExists, format!("VM {name} already exists")));
    }
    let number =
        |property: &str| world.value(&based_on, property).map(|text| text.parse().unwrap_or_default());
    let dvm = Dvm {
        template,
        template_for_dispvms: false,
        memory_mib: number("memory")?,
        vcpus: number("vcpus")? as u32,
        net: "none".to_owned(),
        private_mib: PRIVATE_MIB,
        private_generation: 1,
        private_id: String::new(),
        volatile_mib: VOLATILE_MIB,
        spares: None,
        savefile: None,
    };
    templates::add_dvm(&context.state, &name, &label, dvm)?;
    let mut settings = Settings { uuid: Some(draw_uuid()?), ..Settings::default() };
    settings.tags.insert(format!("created-by-{source}"));
    let saved = settings.save(&context.state, &Owner::Qube(name.clone()));
    saved.inspect_err(|_| drop(templates::remove(&context.state, &name)))?;
    client::changed(&context.state);
    Ok(())
}

fn name_and_label(payload: &[u8]) -> Answer<(String, String)> {
    let text = std::str::from_utf8(payload).ok().filter(|text| text.is_ascii());
    let text = text.ok_or_else(|| silent("parameters that are no ASCII text"))?;
    let all: Vec<(&str, &str)> = pairs(text, ' ').collect();
    enforce(all.len() == text.split(' ').count(), "parameters without values")?;
    enforce(all.iter().all(|(key, _)| matches!(*key, "name" | "label")), "unknown parameters")?;
    let one = |wanted: &str| {
        let mut found = all.iter().filter(|(key, _)| *key == wanted).map(|(_, value)| value.to_string());
        match (found.next(), found.next()) {
            (Some(value), None) => Ok(value),
            _ => Err(silent(format!("not one {wanted}"))),
        }
    };
    Ok((one("name")?, one("label")?))
}

fn draw_uuid() -> Answer<String> {
    let mut bytes = [0; 16];
    File::open("/dev/urandom")
        .and_then(|mut random| random.read_exact(&mut bytes))
        .map_err(Error::failed("draw a UUID"))?;
    Ok(uuid_text(&bytes))
}

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
    let clone = match &vm.kind {
        VmKind::Disp(clone) => Some(clone),
        VmKind::Admin => return Err(silent("dom0 is not killed")),
        VmKind::App(_) | VmKind::Template(_) => world.running_itself(&vm.name)?,
    };
    let clone =
        clone.ok_or_else(|| exception(Kind::VmNotStarted, format!("Domain is powered off: {name:?}")))?;
    end(context, clone)
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
