//! The qubes as they are at one moment: records, settings and running disposables, read when they are asked for.

use std::cell::{OnceCell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use admin_api::{Kind as Exceptions, ADMIN_VM};

use super::answer::{exception, quoted, Answer};
use super::events::Hub;
use super::settings::{self, Owner, Settings, System};
use super::volume_change::Pending;
use crate::clones::{self, CloneRecord, Keeping, Power};
use crate::daemon::client;
use crate::error::{Kind, Result};
use crate::qube::{Class, Disposable, Dvm, Qube, Template};
use crate::state::State;

/// How long what the daemon said of its spares holds: it is asked by `qvm-ls` once a qube otherwise.
const SPARES_KNOWN: Duration = Duration::from_millis(500);

/// What all requests share.
pub(super) struct Context {
    pub(super) state: State,
    pub(super) events: Hub,
    /// The clones of keepers that were handed out, and when the daemon said so; those of other keepers are spares.
    handed_out: Mutex<Option<(Instant, Option<Vec<String>>)>>,
    /// Volumes that are about to be cloned.
    pub(super) pending_clones: Pending,
}

impl Context {
    pub(super) fn new(state: State) -> Context {
        Context {
            state,
            events: Hub::default(),
            handed_out: Mutex::new(None),
            pending_clones: Pending::default(),
        }
    }

    /// What the daemon said of its spares holds no more: one was handed out.
    pub(super) fn forget_spares(&self) {
        *self.handed_out.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = None;
    }

    /// Whether a clone waits to be somebody's. Without a daemon to say so, it counts as somebody's.
    fn is_spare(&self, clone: &CloneRecord) -> bool {
        if clone.keeping != Keeping::Keeper {
            return false;
        }
        let mut known = self.handed_out.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let fresh = known.as_ref().filter(|(at, _)| at.elapsed() < SPARES_KNOWN);
        let handed_out = match fresh {
            Some((_, handed_out)) => handed_out.clone(),
            None => {
                let asked = client::status(&self.state).ok().flatten().map(|status| status.kept);
                *known = Some((Instant::now(), asked.clone()));
                asked
            }
        };
        handed_out.is_some_and(|names| !names.contains(&clone.name))
    }
}

/// A qube.
#[derive(Debug)]
pub(super) struct Vm {
    pub(super) name: String,
    pub(super) label: String,
    pub(super) kind: VmKind,
    pub(super) owner: Owner,
    pub(super) settings: Settings,
}

/// What it is.
#[derive(Debug)]
pub(super) enum VmKind {
    Admin,
    Template(Template),
    App(Dvm),
    /// A disposable that runs, or is kept ready.
    Disp(CloneRecord),
    /// A disposable that has a record of its own, whether it runs or not.
    Named(Disposable),
}

impl Vm {
    pub(super) fn class(&self) -> &'static str {
        match self.kind {
            VmKind::Admin => "AdminVM",
            VmKind::Template(_) => "TemplateVM",
            VmKind::App(_) => "AppVM",
            VmKind::Disp(_) | VmKind::Named(_) => "DispVM",
        }
    }

    /// The qube it is based on.
    pub(super) fn template(&self) -> Option<&str> {
        match &self.kind {
            VmKind::App(dvm) => Some(&dvm.template),
            VmKind::Disp(clone) => Some(&clone.dvm),
            VmKind::Named(disposable) => Some(&disposable.template),
            VmKind::Admin | VmKind::Template(_) => None,
        }
    }

    pub(super) fn uuid(&self) -> String {
        if matches!(self.kind, VmKind::Admin) {
            return "00000000-0000-0000-0000-000000000000".to_owned();
        }
        self.settings.uuid.clone().unwrap_or_else(|| {
            let salt = match &self.kind {
                VmKind::Disp(clone) => clone.started,
                _ => 0,
            };
            let hash = blake3::hash(format!("qube {} {salt}", self.name).as_bytes());
            uuid_text(hash.as_bytes())
        })
    }
}

/// Sixteen bytes as a UUID of version 4.
pub(super) fn uuid_text(bytes: &[u8]) -> String {
    let hex: String = bytes.iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    let part = |from: usize, to: usize| hex.get(from..to).unwrap_or_default();
    format!("{}-{}-4{}-8{}-{}", part(0, 8), part(8, 12), part(13, 16), part(17, 20), part(20, 32))
}

/// See the module. For one request.
pub(super) struct World<'a> {
    pub(super) context: &'a Context,
    pub(super) state: &'a State,
    system: OnceCell<System>,
    known: RefCell<HashMap<String, Option<Rc<Vm>>>>,
    clones: OnceCell<Vec<CloneRecord>>,
}

impl<'a> World<'a> {
    pub(super) fn new(context: &'a Context) -> World<'a> {
        World {
            context,
            state: &context.state,
            system: OnceCell::new(),
            known: RefCell::default(),
            clones: OnceCell::new(),
        }
    }

    pub(super) fn system(&self) -> Result<&System> {
        if self.system.get().is_none() {
            let _ = self.system.set(System::load(self.state)?);
        }
        Ok(self.system.get_or_init(System::default))
    }

    /// The qube of this name, or `uuid:UUID`.
    pub(super) fn vm(&self, name: &str) -> Answer<Rc<Vm>> {
        let found = match name.strip_prefix("uuid:") {
            Some(uuid) => self.all()?.into_iter().find(|vm| vm.uuid() == uuid),
            None => self.find(name)?,
        };
        found.ok_or_else(|| exception(Exceptions::VmNotFound, format!("No such domain: {}", quoted(name))))
    }

    /// The qube of this name, if there is one.
    pub(super) fn find(&self, name: &str) -> Result<Option<Rc<Vm>>> {
        if let Some(known) = self.known.borrow().get(name) {
            return Ok(known.clone());
        }
        let found = self.load(name)?.map(Rc::new);
        self.known.borrow_mut().insert(name.to_owned(), found.clone());
        Ok(found)
    }

    fn load(&self, name: &str) -> Result<Option<Vm>> {
        let with = |label: &str, kind: VmKind, owner: Owner| -> Result<Option<Vm>> {
            let settings = Settings::load(self.state, &owner)?;
            Ok(Some(Vm { name: name.to_owned(), label: label.to_owned(), kind, owner, settings }))
        };
        let owner = Owner::Qube(name.to_owned());
        if name == ADMIN_VM {
            return with("black", VmKind::Admin, owner);
        }
        match Qube::load(self.state, name) {
            Ok(Qube { label, class: Class::TemplateVM(template), .. }) => {
                with(&label, VmKind::Template(template), owner)
            }
            Ok(Qube { label, class: Class::AppVM(dvm), .. }) => with(&label, VmKind::App(dvm), owner),
            Ok(Qube { label, class: Class::DispVM(disposable), .. }) => {
                with(&label, VmKind::Named(disposable), owner)
            }
            Err(error) if error.kind == Kind::Usage => {
                let Some(clone) = self.disposables()?.find(|clone| clone.name == name).cloned() else {
                    return Ok(None);
                };
                // Its template may have been removed by hand.
                let dvms = self.find(&clone.dvm)?.map(|dvm| dvm.label.clone());
                let label = clone.label.clone().or(dvms).unwrap_or_else(|| "red".to_owned());
                let owner = Owner::Disposable(name.to_owned(), clone.started);
                let settings = match Settings::load_own(self.state, &owner)? {
                    Some(own) => own,
                    None => self.begins_with(&clone)?,
                };
                Ok(Some(Vm { name: name.to_owned(), label, kind: VmKind::Disp(clone), owner, settings }))
            }
            Err(error) => Err(error),
        }
    }

    /// The settings a disposable begins with: its template's as they were then, not its caller's. From the first change on it has its
    /// own. A spare is nobody's yet, and has its template's as they are.
    fn begins_with(&self, clone: &CloneRecord) -> Result<Settings> {
        let of_template = match settings::begun(self.state, &clone.name, clone.started)? {
            Some(begun) => Some(begun),
            None => self.find(&clone.dvm)?.map(|dvm| dvm.settings.clone()),
        };
        let Some(of_template) = of_template else { return Ok(Settings::default()) };
        let mut settings = of_template.of_its_disposables();
        if self.context.is_spare(clone) {
            settings.features.insert("internal".to_owned(), "1".to_owned());
        }
        Ok(settings)
    }

    /// All names, dom0's first.
    pub(super) fn names(&self) -> Result<Vec<String>> {
        let mut names = Qube::names(self.state)?;
        names.retain(|name| self.state.qube(name).join("qube.toml").is_file());
        names.extend(self.disposables()?.map(|clone| clone.name.clone()));
        names.sort();
        names.insert(0, ADMIN_VM.to_owned());
        Ok(names)
    }

    /// All qubes, dom0 first. One whose record cannot be read is left out, and logged: it is its own trouble.
    pub(super) fn all(&self) -> Result<Vec<Rc<Vm>>> {
        let readable = |name: String| match self.find(&name) {
            Ok(found) => found,
            Err(error) => {
                tracing::warn!("{name} is left out: {error}");
                None
            }
        };
        Ok(self.names()?.into_iter().filter_map(readable).collect())
    }

    fn clones(&self) -> Result<&[CloneRecord]> {
        if self.clones.get().is_none() {
            let _ = self.clones.set(clones::list(self.state)?);
        }
        Ok(self.clones.get().map_or(&[], |clones| clones))
    }

    /// The disposables that run or are kept ready.
    pub(super) fn disposables(&self) -> Result<impl Iterator<Item = &CloneRecord>> {
        Ok(self.clones()?.iter().filter(|clone| clone.qube.is_none()))
    }

    /// The names of a template's disposables that are somebody's, those with a record that do not run among them.
    pub(super) fn disposables_of(&self, dvm: &str) -> Result<Vec<String>> {
        let living = self.disposables()?.filter(|clone| clone.dvm == dvm && !self.context.is_spare(clone));
        let mut names: Vec<String> = living.map(|clone| clone.name.clone()).collect();
        let all = self.all()?.into_iter();
        let named = all.filter(|vm| matches!(&vm.kind, VmKind::Named(own) if own.template == dvm));
        names.extend(named.map(|vm| vm.name.clone()));
        Ok(names)
    }

    /// The process in which a qube runs itself.
    pub(super) fn running_itself(&self, name: &str) -> Result<Option<&CloneRecord>> {
        Ok(self.clones()?.iter().find(|clone| clone.qube.as_deref() == Some(name)))
    }

    /// The process in which it runs, whatever it is.
    pub(super) fn running<'b>(&'b self, vm: &'b Vm) -> Result<Option<&'b CloneRecord>> {
        match &vm.kind {
            VmKind::Disp(clone) => Ok(Some(clone)),
            _ => self.running_itself(&vm.name),
        }
    }

    pub(super) fn is_spare_clone(&self, clone: &CloneRecord) -> bool {
        self.context.is_spare(clone)
    }

    pub(super) fn is_spare(&self, vm: &Vm) -> bool {
        matches!(&vm.kind, VmKind::Disp(clone) if self.context.is_spare(clone))
    }

    /// `Running`, `Paused`, `Transient` (it is being started) or `Halted`.
    pub(super) fn power_state(&self, vm: &Vm) -> Result<&'static str> {
        if matches!(vm.kind, VmKind::Admin) {
            return Ok("Running");
        }
        Ok(match self.running(vm)?.map(|clone| clone.power) {
            Some(_) if self.is_spare(vm) => "Paused",
            Some(Power::Running) => "Running",
            Some(Power::Paused) => "Paused",
            Some(Power::Starting) => "Transient",
            None => "Halted",
        })
    }
}
