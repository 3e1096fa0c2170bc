//! What a savefile was made from, and what it needs: JSON, schema-versioned.
//!
//! Invariants:
//! - the schema number is read before anything else, so a later schema is refused by its number and not by a missing field;
//! - within a schema every field is known: an unknown one is refused. A field this engine does not know could be an input
//!   that makes the savefile stale, and to lose it silently would be to serve a stale guest. A new field is a new schema;
//! - sizes are in bytes, times in seconds since 1970, hashes in hex.

use serde::{Deserialize, Serialize};

use super::error::Fault;
use crate::units::{ByteCount, PageRange};

/// The schema this engine writes and reads.
pub const SCHEMA: u32 = 1;
/// A manifest is a page or two; the largest working set that is recorded fits too. Nothing larger is read into memory.
pub const MANIFEST_MAX: ByteCount = ByteCount(4 << 20);

/// What a savefile was made from, and what it needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Name of the TemplateVM.
    pub template: String,
    /// Generation of the template's root.
    pub template_generation: u64,
    /// Identity (hash or id) of the template's root of that generation.
    pub template_root: String,
    /// Name of the DVM template.
    pub dvm: String,
    /// Generation of the savefile itself.
    pub generation: u64,
    /// Hash of the guest kernel, hex.
    pub kernel_hash: String,
    /// Hash of the guest's initrd, hex.
    pub initrd_hash: String,
    /// What captured it and must restore it.
    pub host: HostIdentity,
    /// Size of guest memory in bytes.
    pub memory_bytes: u64,
    /// Number of virtual CPUs.
    pub vcpus: u32,
    /// The volumes, in the order the guest has them.
    pub volumes: Vec<VolumeInfo>,
    /// Hash of the qube's settings that the guest can see, hex.
    pub settings_hash: String,
    /// Version of the guest agent in it.
    pub agent_version: String,
    /// When it was captured, in seconds since 1970.
    pub created: u64,
    /// The pages of memory that a real launch touches, as `[first page, pages]` runs; empty while none is recorded.
    #[serde(default)]
    pub working_set: Vec<(u64, u64)>,
}

/// The host a savefile was captured on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostIdentity {
    /// Kind of host: "qemu", "xen".
    pub kind: String,
    /// Its version, as it tells it.
    pub version: String,
    /// Machine type with its version, never an alias.
    pub machine: String,
    /// CPU model.
    pub cpu_model: String,
    /// How guest code ran: "kvm", "tcg", "hvm", "pvh".
    pub accel: String,
}

/// A volume of the guest at capture.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeInfo {
    /// "root", "private", "volatile".
    pub name: String,
    /// Identity (hash or id) of the immutable base that the delta stacks on.
    pub base: String,
    /// Size the guest sees, in bytes.
    pub virtual_bytes: u64,
}

/// Just enough to read the number before the rest.
#[derive(Deserialize)]
struct SchemaOnly {
    schema: u32,
}

impl Manifest {
    /// Reads a manifest section.
    pub fn parse(bytes: &[u8]) -> Result<Manifest, Fault> {
        let fault = |err: serde_json::Error| Fault::Manifest { why: err.to_string() };
        let SchemaOnly { schema } = serde_json::from_slice(bytes).map_err(fault)?;
        if schema != SCHEMA {
            return Err(Fault::Manifest { why: format!("it is of schema {schema}") });
        }
        serde_json::from_slice(bytes).map_err(fault)
    }

    /// The manifest section's bytes.
    pub fn to_bytes(&self) -> Result<Vec<u8>, String> {
        if self.schema != SCHEMA {
            return Err(format!("the manifest says schema {}, this engine writes {SCHEMA}", self.schema));
        }
        let bytes = serde_json::to_vec(self).map_err(|err| format!("the manifest is no JSON: {err}"))?;
        if bytes.len() as u64 > MANIFEST_MAX.0 {
            return Err(format!(
                "the manifest has {} bytes, at most {MANIFEST_MAX} are allowed",
                bytes.len()
            ));
        }
        Ok(bytes)
    }

    /// The recorded working set of guest memory.
    pub fn working_set(&self) -> impl Iterator<Item = PageRange> + '_ {
        self.working_set.iter().map(|&(first, count)| PageRange::new(first, count))
    }

    /// The size of the recorded working set.
    pub fn working_set_bytes(&self) -> ByteCount {
        self.working_set()
            .fold(ByteCount::ZERO, |sum, run| ByteCount(sum.0.saturating_add(run.count.bytes().0)))
    }

    /// The volume of that name.
    pub fn volume(&self, name: &str) -> Option<&VolumeInfo> {
        self.volumes.iter().find(|volume| volume.name == name)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn sample() -> Manifest {
        Manifest {
            schema: SCHEMA,
            template: "debian-12".into(),
            template_generation: 3,
            template_root: "ab12".into(),
            dvm: "debian-dvm".into(),
            generation: 7,
            kernel_hash: "00".into(),
            initrd_hash: "01".into(),
            host: HostIdentity {
                kind: "qemu".into(),
                version: "7.2.9".into(),
                machine: "pc-q35-7.2".into(),
                cpu_model: "max".into(),
                accel: "tcg".into(),
            },
            memory_bytes: 1 << 20,
            vcpus: 2,
            volumes: vec![],
            settings_hash: "02".into(),
            agent_version: "0.1.0".into(),
            created: 1_700_000_000,
            working_set: vec![],
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let manifest = sample();
        assert_eq!(Manifest::parse(&manifest.to_bytes().unwrap()), Ok(manifest));
    }

    #[test]
    fn a_later_schema_is_refused_by_its_number() {
        let err = Manifest::parse(br#"{"schema": 2, "brand_new": true}"#).unwrap_err();
        assert!(err.to_string().contains("schema 2"), "{err}");
    }

    #[test]
    fn an_unknown_field_is_not_lost_silently() {
        let mut json: serde_json::Value =
            serde_json::from_slice(&sample().to_bytes().unwrap()).expect("valid JSON");
        json["firmware_hash"] = "ff".into();
        let err = Manifest::parse(json.to_string().as_bytes()).unwrap_err();
        assert!(err.to_string().contains("firmware_hash"), "{err}");
    }
}
