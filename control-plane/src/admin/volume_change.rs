//! Volumes changed: grown, reverted, cloned, filled. What can be is the private volume of a halted AppVM ([`crate::private`]), and the size of its
//! volatile one; for all else the answer says why not, as Qubes' pools do (`StoragePoolException`).
//!
//! Arguments, order and what is hung up on as in QubesOS/qubes-core-admin `qubes/api/admin.py` (vm_volume_resize, revert, clone_from, clone_to) and
//! `qubes/api/internal.py` (vm_volume_import), R4.3.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead, Read};
use std::sync::Mutex;

use admin_api::{Event, Kind};

use super::answer::{enforce, exception, quoted, silent, Answer, Refusal};
use super::world::{Context, Vm, VmKind, World};
use crate::daemon::client;
use crate::error::Error;
use crate::private;
use crate::qube;
use crate::savefiles;

/// Clones that were begun and not ended: the newest so many are remembered, each until it is used.
const PENDING_MAX: usize = 64;
/// Digits of a size: those of 2^64.
const SIZE_DIGITS_MAX: u64 = 20;

/// Volumes that were said to be cloned from, by their tokens. A daemon that starts anew knows of none.
#[derive(Default)]
pub(super) struct Pending(Mutex<VecDeque<(String, String, String)>>);

impl Pending {
    fn add(&self, qube: &str, volume: &str) -> Answer<String> {
        let mut bytes = [0; 16];
        File::open("/dev/urandom")
            .and_then(|mut random| random.read_exact(&mut bytes))
            .map_err(Error::failed("draw a token"))?;
        let token: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let mut pending = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        pending.push_back((token.clone(), qube.to_owned(), volume.to_owned()));
        if pending.len() > PENDING_MAX {
            pending.pop_front();
        }
        Ok(token)
    }

    /// The qube and volume of a token, which holds no more.
    fn take(&self, token: &str) -> Option<(String, String)> {
        let mut pending = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let at = pending.iter().position(|(known, ..)| known == token)?;
        pending.remove(at).map(|(_, qube, volume)| (qube, volume))
    }
}

/// `admin.vm.volume.Resize`, to a number of bytes.
pub(super) fn resize(world: &World<'_>, vm: &Vm, volume: &str, payload: &[u8]) -> Answer<()> {
    let text = std::str::from_utf8(payload).map_or("", str::trim);
    let digits = !text.is_empty()
        && text.len() as u64 <= SIZE_DIGITS_MAX
        && text.bytes().all(|byte| byte.is_ascii_digit());
    let bytes = Some(text).filter(|_| digits).and_then(|text| text.parse::<u64>().ok());
    let bytes = bytes.ok_or_else(|| silent("no size"))?;
    match (volume, &vm.kind) {
        ("volatile", VmKind::App(dvm)) => {
            let mib = private::mib_for(bytes).map_err(storage)?;
            if mib < dvm.volatile_mib {
                return Err(refused(format!("the volatile volume of {} does not shrink", vm.name)));
            }
            qube::update_dvm(world.state, &vm.name, |dvm| dvm.volatile_mib = mib).map_err(storage)?;
        }
        _ => {
            changeable(world, vm, volume)?;
            changed(world, private::grow(world.state, &vm.name, bytes))?;
        }
    }
    told(
        world,
        Event::new(&vm.name, format!("domain-volume-resized:{volume}")).detail("size", bytes.to_string()),
    )
}

/// `admin.vm.volume.Revert`, to a revision that `ListSnapshots` gives.
pub(super) fn revert(world: &World<'_>, vm: &Vm, volume: &str, known: &str, payload: &[u8]) -> Answer<()> {
    let revision = std::str::from_utf8(payload).map_or("", str::trim);
    enforce(known.lines().any(|known| known == revision), "no such revision")?;
    changeable(world, vm, volume)?;
    let generation = revision.parse().map_err(|_| silent("no such revision"))?;
    changed(world, private::revert(world.state, &vm.name, generation))?;
    told(world, Event::new(&vm.name, "domain-volume-reverted").detail("volume", volume))
}

/// `admin.vm.volume.Clear`: it is as new.
pub(super) fn clear(world: &World<'_>, vm: &Vm, volume: &str) -> Answer<()> {
    changeable(world, vm, volume)?;
    changed(world, private::fill(world.state, &vm.name, &mut std::io::empty(), None))?;
    told(
        world,
        Event::new(&vm.name, "domain-volume-import-end").detail("volume", volume).detail("success", "True"),
    )
}

/// `admin.vm.volume.CloneFrom`: the token for `CloneTo`.
pub(super) fn clone_from(world: &World<'_>, vm: &Vm, volume: &str) -> Answer<String> {
    world.context.pending_clones.add(&vm.name, volume)
}

/// `admin.vm.volume.CloneTo`: the volume becomes what the token's is.
pub(super) fn clone_to(world: &World<'_>, vm: &Vm, volume: &str, payload: &[u8]) -> Answer<()> {
    let token = std::str::from_utf8(payload).map_or("", str::trim);
    let (source, of) = world.context.pending_clones.take(token).ok_or_else(|| silent("no such token"))?;
    // It may have been removed since.
    let source = world.find(&source)?.ok_or_else(|| silent("a volume that is no more"))?;
    changeable(world, vm, volume)?;
    if of != volume || !matches!(source.kind, VmKind::App(_)) {
        return Err(refused(format!("{}:{of} is no private volume of an AppVM", source.name)));
    }
    changed(world, private::take_over(world.state, &vm.name, &source.name))?;
    told(world, Event::new(&vm.name, "domain-volume-cloned").detail("volume", volume))
}

/// The services `admin.vm.volume.Import` and `ImportWithSize`, which are no calls on the socket, since data may be long: `data` is what the
/// volume is to have, `with_size` behind a line with its size.
pub(super) fn import(
    context: &Context,
    name: &str,
    volume: &str,
    data: &mut impl BufRead,
    with_size: bool,
) -> Answer<()> {
    let world = World::new(context);
    let vm = world.vm(name)?;
    enforce(super::volumes::names(&vm).contains(&volume), "no such volume")?;
    let bytes = match with_size {
        true => {
            let mut line = String::new();
            data.take(SIZE_DIGITS_MAX + 1).read_line(&mut line).map_err(Error::failed("read the size"))?;
            let size = line.strip_suffix('\n').and_then(|text| text.parse::<u64>().ok());
            Some(size.ok_or_else(|| silent("no size"))?)
        }
        false => None,
    };
    changeable(&world, &vm, volume)?;
    changed(&world, private::fill(world.state, &vm.name, data, bytes))?;
    client::changed(world.state);
    Ok(())
}

/// Whether the data of this volume can be other than what the qube writes.
fn changeable(world: &World<'_>, vm: &Vm, volume: &str) -> Answer<()> {
    let VmKind::App(_) = vm.kind else {
        return Err(refused(format!(
            "{}:{volume} cannot be changed: only the private volume of an AppVM can",
            vm.name
        )));
    };
    if volume != "private" {
        let whose = if volume == "root" { ": it is its template's" } else { "" };
        return Err(refused(format!("{}:{volume} cannot be changed{whose}", vm.name)));
    }
    match world.power_state(vm)? {
        "Halted" => Ok(()),
        _ => Err(exception(Kind::VmNotHalted, format!("Domain is not powered off: {}", quoted(&vm.name)))),
    }
}

/// Has generations go that are not kept, and what is left of changes cut short, of this one too.
fn changed(world: &World<'_>, done: crate::error::Result<()>) -> Answer<()> {
    if let Err(error) = savefiles::collect(world.state) {
        tracing::warn!("cannot collect what nothing needs: {}", crate::output::error_text(&error));
    }
    done.map_err(storage)
}

/// What stands on the volume (savefiles, spares) is made anew, and whoever listens is told.
fn told(world: &World<'_>, event: Event) -> Answer<()> {
    client::changed(world.state);
    world.context.events.fire(&event);
    Ok(())
}

fn refused(why: String) -> Refusal {
    exception(Kind::StoragePool, why)
}

fn storage(error: Error) -> Refusal {
    refused(crate::output::error_text(&error))
}
