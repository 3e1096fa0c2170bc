//! The savefiles of DVM templates: build, find ready, describe, verify, remove, collect.
//!
//! Invariants:
//! - One build per template at a time, under a lock that dies with its builder.
//! - The record pins a savefile only after the new file has been written, verified and admitted; until then the
//!   old one serves, if its inputs are still the same.
//! - A savefile, a hot image and a template's root generation stay while a record pins them or a living clone uses them; old
//!   generations of a private volume, while any clone of its DVM template lives.

use std::fs;
use std::path::{Path, PathBuf};

use engine::host::Host;
use engine::image::hot::{HotFiles, HotImage};
use engine::savefile::{self, Manifest, ReadBackend, RootHash, Savefile};

use crate::error::{Error, Kind, Result};
use crate::inputs::{self, Guest};
use crate::machine::Machine;
use crate::qube::{self, SavefilePin};
use crate::state::State;

mod binding;
mod build;
mod collect;
mod export;
mod import;
mod raw;
mod rebuild;

pub use build::{build, Built, Prerun};
pub use collect::{collect, Collected};
pub use export::{export, Exported};
pub use import::{import, Import, Imported};
pub use rebuild::{is_building, rebuild, rebuild_log, start_collection, start_rebuild, Rebuild};

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
