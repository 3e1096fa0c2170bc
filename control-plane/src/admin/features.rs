//! Features: free text under a name, looked for in a qube itself, and if asked so in what it is based on.
//!
//! `preload-dispvm-max` is more than text: it is how many disposables of a template are kept ready, and dom0's holds for the
//! default DVM template (QubesOS/qubes-core-admin `qubes/vm/dispvm.py`, get_preload_templates, R4.3).

use std::rc::Rc;

use admin_api::{Event, Kind, ADMIN_VM};

use super::answer::{exception, silent, Answer};
use super::settings;
use super::world::{Context, Vm, VmKind, World};
use crate::daemon::client;
use crate::qube;

/// How many disposables of one template can be kept ready: each has its memory.
const PRELOAD_MAX: u32 = 64;
const PRELOAD: &str = "preload-dispvm-max";

/// Where else a feature is looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scope {
    Own,
    Template,
    Netvm,
    Admin,
    TemplateAndAdmin,
}

impl World<'_> {
    /// A feature's value, or the exception that it is not set.
    pub(super) fn feature(&self, vm: &Rc<Vm>, name: &str, scope: Scope) -> Answer<String> {
        let mut next = Some(Rc::clone(vm));
        let mut seen = std::collections::BTreeSet::new();
        while let Some(here) = next.filter(|here| seen.insert(here.name.clone())) {
            if let Some(value) = here.settings.features.get(name) {
                return Ok(value.clone());
            }
            next = self.find(&self.next_in(&here, scope)?)?;
        }
        if matches!(scope, Scope::Admin | Scope::TemplateAndAdmin) {
            if let Some(value) = self.vm(ADMIN_VM)?.settings.features.get(name) {
                return Ok(value.clone());
            }
        }
        Err(not_found(vm, name))
    }

    fn next_in(&self, vm: &Vm, scope: Scope) -> Answer<String> {
        match scope {
            Scope::Template | Scope::TemplateAndAdmin => Ok(vm.template().unwrap_or_default().to_owned()),
            Scope::Netvm => self.value(vm, "netvm"),
            Scope::Own | Scope::Admin => Ok(String::new()),
        }
    }
}

fn not_found(vm: &Vm, name: &str) -> super::answer::Refusal {
    exception(Kind::FeatureNotFound, format!("Feature not set for domain {}: {name}", vm.name))
}

/// Sets a feature.
pub(super) fn set(context: &Context, of: &str, name: &str, payload: &[u8]) -> Answer<()> {
    // Checks and words as in core-admin's `qubes/api/admin.py`, vm_feature_set, R4.3.
    let text = std::str::from_utf8(payload).ok().filter(|text| text.is_ascii());
    let value = text.ok_or_else(|| silent("a feature that is no ASCII text"))?;
    if !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte)) {
        return Err(exception(Kind::Value, "feature name contains illegal characters"));
    }
    if value.bytes().any(|byte| byte.is_ascii_control()) {
        return Err(exception(Kind::Value, format!("{name} value contains illegal characters")));
    }
    if name == PRELOAD && !value.is_empty() {
        let number = value.parse::<u32>().ok().filter(|_| value.bytes().all(|byte| byte.is_ascii_digit()));
        if number.is_none_or(|number| number > PRELOAD_MAX) {
            let why = format!("Invalid {PRELOAD} value: not a number of up to {PRELOAD_MAX}");
            return Err(exception(Kind::Value, why));
        }
    }
    change(context, of, name, Some(value))
}

/// Removes a feature.
pub(super) fn remove(context: &Context, of: &str, name: &str) -> Answer<()> {
    change(context, of, name, None)
}

fn change(context: &Context, of: &str, name: &str, value: Option<&str>) -> Answer<()> {
    let _lock = settings::lock(&context.state)?;
    let vm = World::new(context).vm(of)?;
    let mut settings = vm.settings.clone();
    let before = match value {
        Some(value) => settings.features.insert(name.to_owned(), value.to_owned()),
        None => Some(settings.features.remove(name).ok_or_else(|| not_found(&vm, name))?),
    };
    settings.save(&context.state, &vm.owner)?;
    if name == PRELOAD {
        let of = match vm.kind {
            VmKind::Admin => World::new(context).system_value("default_dispvm")?,
            _ => vm.name.clone(),
        };
        apply_preload(context, &[&of]).inspect_err(|_| drop(vm.settings.save(&context.state, &vm.owner)))?;
    }
    let event = match value {
        Some(value) => {
            let event = Event::new(&vm.name, format!("domain-feature-set:{name}"));
            let event = event.detail("feature", name).detail("value", value);
            before.into_iter().fold(event, |event, before| event.detail("oldvalue", before))
        }
        None => Event::new(&vm.name, format!("domain-feature-delete:{name}")).detail("feature", name),
    };
    context.events.fire(&event);
    Ok(())
}

/// After another qube has become the default DVM template: dom0's number is no longer that of the one before.
pub(super) fn default_changed(context: &Context, before: &str) -> Answer<()> {
    let world = World::new(context);
    match world.vm(ADMIN_VM)?.settings.features.contains_key(PRELOAD) {
        true => apply_preload(context, &[before, &world.system_value("default_dispvm")?]),
        false => Ok(()),
    }
}

/// Writes how many disposables of these templates are to be kept ready into their records.
fn apply_preload(context: &Context, of: &[&str]) -> Answer<()> {
    let world = World::new(context);
    let default = world.system_value("default_dispvm")?;
    let global = world.vm(ADMIN_VM)?.settings.features.get(PRELOAD).cloned();
    for name in of.iter().filter(|name| !name.is_empty()) {
        let Some(vm) = world.find(name)? else { continue };
        let VmKind::App(dvm) = &vm.kind else { continue };
        let own = vm.settings.features.get(PRELOAD).cloned();
        let text = if **name == *default { global.clone().or(own) } else { own };
        let spares = text.map(|text| text.parse::<u32>().unwrap_or_default());
        if dvm.spares != spares {
            qube::update_dvm(&context.state, name, |dvm| dvm.spares = spares)?;
            client::changed(&context.state);
        }
    }
    Ok(())
}
