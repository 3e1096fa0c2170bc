//! Building a savefile and making it the one that serves.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use engine::build::{self, BuildError, Order, Watch};
use engine::host::HostError;
use engine::image::hot::HotImage;
use engine::launch::LaunchError;
use engine::savefile::{self, Manifest, ReadBackend};
use engine::timeline::Timeline;

use super::{collect, generations, savefile_error};
use crate::agent_link::AgentLink;
use crate::clones::{Keeping, Lease};
use crate::error::{Error, Kind, Result};
use crate::inputs::{self, Guest};
use crate::machine::{self, Machine};
use crate::qube::{self, SavefilePin};
use crate::state::{self, State};

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
    machine::sweep(state, machine)?;
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
    let lease = Lease::take(state, dvm, "", template, Keeping::Launcher, None)?;
    drop(in_use);
    let confinement = machine::confinement(state, machine, lease.number());
    machine::check_memory(state, machine, &guest.spec, &confinement)?;
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

fn build_error(error: BuildError) -> Error {
    let kind = match &error {
        BuildError::Host(HostError::Refused { .. })
        | BuildError::Rehearsal(LaunchError::Host(HostError::Refused { .. })) => Kind::Refused,
        _ => Kind::Failed,
    };
    Error::new(kind, "the savefile cannot be built").because(error)
}
