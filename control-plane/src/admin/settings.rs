//! What was set by hand of a qube, and of the system: the records beside `qube.toml`.
//!
//! Invariants: a record is written aside, synced and renamed; unknown keys are refused; one that is not there says that all is as
//! by default, and so no record is ever needed. Values are as the API says them: `True`, `False`, a number, a name, or empty for none.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use admin_api::ADMIN_VM;
use nix::fcntl::Flock;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Result};
use crate::state::{self, State};

/// The largest record: some thousand features, or all the firewall rules one request can carry, are far below.
pub const RECORD_BYTES_MAX: u64 = 1 << 20;

/// As many revisions of a volume as stay without anybody's saying.
pub const REVISIONS_TO_KEEP: u32 = 1;

/// One qube's settings, `qubes/NAME/settings.toml`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Its UUID, if it was drawn; otherwise it follows from the name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uuid: Option<String>,
    /// Free text.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub notes: String,
    /// Its tags.
    #[serde(skip_serializing_if = "BTreeSet::is_empty")]
    pub tags: BTreeSet<String>,
    /// Its firewall's rules in Qubes' text form, the first that matches holds; without any, everything is accepted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub firewall: Option<Vec<String>>,
    /// The properties that were set.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub properties: BTreeMap<String, String>,
    /// The features that were set.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub features: BTreeMap<String, String>,
    /// What was set of its volumes, by name.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub volumes: BTreeMap<String, VolumeSettings>,
}

/// What was set of a volume.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VolumeSettings {
    /// How many revisions stay.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revisions_to_keep: Option<u32>,
}

/// The system's own settings, `system.toml`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct System {
    /// The properties that were set.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub properties: BTreeMap<String, String>,
}

/// Whose settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Owner {
    /// A qube with a record of its own, or dom0.
    Qube(String),
    /// A disposable that runs: its name, and when it was started, so that the next of this name has none of it.
    Disposable(String, u64),
}

impl Owner {
    fn path(&self, state: &State) -> PathBuf {
        match self {
            // It has no folder among the qubes, where one without a record is swept away.
            Owner::Qube(name) if name == ADMIN_VM => state.admin_settings(),
            Owner::Qube(name) => state.qube(name).join("settings.toml"),
            Owner::Disposable(name, started) => state.disposables().join(format!("{name}-{started}.toml")),
        }
    }
}

impl Settings {
    /// Reads them.
    pub fn load(state: &State, owner: &Owner) -> Result<Settings> {
        Ok(Settings::load_own(state, owner)?.unwrap_or_default())
    }

    /// Reads them, if there is a record.
    pub fn load_own(state: &State, owner: &Owner) -> Result<Option<Settings>> {
        load(&owner.path(state))
    }

    /// What the disposables of a template with these begin with.
    pub fn of_its_disposables(&self) -> Settings {
        let Settings { tags, firewall, mut properties, mut features, .. } = self.clone();
        properties.retain(|name, _| name != "template" && name != "template_for_dispvms");
        features.retain(|name, _| !name.starts_with("preload-dispvm"));
        Settings { tags, firewall, properties, features, ..Settings::default() }
    }

    /// Writes them.
    pub fn save(&self, state: &State, owner: &Owner) -> Result<()> {
        if matches!(owner, Owner::Disposable(..)) {
            state::make_folder(&state.disposables())?;
        }
        save(&owner.path(state), self)
    }
}

impl System {
    /// Reads them.
    pub fn load(state: &State) -> Result<System> {
        Ok(load(&state.system_settings())?.unwrap_or_default())
    }

    /// Writes them.
    pub fn save(&self, state: &State) -> Result<()> {
        save(&state.system_settings(), self)
    }
}

/// The lock of whoever changes settings: held from the checks before a change to its end.
pub fn lock(state: &State) -> Result<Flock<fs::File>> {
    state::lock(&state.settings_lock())
}

/// Keeps what was set of the DVM template `dvm` as what this disposable of it began with, whatever becomes of the template.
///
/// It costs a launch one more name for the template's record, which is never written in place, only replaced.
pub fn begin(state: &State, dvm: &str, disposable: &str, started: u64) -> Result<()> {
    let (from, to) = (Owner::Qube(dvm.to_owned()).path(state), begun_path(state, disposable, started));
    let name = || match fs::hard_link(&from, &to) {
        // Nothing was set of it; or the file system has no such links.
        Err(error) if error.kind() == ErrorKind::NotFound && state.disposables().is_dir() => {
            fs::File::create(&to).map(drop)
        }
        Err(error) if error.kind() != ErrorKind::NotFound => fs::copy(&from, &to).map(drop),
        linked => linked,
    };
    let done = match name() {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            state::make_folder(&state.disposables())?;
            name()
        }
        done => done,
    };
    done.map_err(Error::io("keep the settings of the template in", &to))
}

/// What was set of the template of a disposable when that began to be somebody's; `None` where that was not kept.
pub fn begun(state: &State, disposable: &str, started: u64) -> Result<Option<Settings>> {
    load(&begun_path(state, disposable, started))
}

/// Removes what a disposable that has ended had of settings.
pub fn forget(state: &State, disposable: &str, started: u64) -> Result<()> {
    let own = Owner::Disposable(disposable.to_owned(), started).path(state);
    for path in [own, begun_path(state, disposable, started)] {
        match fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(Error::io("remove", &path)(error))
            }
            _ => {}
        }
    }
    Ok(())
}

fn begun_path(state: &State, disposable: &str, started: u64) -> PathBuf {
    state.disposables().join(format!("{disposable}-{started}.begun"))
}

/// Removes the settings of disposables that are no more. Who lives is asked after these were listed: one that comes meanwhile has a
/// record before it has settings.
pub fn sweep(state: &State, living: impl FnOnce() -> Result<Vec<Owner>>) -> Result<()> {
    let folder = state.disposables();
    let entries = match fs::read_dir(&folder) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(Error::io("list", &folder))?,
    };
    let paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    let living = living()?;
    let living: BTreeSet<PathBuf> = living.iter().map(|owner| owner.path(state).with_extension("")).collect();
    for path in paths {
        let is_record = path.extension().is_some_and(|ending| ending == "toml" || ending == "begun");
        if is_record && !living.contains(&path.with_extension("")) {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    return Err(Error::io("remove", &path)(error))
                }
                _ => {}
            }
        }
    }
    Ok(())
}

fn load<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    let file = match fs::File::open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        file => file.map_err(Error::io("open", path))?,
    };
    let mut text = String::new();
    file.take(RECORD_BYTES_MAX + 1).read_to_string(&mut text).map_err(Error::io("read", path))?;
    check_size(path, text.len())?;
    toml::from_str(&text)
        .map(Some)
        .map_err(|error| Error::new(Kind::Failed, format!("{}: {}", path.display(), error.message())))
}

fn save(path: &Path, record: &impl Serialize) -> Result<()> {
    let text = toml::to_string(record).map_err(Error::failed("write the settings"))?;
    check_size(path, text.len())?;
    state::replace_file(path, text.as_bytes())
}

fn check_size(path: &Path, bytes: usize) -> Result<()> {
    match bytes as u64 <= RECORD_BYTES_MAX {
        true => Ok(()),
        false => Err(Error::new(Kind::Refused, format!("{}: over {RECORD_BYTES_MAX} bytes", path.display()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> (tempfile::TempDir, State) {
        let folder = tempfile::tempdir().unwrap();
        let state = State::open(folder.path()).unwrap();
        (folder, state)
    }

    #[test]
    fn settings_come_back_as_they_were_and_none_are_all_defaults() {
        let (_folder, state) = state();
        let dom0 = Owner::Qube("dom0".into());
        assert_eq!(Settings::load(&state, &dom0).unwrap(), Settings::default());
        let mut settings = Settings { notes: "a\nb".into(), ..Settings::default() };
        settings.tags.insert("t".into());
        settings.features.insert("preload-dispvm-max".into(), "2".into());
        settings.properties.insert("netvm".into(), String::new());
        settings.firewall = Some(vec!["action=drop".into()]);
        settings.volumes.insert("root".into(), VolumeSettings { revisions_to_keep: Some(3) });
        settings.save(&state, &dom0).unwrap();
        assert_eq!(Settings::load(&state, &dom0).unwrap(), settings);
        assert!(state.root().join("dom0.toml").is_file());
    }

    #[test]
    fn unknown_keys_and_endless_records_are_refused() {
        let (_folder, state) = state();
        fs::write(state.system_settings(), "colour = 1\n").unwrap();
        assert!(System::load(&state).is_err());
        fs::write(state.system_settings(), vec![b'#'; RECORD_BYTES_MAX as usize + 1]).unwrap();
        assert_eq!(System::load(&state).unwrap_err().kind, Kind::Refused);
        let large = Settings { notes: "x".repeat(RECORD_BYTES_MAX as usize), ..Settings::default() };
        assert!(large.save(&state, &Owner::Qube("dom0".into())).is_err());
    }

    #[test]
    fn a_disposable_keeps_what_its_template_had_at_next_to_no_cost() {
        let (_folder, state) = state();
        let dvm = Owner::Qube("d".into());
        assert_eq!(begun(&state, "disp7", 1).unwrap(), None);
        state::make_folder(&state.qube("d")).unwrap();
        begin(&state, "d", "disp7", 1).unwrap();
        let set = |notes: &str| {
            Settings { notes: notes.into(), ..Settings::default() }.save(&state, &dvm).unwrap();
        };
        set("one");
        assert_eq!(begun(&state, "disp7", 1).unwrap(), Some(Settings::default()));
        let mut times: Vec<_> = (2..100)
            .map(|started| {
                let start = std::time::Instant::now();
                begin(&state, "d", "disp7", started).unwrap();
                start.elapsed()
            })
            .collect();
        set("two");
        assert_eq!(begun(&state, "disp7", 50).unwrap().unwrap().notes, "one");
        times.sort();
        println!("keeping a template's settings: median {:?}, most {:?}", times[49], times[97]);
        forget(&state, "disp7", 50).unwrap();
        assert_eq!(begun(&state, "disp7", 50).unwrap(), None);
        sweep(&state, || Ok(vec![Owner::Disposable("disp7".into(), 3)])).unwrap();
        assert_eq!(fs::read_dir(state.disposables()).unwrap().count(), 1);
    }

    #[test]
    fn settings_of_a_disposable_go_when_it_does() {
        let (_folder, state) = state();
        let owner = |started| Owner::Disposable("disp7".into(), started);
        Settings { notes: "x".into(), ..Settings::default() }.save(&state, &owner(1)).unwrap();
        assert_eq!(Settings::load(&state, &owner(2)).unwrap(), Settings::default());
        sweep(&state, || Ok(vec![owner(1)])).unwrap();
        assert_eq!(Settings::load(&state, &owner(1)).unwrap().notes, "x");
        sweep(&state, || Ok(vec![owner(2)])).unwrap();
        assert_eq!(Settings::load(&state, &owner(1)).unwrap(), Settings::default());
    }
}
