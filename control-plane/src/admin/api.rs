//! The methods: for each, what it may be asked of and with, and who answers it.
//!
//! Written from QubesOS/qubes-core-admin `qubes/api/admin.py` (R4.2, R4.3). A method that is not here is answered as qubesd answers
//! one it does not know: the connection is closed without a word.

use std::fmt::Write;
use std::rc::Rc;

use admin_api::lines::Qube as Line;
use admin_api::{Event, Kind, Request, ADMIN_VM};

use super::answer::{enforce, exception, quoted, silent, Answer, Refusal};
use super::change;
use super::create;
use super::features::{self, Scope};
use super::firewall;
use super::lives;
use super::pools;
use super::properties::{self, Subject};
use super::settings::{self, Settings};
use super::volume_change;
use super::volumes;
use super::world::{Context, Vm, VmKind, World};
use crate::qube::LABELS;

/// Qubes' colours of the labels, in the order of their indices, which begin with 1.
const COLOURS: [&str; 8] =
    ["0xcc0000", "0xf57900", "0xedd400", "0x73d216", "0x555753", "0x3465a4", "0x75507b", "0x000000"];
/// As long as Qubes' own.
const NOTES_BYTES_MAX: usize = 256_000;
const TAG_BYTES_MAX: usize = 128;

/// Carries out a call and gives what it answers.
pub(super) fn call(context: &Context, request: &Request) -> Answer {
    let world = World::new(context);
    check_call(&world, request)?;
    let method = request.method.as_str();
    let text = match method.strip_prefix("admin.vm.") {
        Some(method) => of_a_qube(&world, method, request)?,
        None => of_the_system(&world, method, request)?,
    };
    Ok(text.into_bytes())
}

/// What is asked of `admin.Events`: all, or one qube's.
pub(super) fn events_about(context: &Context, request: &Request) -> Answer<String> {
    let world = World::new(context);
    check_call(&world, request)?;
    Ok(world.vm(&request.destination)?.name.clone())
}

/// Whether a method wants something: it must be there, must not, or may.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wants {
    It,
    No,
    Either,
}

use Wants::{Either, It, No};

impl Wants {
    fn check(self, is_there: bool, what: &str) -> Answer<()> {
        match (self, is_there) {
            (It, false) => Err(silent(format!("{what} is missing"))),
            (No, true) => Err(silent(format!("{what} is not expected"))),
            _ => Ok(()),
        }
    }
}

/// Each method with what it wants: dom0 as its destination, an argument, a payload.
#[rustfmt::skip]
const METHODS: [(&str, Wants, Wants, Wants); 89] = [
    ("admin.Events", Either, No, No),
    ("admin.label.Get", It, It, No),
    ("admin.label.Index", It, It, No),
    ("admin.label.List", It, No, No),
    ("admin.pool.Info", It, It, No),
    ("admin.pool.List", It, No, No),
    ("admin.pool.ListDrivers", It, No, No),
    ("admin.pool.UsageDetails", It, It, No),
    ("admin.pool.volume.Info", It, It, It),
    ("admin.pool.volume.List", It, It, No),
    ("admin.pool.volume.ListSnapshots", It, It, It),
    ("admin.property.Get", It, It, No),
    ("admin.property.GetAll", It, No, No),
    ("admin.property.GetDefault", It, It, No),
    ("admin.property.Help", It, It, No),
    ("admin.property.List", It, No, No),
    ("admin.property.Reset", It, It, No),
    ("admin.property.Set", It, It, Either),
    ("admin.vm.Create.AppVM", It, Either, It),
    ("admin.vm.Create.DispVM", It, Either, It),
    ("admin.vm.Create.StandaloneVM", It, Either, It),
    ("admin.vm.Create.TemplateVM", It, Either, It),
    ("admin.vm.Console", No, No, No),
    ("admin.vm.CreateDisposable", Either, No, Either),
    ("admin.vm.CreateInPool.AppVM", It, Either, It),
    ("admin.vm.CreateInPool.DispVM", It, Either, It),
    ("admin.vm.CreateInPool.StandaloneVM", It, Either, It),
    ("admin.vm.CreateInPool.TemplateVM", It, Either, It),
    ("admin.vm.CurrentState", Either, No, No),
    ("admin.vm.Kill", Either, No, No),
    ("admin.vm.List", Either, No, No),
    ("admin.vm.Pause", Either, No, No),
    ("admin.vm.Remove", No, No, No),
    ("admin.vm.Resume", Either, No, No),
    ("admin.vm.Shutdown", Either, Either, No),
    ("admin.vm.Start", Either, No, No),
    ("admin.vm.Suspend", Either, No, No),
    ("admin.vm.Unpause", Either, No, No),
    ("admin.vm.feature.CheckWithAdminVM", Either, It, No),
    ("admin.vm.feature.CheckWithNetvm", Either, It, No),
    ("admin.vm.feature.CheckWithTemplate", Either, It, No),
    ("admin.vm.feature.CheckWithTemplateAndAdminVM", Either, It, No),
    ("admin.vm.feature.Get", Either, It, No),
    ("admin.vm.feature.List", Either, No, No),
    ("admin.vm.feature.Remove", Either, It, No),
    ("admin.vm.feature.Set", Either, It, Either),
    ("admin.vm.firewall.Get", Either, No, No),
    ("admin.vm.firewall.Reload", Either, No, No),
    ("admin.vm.firewall.Set", Either, No, Either),
    ("admin.vm.notes.Get", Either, No, No),
    ("admin.vm.notes.Set", Either, No, Either),
    ("admin.vm.property.Get", Either, It, No),
    ("admin.vm.property.GetAll", Either, No, No),
    ("admin.vm.property.GetDefault", Either, It, No),
    ("admin.vm.property.Help", Either, It, No),
    ("admin.vm.property.List", Either, No, No),
    ("admin.vm.property.Reset", Either, It, No),
    ("admin.vm.property.Set", Either, It, Either),
    ("admin.vm.tag.Get", Either, It, No),
    ("admin.vm.tag.List", Either, No, No),
    ("admin.vm.tag.Remove", Either, It, No),
    ("admin.vm.tag.Set", Either, It, No),
    ("admin.vm.volume.Clear", No, It, No),
    ("admin.vm.volume.CloneFrom", No, It, No),
    ("admin.vm.volume.CloneTo", No, It, It),
    ("admin.vm.volume.Info", Either, It, No),
    ("admin.vm.volume.List", Either, No, No),
    ("admin.vm.volume.ListSnapshots", Either, It, No),
    ("admin.vm.volume.Resize", No, It, It),
    ("admin.vm.volume.Revert", No, It, It),
    ("admin.vm.volume.Set.ephemeral", No, It, It),
    ("admin.vm.volume.Set.revisions_to_keep", No, It, It),
    ("admin.vm.volume.Set.rw", No, It, It),
    ("admin.vmclass.List", It, No, No),
    ("admin.deviceclass.List", It, No, No),
    ("admin.vm.device.block.Assigned", Either, Either, No),
    ("admin.vm.device.block.Attached", Either, Either, No),
    ("admin.vm.device.block.Available", Either, Either, No),
    ("admin.vm.device.block.List", Either, Either, No),
    ("admin.vm.device.mic.Assigned", Either, Either, No),
    ("admin.vm.device.mic.Attached", Either, Either, No),
    ("admin.vm.device.mic.Available", Either, Either, No),
    ("admin.vm.device.pci.Assigned", Either, Either, No),
    ("admin.vm.device.pci.Attached", Either, Either, No),
    ("admin.vm.device.pci.Available", Either, Either, No),
    ("admin.vm.device.pci.List", Either, Either, No),
    ("admin.vm.device.usb.Assigned", Either, Either, No),
    ("admin.vm.device.usb.Attached", Either, Either, No),
    ("admin.vm.device.usb.Available", Either, Either, No),
];

/// Whether the call waits for a guest, or copies a volume.
pub(super) fn takes_long(request: &Request) -> bool {
    let long = [
        "admin.vm.CreateDisposable",
        "admin.vm.Kill",
        "admin.vm.Shutdown",
        "admin.vm.Start",
        "admin.vm.volume.Clear",
        "admin.vm.volume.CloneTo",
        "admin.vm.volume.Resize",
        "admin.vm.volume.Revert",
    ];
    long.contains(&request.method.as_str())
}

/// Whether qubes have come, gone, started or ended after this call.
pub(super) fn makes_or_ends(method: &str) -> bool {
    let Some(what) = method.strip_prefix("admin.vm.") else { return false };
    let lives =
        ["CreateDisposable", "Kill", "Pause", "Remove", "Resume", "Shutdown", "Start", "Suspend", "Unpause"];
    what.starts_with("Create.") || what.starts_with("CreateInPool.") || lives.contains(&what)
}

fn check_call(world: &World<'_>, request: &Request) -> Answer<()> {
    world.vm(&request.source)?;
    let known = METHODS.iter().find(|(method, ..)| *method == request.method);
    let (_, dom0, argument, payload) = known.ok_or_else(|| silent("no such method"))?;
    // By whatever name: it has a UUID, too.
    let is_dom0 = request.destination == ADMIN_VM || world.vm(&request.destination)?.name == ADMIN_VM;
    dom0.check(is_dom0, "dom0 as the destination")?;
    argument.check(!request.argument.is_empty(), "an argument")?;
    payload.check(!request.payload.is_empty(), "a payload")
}

fn of_the_system(world: &World<'_>, method: &str, request: &Request) -> Answer<String> {
    let argument = request.argument.as_str();
    match method {
        "admin.vmclass.List" => Ok(lines(["AdminVM", "AppVM", "DispVM", "TemplateVM"])),
        "admin.deviceclass.List" => Ok(String::new()),
        "admin.label.List" => Ok(lines(LABELS)),
        "admin.label.Get" => Ok(label(argument)?.1.to_owned()),
        "admin.label.Index" => Ok(label(argument)?.0.to_string()),
        _ => match (method.strip_prefix("admin.property."), method.strip_prefix("admin.pool.")) {
            (Some(what), _) => property(world, None, what, request),
            (_, Some(what)) => pools::answer(world, what, request),
            _ => Err(silent("no such method")),
        },
    }
}

fn of_a_qube(world: &World<'_>, method: &str, request: &Request) -> Answer<String> {
    let (context, name, argument) = (world.context, request.destination.as_str(), request.argument.as_str());
    let vm = world.vm(name)?;
    if let Some((what, rest)) = method.split_once('.') {
        return match (what, rest) {
            ("property", what) => property(world, Some(&vm), what, request),
            ("feature", what) => feature(world, &vm, what, request),
            ("tag", what) => tag(world, &vm, what, argument),
            ("volume", what) => volume(world, &vm, what, request),
            ("firewall", what) => rules(world, &vm, what, &request.payload),
            ("notes", what) => notes(world, &vm, what, &request.payload),
            ("device", _) => Ok(String::new()),
            ("Create" | "CreateInPool", class) => {
                let new = create::parameters(&request.payload, what == "CreateInPool")?;
                match class {
                    "AppVM" => done(create::app(context, &request.source, argument, &new)),
                    "DispVM" => done(create::named(context, &request.source, argument, &new)),
                    "TemplateVM" => Err(not_here(
                        "a TemplateVM is made of a root image, a kernel and an initrd: `dispvm-qube add-template`",
                    )),
                    "StandaloneVM" => {
                        Err(not_here("there are no StandaloneVMs: a root volume is a TemplateVM's"))
                    }
                    _ => Err(silent("no such method")),
                }
            }
            _ => Err(silent("no such method")),
        };
    }
    match method {
        "List" => list(world, &vm),
        "CreateDisposable" => create::disposable(context, &request.source, &vm, &request.payload),
        "Console" => Err(not_here("the console of a qube is not kept")),
        "CurrentState" => current_state(world, &vm),
        "Remove" => done(lives::remove(context, &vm.name)),
        "Kill" => done(lives::kill(context, &vm.name)),
        // There are no devices of the host's that would have to sleep: the CPUs stop, as in Qubes where a qube has none either.
        "Pause" | "Suspend" => done(lives::pause(context, &vm.name)),
        "Shutdown" => done(lives::shutdown(context, &vm.name, argument)),
        "Start" => done(lives::start(context, &vm.name)),
        "Unpause" | "Resume" => done(lives::unpause(context, &vm.name)),
        _ => Err(silent("no such method")),
    }
}

/// What Qubes has and we have not: told, so that nobody takes it for a daemon that fails.
fn not_here(why: &str) -> Refusal {
    exception(Kind::NotImplemented, why)
}

fn done(done: Answer<()>) -> Answer<String> {
    done.map(|()| String::new())
}

pub(super) fn lines<T: std::fmt::Display>(all: impl IntoIterator<Item = T>) -> String {
    all.into_iter().fold(String::new(), |mut text, line| {
        let _ = writeln!(text, "{line}");
        text
    })
}

fn label(name: &str) -> Answer<(usize, &'static str)> {
    let place = LABELS.iter().position(|label| *label == name);
    let found = place.and_then(|place| Some((place + 1, *COLOURS.get(place)?)));
    found.ok_or_else(|| exception(Kind::Value, format!("Label does not exist: {name}")))
}

fn list(world: &World<'_>, vm: &Rc<Vm>) -> Answer<String> {
    let all = if vm.name == ADMIN_VM { world.all()? } else { vec![Rc::clone(vm)] };
    let line = |vm: &Rc<Vm>| -> Answer<Line> {
        let state = world.power_state(vm)?.to_owned();
        Ok(Line { name: vm.name.clone(), class: vm.class().to_owned(), state, uuid: Some(vm.uuid()) })
    };
    Ok(lines(all.iter().map(line).collect::<Answer<Vec<_>>>()?))
}

fn current_state(world: &World<'_>, vm: &Vm) -> Answer<String> {
    let state = world.power_state(vm)?;
    let memory_kib = world.value(vm, "memory")?.parse::<u64>().unwrap_or_default().saturating_mul(1024);
    let used_kib = if state == "Halted" { 0 } else { memory_kib };
    Ok(format!("mem={used_kib} mem_static_max={memory_kib} cputime=0 power_state={state}"))
}

fn property(world: &World<'_>, subject: Subject<'_>, what: &str, request: &Request) -> Answer<String> {
    let (context, name) = (world.context, request.argument.as_str());
    let of = subject.map(|vm| vm.name.as_str());
    match what {
        "List" => Ok(lines(properties::of(subject).map(|property| property.name))),
        "GetAll" => {
            let mut text = String::new();
            for property in properties::of(subject) {
                text.push_str(&world.get(subject, property)?.encode_line(property.name));
            }
            Ok(text)
        }
        "Get" => Ok(world.get(subject, change::find(subject, name)?)?.encode()),
        "GetDefault" => {
            let property = change::find(subject, name)?;
            let default = world.default_of(subject, property)?;
            let text = |default| format!("type={} {default}", property.kind.name());
            Ok(default.map_or(String::new(), text))
        }
        "Help" => Ok(change::find(subject, name)?.help.to_owned()),
        "Set" => done(change::set(context, of, name, &request.payload)),
        "Reset" => done(change::reset(context, of, name)),
        _ => Err(silent("no such method")),
    }
}

fn feature(world: &World<'_>, vm: &Rc<Vm>, what: &str, request: &Request) -> Answer<String> {
    let (context, name) = (world.context, request.argument.as_str());
    let scope = match what {
        "List" => return Ok(lines(vm.settings.features.keys())),
        "Set" => return done(features::set(context, &vm.name, name, &request.payload)),
        "Remove" => return done(features::remove(context, &vm.name, name)),
        "Get" => Scope::Own,
        "CheckWithTemplate" => Scope::Template,
        "CheckWithNetvm" => Scope::Netvm,
        "CheckWithAdminVM" => Scope::Admin,
        "CheckWithTemplateAndAdminVM" => Scope::TemplateAndAdmin,
        _ => return Err(silent("no such method")),
    };
    world.feature(vm, name, scope)
}

fn tag(world: &World<'_>, vm: &Vm, what: &str, tag: &str) -> Answer<String> {
    if what == "List" {
        return Ok(lines(&vm.settings.tags));
    }
    let mut bytes = tag.bytes();
    let legal = bytes.next().is_some_and(|first| first.is_ascii_alphabetic())
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || b"_-".contains(&byte))
        && tag.len() <= TAG_BYTES_MAX;
    if !legal {
        return Err(exception(Kind::Value, format!("Invalid tag: {}", quoted(tag))));
    }
    let told = |event: &str| Event::new(&vm.name, format!("domain-tag-{event}:{tag}")).detail("tag", tag);
    match what {
        "Get" => Ok(u8::from(vm.settings.tags.contains(tag)).to_string()),
        "Set" => alter(world, vm, told("add"), |settings| {
            settings.tags.insert(tag.to_owned());
            Ok(())
        }),
        "Remove" => alter(world, vm, told("delete"), |settings| match settings.tags.remove(tag) {
            true => Ok(()),
            false => Err(exception(Kind::TagNotFound, format!("Tag not set for domain {}: {tag}", vm.name))),
        }),
        _ => Err(silent("no such method")),
    }
}

fn rules(world: &World<'_>, vm: &Vm, what: &str, payload: &[u8]) -> Answer<String> {
    enforce(!matches!(vm.kind, VmKind::Admin), "dom0 has no firewall")?;
    let changed = Event::new(&vm.name, "firewall-changed");
    match what {
        "Get" => match &vm.settings.firewall {
            Some(rules) => Ok(lines(rules)),
            None => Ok(lines([firewall::DEFAULT])),
        },
        "Set" => {
            let rules = firewall::parse_all(payload).map_err(|why| exception(Kind::Value, why))?;
            alter(world, vm, changed, |settings| {
                settings.firewall = Some(rules);
                Ok(())
            })
        }
        "Reload" => {
            world.context.events.fire(&changed);
            Ok(String::new())
        }
        _ => Err(silent("no such method")),
    }
}

fn notes(world: &World<'_>, vm: &Vm, what: &str, payload: &[u8]) -> Answer<String> {
    match what {
        "Get" => Ok(vm.settings.notes.clone()),
        "Set" => {
            let text = std::str::from_utf8(payload).ok().filter(|text| {
                text.len() <= NOTES_BYTES_MAX && text.chars().all(|char| char == '\n' || !char.is_control())
            });
            let text = text.ok_or_else(|| exception(Kind::Value, "notes that are no text, or too long"))?;
            alter(world, vm, Event::new(&vm.name, "domain-notes-changed"), |settings| {
                settings.notes = text.to_owned();
                Ok(())
            })
        }
        _ => Err(silent("no such method")),
    }
}

fn volume(world: &World<'_>, vm: &Vm, what: &str, request: &Request) -> Answer<String> {
    let name = request.argument.as_str();
    if what == "List" {
        return Ok(lines(volumes::names(vm)));
    }
    enforce(volumes::names(vm).contains(&name), "no such volume")?;
    match what {
        "Info" => volumes::info(world, vm, name),
        "ListSnapshots" => volumes::revisions(world, vm, name),
        "Resize" => done(volume_change::resize(world, vm, name, &request.payload)),
        "Revert" => {
            let known = volumes::revisions(world, vm, name)?;
            done(volume_change::revert(world, vm, name, &known, &request.payload))
        }
        "Clear" => done(volume_change::clear(world, vm, name)),
        "CloneFrom" => volume_change::clone_from(world, vm, name),
        "CloneTo" => done(volume_change::clone_to(world, vm, name, &request.payload)),
        "Set.rw" | "Set.ephemeral" => {
            let wanted = std::str::from_utf8(&request.payload).ok().and_then(change::parse_bool);
            let wanted = wanted.ok_or_else(|| silent("no boolean"))?;
            done(volumes::set_flag(world, vm, name, what == "Set.rw", wanted))
        }
        "Set.revisions_to_keep" => {
            let number = std::str::from_utf8(&request.payload).ok().and_then(|text| text.parse::<u32>().ok());
            let number = number.ok_or_else(|| silent("no number of revisions"))?;
            alter(
                world,
                vm,
                Event::new(&vm.name, "domain-volume-changed").detail("volume", name),
                |settings| {
                    settings.volumes.entry(name.to_owned()).or_default().revisions_to_keep = Some(number);
                    Ok(())
                },
            )
        }
        _ => Err(silent("no such method")),
    }
}

/// Changes a qube's settings as they are under the lock, and tells of it.
fn alter(
    world: &World<'_>,
    vm: &Vm,
    event: Event,
    change: impl FnOnce(&mut Settings) -> Answer<()>,
) -> Answer<String> {
    let _lock = settings::lock(world.state)?;
    let now = World::new(world.context).vm(&vm.name)?;
    let mut settings = now.settings.clone();
    change(&mut settings)?;
    settings.save(world.state, &now.owner)?;
    world.context.events.fire(&event);
    Ok(String::new())
}
