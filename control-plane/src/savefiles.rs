//! The savefiles of DVM templates: build, find ready, describe, verify, remove, collect.
//!
//! Invariants:
//! - One build per template at a time, under a lock that dies with its builder.
//! - The record pins a savefile only after the new file has been written, verified and admitted; until then the
//!   old one serves, if its inputs are still the same.
//! - A savefile, a hot image and a template's root generation stay while a record pins them or a living clone uses them; old
//!   generations of a private volume, while any clone of its DVM template lives.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use engine::build::{self, BuildError, Order, Watch};
use engine::host::{Host, HostError};
use engine::image::hot::{HotFiles, HotImage};
use engine::launch::LaunchError;
use engine::savefile::{self, Manifest, ReadBackend, RootHash, Savefile};
use engine::timeline::Timeline;

use crate::agent_link::AgentLink;
use crate::clones::{self, Keeping, Lease};
use crate::error::{Error, Kind, Result};
use crate::inputs::{self, Guest};
use crate::machine::{self, Machine};
use crate::qube::{self, Class, Qube, SavefilePin};
use crate::state::{self, State};
use crate::templates;

/// Whether a launch has a savefile to start from.
pub enum Readiness {
    /// It has.
    Ready {
        /// The savefile's generation.
        generation: u64,
        /// Its root hash.
        root_hash: String,
        /// The admitted files.
        files: HotFiles,
    },
    /// It has not.
    Not {
        /// Why.
        reason: String,
    },
}

/// The savefile that serves launches.
#[derive(Debug, Clone)]
pub struct Serving {
    /// Its generation.
    pub generation: u64,
    /// Its root hash.
    pub root: RootHash,
    /// The same, as text.
    pub root_hash: String,
    /// The hash of what it was built from.
    pub inputs: String,
}

/// How a template's savefile stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// There is one, and it is what would be built now.
    Fresh,
    /// There is none.
    Missing,
    /// Something it was built from has changed.
    Stale(Vec<String>),
    /// It is damaged, or was replaced.
    Corrupt(String),
}

/// The hook a build runs.
pub enum Prerun {
    /// The one of the last build.
    Same,
    /// None.
    None,
    /// This file.
    File(PathBuf),
}

/// What a build made.
pub struct Built {
    /// The savefile's generation.
    pub generation: u64,
    /// Its path.
    pub path: PathBuf,
    /// What is in it.
    pub written: savefile::Written,
    /// Its phases.
    pub timeline: Timeline,
}

/// What is known of a savefile.
pub struct Description {
    /// The DVM template.
    pub name: String,
    /// The file.
    pub path: PathBuf,
    /// The pinned root hash.
    pub root_hash: String,
    /// Its size.
    pub stored_bytes: u64,
    /// What it says of itself.
    pub manifest: Manifest,
    /// How it stands.
    pub standing: Standing,
}

/// Builds the savefile of `dvm` and makes it the one that serves. `None`: another build of it is under way, and
/// `wait` was not asked for.
pub fn build(
    state: &State,
    machine: &dyn Machine,
    dvm: &str,
    prerun: &Prerun,
    wait: bool,
    watch: &mut dyn Watch,
) -> Result<Option<Built>> {
    let mut timeline = Timeline::since(Instant::now());
    let folder = state.savefiles(dvm);
    Guest::load(state, dvm)?;
    state::make_folder(&folder)?;
    let lock_path = folder.join("build.lock");
    let _lock = match wait {
        true => state::lock(&lock_path)?,
        false => match state::try_lock_patiently(&lock_path)? {
            Some(lock) => lock,
            None => return Ok(None),
        },
    };
    clones::sweep(state)?;
    savefile::sweep(&folder).map_err(savefile_error)?;
    let in_use = state::lock_shared(&state.use_lock())?;
    // Only now: the wait for the lock may have been long.
    let guest = Guest::load(state, dvm)?;
    let host = machine.host(state, &guest.spec.kernel)?;
    let hook = load_hook(&folder, prerun)?;
    let generation = next_generation(&folder, &guest)?;
    let expected = guest.manifest(host.facts());
    let pinned_inputs = inputs::hash(&expected)?;
    let path = state.savefile(dvm, generation);
    let template = (guest.dvm.template.clone(), guest.template.generation);
    let lease = Lease::take(state, dvm, "", template, Keeping::Launcher)?;
    drop(in_use);
    let confinement = machine::confinement(state, machine, lease.number());
    machine::check_memory(machine, &guest.spec, &confinement)?;
    let created = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let order = Order {
        spec: &guest.spec,
        confinement: &confinement,
        prerun: hook.as_deref(),
        manifest: Manifest { generation, created, ..expected },
        path: &path,
    };
    let connect = |pipe| AgentLink::new(pipe).limited(machine.agent_limits());
    let written = build::build(&*host, order, connect, watch, &mut timeline).map_err(build_error)?;

    // Admission reads the file back through the verifying reader: nothing is pinned that was not seen to be whole.
    let in_use = state::lock_shared(&state.use_lock())?;
    let silent = savefile::silent;
    let admitted = HotImage::admit(&path, &written.root, &state.hot(), &*host, ReadBackend::Ring, &silent);
    if let Err(error) = admitted {
        let _ = fs::remove_file(&path);
        return Err(savefile_error(error));
    }
    timeline.mark("admit");
    let pin = SavefilePin { generation, root_hash: written.root.to_string(), inputs: pinned_inputs };
    qube::update_dvm(state, dvm, |dvm| dvm.savefile = Some(pin))?;
    keep_hook(&folder, prerun, hook.as_deref())?;
    drop(in_use);
    drop(lease);
    collect(state)?;
    Ok(Some(Built { generation, path, written, timeline }))
}

/// The hook to run: the one given, or the one kept beside the savefiles.
fn load_hook(folder: &Path, prerun: &Prerun) -> Result<Option<Vec<u8>>> {
    let kept = folder.join("prerun");
    match prerun {
        Prerun::None => Ok(None),
        Prerun::File(path) => {
            let bytes = fs::read(path).map_err(Error::io("read the prerun hook", path))?;
            if bytes.is_empty() || bytes.len() > qrexec::PRERUN_BYTES_MAX {
                return Err(Error::new(
                    Kind::Usage,
                    format!("{} is no hook: {} bytes", path.display(), bytes.len()),
                ));
            }
            Ok(Some(bytes))
        }
        Prerun::Same if kept.exists() => fs::read(&kept).map(Some).map_err(Error::io("read", &kept)),
        Prerun::Same => Ok(None),
    }
}

/// Keeps the hook of a build that has succeeded, so that a rebuild runs the same.
fn keep_hook(folder: &Path, prerun: &Prerun, hook: Option<&[u8]>) -> Result<()> {
    let kept = folder.join("prerun");
    match (prerun, hook) {
        (Prerun::Same, _) => Ok(()),
        (_, Some(bytes)) => state::replace_file(&kept, bytes),
        (_, None) => match fs::remove_file(&kept) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io("remove", &kept)(error))
            }
            _ => Ok(()),
        },
    }
}

/// One more than any there is or was pinned.
fn next_generation(folder: &Path, guest: &Guest) -> Result<u64> {
    let pinned = guest.dvm.savefile.as_ref().map_or(0, |pin| pin.generation);
    Ok(generations(folder)?.into_iter().max().unwrap_or(0).max(pinned) + 1)
}

/// The generations whose files are there.
fn generations(folder: &Path) -> Result<Vec<u64>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io("list", folder)(error)),
    };
    Ok(entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.strip_suffix(".savefile")?.parse().ok())
        .collect())
}

/// The savefile that serves launches of the template, or, in words, why none does. Reads the record, and the header of the file.
pub fn serving(
    state: &State,
    guest: &Guest,
    host: &dyn Host,
) -> Result<std::result::Result<Serving, String>> {
    let name = &guest.dvm_name;
    let Some(pin) = &guest.dvm.savefile else { return Ok(Err(format!("{name} has no savefile"))) };
    let path = state.savefile(name, pin.generation);
    let expected = guest.manifest(host.facts());
    if inputs::hash(&expected)? != pin.inputs {
        let what = match savefile::peek(&path, None) {
            Ok(peek) => inputs::differences(&expected, &peek.manifest).join("; "),
            Err(_) => "its inputs have changed".to_owned(),
        };
        return Ok(Err(format!("the savefile of {name} is stale ({what})")));
    }
    let root = parse_root(pin)?;
    // Also where its hot image is admitted already: a file that was replaced shall not go unnoticed until the next boot.
    match savefile::check_root(&path, &root) {
        Ok(()) => {}
        // That it cannot be read just now says nothing about it.
        Err(error @ savefile::Error::Io { .. }) if !error.is_missing() => return Err(unusable(name, error)),
        Err(error) => return Ok(Err(unusable_text(name, error))),
    }
    let (root_hash, inputs) = (pin.root_hash.clone(), pin.inputs.clone());
    Ok(Ok(Serving { generation: pin.generation, root, root_hash, inputs }))
}

/// The admitted files of the template's savefile, admitted now if they are not yet.
pub fn ready(state: &State, guest: &Guest, host: &dyn Host) -> Result<Readiness> {
    let serving = match serving(state, guest, host)? {
        Ok(serving) => serving,
        Err(reason) => return Ok(Readiness::Not { reason }),
    };
    let found = match HotImage::find(&state.hot(), &serving.root) {
        Ok(None) => {
            let path = state.savefile(&guest.dvm_name, serving.generation);
            let silent = &savefile::silent;
            HotImage::admit(&path, &serving.root, &state.hot(), host, ReadBackend::Ring, silent).map(Some)
        }
        found => found,
    };
    Ok(match found {
        Ok(Some(HotImage { files, .. })) => {
            Readiness::Ready { generation: serving.generation, root_hash: serving.root_hash, files }
        }
        Ok(None) => Readiness::Not { reason: format!("the savefile of {} is gone", guest.dvm_name) },
        Err(error) => Readiness::Not { reason: unusable_text(&guest.dvm_name, error) },
    })
}

fn unusable_text(name: &str, error: savefile::Error) -> String {
    let error = Error::new(Kind::Unusable, format!("the savefile of {name} cannot be used")).because(error);
    crate::output::error_text(&error)
}

/// How the rebuilding of a savefile stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rebuild {
    /// Somebody is at it.
    UnderWay,
    /// The last one in the background failed: its last words, and where the others are.
    Failed(String, PathBuf),
    /// Nothing to tell.
    Quiet,
}

/// How the rebuilding of the savefile of `dvm` stands.
pub fn rebuild(state: &State, dvm: &str) -> Rebuild {
    if is_building(state, dvm) {
        return Rebuild::UnderWay;
    }
    let log = rebuild_log(state, dvm);
    let text = fs::read_to_string(&log).unwrap_or_default();
    match text.lines().rev().find(|line| !line.trim().is_empty()) {
        Some(last) => Rebuild::Failed(last.to_owned(), log),
        None => Rebuild::Quiet,
    }
}

/// Whether somebody is building a savefile of `dvm`.
pub fn is_building(state: &State, dvm: &str) -> bool {
    let path = state.savefiles(dvm).join("build.lock");
    path.exists() && matches!(state::is_locked(&path), Ok(true))
}

/// Starts `dispvm-savefile build` in a session of its own, at low priority: it outlives us and our terminal. It ends by
/// itself when another build of the same template is under way.
pub fn start_rebuild(state: &State, dvm: &str) -> io::Result<Child> {
    let program = std::env::current_exe()?.with_file_name("dispvm-savefile");
    let mut command = Command::new("setsid");
    command.args(["nice", "-n", "10"]).arg(program).arg("--root").arg(state.root());
    command.args(["build", "--background"]).arg(dvm);
    fs::create_dir_all(state.savefiles(dvm))?;
    let log = fs::File::create(rebuild_log(state, dvm))?;
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn()
}

/// Starts `dispvm-savefile gc`, which says nothing.
pub fn start_collection(state: &State) -> io::Result<Child> {
    let mut command = Command::new(std::env::current_exe()?.with_file_name("dispvm-savefile"));
    command.arg("--root").arg(state.root()).arg("gc");
    command.stdin(Stdio::null()).stdout(Stdio::null()).spawn()
}

/// What the last rebuild had to say.
pub fn rebuild_log(state: &State, dvm: &str) -> PathBuf {
    state.savefiles(dvm).join("build.log")
}

/// How the savefile of `dvm` stands, by its header and manifest.
pub fn standing(state: &State, guest: &Guest, host: &dyn Host) -> Result<Standing> {
    let Some(pin) = &guest.dvm.savefile else { return Ok(Standing::Missing) };
    let path = state.savefile(&guest.dvm_name, pin.generation);
    Ok(match savefile::peek(&path, Some(&parse_root(pin)?)) {
        Err(error) => Standing::Corrupt(error.to_string()),
        Ok(peek) => {
            let differences = inputs::differences(&guest.manifest(host.facts()), &peek.manifest);
            if differences.is_empty() {
                Standing::Fresh
            } else {
                Standing::Stale(differences)
            }
        }
    })
}

/// Describes the savefile of `dvm`.
pub fn describe(state: &State, machine: &dyn Machine, dvm: &str) -> Result<Description> {
    let guest = Guest::load(state, dvm)?;
    let host = machine.host(state, &guest.spec.kernel)?;
    let pin = guest.dvm.savefile.clone().ok_or_else(|| no_savefile(dvm))?;
    let path = state.savefile(dvm, pin.generation);
    let peek = savefile::peek(&path, Some(&parse_root(&pin)?)).map_err(|error| unusable(dvm, error))?;
    Ok(Description {
        name: dvm.to_owned(),
        root_hash: pin.root_hash,
        stored_bytes: peek.stored_bytes.0,
        manifest: peek.manifest,
        standing: standing(state, &guest, &*host)?,
        path,
    })
}

/// Checks every byte of the savefile of `dvm` against the pinned root hash.
pub fn verify(state: &State, dvm: &str, progress: savefile::OnProgress<'_>) -> Result<PathBuf> {
    let guest = Guest::load(state, dvm)?;
    let pin = guest.dvm.savefile.as_ref().ok_or_else(|| no_savefile(dvm))?;
    let path = state.savefile(dvm, pin.generation);
    Savefile::open(&path, Some(&parse_root(pin)?))
        .and_then(|savefile| savefile.verify(ReadBackend::Ring, progress))
        .map_err(|error| unusable(dvm, error))?;
    Ok(path)
}

/// Removes the savefile of `dvm`; living clones go on.
pub fn remove(state: &State, dvm: &str) -> Result<()> {
    let guest = Guest::load(state, dvm)?;
    if guest.dvm.savefile.is_none() {
        return Err(no_savefile(dvm));
    }
    qube::update_dvm(state, dvm, |dvm| dvm.savefile = None)?;
    collect(state).map(drop)
}

/// What a collection removed.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Collected {
    /// Savefiles that no record pins.
    pub savefiles: usize,
    /// Hot images that no record pins and no clone uses.
    pub hot_images: usize,
    /// Template generations that are neither current nor used.
    pub root_generations: usize,
    /// Generations of private volumes that are not current, of DVM templates no clone of which lives.
    pub private_generations: usize,
}

/// Removes what nothing needs any more: old savefiles, hot images, template generations, dead clones' records.
pub fn collect(state: &State) -> Result<Collected> {
    let _nobody_else = state::lock(&state.use_lock())?;
    clones::sweep(state)?;
    templates::remove_leftovers(state)?;
    let living = clones::list(state)?;
    let qubes = Qube::all(state)?;
    let mut collected = Collected::default();
    let mut roots: HashSet<String> = living.iter().map(|clone| clone.root_hash.clone()).collect();
    let mut generations_used: HashSet<(String, u64)> =
        living.iter().map(|clone| clone.template.clone()).collect();
    for qube in &qubes {
        match &qube.class {
            Class::AppVM(dvm) => {
                let pinned = dvm.savefile.as_ref();
                roots.extend(pinned.map(|pin| pin.root_hash.clone()));
                collected.savefiles +=
                    remove_old_savefiles(state, &qube.name, pinned.map(|pin| pin.generation))?;
                if living.iter().all(|clone| clone.dvm != qube.name) {
                    collected.private_generations += remove_old_privates(state, &qube.name)?;
                }
            }
            Class::TemplateVM(template) => {
                generations_used.insert((qube.name.clone(), template.generation));
            }
        }
    }
    for qube in qubes.iter().filter(|qube| matches!(qube.class, Class::TemplateVM(_))) {
        collected.root_generations += remove_old_roots(state, &qube.name, &generations_used)?;
    }
    let keep: Vec<RootHash> = roots.iter().filter_map(|root| root.parse().ok()).collect();
    collected.hot_images = HotImage::evict_all_but(&state.hot(), &keep).map_err(savefile_error)?;
    Ok(collected)
}

fn remove_old_savefiles(state: &State, dvm: &str, pinned: Option<u64>) -> Result<usize> {
    let folder = state.savefiles(dvm);
    if !folder.exists() {
        return Ok(0);
    }
    savefile::sweep(&folder).map_err(savefile_error)?;
    let old: Vec<u64> =
        generations(&folder)?.into_iter().filter(|generation| Some(*generation) != pinned).collect();
    // A build between its writing and its pinning has a file no record pins yet: leave those newer than the pin alone
    // while the build's lock is held by somebody else.
    let building = state::try_lock(&folder.join("build.lock"))?.is_none();
    let mut removed = 0;
    for generation in old {
        if building && pinned.is_none_or(|pinned| generation > pinned) {
            continue;
        }
        let path = state.savefile(dvm, generation);
        fs::remove_file(&path).map_err(Error::io("remove", &path))?;
        removed += 1;
    }
    Ok(removed)
}

/// All but the current one.
fn remove_old_privates(state: &State, name: &str) -> Result<usize> {
    let _lock = state::lock(&state.qube(name).join("record.lock"))?;
    let Class::AppVM(dvm) = Qube::load(state, name)?.class else { return Ok(0) };
    let current = state.private_image(name, dvm.private_generation);
    let folder = state.qube(name).join("private");
    let mut removed = 0;
    for entry in fs::read_dir(&folder).map_err(Error::io("list", &folder))? {
        let path = entry.map_err(Error::io("list", &folder))?.path();
        if path != current {
            fs::remove_file(&path).map_err(Error::io("remove", &path))?;
            removed += 1;
        }
    }
    Ok(removed)
}

fn remove_old_roots(state: &State, template: &str, used: &HashSet<(String, u64)>) -> Result<usize> {
    let folder = state.qube(template).join("root");
    let _lock = state::lock(&state.qube(template).join("record.lock"))?;
    let current = Qube::load(state, template)?.template()?.generation;
    let mut removed = 0;
    for entry in fs::read_dir(&folder).map_err(Error::io("list", &folder))? {
        let path = entry.map_err(Error::io("list", &folder))?.path();
        let generation =
            path.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse::<u64>().ok());
        match generation {
            Some(generation)
                if generation == current || used.contains(&(template.to_owned(), generation)) => {}
            _ => {
                fs::remove_dir_all(&path).map_err(Error::io("remove", &path))?;
                removed += 1;
            }
        }
    }
    Ok(removed)
}

fn parse_root(pin: &SavefilePin) -> Result<RootHash> {
    pin.root_hash
        .parse()
        .map_err(|error| Error::new(Kind::Failed, "the record's root hash is none").because(error))
}

fn no_savefile(dvm: &str) -> Error {
    Error::new(Kind::Unusable, format!("{dvm} has no savefile"))
        .hint(format!("`dispvm-savefile build {dvm}`"))
}

fn unusable(dvm: &str, error: savefile::Error) -> Error {
    Error::new(Kind::Unusable, format!("the savefile of {dvm} cannot be used"))
        .because(error)
        .hint(format!("`dispvm-savefile build {dvm}` makes a new one"))
}

fn savefile_error(error: savefile::Error) -> Error {
    Error::new(Kind::Failed, "the savefile cannot be made or admitted").because(error)
}

fn build_error(error: BuildError) -> Error {
    let kind = match &error {
        BuildError::Host(HostError::Refused { .. })
        | BuildError::Rehearsal(LaunchError::Host(HostError::Refused { .. })) => Kind::Refused,
        _ => Kind::Failed,
    };
    Error::new(kind, "the savefile cannot be built").because(error)
}
