//! Qubes: TemplateVMs, AppVMs on them (DVM templates among these), and disposables that have a record, one TOML file each.
//!
//! Invariants: a record is written aside and renamed, so it is never half there; a name is a legal Qubes name, so it
//! is safe as a file name; unknown keys are refused, so that a typing mistake does not go unnoticed.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use nix::fcntl::Flock;
use serde::{Deserialize, Serialize};

use crate::admin::settings::System;
use crate::error::{Error, Kind, Result};
use crate::state::{self, State};

/// The labels Qubes has.
pub const LABELS: [&str; 8] = ["red", "orange", "yellow", "green", "gray", "blue", "purple", "black"];

/// One qube's record, `qubes/NAME/qube.toml`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Qube {
    /// Its name.
    pub name: String,
    /// Its label, the colour of its windows' borders.
    pub label: String,
    /// What it is: the table `[class.TemplateVM]`, `[class.AppVM]` or `[class.DispVM]`.
    pub class: Class,
}

/// What a qube is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Class {
    /// Has a root volume and a kernel of its own.
    TemplateVM(Template),
    /// Uses a template's root; as a DVM template, disposables are made from it.
    AppVM(Dvm),
    /// A disposable that is there also while it does not run: one with a name of the user's, or made by the Admin API to be
    /// started. Nothing it writes is ever kept. Those of `dispvm-launch` have no such record ([`crate::clones`]).
    DispVM(Disposable),
}

/// A TemplateVM's part of the record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Template {
    /// The generation of root, kernel and initrd, from 1.
    pub generation: u64,
    /// blake3 of the root image, hexadecimal.
    pub root_hash: String,
    /// Size of the root volume in bytes.
    pub root_bytes: u64,
    /// blake3 of the kernel.
    pub kernel_hash: String,
    /// blake3 of the initrd.
    pub initrd_hash: String,
    /// The kernel's command line.
    pub cmdline: String,
}

/// A DVM template's part of the record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Dvm {
    /// The TemplateVM.
    pub template: String,
    /// Whether disposables may be made from it.
    pub template_for_dispvms: bool,
    /// RAM in MiB.
    pub memory_mib: u64,
    /// vCPUs.
    pub vcpus: u32,
    /// Where the network card leads: `none`, `user`, or `tap:NAME`.
    pub net: String,
    /// Size of the private volume in MiB.
    pub private_mib: u64,
    /// The generation of the private volume, from 1.
    pub private_generation: u64,
    /// What identifies that generation.
    pub private_id: String,
    /// Size of the volatile volume in MiB.
    pub volatile_mib: u64,
    /// How many clones `dispvmd` keeps ready; without it, as many as the daemon was told.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub spares: Option<u32>,
    /// The savefile in use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub savefile: Option<SavefilePin>,
}

/// A disposable's part of the record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disposable {
    /// The DVM template it is made from, each time it starts.
    pub template: String,
    /// Whether the record goes when the disposable ends.
    #[serde(default)]
    pub auto_cleanup: bool,
}

/// Which savefile serves, and what it must be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavefilePin {
    /// Its generation.
    pub generation: u64,
    /// Its root hash: a file that has another was replaced.
    pub root_hash: String,
    /// The hash of everything it was built from ([`crate::inputs`]).
    pub inputs: String,
}

impl Qube {
    /// Reads a record.
    pub fn load(state: &State, name: &str) -> Result<Qube> {
        check_name(name)?;
        let path = record_path(state, name);
        let text = fs::read_to_string(&path).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => Error::new(Kind::Usage, format!("there is no qube {name}"))
                .hint("`dispvm-qube list` shows those there are"),
            _ => Error::io("read", &path)(error),
        })?;
        Qube::parse(name, &text).map_err(|why| Error::new(Kind::Failed, format!("{}: {why}", path.display())))
    }

    /// Reads the text of `name`'s record. Error: what is wrong with it.
    pub fn parse(name: &str, text: &str) -> std::result::Result<Qube, String> {
        let qube: Qube = toml::from_str(text).map_err(|error| error.message().to_owned())?;
        if qube.name != name {
            return Err(format!("it is the record of {:?}", qube.name));
        }
        check_label(&qube.label).map_err(|error| error.to_string())?;
        if let Some(template) = qube.based_on() {
            // It becomes the name of a folder.
            check_name(template).map_err(|error| format!("template: {error}"))?;
        }
        Ok(qube)
    }

    /// The record's text.
    pub fn to_text(&self) -> Result<String> {
        toml::to_string(self).map_err(Error::failed("write the qube's record"))
    }

    /// Writes the record.
    pub fn save(&self, state: &State) -> Result<()> {
        check_name(&self.name)?;
        check_label(&self.label)?;
        state::make_folder(&state.qube(&self.name))?;
        state::replace_file(&record_path(state, &self.name), self.to_text()?.as_bytes())
    }

    /// The names of all qubes, sorted; whether their records can be read is not asked.
    pub fn names(state: &State) -> Result<Vec<String>> {
        let folder = state.qubes();
        let mut names: Vec<String> = fs::read_dir(&folder)
            .map_err(Error::io("list", &folder))?
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| check_name(name).is_ok())
            .collect();
        names.sort();
        Ok(names)
    }

    /// All qubes, by name. One that is being removed meanwhile is left out; a record that cannot be read is an error.
    pub fn all(state: &State) -> Result<Vec<Qube>> {
        let names = Qube::names(state)?;
        let records = names.iter().map(|name| (name, Qube::load(state, name)));
        records.filter(|(name, _)| record_path(state, name).is_file()).map(|(_, record)| record).collect()
    }

    /// The qube it is based on.
    pub fn based_on(&self) -> Option<&str> {
        match &self.class {
            Class::TemplateVM(_) => None,
            Class::AppVM(dvm) => Some(&dvm.template),
            Class::DispVM(disposable) => Some(&disposable.template),
        }
    }

    /// The DVM template's part, or what stands in the way.
    pub fn dvm(&self) -> Result<&Dvm> {
        match &self.class {
            Class::AppVM(dvm) if dvm.template_for_dispvms => Ok(dvm),
            Class::AppVM(_) => Err(Error::new(
                Kind::Refused,
                format!("{} does not serve as a template for disposables", self.name),
            )
            .hint(format!("`qvm-prefs {} template_for_dispvms True`", self.name))),
            Class::TemplateVM(_) => Err(Error::new(
                Kind::Refused,
                format!("{} is a TemplateVM, disposables are made from a DVM template on it", self.name),
            )
            .hint(format!("`dispvm-qube add-dvm NAME --template {}`", self.name))),
            Class::DispVM(disposable) => Err(Error::new(
                Kind::Refused,
                format!("{} is a disposable itself, made from {}", self.name, disposable.template),
            )),
        }
    }

    /// The TemplateVM's part, or what stands in the way.
    pub fn template(&self) -> Result<&Template> {
        match &self.class {
            Class::TemplateVM(template) => Ok(template),
            Class::AppVM(_) | Class::DispVM(_) => {
                Err(Error::new(Kind::Usage, format!("{} is no TemplateVM", self.name)))
            }
        }
    }
}

/// Changes a qube's record under its lock.
pub fn update(state: &State, name: &str, change: impl FnOnce(&mut Qube) -> Result<()>) -> Result<()> {
    let _lock = state::lock(&state.qube(name).join("record.lock"))?;
    let mut qube = Qube::load(state, name)?;
    change(&mut qube)?;
    qube.save(state)
}

/// Changes a DVM template's record under its lock.
pub fn update_dvm(state: &State, name: &str, change: impl FnOnce(&mut Dvm)) -> Result<()> {
    update(state, name, |qube| match &mut qube.class {
        Class::AppVM(dvm) => {
            change(dvm);
            Ok(())
        }
        Class::TemplateVM(_) | Class::DispVM(_) => {
            Err(Error::new(Kind::Usage, format!("{name} is no AppVM")))
        }
    })
}

/// Takes the lock that is held while a qube runs itself; refused while it does. Its folder must be there.
pub fn hold_running(state: &State, name: &str) -> Result<Flock<File>> {
    let lock = state::try_lock_patiently(&state.qube(name).join("start.lock"))?.ok_or_else(|| {
        Error::new(Kind::Refused, format!("{name} is running")).hint(format!(
            "`qvm-shutdown --wait {name}`, or wait until its `dispvm-qube start {name}` has ended"
        ))
    })?;
    still_its_own(state, name, &lock)?;
    Ok(lock)
}

/// Whoever removes a qube has this lock, and takes its file away: who had opened it before has got the lock of a qube that is gone, and of
/// one made since under the same name it holds nothing.
fn still_its_own(state: &State, name: &str, lock: &File) -> Result<()> {
    let path = state.qube(name).join("start.lock");
    let ours = lock.metadata().map_err(Error::io("look at", &path))?;
    match fs::metadata(&path).is_ok_and(|there| (there.dev(), there.ino()) == (ours.dev(), ours.ino())) {
        true => Ok(()),
        false => Err(Error::new(Kind::Usage, format!("{name} was removed meanwhile"))),
    }
}

/// The DVM template to use when none is named: the default_dispvm that was set, or the only one there is.
pub fn default_dvm(state: &State) -> Result<String> {
    match System::load(state)?.properties.remove("default_dispvm") {
        Some(none) if none.is_empty() => {
            return Err(Error::new(Kind::Refused, "default_dispvm is set to none")
                .hint("choose one with --dvm NAME, or `qubes-prefs default_dispvm NAME`"))
        }
        Some(name) => return Ok(name),
        None => {}
    }
    let mut dvms: Vec<String> =
        Qube::all(state)?.into_iter().filter(|qube| qube.dvm().is_ok()).map(|qube| qube.name).collect();
    match dvms.len() {
        1 => Ok(dvms.remove(0)),
        0 => Err(Error::new(Kind::Usage, "there is no DVM template")
            .hint("`make demo` makes one, or `dispvm-qube add-template` and `dispvm-qube add-dvm`")),
        _ => Err(Error::new(Kind::Usage, format!("there are several DVM templates: {}", dvms.join(", ")))
            .hint("choose one with --dvm NAME, or for good with `qubes-prefs default_dispvm NAME`")),
    }
}

/// One of Qubes' labels.
pub fn check_label(label: &str) -> Result<()> {
    match LABELS.contains(&label) {
        true => Ok(()),
        false => Err(Error::new(Kind::Usage, format!("{label:?} is no label"))
            .hint(format!("one of {}", LABELS.join(", ")))),
    }
}

/// A legal Qubes name: a letter, then up to 30 letters, digits, `.`, `_`, `-`.
pub fn check_name(name: &str) -> Result<()> {
    let mut bytes = name.bytes();
    let legal = bytes.next().is_some_and(|first| first.is_ascii_alphabetic())
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
        && name.len() <= 31;
    match legal {
        true => Ok(()),
        false => Err(Error::new(Kind::Usage, format!("{name:?} is no name of a qube"))
            .hint("a letter, then letters, digits, '.', '_' and '-', 31 in all")),
    }
}

fn record_path(state: &State, name: &str) -> PathBuf {
    state.qube(name).join("qube.toml")
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn dvm(name: &str) -> Qube {
        Qube {
            name: name.into(),
            label: "red".into(),
            class: Class::AppVM(Dvm {
                template: "debian-12".into(),
                template_for_dispvms: true,
                memory_mib: 1024,
                vcpus: 2,
                net: "none".into(),
                private_mib: 2048,
                private_generation: 1,
                private_id: "x".into(),
                volatile_mib: 1024,
                spares: None,
                savefile: None,
            }),
        }
    }

    #[test]
    fn the_lock_of_a_qube_that_was_removed_is_not_that_of_one_made_since() {
        let folder = tempfile::tempdir().unwrap();
        let state = State::open(folder.path()).unwrap();
        dvm("d").save(&state).unwrap();
        let before = hold_running(&state, "d").unwrap();
        still_its_own(&state, "d", &before).unwrap();
        fs::rename(state.qube("d"), folder.path().join("removed")).unwrap();
        assert_eq!(still_its_own(&state, "d", &before).unwrap_err().kind, Kind::Usage);
        dvm("d").save(&state).unwrap();
        let _now = hold_running(&state, "d").unwrap();
        assert_eq!(still_its_own(&state, "d", &before).unwrap_err().kind, Kind::Usage);
    }

    #[test]
    fn a_record_comes_back_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let state = State::open(folder.path()).unwrap();
        let qube = dvm("debian-dvm");
        qube.save(&state).unwrap();
        assert_eq!(Qube::load(&state, "debian-dvm").unwrap(), qube);
        update_dvm(&state, "debian-dvm", |dvm| dvm.vcpus = 4).unwrap();
        assert_eq!(Qube::load(&state, "debian-dvm").unwrap().dvm().unwrap().vcpus, 4);
        assert_eq!(default_dvm(&state).unwrap(), "debian-dvm");
        dvm("other").save(&state).unwrap();
        assert_eq!(default_dvm(&state).unwrap_err().kind, Kind::Usage);
    }

    #[test]
    fn names_and_labels_are_checked() {
        let folder = tempfile::tempdir().unwrap();
        let state = State::open(folder.path()).unwrap();
        for name in ["", "../x", "1a", "a/b", "a b", &"a".repeat(32)] {
            assert!(check_name(name).is_err(), "{name}");
        }
        let mut qube = dvm("a");
        qube.label = "pink".into();
        assert!(qube.save(&state).is_err());
        let text = dvm("a").to_text().unwrap();
        assert!(Qube::parse("a", &text).is_ok());
        let why = |from: &str, to: &str| Qube::parse("a", &text.replace(from, to)).unwrap_err();
        assert!(why("\"red\"", "\"pink\"").contains("no label"));
        assert!(why("\"debian-12\"", "\"../../etc\"").contains("template"));
        assert!(why("\"a\"", "\"b\"").contains("record of"));
    }
}
