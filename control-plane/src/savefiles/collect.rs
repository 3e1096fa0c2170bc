//! Removing what nothing needs any more. A savefile, a hot image and a generation stay while a record names them or a living clone
//! uses them.

use std::collections::HashSet;
use std::fs;
use std::path::PathBuf;

use engine::image::hot::HotImage;
use engine::savefile::{self, RootHash};

use super::{generations, savefile_error};
use crate::admin::settings::{Owner, Settings, REVISIONS_TO_KEEP};
use crate::clones;
use crate::error::{Error, Result};
use crate::private;
use crate::qube::{Class, Qube};
use crate::state::{self, State};
use crate::templates;

/// What a collection removed.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Collected {
    /// Savefiles that no record pins.
    pub savefiles: usize,
    /// Hot images that no record pins and no clone uses.
    pub hot_images: usize,
    /// Template generations that are neither current nor used.
    pub root_generations: usize,
    /// Generations of private volumes that are neither current nor kept, of DVM templates no clone of which lives.
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
            Class::DispVM(_) => {}
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

/// All but the current one, and those before it that stay for `admin.vm.volume.Revert`.
fn remove_old_privates(state: &State, name: &str) -> Result<usize> {
    let _lock = state::lock(&state.qube(name).join("record.lock"))?;
    let Class::AppVM(dvm) = Qube::load(state, name)?.class else { return Ok(0) };
    let earlier = private::earlier(state, name, dvm.private_generation)?;
    let stay = earlier.iter().rev().take(revisions_to_keep(state, name)).copied();
    let stay: Vec<PathBuf> = stay
        .chain([dvm.private_generation])
        .map(|generation| state.private_image(name, generation))
        .collect();
    let folder = state.qube(name).join("private");
    let mut removed = 0;
    for entry in fs::read_dir(&folder).map_err(Error::io("list", &folder))? {
        let path = entry.map_err(Error::io("list", &folder))?.path();
        if !stay.contains(&path) {
            fs::remove_file(&path).map_err(Error::io("remove", &path))?;
            removed += 1;
        }
    }
    Ok(removed)
}

/// Settings that cannot be read are no reason to throw away more than usual.
fn revisions_to_keep(state: &State, name: &str) -> usize {
    let settings = Settings::load(state, &Owner::Qube(name.to_owned())).unwrap_or_default();
    let set = settings.volumes.get("private").and_then(|volume| volume.revisions_to_keep);
    set.unwrap_or(REVISIONS_TO_KEEP) as usize
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
