//! Setting and resetting properties: what may be set is checked under the lock under which it is written.

use admin_api::lines::{bool_text, Type};
use admin_api::{Event, Kind};

use super::answer::{exception, quoted, silent, Answer, Refusal};
use super::features;
use super::properties::{self, Place, Property, Subject};
use super::settings;
use super::world::{Context, Vm, VmKind, World};
use crate::daemon::client;
use crate::error;
use crate::qube::{self, Class, LABELS};

/// The longest text of a property: a kernel's command line has at most as much.
const TEXT_BYTES_MAX: usize = 4096;
/// What the engine can give a guest.
const MEMORY_MIB: std::ops::RangeInclusive<u64> = 16..=4 << 20;
const VCPUS: std::ops::RangeInclusive<u64> = 1..=255;

/// Sets a property of a qube, or of the system.
pub(super) fn set(context: &Context, of: Option<&str>, name: &str, payload: &[u8]) -> Answer<()> {
    change(context, of, name, |world, subject, property| {
        let value = parse(world, property, payload)?;
        check(world, subject, property, &value)?;
        Ok(Some(value))
    })
}

/// Resets it to its default.
pub(super) fn reset(context: &Context, of: Option<&str>, name: &str) -> Answer<()> {
    change(context, of, name, |world, subject, property| {
        match world.default_of(subject, property)? {
            Some(default) => check(world, subject, property, &default)?,
            None => return Err(wrong(property, "it has no default")),
        }
        Ok(None)
    })
}

/// The property of this name, or the exception that there is none.
pub(super) fn find(subject: Subject<'_>, name: &str) -> Answer<&'static Property> {
    properties::of(subject).find(|property| property.name == name).ok_or_else(|| {
        let of = subject.map_or("the system".to_owned(), |vm| vm.name.clone());
        exception(Kind::NoSuchProperty, format!("Invalid property {} of {of}", quoted(name)))
    })
}

/// `decide` answers the new value, or none for the default.
fn change(
    context: &Context,
    of: Option<&str>,
    name: &str,
    decide: impl FnOnce(&World<'_>, Subject<'_>, &Property) -> Answer<Option<String>>,
) -> Answer<()> {
    let _lock = settings::lock(&context.state)?;
    let world = World::new(context);
    let vm = of.map(|of| world.vm(of)).transpose()?;
    let subject = vm.as_deref();
    let property = find(subject, name)?;
    let before = world.get(subject, property)?.value;
    let value = decide(&world, subject, property)?;
    if property.place == Place::Computed {
        // What it is already: there is nothing to do.
        return Ok(());
    }
    match subject {
        None => write_system(&world, property, value.as_deref())?,
        Some(vm) => write(&world, vm, property, value.as_deref())?,
    }
    if subject.is_none() && name == "default_dispvm" {
        features::default_changed(context, &before)?;
    }
    tell(context, subject, property, &before, value.as_deref());
    Ok(())
}

fn tell(context: &Context, subject: Subject<'_>, property: &Property, before: &str, value: Option<&str>) {
    let of = subject.map_or("", |vm| &vm.name);
    let what = if value.is_some() { "property-set" } else { "property-reset" };
    let event = Event::new(of, format!("{what}:{}", property.name)).detail("name", property.name);
    let event = value.into_iter().fold(event, |event, value| event.detail("newvalue", value));
    context.events.fire(&event.detail("oldvalue", before));
    if matches!(property.name, "label" | "template_for_dispvms") {
        context.events.fire(&Event::new(of, "property-reset:icon").detail("name", "icon"));
    }
}

fn write_system(world: &World<'_>, property: &Property, value: Option<&str>) -> Answer<()> {
    let mut system = world.system()?.clone();
    match value {
        Some(value) => system.properties.insert(property.name.to_owned(), value.to_owned()),
        None => system.properties.remove(property.name),
    };
    Ok(system.save(world.state)?)
}

fn write(world: &World<'_>, vm: &Vm, property: &Property, value: Option<&str>) -> Answer<()> {
    let mut settings = vm.settings.clone();
    match value {
        Some(value) => settings.properties.insert(property.name.to_owned(), value.to_owned()),
        None => settings.properties.remove(property.name),
    };
    settings.save(world.state, &vm.owner)?;
    if matches!(property.place, Place::Settings(_)) {
        return Ok(());
    }
    let recorded = match value {
        Some(value) => value.to_owned(),
        None => world.default_of(Some(vm), property)?.unwrap_or_default(),
    };
    // The settings only say that it was set; what it is stands in the record. Where that cannot be written, they are as before.
    record(world, vm, property, &recorded).inspect_err(|_| drop(vm.settings.save(world.state, &vm.owner)))?;
    client::changed(world.state);
    Ok(())
}

fn record(world: &World<'_>, vm: &Vm, property: &Property, value: &str) -> Answer<()> {
    let number = || value.parse().map_err(error::Error::failed("read the number"));
    let changed = qube::update(world.state, &vm.name, |qube| {
        match (property.name, &mut qube.class) {
            ("label", _) => qube.label = value.to_owned(),
            ("kernelopts", Class::TemplateVM(template)) => template.cmdline = value.to_owned(),
            ("template", Class::AppVM(dvm)) => dvm.template = value.to_owned(),
            ("memory", Class::AppVM(dvm)) => dvm.memory_mib = number()?,
            ("vcpus", Class::AppVM(dvm)) => dvm.vcpus = number()? as u32,
            ("template_for_dispvms", Class::AppVM(dvm)) => {
                dvm.template_for_dispvms = value == bool_text(true);
            }
            ("template", Class::DispVM(own)) => own.template = value.to_owned(),
            ("auto_cleanup", Class::DispVM(own)) => own.auto_cleanup = value == bool_text(true),
            _ => {}
        }
        Ok(())
    });
    Ok(changed?)
}

/// A payload as a value of the property's type.
fn parse(world: &World<'_>, property: &Property, payload: &[u8]) -> Answer<String> {
    let text = std::str::from_utf8(payload).ok().filter(|text| {
        text.len() <= TEXT_BYTES_MAX && text.bytes().all(|byte| byte == b' ' || byte.is_ascii_graphic())
    });
    let text = text.ok_or_else(|| wrong(property, "it is no printable text, or too long"))?;
    match property.kind {
        Type::Str => Ok(text.to_owned()),
        Type::Bool => parse_bool(text).map(|value| bool_text(value).to_owned()).ok_or_else(|| {
            wrong(property, &format!("Invalid literal for boolean property: {}", quoted(text)))
        }),
        Type::Int => text
            .parse::<u64>()
            .ok()
            .filter(|_| text.bytes().all(|byte| byte.is_ascii_digit()))
            .map(|number| number.to_string())
            .ok_or_else(|| wrong(property, &format!("{} is no number", quoted(text)))),
        Type::Label if LABELS.contains(&text) => Ok(text.to_owned()),
        Type::Label => Err(exception(Kind::LabelNotFound, format!("Label does not exist: {text}"))),
        Type::Vm if text.is_empty() => Ok(String::new()),
        Type::Vm => Ok(world.vm(text)?.name.clone()),
    }
}

/// What Qubes takes for a boolean.
pub(super) fn parse_bool(text: &str) -> Option<bool> {
    match text.trim().to_ascii_lowercase().as_str() {
        "true" | "yes" | "on" | "1" => Some(true),
        "false" | "no" | "off" | "0" => Some(false),
        _ => None,
    }
}

/// Whether the property may have the value.
fn check(world: &World<'_>, subject: Subject<'_>, property: &Property, value: &str) -> Answer<()> {
    if property.place == Place::Computed {
        return match world.get(subject, property)?.value == value {
            true => Ok(()),
            // core-admin hangs up on who sets what is written once, which the stock clone takes for a property that stays as it is.
            false if property.name == "dispid" => Err(silent("dispid is written once")),
            false => Err(wrong(property, "it cannot be set")),
        };
    }
    let number = value.parse::<u64>().unwrap_or_default();
    match (property.name, subject) {
        ("label", Some(vm)) if matches!(vm.kind, VmKind::Admin | VmKind::Disp(_)) => {
            Err(wrong(property, "it cannot be changed"))
        }
        ("kernelopts", Some(vm)) if !matches!(vm.kind, VmKind::Template(_)) => {
            Err(wrong(property, "it is that of the template, set it there"))
        }
        ("template" | "auto_cleanup", Some(vm)) if matches!(vm.kind, VmKind::Disp(_)) => {
            Err(wrong(property, "it cannot be changed of a disposable without a record of its own"))
        }
        ("memory" | "vcpus", Some(vm)) if matches!(vm.kind, VmKind::Disp(_) | VmKind::Named(_)) => {
            Err(wrong(property, "a disposable has its template's"))
        }
        ("memory", _) if !MEMORY_MIB.contains(&number) => Err(wrong(property, "it is out of range")),
        ("vcpus", _) if !VCPUS.contains(&number) => Err(wrong(property, "it is out of range")),
        (
            "qrexec_timeout"
            | "shutdown_timeout"
            | "default_qrexec_timeout"
            | "default_shutdown_timeout"
            | "stats_interval",
            _,
        ) if number == 0 => Err(wrong(property, "Value must be positive")),
        ("template", Some(vm)) => check_template(world, vm, property, value),
        ("template_for_dispvms", Some(vm)) if value != bool_text(true) => check_not_a_template(world, vm),
        ("default_dispvm" | "management_dispvm", _) if !value.is_empty() => {
            check_for_dispvms(world, property, value)
        }
        ("default_template", None) if !value.is_empty() => check_is_template(world, property, value),
        ("netvm", Some(vm)) if !value.is_empty() => check_netvm(world, vm, property, value),
        ("default_netvm", None) if !value.is_empty() => check_provides_network(world, property, value),
        ("provides_network", Some(vm)) if value != bool_text(true) => check_no_clients(world, vm),
        _ => Ok(()),
    }
}

fn check_for_dispvms(world: &World<'_>, property: &Property, value: &str) -> Answer<()> {
    match world.find(value)?.map(|vm| world.value(&vm, "template_for_dispvms")).transpose()? {
        Some(answer) if answer == bool_text(true) => Ok(()),
        _ => Err(wrong(property, &format!("{value} has no template_for_dispvms"))),
    }
}

fn check_is_template(world: &World<'_>, property: &Property, value: &str) -> Answer<()> {
    match world.find(value)?.map(|vm| matches!(vm.kind, VmKind::Template(_))) {
        Some(true) => Ok(()),
        _ => Err(wrong(property, &format!("{} is no TemplateVM", quoted(value)))),
    }
}

fn check_template(world: &World<'_>, vm: &Vm, property: &Property, value: &str) -> Answer<()> {
    match vm.kind {
        VmKind::Named(_) => check_for_dispvms(world, property, value)?,
        _ => check_is_template(world, property, value)?,
    }
    let runs = world.running_itself(&vm.name)?.is_some();
    let living = world.disposables()?.any(|clone| clone.dvm == vm.name && !world.is_spare_clone(clone));
    match runs || living {
        true => Err(exception(
            Kind::VmNotHalted,
            format!("Cannot change the template of {} while it or disposables based on it run", vm.name),
        )),
        false => Ok(()),
    }
}

/// T3: a DVM template in use stays one.
fn check_not_a_template(world: &World<'_>, vm: &Vm) -> Answer<()> {
    let mut users = world.disposables_of(&vm.name)?;
    users.extend(properties::naming(world.system()?, &vm.name));
    for other in world.all()? {
        let names_it =
            |property: &str| other.settings.properties.get(property).is_some_and(|set| *set == vm.name);
        let of_others = ["default_dispvm", "management_dispvm"].into_iter().filter(|name| names_it(name));
        // A disposable's own is its template's.
        if !matches!(other.kind, VmKind::Disp(_)) {
            users.extend(of_others.map(|name| format!("{name} of {}", other.name)));
        }
    }
    match users.is_empty() {
        true => Ok(()),
        false => Err(exception(
            Kind::VmInUse,
            format!(
                "Cannot change template_for_dispvms of {} to False: in use by {}",
                vm.name,
                users.join(", ")
            ),
        )),
    }
}

fn check_provides_network(world: &World<'_>, property: &Property, value: &str) -> Answer<()> {
    match world.value(&*world.vm(value)?, "provides_network")? == bool_text(true) {
        true => Ok(()),
        false => Err(wrong(property, &format!("The {value} qube does not provide network"))),
    }
}

fn check_netvm(world: &World<'_>, vm: &Vm, property: &Property, value: &str) -> Answer<()> {
    check_provides_network(world, property, value)?;
    let mut next = value.to_owned();
    let mut seen = std::collections::BTreeSet::new();
    while !next.is_empty() && seen.insert(next.clone()) {
        if next == vm.name {
            return Err(wrong(property, "Loops in network are unsupported"));
        }
        next = world.value(&*world.vm(&next)?, "netvm")?;
    }
    Ok(())
}

fn check_no_clients(world: &World<'_>, vm: &Vm) -> Answer<()> {
    let mut clients = properties::naming(world.system()?, &vm.name);
    clients.retain(|user| user.ends_with("default_netvm"));
    for other in world.all()? {
        if other.settings.properties.get("netvm").is_some_and(|set| *set == vm.name) {
            clients.push(other.name.clone());
        }
    }
    match clients.is_empty() {
        true => Ok(()),
        false => Err(exception(
            Kind::VmInUse,
            format!("The {} qube is used as a netvm by {}", vm.name, clients.join(", ")),
        )),
    }
}

fn wrong(property: &Property, why: &str) -> Refusal {
    exception(Kind::PropertyValue, format!("Invalid value for property {}: {why}", quoted(property.name)))
}
