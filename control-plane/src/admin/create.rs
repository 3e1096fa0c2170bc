//! Qubes made: AppVMs, and disposables with a record of their own.
//!
//! Invariant: settings are written before the record, so that a qube that is there has its tags, and what it has taken over of its
//! DVM template; what an attempt cut short leaves is no qube, and swept.

use std::fs::File;
use std::io::Read;
use std::rc::Rc;

use admin_api::lines::{bool_text, pairs};
use admin_api::Kind;
use qrexec::service::QubeName;

use super::answer::{enforce, exception, quoted, silent, Answer, Refusal};
use super::settings::{self, Owner, Settings};
use super::volumes;
use super::world::{uuid_text, Context, Vm, VmKind, World};
use crate::clones;
use crate::daemon::client;
use crate::error::Error;
use crate::names;
use crate::qube::{Disposable, Dvm, LABELS};
use crate::templates;

/// Volumes of a new AppVM in MiB, as `dispvm-qube add-dvm` makes them.
const PRIVATE_MIB: u64 = 2048;
const VOLATILE_MIB: u64 = 1024;

/// What a qube is to be called, and its label.
pub(super) struct New {
    name: String,
    label: String,
}

/// Makes an AppVM (`admin.vm.Create.AppVM+TEMPLATE`).
pub(super) fn app(context: &Context, source: &str, template: &str, new: &New) -> Answer<()> {
    let New { name, label } = new;
    let _lock = settings::lock(&context.state)?;
    let world = World::new(context);
    let based_on = template_of(&world, template, name, "default_template")?;
    if !matches!(based_on.kind, VmKind::Template(_)) {
        return Err(exception(Kind::Value, format!("{} is no TemplateVM", based_on.name)));
    }
    let number =
        |property: &str| world.value(&based_on, property).map(|text| text.parse().unwrap_or_default());
    let dvm = Dvm {
        template: based_on.name.clone(),
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
    let mut settings = Settings { uuid: Some(draw_uuid()?), ..Settings::default() };
    settings.tags.insert(format!("created-by-{source}"));
    let begin = || settings.save(&context.state, &Owner::Qube(name.clone()));
    templates::add_dvm_with(&context.state, name, label, dvm, begin)?;
    client::changed(&context.state);
    Ok(())
}

/// Makes a disposable with a name of the user's (`admin.vm.Create.DispVM+DVM`).
pub(super) fn named(context: &Context, source: &str, dvm: &str, new: &New) -> Answer<()> {
    let New { name, label } = new;
    let _lock = settings::lock(&context.state)?;
    let world = World::new(context);
    let dvm = template_of(&world, dvm, name, "default_dispvm")?;
    if world.value(&dvm, "template_for_dispvms")? != bool_text(true) {
        let why = "needs to be an AppVM with template_for_dispvms=True";
        return Err(exception(Kind::Value, format!("template for disposable ({}) {why}", dvm.name)));
    }
    add(context, &dvm, name, label, false, &[format!("created-by-{source}")]).map(drop)
}

/// Makes one that goes when it ends (`admin.vm.CreateDisposable`), and answers its name, or `uuid:UUID` if that was asked for.
///
/// Order and words as in QubesOS/qubes-core-admin `qubes/api/admin.py` create_disposable and `qubes/vm/dispvm.py` from_appvm, R4.3.
pub(super) fn disposable(context: &Context, source: &str, vm: &Rc<Vm>, payload: &[u8]) -> Answer<String> {
    let by_uuid = match payload {
        b"" => false,
        b"uuid" => true,
        _ => {
            let why = "expected the empty string or 'uuid'";
            return Err(exception(
                Kind::Value,
                format!("Invalid payload for admin.vm.CreateDisposable: {why}"),
            ));
        }
    };
    let tags = ["created-by", "disp-created-by"].map(|tag| format!("{tag}-{source}"));
    let text = |name: String, uuid: String| if by_uuid { format!("uuid:{uuid}") } else { name };
    let dvm = base_of_disposable(context, source, vm)?;
    if let Some(held) = client::hold_spare(&context.state, &dvm.name) {
        let uuid = tag_spare(context, &held.name, &tags)?;
        held.go().map_err(Error::failed("have the disposable go on"))?;
        return Ok(text(held.name, uuid));
    }
    let _lock = settings::lock(&context.state)?;
    // As it is now that nobody changes it.
    let dvm = base_of_disposable(context, source, vm)?;
    let number = names::take(&context.state, |number| clones::is_taken(&context.state, number))?;
    let uuid = add(context, &dvm, &number.to_string(), &dvm.label, true, &tags)?;
    Ok(text(number.to_string(), uuid))
}

/// Notes whose a disposable is that was a spare until now, and answers its UUID. It makes no calls yet, so policy never meets it without its tags.
fn tag_spare(context: &Context, name: &str, tags: &[String]) -> Answer<String> {
    context.forget_spares();
    let _lock = settings::lock(&context.state)?;
    let vm = World::new(context).vm(name)?;
    let mut settings = vm.settings.clone();
    settings.tags.extend(tags.iter().cloned());
    settings.save(&context.state, &vm.owner)?;
    Ok(vm.uuid())
}

/// The DVM template a caller's disposable is made from: the one that was asked for, or its default.
fn base_of_disposable(context: &Context, source: &str, vm: &Vm) -> Answer<Rc<Vm>> {
    let world = World::new(context);
    let dvm = match vm.kind {
        VmKind::Admin => world.find(&world.value(&*world.vm(source)?, "default_dispvm")?)?,
        _ => world.find(&vm.name)?,
    };
    let refused = || {
        let why = "Refusing to create disposable out of this AppVM, because template_for_dispvms=False";
        exception(Kind::QubesException, why)
    };
    let dvm = dvm.ok_or_else(refused)?;
    if world.value(&dvm, "template_for_dispvms")? != bool_text(true) {
        return Err(refused());
    }
    Ok(dvm)
}

/// Makes a disposable that begins with its template's settings, as they are now. Answers its UUID.
fn add(
    context: &Context,
    dvm: &Vm,
    name: &str,
    label: &str,
    auto_cleanup: bool,
    tags: &[String],
) -> Answer<String> {
    let uuid = draw_uuid()?;
    let mut settings = Settings { uuid: Some(uuid.clone()), ..dvm.settings.of_its_disposables() };
    settings.tags.extend(tags.iter().cloned());
    let begin = || settings.save(&context.state, &Owner::Qube(name.to_owned()));
    let disposable = Disposable { template: dvm.name.clone(), auto_cleanup };
    templates::add_disposable(&context.state, name, label, disposable, begin)?;
    Ok(uuid)
}

/// The template that was asked for, or else the system's, for a qube to be called `new`. In core-admin's order (`qubes/api/admin.py`,
/// `_vm_create`, R4.3): first whether what was asked for is there, then whether the name is free.
fn template_of(world: &World<'_>, asked: &str, new: &str, otherwise: &str) -> Answer<Rc<Vm>> {
    let asked = match asked {
        "" => None,
        asked => Some(world.vm(asked)?),
    };
    check_free(world, new)?;
    if let Some(asked) = asked {
        return Ok(asked);
    }
    let name = world.system_value(otherwise)?;
    if name.is_empty() {
        let why = format!("Template for this domain not found: there is no {otherwise}");
        return Err(exception(Kind::NoTemplate, why));
    }
    world.vm(&name)
}

fn check_free(world: &World<'_>, name: &str) -> Answer<()> {
    // A disposable's name, free now, may be drawn at any time.
    let is_drawn = name.strip_prefix("disp").is_some_and(|rest| rest.parse::<u16>().is_ok());
    match is_drawn || name == admin_api::ADMIN_VM || world.find(name)?.is_some() {
        true => Err(exception(Kind::VmAlreadyExists, format!("VM {name} already exists"))),
        false => Ok(()),
    }
}

/// Reads the payload of `admin.vm.Create.*`, `name=NAME label=LABEL`, and of `admin.vm.CreateInPool.*`, where `pool=POOL`, or
/// `pool:VOLUME=POOL` for some volumes, must be the one pool there is.
pub(super) fn parameters(payload: &[u8], with_pools: bool) -> Answer<New> {
    let text = std::str::from_utf8(payload).ok().filter(|text| text.is_ascii());
    let text = text.ok_or_else(|| silent("parameters that are no ASCII text"))?;
    let all: Vec<(&str, &str)> = pairs(text, ' ').collect();
    enforce(all.len() == text.split(' ').count(), "parameters without values")?;
    for (key, value) in &all {
        let is_pool = *key == "pool" || key.strip_prefix("pool:").is_some_and(volumes::has_pool);
        enforce(matches!(*key, "name" | "label") || with_pools && is_pool, "unknown parameters")?;
        enforce(!is_pool || *value == volumes::POOL, "no such pool")?;
    }
    let one = |wanted: &str| -> Result<String, Refusal> {
        let mut found = all.iter().filter(|(key, _)| *key == wanted).map(|(_, value)| value.to_string());
        match (found.next(), found.next()) {
            (Some(value), None) => Ok(value),
            _ => Err(silent(format!("not one {wanted}"))),
        }
    };
    let (name, label) = (one("name")?, one("label")?);
    enforce_name(&name)?;
    match LABELS.contains(&label.as_str()) {
        true => Ok(New { name, label }),
        false => Err(exception(Kind::LabelNotFound, format!("Label does not exist: {label}"))),
    }
}

/// What Qubes takes for a new qube's name (QubesOS/qubes-core-admin, `qubes/vm/__init__.py`, `validate_name`): one that can call and be
/// called, and that is not a word or another's.
fn enforce_name(name: &str) -> Answer<()> {
    let is_reserved = matches!(name, "Domain-0" | "none" | "default") || name.ends_with("-dm");
    match QubeName::parse(name.as_bytes()).is_ok() && !is_reserved {
        true => Ok(()),
        false => Err(exception(Kind::Value, format!("Illegal qube name: {}", quoted(name)))),
    }
}

fn draw_uuid() -> Answer<String> {
    let mut bytes = [0; 16];
    File::open("/dev/urandom")
        .and_then(|mut random| random.read_exact(&mut bytes))
        .map_err(Error::failed("draw a UUID"))?;
    Ok(uuid_text(&bytes))
}
