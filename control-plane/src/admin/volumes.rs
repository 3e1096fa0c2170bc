//! Volumes as Qubes lists them: root and private are snapshots of an immutable generation, volatile is fresh, the kernel is
//! read-only. All are in one pool.

use std::path::PathBuf;

use admin_api::lines::bool_text;
use admin_api::Kind;

use super::answer::{exception, quoted, silent, Answer};
use super::settings;
use super::world::{Vm, VmKind, World};
use crate::private;

/// The name of the pool.
pub(super) const POOL: &str = "dispvm";

/// A volume.
struct Volume {
    name: &'static str,
    bytes: u64,
    path: PathBuf,
    /// The volume it is a snapshot of when the qube starts.
    source: Option<String>,
    writable: bool,
    /// Whether what is written stays.
    kept: bool,
}

impl Volume {
    /// What a disposable writes is in memory or under a key that nobody has afterwards.
    fn is_ephemeral(&self) -> bool {
        self.writable && !self.kept
    }
}

/// Whether a volume of this name is made in a pool that one may choose.
pub(super) fn has_pool(name: &str) -> bool {
    matches!(name, "root" | "private" | "volatile")
}

/// The names of a qube's volumes.
pub(super) fn names(vm: &Vm) -> &'static [&'static str] {
    match vm.kind {
        VmKind::Admin => &[],
        VmKind::Template(_) | VmKind::App(_) | VmKind::Disp(_) | VmKind::Named(_) => {
            &["root", "private", "volatile", "kernel"]
        }
    }
}

/// The answer of `admin.vm.volume.Info`.
pub(super) fn info(world: &World<'_>, vm: &Vm, name: &str) -> Answer<String> {
    let volume = find(world, vm, name)?;
    let revisions = vm.settings.volumes.get(name).and_then(|volume| volume.revisions_to_keep);
    let usage = std::fs::metadata(&volume.path)
        .map_or(0, |file| std::os::unix::fs::MetadataExt::blocks(&file).saturating_mul(512));
    let pairs = [
        ("pool", POOL.to_owned()),
        ("vid", vid(&vm.name, volume.name)),
        ("size", volume.bytes.to_string()),
        ("usage", usage.to_string()),
        ("rw", bool_text(volume.writable).to_owned()),
        ("source", volume.source.clone().unwrap_or_default()),
        ("path", volume.path.display().to_string()),
        ("save_on_stop", bool_text(volume.kept).to_owned()),
        ("snap_on_start", bool_text(volume.source.is_some()).to_owned()),
        ("revisions_to_keep", revisions.unwrap_or(settings::REVISIONS_TO_KEEP).to_string()),
        ("ephemeral", bool_text(volume.is_ephemeral()).to_owned()),
        ("is_outdated", bool_text(false).to_owned()),
    ];
    Ok(pairs.iter().map(|(key, value)| format!("{key}={value}\n")).collect())
}

/// `admin.vm.volume.Set.rw` and `Set.ephemeral`: what a volume is follows from its kind, so it may only be set to what it is.
pub(super) fn set_flag(world: &World<'_>, vm: &Vm, name: &str, rw: bool, wanted: bool) -> Answer<()> {
    let volume = find(world, vm, name)?;
    if world.power_state(vm)? != "Halted" {
        return Err(exception(Kind::VmNotHalted, format!("Domain is not powered off: {}", quoted(&vm.name))));
    }
    let (flag, is) = if rw { ("rw", volume.writable) } else { ("ephemeral", volume.is_ephemeral()) };
    match is == wanted {
        true => Ok(()),
        false => {
            let why = format!("{}:{name} has {flag}={}, which cannot be changed", vm.name, bool_text(is));
            Err(exception(Kind::StoragePool, why))
        }
    }
}

/// The revisions of a volume that it can be reverted to, oldest first: what an AppVM's private volume was before, as many of them as stay.
pub(super) fn revisions(world: &World<'_>, vm: &Vm, name: &str) -> Answer<String> {
    find(world, vm, name)?;
    let earlier = match (&vm.kind, name) {
        (VmKind::App(dvm), "private") => private::earlier(world.state, &vm.name, dvm.private_generation)?,
        _ => Vec::new(),
    };
    Ok(earlier.iter().map(|generation| format!("{generation}\n")).collect())
}

/// What a volume is called in its pool.
pub(super) fn vid(qube: &str, volume: &str) -> String {
    format!("{qube}/{volume}")
}

fn find(world: &World<'_>, vm: &Vm, name: &str) -> Answer<Volume> {
    let known = names(vm).iter().find(|known| **known == name).copied();
    let name = known.ok_or_else(|| silent("no such volume"))?;
    // What a disposable starts from is its template's.
    let based_on = match &vm.kind {
        VmKind::Disp(_) | VmKind::Named(_) => vm.template().map(|dvm| world.vm(dvm)).transpose()?,
        _ => None,
    };
    let here = based_on.as_deref().unwrap_or(vm);
    let is_disposable = based_on.is_some();
    let template = match here.template() {
        Some(template) => Some(world.vm(template)?),
        None => None,
    };
    let of_root = template.as_deref().unwrap_or(here);
    let VmKind::Template(root) = &of_root.kind else { return Err(silent("a qube without a root volume")) };
    let files = world.state.root_generation(&of_root.name, root.generation);
    let volume = |bytes, path, source| Volume { name, bytes, path, source, writable: true, kept: false };
    Ok(match (name, &here.kind) {
        ("root", VmKind::Template(_)) => {
            Volume { kept: true, ..volume(root.root_bytes, files.join("root.img"), None) }
        }
        ("root", _) => volume(root.root_bytes, files.join("root.img"), Some(vid(&of_root.name, "root"))),
        ("private", VmKind::App(dvm)) => {
            let path = world.state.private_image(&here.name, dvm.private_generation);
            let source = is_disposable.then(|| vid(&here.name, "private"));
            Volume { kept: !is_disposable, ..volume(dvm.private_mib << 20, path, source) }
        }
        ("volatile", VmKind::App(dvm)) => volume(dvm.volatile_mib << 20, PathBuf::new(), None),
        ("kernel", _) => Volume { writable: false, ..volume(0, files.join("vmlinuz"), None) },
        _ => volume(0, PathBuf::new(), None),
    })
}
