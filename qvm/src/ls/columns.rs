//! What stands in a column: some are worked out, all others are properties.

use admin_api::lines::{pairs, Property, Qube};
use admin_api::{ApiError, Kind};

use crate::api::{is, is_running, Api};

const MIB: u64 = 1 << 20;

/// A qube with its properties.
pub struct Row {
    /// The qube.
    pub qube: Qube,
    /// Its properties, by name.
    pub properties: Vec<(String, Property)>,
}

impl Row {
    /// A property's value, if it has one.
    pub fn property(&self, name: &str) -> Option<&String> {
        let property = self.properties.iter().find(|(known, _)| known == name);
        property.map(|(_, property)| &property.value).filter(|value| !value.is_empty())
    }

    /// Whether it is hidden.
    pub fn is_internal(&self, api: &Api) -> Result<bool, ApiError> {
        if self.qube.class == "AdminVM" {
            return Ok(false);
        }
        match self.property("internal") {
            Some(value) => Ok(value == "True"),
            None => Ok(api.feature(&self.qube.name, "internal")?.is_some_and(|value| !value.is_empty())),
        }
    }

    /// What stands under this head; `-` if there is nothing to say.
    pub fn cell(&self, api: &Api, head: &str) -> Result<String, ApiError> {
        let text = match head {
            "STATE" => Some(self.qube.state.clone()),
            "CLASS" => Some(self.qube.class.clone()),
            "UUID" => self.qube.uuid.clone().or_else(|| self.property("uuid").cloned()),
            "FLAGS" => Some(self.flags()),
            "MEMORY" if is_running(&self.qube.state) => self.memory(api)?,
            "MEMORY" => None,
            "GATEWAY" => match self.property("netvm") {
                Some(netvm) => property_of(api, netvm, "gateway")?,
                None => None,
            },
            "DISK" => Some((self.disk(api)? / MIB).to_string()),
            "PRIV-CURR" => Some(self.volume(api, "private")?.used_mib().to_string()),
            "PRIV-MAX" => Some(self.volume(api, "private")?.size_mib().to_string()),
            "PRIV-POOL" => Some(self.volume(api, "private")?.pool),
            "PRIV-USED" => Some(self.volume(api, "private")?.percent()),
            "ROOT-CURR" => Some(self.volume(api, "root")?.used_mib().to_string()),
            "ROOT-MAX" => Some(self.volume(api, "root")?.size_mib().to_string()),
            "ROOT-POOL" => Some(self.volume(api, "root")?.pool),
            "ROOT-USED" => Some(self.volume(api, "root")?.percent()),
            head => self.property(&head.replace('-', "_").to_lowercase()).cloned(),
        };
        Ok(text.unwrap_or_else(|| "-".into()))
    }

    /// Type, state, then a letter for each of: updateable, provides network, installed by RPM, internal, debug, autostart.
    fn flags(&self) -> String {
        let class = match &self.qube.class[..] {
            "AdminVM" => '0',
            "TemplateVM" => 't',
            "AppVM" => 'a',
            "StandaloneVM" => 's',
            "DispVM" => 'd',
            _ => '-',
        };
        let is_hvm = self.property("virt_mode").is_some_and(|mode| mode == "hvm");
        let state = match &self.qube.state[..] {
            "Halted" | "NA" => '-',
            state => state.chars().next().map_or('?', |char| char.to_ascii_lowercase()),
        };
        let properties =
            ["updateable", "provides_network", "installed_by_rpm", "internal", "debug", "autostart"];
        let set = |name: &str| self.property(name).is_some_and(|value| value == "True");
        let letters = properties
            .iter()
            .zip("UNRiDA".chars())
            .map(|(name, letter)| if set(name) { letter } else { '-' });
        let class = if is_hvm { class.to_ascii_uppercase() } else { class };
        [class, state].into_iter().chain(letters).collect()
    }

    /// MiB in use.
    fn memory(&self, api: &Api) -> Result<Option<String>, ApiError> {
        let state = api.text("admin.vm.CurrentState", &self.qube.name, "")?;
        let kib =
            pairs(&state, ' ').find(|(key, _)| *key == "mem").and_then(|(_, kib)| kib.parse::<u64>().ok());
        Ok(kib.map(|kib| (kib / 1024).to_string()))
    }

    fn disk(&self, api: &Api) -> Result<u64, ApiError> {
        let mut used: u64 = 0;
        for name in api.names("admin.vm.volume.List", &self.qube.name, "")? {
            used = used.saturating_add(self.volume(api, &name)?.used);
        }
        Ok(used)
    }

    fn volume(&self, api: &Api, name: &str) -> Result<Space, ApiError> {
        if !api.names("admin.vm.volume.List", &self.qube.name, "")?.iter().any(|known| known == name) {
            return Ok(Space { used: 0, size: 0, pool: "-".into() });
        }
        let info = api.text("admin.vm.volume.Info", &self.qube.name, name)?;
        let number =
            |key| pairs(&info, '\n').find(|(name, _)| *name == key).and_then(|(_, text)| text.parse().ok());
        let pool = pairs(&info, '\n').find(|(name, _)| *name == "pool").map_or("-", |(_, pool)| pool);
        let (used, size) = (number("usage").unwrap_or(0), number("size").unwrap_or(0));
        Ok(Space { used, size, pool: pool.to_owned() })
    }
}

fn property_of(api: &Api, qube: &str, name: &str) -> Result<Option<String>, ApiError> {
    match api.text("admin.vm.property.Get", qube, name) {
        Err(error) if is(&error, Kind::NoSuchProperty) => Ok(None),
        answer => Ok(Some(Property::decode(&answer?)?.value).filter(|value| !value.is_empty())),
    }
}

/// A volume's bytes.
struct Space {
    used: u64,
    size: u64,
    pool: String,
}

impl Space {
    fn used_mib(&self) -> u64 {
        self.used / MIB
    }

    fn size_mib(&self) -> u64 {
        self.size / MIB
    }

    fn percent(&self) -> String {
        match self.used_mib().saturating_mul(100).checked_div(self.size_mib()) {
            Some(percent) => format!("{percent}%"),
            None => "0".into(),
        }
    }
}
