//! One operation of the product on the simulated machine, in a process of its own: this is what fails and is killed.
//!
//! When the operation is over, however it went, the process has no descriptor and no agent's thread more than before.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use control_plane::admin::settings::{Owner, Settings};
use control_plane::error::{Error, Result};
use control_plane::launcher::{self, Request};
use control_plane::output::error_text;
use control_plane::qube::{Disposable, Dvm};
use control_plane::savefiles::{self, Prerun};
use control_plane::state::State;
use control_plane::templates::{self, TemplateFiles};
use engine::build::{Step, Watch};
use nix::sys::resource::{setrlimit, Resource, RLIM_INFINITY};
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::alarm;
use qrexec::Exec;

use crate::agent::THREAD;
use crate::context::Context;
use crate::machine::SimMachine;
use crate::plan::Plan;
use crate::steps::Steps;
use crate::tracer;
use crate::world::{DVM, TEMPLATE};

/// Two orders of magnitude above the usual: a process that lives longer hangs, and is ended by SIGALRM.
pub const ALARM_S: u32 = 30;

/// What is done.
#[derive(Debug, Clone, PartialEq, Eq, clap::Subcommand)]
pub enum Action {
    /// Build a savefile
    Build {
        /// DVM template
        dvm: String,
        /// The hook
        #[arg(long)]
        prerun: Option<PathBuf>,
    },
    /// Launch a clone
    Launch {
        /// DVM template
        dvm: String,
        /// A command of the simulated guest
        command: Vec<String>,
    },
    /// Collect what nothing needs
    Gc,
    /// Remove a savefile
    Rm {
        /// DVM template
        dvm: String,
    },
    /// Give a template its next generation
    AddTemplate {
        /// TemplateVM
        name: String,
        /// Root image
        root: PathBuf,
    },
    /// Make a DVM template
    AddDvm {
        /// DVM template
        name: String,
    },
    /// Make a disposable with a record of its own
    AddDisposable {
        /// Disposable
        name: String,
    },
    /// Remove a qube
    RmQube {
        /// Qube
        name: String,
    },
}

impl Action {
    /// As arguments.
    pub fn arguments(&self) -> Vec<String> {
        let path = |path: &Path| path.to_string_lossy().into_owned();
        match self {
            Action::Build { dvm, prerun: None } => vec!["build".into(), dvm.clone()],
            Action::Build { dvm, prerun: Some(hook) } => {
                vec!["build".into(), dvm.clone(), "--prerun".into(), path(hook)]
            }
            Action::Launch { dvm, command } => {
                let head = ["launch".to_owned(), dvm.clone(), "--".to_owned()];
                head.into_iter().chain(command.iter().cloned()).collect()
            }
            Action::Gc => vec!["gc".into()],
            Action::Rm { dvm } => vec!["rm".into(), dvm.clone()],
            Action::AddTemplate { name, root } => vec!["add-template".into(), name.clone(), path(root)],
            Action::AddDvm { name } => vec!["add-dvm".into(), name.clone()],
            Action::AddDisposable { name } => vec!["add-disposable".into(), name.clone()],
            Action::RmQube { name } => vec!["rm-qube".into(), name.clone()],
        }
    }
}

/// Where and how an operation runs.
#[derive(Debug, Clone, clap::Args)]
pub struct Setting {
    /// The world's folder
    #[arg(long)]
    pub world: PathBuf,
    /// Seed
    #[arg(long)]
    pub seed: u64,
    /// What goes wrong
    #[arg(long, default_value = "nothing")]
    pub plan: Plan,
    /// Where the steps are written
    #[arg(long)]
    pub trace: Option<PathBuf>,
    /// Whether the parent traces this process
    #[arg(long)]
    pub traced: bool,
}

/// Where the simulation's own notes are in a world.
pub fn notes(world: &Path) -> PathBuf {
    world.join("notes")
}

/// Where the state folder is in a world.
pub fn state_root(world: &Path) -> PathBuf {
    world.join("state")
}

/// Does it. Answers the exit status.
pub fn run(setting: &Setting, action: &Action) -> io::Result<u8> {
    alarm::set(ALARM_S);
    let steps = Steps::new(setting.plan, setting.trace.as_deref())?;
    let context = Arc::new(Context::new(&notes(&setting.world), setting.seed, steps)?);
    let before = descriptors()?;
    match setting.plan {
        Plan::FileBytes(bytes) => {
            // Blocked, the signal for a file too large is an error of the write instead.
            let mut signals = SigSet::empty();
            signals.add(Signal::SIGXFSZ);
            signals.thread_block()?;
            setrlimit(Resource::RLIMIT_FSIZE, bytes, RLIM_INFINITY)?;
        }
        Plan::Descriptors(count) => setrlimit(Resource::RLIMIT_NOFILE, count, 1 << 10)?,
        _ => {}
    }
    if setting.traced {
        tracer::stop_for_tracer()?;
    }
    let result = act(&setting.world, SimMachine::new(context.clone()), action);
    setrlimit(Resource::RLIMIT_NOFILE, 1 << 10, 1 << 10)?;
    setrlimit(Resource::RLIMIT_FSIZE, RLIM_INFINITY, RLIM_INFINITY)?;
    for (fd, file) in descriptors_since(&before)? {
        context.violation(&format!("{action:?} left descriptor {fd} open: {}", file.display()));
    }
    if agents()? > 0 {
        context.violation(&format!("{action:?} left a simulated guest running"));
    }
    Ok(result.unwrap_or_else(|error| {
        say(&error_text(&error));
        match action {
            Action::Launch { .. } => launcher::exit_of(&error),
            _ => 1,
        }
    }))
}

fn act(world: &Path, machine: SimMachine, action: &Action) -> Result<u8> {
    let state = State::open(&state_root(world))?;
    match action {
        Action::Build { dvm, prerun } => {
            let prerun = prerun.clone().map_or(Prerun::Same, Prerun::File);
            savefiles::build(&state, &machine, dvm, &prerun, true, &mut Unwatched)?;
        }
        Action::Launch { dvm, command } => {
            let exec = Exec::user(command.iter().map(String::as_str));
            let request =
                Request { dvm: dvm.clone(), exec, label: None, start: Instant::now(), rebuild: false };
            let report = launcher::run(&state, &machine, request, &say)?;
            say(&report.json().to_string());
            return Ok(report.exit_status());
        }
        Action::Gc => savefiles::collect(&state).map(|_| ())?,
        Action::Rm { dvm } => savefiles::remove(&state, dvm)?,
        Action::AddTemplate { name, root } => {
            let cmdline = "simulated".to_owned();
            let files = TemplateFiles { root, kernel: root, initrd: root, cmdline };
            templates::add_template(&state, name, "black", &files)?;
        }
        Action::AddDvm { name } => templates::add_dvm(&state, name, "red", new_dvm())?,
        Action::AddDisposable { name } => {
            let disposable = Disposable { template: DVM.to_owned(), auto_cleanup: false };
            let settings = Settings { notes: "begun".to_owned(), ..Settings::default() };
            let begin = || settings.save(&state, &Owner::Qube(name.clone()));
            templates::add_disposable(&state, name, "red", disposable, begin)?;
        }
        Action::RmQube { name } => templates::remove(&state, name)?,
    }
    Ok(0)
}

/// Says something on stderr, which may be as full as the disk is.
fn say(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// The settings of a small DVM template.
pub fn new_dvm() -> Dvm {
    Dvm {
        template: TEMPLATE.to_owned(),
        template_for_dispvms: true,
        memory_mib: 64,
        vcpus: 1,
        net: "none".to_owned(),
        private_mib: 32,
        private_generation: 1,
        private_id: String::new(),
        volatile_mib: 32,
        spares: Default::default(),
        savefile: None,
    }
}

/// Nobody watches a build.
pub struct Unwatched;

impl Watch for Unwatched {
    fn step(&mut self, _: Step) {}
    fn wrote(&self, _: engine::savefile::Progress) {}
}

/// This process's descriptors, but for the one that lists them.
pub fn descriptors() -> io::Result<BTreeMap<i32, PathBuf>> {
    let listed = fs::read_dir("/proc/self/fd")?.filter_map(|entry| {
        let path = entry.ok()?.path();
        Some((path.file_name()?.to_str()?.parse().ok()?, fs::read_link(&path).ok()?))
    });
    let own = PathBuf::from(format!("/proc/{}/fd", std::process::id()));
    Ok(listed.filter(|(_, file)| *file != own).collect())
}

/// Descriptors that were not there before and stay. What is read ahead of a restore is read on a thread of its own, which may
/// outlast a short command by a moment.
fn descriptors_since(before: &BTreeMap<i32, PathBuf>) -> io::Result<Vec<(i32, PathBuf)>> {
    let mut more = Vec::new();
    for _ in 0..100 {
        more = descriptors()?.into_iter().filter(|(fd, _)| !before.contains_key(fd)).collect();
        if more.is_empty() {
            break;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(more)
}

/// How many agents' threads this process has. A thread that was joined may be listed for a moment more.
fn agents() -> io::Result<usize> {
    let mut count = 0;
    for _ in 0..20 {
        count = fs::read_dir("/proc/self/task")?
            .filter_map(|entry| fs::read_to_string(entry.ok()?.path().join("comm")).ok())
            .filter(|name| name.trim_end() == THREAD)
            .count();
        if count == 0 {
            break;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(count)
}

/// For those who need it: an error of this crate's own as one of the product's.
pub fn own_error(step: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |error| Error::failed(step)(error)
}
