//! The qubes there are, as far as policy asks about them: the JSON of qubesd's `internal.GetSystemInfo`
//! (QubesOS/qubes-core-admin, `qubes/api/internal.py`; QubesOS/qubes-core-qrexec, `qrexec/utils.py`).

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

/// Of the JSON: thousands of qubes with dozens of tags each fit.
pub const SYSTEM_BYTES_MAX: usize = 4 << 20;

/// All qubes by name. dom0 is one of them, with class AdminVM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct System {
    #[serde(rename = "domains")]
    qubes: BTreeMap<String, Qube>,
}

/// What policy knows of a qube.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Qube {
    /// Its tags.
    #[serde(default)]
    pub tags: BTreeSet<String>,
    /// Its class: AppVM, TemplateVM, DispVM, StandaloneVM, AdminVM.
    #[serde(rename = "type")]
    pub class: String,
    /// Whether disposables may be made of it.
    #[serde(default)]
    pub template_for_dispvms: bool,
    /// What `@dispvm` means when it calls.
    #[serde(default)]
    pub default_dispvm: Option<String>,
    /// Running, Halted, Paused, …
    #[serde(default)]
    pub power_state: String,
    /// Its UUID, in small letters with dashes.
    #[serde(default)]
    pub uuid: Option<String>,
    /// Whether menus hide it.
    #[serde(default)]
    pub internal: bool,
    /// The icon that a question shows.
    #[serde(default)]
    pub icon: String,
}

/// A description of the system that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum SystemError {
    /// Too long.
    #[error("more than {SYSTEM_BYTES_MAX} bytes")]
    TooLong,
    /// Not what docs/policy.md describes.
    #[error("not the JSON of a system: {0}")]
    Json(#[from] serde_json::Error),
    /// A name that rules could not tell from a word of theirs.
    #[error("no qube can be named {0:?}")]
    Name(String),
    /// A default that is not there.
    #[error("default_dispvm of {qube} is {dispvm}, which is not there")]
    NoSuchDispvm {
        /// Whose.
        qube: String,
        /// What it names.
        dispvm: String,
    },
}

impl System {
    /// Reads the JSON. What it says of a qube beyond [`Qube`] is ignored.
    pub fn parse(json: &[u8]) -> Result<System, SystemError> {
        if json.len() > SYSTEM_BYTES_MAX {
            return Err(SystemError::TooLong);
        }
        let System { qubes } = serde_json::from_slice(json)?;
        System::new(qubes)
    }

    /// A system of these qubes.
    pub fn new(qubes: impl IntoIterator<Item = (String, Qube)>) -> Result<System, SystemError> {
        let qubes: BTreeMap<String, Qube> = qubes.into_iter().collect();
        for (name, qube) in &qubes {
            let word = name.is_empty() || name.starts_with(['@', '$', '*']) || name.starts_with("uuid:");
            if word || name.chars().any(|c| c.is_whitespace() || c.is_control()) {
                return Err(SystemError::Name(name.clone()));
            }
            match &qube.default_dispvm {
                Some(dispvm) if !qubes.contains_key(dispvm) => {
                    return Err(SystemError::NoSuchDispvm { qube: name.clone(), dispvm: dispvm.clone() })
                }
                _ => {}
            }
        }
        Ok(System { qubes })
    }

    /// A qube by its name.
    pub fn get(&self, name: &str) -> Option<&Qube> {
        self.qubes.get(name)
    }

    /// All of them, in the order of their names.
    pub fn qubes(&self) -> impl Iterator<Item = (&str, &Qube)> {
        self.qubes.iter().map(|(name, qube)| (name.as_str(), qube))
    }

    /// The name behind a name or `uuid:UUID`; what is not there stays as it is.
    pub(crate) fn name_of<'a>(&'a self, name: &'a str) -> &'a str {
        let Some(uuid) = name.strip_prefix("uuid:") else { return name };
        self.qubes().find(|(_, qube)| qube.uuid.as_deref() == Some(uuid)).map_or(name, |(name, _)| name)
    }

    /// The template for disposables behind a name or `uuid:UUID`, if it is one.
    pub(crate) fn template<'a>(&'a self, name: &'a str) -> Option<&'a str> {
        let name = self.name_of(name);
        self.get(name).filter(|qube| qube.template_for_dispvms).map(|_| name)
    }
}
