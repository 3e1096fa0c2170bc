//! The properties: which class has which, of what type, and what holds where nobody has set one.
//!
//! Written from QubesOS/qubes-core-admin `qubes/vm/{__init__,qubesvm,appvm,dispvm,templatevm,adminvm}.py`, `qubes/vm/mix/{net,
//! dvmtemplate}.py` and `qubes/app.py` (R4.2, R4.3). What differs there by the nature of the engine is said in docs/admin-api.md.

use admin_api::lines::{bool_text, Property as Value, Type};
use engine::identity::CLONE_NUMBERS;

use super::answer::Answer;
use super::settings::System;
use super::world::{Vm, VmKind, World};
use crate::clones;

const ADMIN: u8 = 1;
const TEMPLATE: u8 = 2;
const APP: u8 = 4;
const DISP: u8 = 8;
const SYSTEM: u8 = 16;
/// All that is made from a root volume.
const GUESTS: u8 = TEMPLATE | APP | DISP;

/// A property.
#[derive(Debug)]
pub struct Property {
    /// Its name.
    pub name: &'static str,
    /// What its values are.
    pub kind: Type,
    /// Which classes have it.
    on: u8,
    /// Where its value is.
    pub(super) place: Place,
    /// What it is for.
    pub help: &'static str,
}

/// Where a value is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// In the settings, or else what the default says.
    Settings(Otherwise),
    /// In the qube's own record, where the engine reads it; the default is what it would be without.
    Record(Otherwise),
    /// Nowhere: it follows from what the qube is, and cannot be set.
    Computed,
}

/// What holds where nothing is set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Otherwise {
    /// There is no default.
    Nothing,
    /// This.
    Fixed(&'static str),
    /// What the system has.
    System(&'static str),
    /// What the template has; without one, this.
    Template(&'static str),
    /// What the template has; without one, what the system has.
    TemplateThenSystem(&'static str),
    /// See `default_of`.
    Rule,
}

use Otherwise::{Fixed, Nothing, Rule, Template, TemplateThenSystem};
use Place::{Computed, Record, Settings};

const fn property(name: &'static str, kind: Type, on: u8, place: Place, help: &'static str) -> Property {
    Property { name, kind, on, place, help }
}

/// All of them, sorted by name within qubes and within the system.
#[rustfmt::skip]
static PROPERTIES: [Property; 49] = [
    property("audiovm", Type::Vm, GUESTS, Settings(Otherwise::System("default_audiovm")), "Qube that plays its sound."),
    property("auto_cleanup", Type::Bool, DISP, Record(Fixed("False")), "Whether it is removed when it has shut down."),
    property("autostart", Type::Bool, GUESTS, Settings(Fixed("False")), "Whether it is started with the system."),
    property("debug", Type::Bool, GUESTS, Settings(Fixed("False")), "Whether debugging features are on."),
    property("default_dispvm", Type::Vm, ADMIN | GUESTS, Settings(Rule), "Template of disposables made for it."),
    property("default_user", Type::Str, GUESTS, Settings(Template("user")), "User who runs applications."),
    property("dispid", Type::Int, DISP, Computed, "Number in a disposable's name."),
    property("guivm", Type::Vm, GUESTS, Settings(Otherwise::System("default_guivm")), "Qube that shows its windows."),
    property("icon", Type::Str, ADMIN | GUESTS, Computed, "Icon that stands for it."),
    property("include_in_backups", Type::Bool, ADMIN | GUESTS, Settings(Rule), "Whether backups have it by default."),
    property("installed_by_rpm", Type::Bool, GUESTS, Settings(Fixed("False")), "Whether a package manager has installed it."),
    property("is_preload", Type::Bool, DISP, Computed, "Whether it is kept ready for whoever asks next."),
    property("kernel", Type::Str, GUESTS, Computed, "Kernel; none, since each template has its own."),
    property("kernelopts", Type::Str, GUESTS, Record(Template("")), "The kernel's command line, which is its template's."),
    property("keyboard_layout", Type::Str, ADMIN | GUESTS, Settings(Fixed("us++")), "Layout of its keyboard."),
    property("klass", Type::Str, ADMIN | GUESTS, Computed, "Its class."),
    property("label", Type::Label, ADMIN | GUESTS, Record(Nothing), "Colour of its windows' borders."),
    property("management_dispvm", Type::Vm, GUESTS, Settings(TemplateThenSystem("management_dispvm")), "Template of disposables that manage it."),
    property("maxmem", Type::Int, GUESTS, Computed, "Most memory for balancing; 0, since its memory is not balanced."),
    property("memory", Type::Int, GUESTS, Record(Template("1024")), "Memory in MiB."),
    property("name", Type::Str, ADMIN | GUESTS, Computed, "Its name."),
    property("netvm", Type::Vm, GUESTS, Settings(Rule), "Qube that gives it network."),
    property("provides_network", Type::Bool, GUESTS, Settings(Fixed("False")), "Whether others may have it as their netvm."),
    property("qrexec_timeout", Type::Int, GUESTS, Settings(TemplateThenSystem("default_qrexec_timeout")), "Seconds its agent may take to answer."),
    property("shutdown_timeout", Type::Int, GUESTS, Settings(TemplateThenSystem("default_shutdown_timeout")), "Seconds it may take to shut down."),
    property("template", Type::Vm, APP | DISP, Record(Nothing), "What it is based on."),
    property("template_for_dispvms", Type::Bool, APP, Record(Fixed("False")), "Whether disposables may be made from it."),
    property("updateable", Type::Bool, ADMIN | GUESTS, Computed, "Whether it is updated by itself."),
    property("uuid", Type::Str, ADMIN | GUESTS, Computed, "What no other qube has."),
    property("vcpus", Type::Int, GUESTS, Record(Template("2")), "Number of virtual CPUs."),
    property("virt_mode", Type::Str, GUESTS, Computed, "How it is virtualised."),
    property("check_updates_vm", Type::Bool, SYSTEM, Settings(Fixed("True")), "Whether qubes look for updates."),
    property("clockvm", Type::Vm, SYSTEM, Settings(Fixed("")), "Qube that knows the time."),
    property("default_audiovm", Type::Vm, SYSTEM, Settings(Fixed("")), "Default of audiovm."),
    property("default_dispvm", Type::Vm, SYSTEM, Settings(Fixed("")), "Default of default_dispvm."),
    property("default_guivm", Type::Vm, SYSTEM, Settings(Fixed("")), "Default of guivm."),
    property("default_kernel", Type::Str, SYSTEM, Computed, "Default of kernel."),
    property("default_netvm", Type::Vm, SYSTEM, Settings(Fixed("")), "Default of netvm."),
    property("default_pool", Type::Str, SYSTEM, Computed, "Pool of new volumes."),
    property("default_pool_kernel", Type::Str, SYSTEM, Computed, "Pool of new kernel volumes."),
    property("default_pool_private", Type::Str, SYSTEM, Computed, "Pool of new private volumes."),
    property("default_pool_root", Type::Str, SYSTEM, Computed, "Pool of new root volumes."),
    property("default_pool_volatile", Type::Str, SYSTEM, Computed, "Pool of new volatile volumes."),
    property("default_qrexec_timeout", Type::Int, SYSTEM, Settings(Fixed("60")), "Default of qrexec_timeout."),
    property("default_shutdown_timeout", Type::Int, SYSTEM, Settings(Fixed("60")), "Default of shutdown_timeout."),
    property("default_template", Type::Vm, SYSTEM, Settings(Fixed("")), "Template of new AppVMs."),
    property("management_dispvm", Type::Vm, SYSTEM, Settings(Fixed("")), "Default of management_dispvm."),
    property("stats_interval", Type::Int, SYSTEM, Settings(Fixed("3")), "Seconds between two looks at what qubes use."),
    property("updatevm", Type::Vm, SYSTEM, Settings(Fixed("")), "Qube through which dom0 is updated."),
];

/// Whose properties: the system's without a qube.
pub(super) type Subject<'a> = Option<&'a Vm>;

/// Those that it has, sorted.
pub(super) fn of(subject: Subject<'_>) -> impl Iterator<Item = &'static Property> {
    let on = match subject.map(|vm| &vm.kind) {
        None => SYSTEM,
        Some(VmKind::Admin) => ADMIN,
        Some(VmKind::Template(_)) => TEMPLATE,
        Some(VmKind::App(_)) => APP,
        Some(VmKind::Disp(_) | VmKind::Named(_)) => DISP,
    };
    PROPERTIES.iter().filter(move |property| property.on & on != 0)
}

impl World<'_> {
    /// A property's value and whether it is the default.
    pub(super) fn get(&self, subject: Subject<'_>, property: &Property) -> Answer<Value> {
        let value = |is_default, value: String| Value::new(is_default, property.kind, value);
        let set = match subject {
            None => self.system()?.properties.get(property.name).cloned(),
            Some(vm) => vm.settings.properties.get(property.name).cloned(),
        };
        Ok(match (property.place, subject) {
            (Computed, _) => value(is_a_default(property.name), self.computed(subject, property)?),
            (Record(_), Some(vm)) => {
                let now = self.recorded(vm, property)?;
                let default = self.default_of(subject, property)?;
                value(set.is_none() && default.as_ref() == Some(&now), now)
            }
            (Settings(_) | Record(_), _) => match set {
                Some(set) => value(false, set),
                None => value(true, self.default_of(subject, property)?.unwrap_or_default()),
            },
        })
    }

    /// A value by name, empty where there is no such property.
    pub(super) fn value(&self, vm: &Vm, name: &str) -> Answer<String> {
        match of(Some(vm)).find(|property| property.name == name) {
            Some(property) => Ok(self.get(Some(vm), property)?.value),
            None => Ok(String::new()),
        }
    }

    /// A value of the system's by name.
    pub(super) fn system_value(&self, name: &str) -> Answer<String> {
        match of(None).find(|property| property.name == name) {
            Some(property) => Ok(self.get(None, property)?.value),
            None => Ok(String::new()),
        }
    }

    /// What holds where nobody has set it; `None` if it has no default.
    pub(super) fn default_of(&self, subject: Subject<'_>, property: &Property) -> Answer<Option<String>> {
        let otherwise = match property.place {
            Settings(otherwise) | Record(otherwise) => otherwise,
            Computed => Nothing,
        };
        let (inherits, last) = match otherwise {
            Nothing => return Ok(None),
            Fixed(value) => return Ok(Some(value.to_owned())),
            Otherwise::System(name) => return self.system_value(name).map(Some),
            Rule => return self.rule(subject, property.name).map(Some),
            Template(value) => (subject, value.to_owned()),
            TemplateThenSystem(name) => (subject, self.system_value(name)?),
        };
        let template = inherits.and_then(|vm| vm.template());
        match template.map(|template| self.find(template)).transpose()?.flatten() {
            Some(template) => self.value(&template, property.name).map(Some),
            None => Ok(Some(last)),
        }
    }

    fn rule(&self, subject: Subject<'_>, name: &str) -> Answer<String> {
        let Some(vm) = subject else { return Ok(String::new()) };
        Ok(match (name, &vm.kind) {
            ("default_dispvm", VmKind::Disp(_) | VmKind::Named(_)) => {
                vm.template().unwrap_or_default().to_owned()
            }
            ("default_dispvm", _) => self.system_value("default_dispvm")?,
            ("include_in_backups", VmKind::Disp(_)) => bool_text(false).to_owned(),
            ("include_in_backups", VmKind::Named(own)) => bool_text(!own.auto_cleanup).to_owned(),
            ("include_in_backups", _) => bool_text(true).to_owned(),
            // A template's updates go through a proxy.
            ("netvm", VmKind::Template(_)) => String::new(),
            ("netvm", _) if self.value(vm, "provides_network")? == bool_text(true) => String::new(),
            ("netvm", _) => self.system_value("default_netvm")?,
            _ => String::new(),
        })
    }

    /// What the engine's record has.
    fn recorded(&self, vm: &Vm, property: &Property) -> Answer<String> {
        Ok(match (property.name, &vm.kind) {
            ("label", _) => vm.label.clone(),
            ("template", _) => vm.template().unwrap_or_default().to_owned(),
            ("kernelopts", VmKind::Template(template)) => template.cmdline.clone(),
            ("memory", VmKind::App(dvm)) => dvm.memory_mib.to_string(),
            ("vcpus", VmKind::App(dvm)) => dvm.vcpus.to_string(),
            ("auto_cleanup", VmKind::Disp(_)) => bool_text(true).to_owned(),
            ("auto_cleanup", VmKind::Named(own)) => bool_text(own.auto_cleanup).to_owned(),
            ("template_for_dispvms", VmKind::App(dvm)) => bool_text(dvm.template_for_dispvms).to_owned(),
            // What a template has of these is what those on it begin with.
            ("memory" | "vcpus", VmKind::Template(_)) => match vm.settings.properties.get(property.name) {
                Some(set) => set.clone(),
                None => self.default_of(Some(vm), property)?.unwrap_or_default(),
            },
            _ => self.default_of(Some(vm), property)?.unwrap_or_default(),
        })
    }

    fn computed(&self, subject: Subject<'_>, property: &Property) -> Answer<String> {
        let Some(vm) = subject else {
            let is_pool = property.name.starts_with("default_pool");
            return Ok(if is_pool { super::volumes::POOL } else { "" }.to_owned());
        };
        Ok(match property.name {
            "name" => vm.name.clone(),
            "klass" => vm.class().to_owned(),
            "uuid" => vm.uuid(),
            "icon" => icon(vm),
            "updateable" => bool_text(vm.template().is_none()).to_owned(),
            "dispid" => dispid(&vm.name).to_string(),
            "is_preload" => bool_text(self.is_spare(vm)).to_owned(),
            "maxmem" => "0".to_owned(),
            "virt_mode" => "pvh".to_owned(),
            _ => String::new(),
        })
    }
}

/// The number in a disposable's name; one with a name of the user's has one that follows from it.
fn dispid(name: &str) -> u32 {
    let [first, second, ..] = *blake3::hash(name.as_bytes()).as_bytes();
    let drawn = u32::from(u16::from_le_bytes([first, second])) % CLONE_NUMBERS;
    clones::number_of(name).map_or(drawn, |number| number.get())
}

fn icon(vm: &Vm) -> String {
    let prefix = match &vm.kind {
        VmKind::Admin => return "adminvm-black".to_owned(),
        VmKind::Template(_) => "templatevm",
        VmKind::App(dvm) if dvm.template_for_dispvms => "templatevm",
        VmKind::App(_) => "appvm",
        VmKind::Disp(_) | VmKind::Named(_) => "dispvm",
    };
    format!("{prefix}-{}", vm.label)
}

/// Whether a value that cannot be set counts as the default one: those that say what the qube is do not.
fn is_a_default(name: &str) -> bool {
    !matches!(name, "name" | "uuid" | "dispid")
}

/// What was set of the system that names this qube, and must not while it is removed.
pub(super) fn naming(system: &System, name: &str) -> Vec<String> {
    let names_it = |property: &&Property| {
        property.kind == Type::Vm && system.properties.get(property.name).is_some_and(|set| set == name)
    };
    of(None).filter(names_it).map(|property| format!("the system's {}", property.name)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_sorted_and_none_is_there_twice_in_a_class() {
        for on in [ADMIN, TEMPLATE, APP, DISP, SYSTEM] {
            let names: Vec<_> = PROPERTIES.iter().filter(|p| p.on & on != 0).map(|p| p.name).collect();
            assert!(names.windows(2).all(|pair| pair[0] < pair[1]), "{names:?}");
        }
    }
}
