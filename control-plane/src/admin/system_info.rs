//! The qubes as policy sees them: what qubesd answers to `internal.GetSystemInfo` (docs/policy.md), from the records of this moment.

use std::rc::Rc;

use policy::{Qube, System};

use super::answer::{Answer, Refusal};
use super::world::{Context, Vm, World};
use crate::error::{Error, Kind, Result};
use crate::state::State;

/// Describes the system. A qube whose record cannot be read is not in it, so nothing is allowed to it or by it.
pub fn system_info(state: &State) -> Result<System> {
    let context = Context::new(state.clone());
    let world = World::new(&context);
    let all = world.all()?;
    let qubes = all
        .iter()
        .map(|vm| Ok((vm.name.clone(), describe(&world, vm, &all)?)))
        .collect::<Answer<Vec<_>>>()
        .map_err(error_of)?;
    System::new(qubes).map_err(Error::failed("describe the system"))
}

fn describe(world: &World<'_>, vm: &Vm, all: &[Rc<Vm>]) -> Answer<Qube> {
    // One that is gone is none.
    let there = |name: &String| all.iter().any(|vm| vm.name == *name);
    Ok(Qube {
        tags: vm.settings.tags.iter().cloned().collect(),
        class: vm.class().to_owned(),
        template_for_dispvms: world.value(vm, "template_for_dispvms")? == "True",
        default_dispvm: Some(world.value(vm, "default_dispvm")?).filter(there),
        power_state: world.power_state(vm)?.to_owned(),
        uuid: Some(vm.uuid()),
        internal: vm.settings.features.get("internal").is_some_and(|value| !value.is_empty()),
        icon: world.value(vm, "icon")?,
    })
}

fn error_of(refusal: Refusal) -> Error {
    let why = match refusal {
        Refusal::Exception(exception) => exception.message(),
        Refusal::Silent(why) => why,
    };
    Error::new(Kind::Failed, format!("cannot describe the system: {why}"))
}
