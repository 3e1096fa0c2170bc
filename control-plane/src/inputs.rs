//! What a savefile is built from, and with that what makes it stale.
//!
//! A launch compares one hash, kept beside the pinned root hash; only when it differs is the savefile opened to say
//! what does.

use std::str::FromStr;

use engine::host::{Base, GuestSpec, HostFacts, Nic, VolumeSpec};
use engine::savefile::{Manifest, VolumeInfo, SCHEMA};
use engine::units::ByteCount;

use crate::error::{Error, Kind, Result};
use crate::qube::{Dvm, Qube, Template};
use crate::state::State;
use crate::templates::VOLUME_MIB;

/// A DVM template with its TemplateVM, as a guest to build or launch.
#[derive(Debug, Clone)]
pub struct Guest {
    /// The DVM template's name.
    pub dvm_name: String,
    /// Its part of the record.
    pub dvm: Dvm,
    /// Its label.
    pub label: String,
    /// Its template's part.
    pub template: Template,
    /// The guest for the host.
    pub spec: GuestSpec,
}

impl Guest {
    /// Reads both records.
    pub fn load(state: &State, dvm_name: &str) -> Result<Guest> {
        let qube = Qube::load(state, dvm_name)?;
        let dvm = qube.dvm()?.clone();
        let template = Qube::load(state, &dvm.template)?.template()?.clone();
        let spec = spec(state, dvm_name, &dvm, &template)?;
        Ok(Guest { dvm_name: dvm_name.to_owned(), dvm, label: qube.label, template, spec })
    }

    /// The manifest a savefile built now would have, but for what only the build knows.
    pub fn manifest(&self, host: &HostFacts) -> Manifest {
        let base = |volume: &VolumeSpec| match volume.name.as_str() {
            "root" => self.template.root_hash.clone(),
            "private" => format!("{}:{}", self.dvm.private_generation, self.dvm.private_id),
            _ => String::from("empty"),
        };
        let volumes = self.spec.volumes.iter().map(|volume| VolumeInfo {
            name: volume.name.clone(),
            base: base(volume),
            virtual_bytes: volume.size.0,
        });
        Manifest {
            schema: SCHEMA,
            template: self.dvm.template.clone(),
            template_generation: self.template.generation,
            template_root: self.template.root_hash.clone(),
            dvm: self.dvm_name.clone(),
            generation: 0,
            kernel_hash: self.template.kernel_hash.clone(),
            initrd_hash: self.template.initrd_hash.clone(),
            host: host.clone(),
            memory_bytes: self.spec.memory.0,
            vcpus: self.spec.vcpus,
            volumes: volumes.collect(),
            settings_hash: settings_hash(&self.spec.cmdline),
            agent_version: String::new(),
            created: 0,
            working_set: Vec::new(),
        }
    }
}

/// What else a savefile depends on: the kernel's command line, and the words its agent knows, for a restored agent is never asked which it has.
fn settings_hash(cmdline: &str) -> String {
    let settings = format!("{cmdline}\0agent protocol {}", qrexec::PROTOCOL);
    blake3::hash(settings.as_bytes()).to_hex().to_string()
}

/// The hash of all that makes a savefile stale when it changes.
pub fn hash(expected: &Manifest) -> Result<String> {
    let bytes = serde_json::to_vec(&comparable(expected)).map_err(Error::failed("hash the inputs"))?;
    Ok(blake3::hash(&bytes).to_hex().to_string())
}

/// What differs between the savefile that is there and the one that would be built now, in words.
pub fn differences(expected: &Manifest, actual: &Manifest) -> Vec<String> {
    let mut found = Vec::new();
    let mut compare = |what: &str, old: &dyn std::fmt::Display, new: &dyn std::fmt::Display| {
        let (old, new) = (old.to_string(), new.to_string());
        if old != new {
            found.push(format!("{what}: built from {old}, now {new}"));
        }
    };
    compare("template", &actual.template, &expected.template);
    compare("template's generation", &actual.template_generation, &expected.template_generation);
    compare("template's root", &short(&actual.template_root), &short(&expected.template_root));
    compare("kernel", &short(&actual.kernel_hash), &short(&expected.kernel_hash));
    compare("initrd", &short(&actual.initrd_hash), &short(&expected.initrd_hash));
    compare("memory", &actual.memory_bytes, &expected.memory_bytes);
    compare("vCPUs", &actual.vcpus, &expected.vcpus);
    compare("settings", &short(&actual.settings_hash), &short(&expected.settings_hash));
    compare("host", &actual.host.kind, &expected.host.kind);
    compare("hypervisor", &actual.host.version, &expected.host.version);
    compare("machine type", &actual.host.machine, &expected.host.machine);
    compare("CPU model", &actual.host.cpu_model, &expected.host.cpu_model);
    compare("accelerator", &actual.host.accel, &expected.host.accel);
    for new in &expected.volumes {
        let old = actual.volume(&new.name).map_or("nothing".to_owned(), volume_text);
        compare(&format!("{} volume", new.name), &old, &volume_text(new));
    }
    found
}

fn volume_text(volume: &VolumeInfo) -> String {
    format!("{} ({} bytes)", short(&volume.base), volume.virtual_bytes)
}

fn short(hash: &str) -> &str {
    hash.get(..12).unwrap_or(hash)
}

/// The manifest without what does not make it stale.
fn comparable(manifest: &Manifest) -> Manifest {
    Manifest {
        generation: 0,
        created: 0,
        agent_version: String::new(),
        working_set: Vec::new(),
        ..manifest.clone()
    }
}

/// The guest with these settings on that template.
pub(crate) fn spec(state: &State, name: &str, dvm: &Dvm, template: &Template) -> Result<GuestSpec> {
    let files = state.root_generation(&dvm.template, template.generation);
    let mib = |mib: u64| ByteCount(mib << 20);
    if !(64..=1 << 20).contains(&dvm.memory_mib) || !(1..=64).contains(&dvm.vcpus) {
        return Err(Error::new(
            Kind::Usage,
            format!("{name}: {} MiB and {} vCPUs", dvm.memory_mib, dvm.vcpus),
        )
        .hint("memory_mib is from 64 to 1048576, vcpus from 1 to 64"));
    }
    if !VOLUME_MIB.contains(&dvm.private_mib) || !VOLUME_MIB.contains(&dvm.volatile_mib) {
        let volumes = format!("{} MiB and {} MiB", dvm.private_mib, dvm.volatile_mib);
        return Err(Error::new(Kind::Usage, format!("{name}: private and volatile volumes of {volumes}"))
            .hint(format!(
                "private_mib and volatile_mib are from {} to {}",
                VOLUME_MIB.start(),
                VOLUME_MIB.end()
            )));
    }
    Ok(GuestSpec {
        memory: mib(dvm.memory_mib),
        vcpus: dvm.vcpus,
        kernel: files.join("vmlinuz"),
        initrd: files.join("initrd"),
        cmdline: template.cmdline.clone(),
        volumes: vec![
            VolumeSpec {
                name: "root".into(),
                base: Base::Frozen(files.join("root.img")),
                size: ByteCount(template.root_bytes),
            },
            VolumeSpec {
                name: "private".into(),
                base: Base::Frozen(state.private_image(name, dvm.private_generation)),
                size: mib(dvm.private_mib),
            },
            VolumeSpec { name: "volatile".into(), base: Base::Empty, size: mib(dvm.volatile_mib) },
        ],
        nic: parse_nic(&dvm.net)?,
    })
}

/// `none`, `user` or `tap:NAME`.
pub fn parse_nic(net: &str) -> Result<Nic> {
    match net {
        "none" => Ok(Nic::None),
        "user" => Ok(Nic::User),
        _ => match net.strip_prefix("tap:").map(String::from_str) {
            Some(Ok(name)) if !name.is_empty() && name.len() <= 15 => Ok(Nic::Tap(name)),
            _ => Err(Error::new(Kind::Usage, format!("{net:?} is no network"))
                .hint("net is `none`, `user` or `tap:INTERFACE`")),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sizes are shifted: one from a record written by hand could lose its upper bits and be a volume of nothing.
    #[test]
    fn sizes_outside_the_limits_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let state = State::open(folder.path()).unwrap();
        let template = Template {
            generation: 1,
            root_hash: "ab".into(),
            root_bytes: 1 << 20,
            kernel_hash: "00".into(),
            initrd_hash: "01".into(),
            cmdline: String::new(),
        };
        let good = crate::qube::tests::dvm("debian-dvm").dvm().unwrap().clone();
        assert!(spec(&state, "debian-dvm", &good, &template).is_ok());
        for bad in [
            Dvm { private_mib: 1 << 44, ..good.clone() },
            Dvm { volatile_mib: 0, ..good.clone() },
            Dvm { memory_mib: 1 << 44, ..good.clone() },
        ] {
            assert_eq!(spec(&state, "debian-dvm", &bad, &template).unwrap_err().kind, Kind::Usage, "{bad:?}");
        }
    }
}
