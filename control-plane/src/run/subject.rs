//! What a qube that is run itself is made of, and which volume of it is kept.
//!
//! As in Qubes, of a TemplateVM the root volume is kept, of an AppVM (a DVM template too) the private one; what is written elsewhere is
//! gone with the run. (A TemplateVM's private volume, which Qubes keeps, starts empty: no qube is made from it.)

use std::fs::File;

use engine::host::{Base, GuestSpec, VolumeSpec};

use crate::error::{Error, Kind, Result};
use crate::inputs;
use crate::qube::{Class, Dvm, Qube};
use crate::state::State;
use crate::{templates, volume};

/// A TemplateVM's settings, whose record has none: those a DVM template has unless told otherwise.
const TEMPLATE_MEMORY_MIB: u64 = 1024;
const TEMPLATE_VCPUS: u32 = 2;
const TEMPLATE_PRIVATE_MIB: u64 = 2048;
const TEMPLATE_VOLATILE_MIB: u64 = 1024;

/// A qube to run, and the one volume of it that is kept.
pub(super) struct Subject {
    /// That volume.
    pub(super) kept: &'static str,
    /// Its generation.
    pub(super) generation: u64,
    /// The template and its generation that must stay meanwhile.
    pub(super) template: (String, u64),
    /// The guest.
    pub(super) spec: GuestSpec,
}

/// What of a qube's settings is another for one run.
#[derive(Debug, Clone, Default)]
pub struct Overrides {
    /// RAM in MiB, instead of the record's.
    pub memory_mib: Option<u64>,
    /// vCPUs, instead of the record's.
    pub vcpus: Option<u32>,
    /// Network, instead of the record's (TemplateVMs have none).
    pub net: Option<String>,
}

impl Subject {
    /// Reads the records of `name`.
    pub(super) fn load(state: &State, name: &str, instead: &Overrides) -> Result<Subject> {
        match Qube::load(state, name)?.class {
            Class::TemplateVM(template) => {
                let mut spec =
                    inputs::spec(state, name, &settings(template_settings(name), instead), &template)?;
                set_base(&mut spec, "private", Base::Empty);
                let generation = template.generation;
                Ok(Subject { kept: "root", generation, template: (name.to_owned(), generation), spec })
            }
            Class::AppVM(dvm) => {
                let template = Qube::load(state, &dvm.template)?.template()?.clone();
                let generation = dvm.private_generation;
                let uses = (dvm.template.clone(), template.generation);
                let spec = inputs::spec(state, name, &settings(dvm, instead), &template)?;
                Ok(Subject { kept: "private", generation, template: uses, spec })
            }
            Class::DispVM(_) => Err(Error::new(
                Kind::Usage,
                format!("{name} is a disposable: nothing that is written in it is kept"),
            )
            .hint(format!("`qvm-start {name}`, then `qvm-run {name} COMMAND`"))),
        }
    }

    /// Puts a copy to write to in the place of the volume that is kept.
    pub(super) fn copy_kept_volume(&mut self, state: &State, name: &str) -> Result<File> {
        let kept = self.spec.volumes.iter().find(|volume| volume.name == self.kept);
        let Some(VolumeSpec { base: Base::Frozen(base), .. }) = kept else {
            return Err(Error::new(Kind::Failed, format!("there is no {} volume to keep", self.kept)));
        };
        // In the qube's folder, on the file system where the next generation will have its name.
        let copy = volume::unnamed_copy(base, &state.qube(name))?;
        set_base(&mut self.spec, self.kept, Base::Persistent(volume::path_of(&copy)));
        Ok(copy)
    }

    /// Makes the copy the next generation, unless no byte differs.
    pub(super) fn keep(&self, state: &State, name: &str, written: &File) -> Result<Option<u64>> {
        match self.kept {
            "root" => templates::next_root(state, name, self.generation, written),
            _ => templates::next_private(state, name, self.generation, written),
        }
    }
}

fn set_base(spec: &mut GuestSpec, name: &str, base: Base) {
    if let Some(volume) = spec.volumes.iter_mut().find(|volume| volume.name == name) {
        volume.base = base;
    }
}

/// The settings of a TemplateVM when it runs itself.
fn template_settings(name: &str) -> Dvm {
    Dvm {
        template: name.to_owned(),
        template_for_dispvms: false,
        memory_mib: TEMPLATE_MEMORY_MIB,
        vcpus: TEMPLATE_VCPUS,
        net: "none".to_owned(),
        private_mib: TEMPLATE_PRIVATE_MIB,
        private_generation: 0,
        private_id: String::new(),
        volatile_mib: TEMPLATE_VOLATILE_MIB,
        spares: None,
        savefile: None,
    }
}

fn settings(dvm: Dvm, instead: &Overrides) -> Dvm {
    Dvm {
        memory_mib: instead.memory_mib.unwrap_or(dvm.memory_mib),
        vcpus: instead.vcpus.unwrap_or(dvm.vcpus),
        net: instead.net.clone().unwrap_or(dvm.net),
        ..dvm
    }
}
