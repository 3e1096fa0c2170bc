//! Living clones' records, `clones/dispN`: JSON, locked by the clone's keeper as long as it lives.
//!
//! A record whose lock is free is a dead clone's: every reader ignores it, and the next command removes it. There is
//! nothing else to clean up after a killed keeper, for its clone's processes die with it and its files have no names.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use engine::identity::CloneNumber;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use crate::admin::settings;
use crate::error::{Error, Kind, Result};
use crate::names;
use crate::output::error_text;
use crate::qube::{self, Qube};
use crate::state::{self, State};
use crate::templates;

/// What is known of a living clone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CloneRecord {
    /// Its name.
    pub name: String,
    /// The DVM template it was made from.
    pub dvm: String,
    /// The savefile's root hash, empty after a cold boot: the hot image stays while a clone maps it.
    pub root_hash: String,
    /// The template's root generation, which stays while a clone uses it.
    pub template: (String, u64),
    /// The process that keeps it.
    pub pid: u32,
    /// What that process is.
    pub keeping: Keeping,
    /// Seconds since 1970.
    pub started: u64,
    /// Its label; without one, it is the DVM template's.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub label: Option<String>,
    /// The qube with a record of its own that runs here. `dvm` is then what it is made from: a disposable's DVM template, else itself.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub qube: Option<String>,
    /// Whether its programs run.
    #[serde(default)]
    pub power: Power,
}

/// Whether a clone's programs run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Power {
    /// It is being started.
    Starting,
    /// They do.
    #[default]
    Running,
    /// Its CPUs are stopped.
    Paused,
}

/// What a clone is to be.
pub struct Claim<'a> {
    /// The DVM template.
    pub dvm: &'a str,
    /// The savefile's root hash, empty before a cold boot.
    pub root_hash: &'a str,
    /// The template and its generation.
    pub template: (String, u64),
    /// What keeps it.
    pub keeping: Keeping,
    /// Its label. A spare gets it when it becomes somebody's.
    pub label: Option<&'a str>,
    /// The qube with a record of its own that it is.
    pub qube: Option<&'a str>,
}

/// What keeps a clone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Keeping {
    /// The command that made it, and uses it.
    Launcher,
    /// A keeper of `dispvmd`'s, which answers to SIGUSR1.
    Keeper,
    /// The runner of a qube with a record of its own ([`crate::run`]).
    Runner,
}

/// A name and its record, held as long as the clone lives. Dropping it removes the record and sends the name to rest.
pub struct Lease {
    state: State,
    number: CloneNumber,
    path: PathBuf,
    /// Whether the name goes to rest when the clone ends.
    rests: bool,
    record: Box<CloneRecord>,
    /// The record's bytes on the disk, which it always has.
    room: usize,
    lock: Flock<File>,
}

impl Lease {
    /// Takes a name for a clone of `dvm` and writes its record.
    pub fn take(
        state: &State,
        dvm: &str,
        root_hash: &str,
        template: (String, u64),
        keeping: Keeping,
        label: Option<&str>,
    ) -> Result<Lease> {
        Lease::claim(state, Claim { dvm, root_hash, template, keeping, label, qube: None })
    }

    /// Takes a name for a clone and writes its record. A disposable whose record has a clone's name keeps that.
    pub fn claim(state: &State, claim: Claim<'_>) -> Result<Lease> {
        let own = claim.qube.and_then(number_of);
        loop {
            let number = match own {
                Some(number) => number,
                None => names::take(state, |number| is_taken(state, number))?,
            };
            let path = state.clones().join(number.to_string());
            let taken = || Error::new(Kind::Refused, format!("{number} is running"));
            let lock = match own {
                Some(_) => state::try_lock_patiently(&path)?.ok_or_else(taken)?,
                None => match state::try_lock(&path)? {
                    Some(lock) => lock,
                    None => continue,
                },
            };
            // A sweep may have removed the file between its opening and its locking.
            let same =
                fs::metadata(&path).ok().zip(lock.metadata().ok()).is_some_and(|(a, b)| a.ino() == b.ino());
            if !same {
                continue;
            }
            let record = Box::new(CloneRecord {
                name: number.to_string(),
                dvm: claim.dvm.to_owned(),
                root_hash: claim.root_hash.to_owned(),
                template: claim.template.clone(),
                pid: std::process::id(),
                keeping: claim.keeping,
                started: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
                label: claim.label.map(str::to_owned),
                qube: claim.qube.map(str::to_owned),
                power: if claim.qube.is_some() { Power::Starting } else { Power::Running },
            });
            let mut lease = Lease { state: state.clone(), number, path, rests: true, record, room: 0, lock };
            lease.write()?;
            if lease.record.qube.is_none() && lease.record.keeping == Keeping::Launcher {
                lease.keep_settings();
            }
            return Ok(lease);
        }
    }

    /// It becomes somebody's: what its DVM template is from now on is no matter to it.
    pub fn hand_out(&mut self) -> Result<()> {
        self.record.label = Some(Qube::load(&self.state, &self.record.dvm)?.label);
        self.keep_settings();
        self.write()
    }

    /// Without them it has its template's as they are when somebody asks: no reason not to launch.
    fn keep_settings(&self) {
        let CloneRecord { name, dvm, started, .. } = &*self.record;
        if let Err(error) = settings::begin(&self.state, dvm, name, *started) {
            tracing::warn!("{name}: {}", error_text(&error));
        }
    }

    /// Notes whether its programs run.
    pub fn tell(&mut self, power: Power) -> Result<()> {
        self.record.power = power;
        self.write()
    }

    /// In one piece and never shorter than before, so that who reads meanwhile finds a whole record, the old one or the new.
    fn write(&mut self) -> Result<()> {
        let mut bytes =
            serde_json::to_vec(&self.record).map_err(Error::failed("write the clone's record"))?;
        bytes.resize(bytes.len().max(self.room), b' ');
        self.room = bytes.len();
        self.lock.write_all_at(&bytes, 0).map_err(Error::io("write", &self.path))
    }

    /// Says that the clone was nobody's: its name need not rest, or spares that nobody gets would use them up.
    pub fn forget_name(&mut self) {
        self.rests = false;
    }

    /// The clone's number.
    pub fn number(&self) -> CloneNumber {
        self.number
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // A holder that was killed has left its socket.
        let name = self.record.qube.as_ref().unwrap_or(&self.record.name);
        let _ = fs::remove_file(self.state.call_socket(name));
        // Without its record nobody would know of what is left: the next sweep takes both.
        if settings::forget(&self.state, &self.record.name, self.record.started).is_ok() {
            let _ = fs::remove_file(&self.path);
        }
        let _ = match self.rests {
            true => names::give_back(&self.state, self.number),
            false => names::forget(&self.state, self.number),
        };
    }
}

/// The living clones. One that cannot be asked is an error: to take it for dead would be to take away what it uses.
pub fn list(state: &State) -> Result<Vec<CloneRecord>> {
    let folder = state.clones();
    let mut clones: Vec<CloneRecord> = Vec::new();
    for entry in fs::read_dir(&folder).map_err(Error::io("list", &folder))? {
        let path = entry.map_err(Error::io("list", &folder))?.path();
        let bytes = match is_alive(&path).and_then(|alive| alive.then(|| fs::read(&path)).transpose()) {
            Ok(Some(bytes)) => bytes,
            Ok(None) => continue,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(Error::io("read", &path)(error)),
        };
        // What cannot be read as a record is one that is just being written.
        clones.extend(serde_json::from_slice::<CloneRecord>(&bytes).ok());
    }
    clones.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(clones)
}

/// Whether the clone of this number has a living keeper. One that cannot be asked counts as alive.
pub fn is_kept(state: &State, slot: u32) -> bool {
    let path = CloneNumber::new(slot).map(|number| state.clones().join(number.to_string()));
    path.is_some_and(|path| is_alive(&path).unwrap_or(true))
}

/// Removes the records of dead clones.
pub fn sweep(state: &State) -> Result<()> {
    let folder = state.clones();
    for entry in fs::read_dir(&folder).map_err(Error::io("list", &folder))? {
        let path = entry.map_err(Error::io("list", &folder))?.path();
        let number = path.file_name().and_then(|name| number_of(name.to_str()?));
        if let Ok(Some(lock)) = lock_existing(&path, FlockArg::LockExclusiveNonblock) {
            let record =
                fs::read(&path).ok().and_then(|bytes| serde_json::from_slice::<CloneRecord>(&bytes).ok());
            match record.as_ref().and_then(|record| record.qube.as_ref()) {
                Some(qube) => remove_socket_of(state, qube),
                None => drop(number.map(|number| fs::remove_file(state.call_socket(&number.to_string())))),
            }
            if let (Some(number), Some(record)) = (number, &record) {
                settings::forget(state, &number.to_string(), record.started)?;
            }
            let _ = fs::remove_file(&path);
            // Its seven days begin now, as far as anybody can tell.
            if let Some(number) = number {
                names::give_back(state, number)?;
            }
            if let Some(qube) = record.and_then(|record| record.qube) {
                if let Err(error) = templates::remove_ended(state, &qube) {
                    tracing::warn!("cannot remove the record of {qube}, which has ended: {error}");
                }
            }
            drop(lock);
        }
    }
    Ok(())
}

/// Removes the call socket of a qube whose runner was killed, unless it runs again by now: then it is another's.
fn remove_socket_of(state: &State, qube: &str) {
    let runs = || state::is_locked(&state.qube(qube).join("start.lock")).unwrap_or(false);
    if qube::check_name(qube).is_ok() && !runs() {
        let _ = fs::remove_file(state.call_socket(qube));
    }
}

/// The number in a clone's name, if it is one.
pub fn number_of(name: &str) -> Option<CloneNumber> {
    let digits =
        name.strip_prefix("disp").filter(|digits| digits.bytes().all(|byte| byte.is_ascii_digit()))?;
    CloneNumber::new(digits.parse().ok()?).filter(|number| number.to_string() == name)
}

/// Whether a clone lives under this number, or a disposable has it in its record.
pub fn is_taken(state: &State, number: CloneNumber) -> bool {
    let name = number.to_string();
    state.qube(&name).exists() || is_alive(&state.clones().join(name)).unwrap_or(true)
}

/// Whether the record's keeper holds its lock. Asked with a shared lock, so that those who ask do not see each other.
fn is_alive(path: &Path) -> std::io::Result<bool> {
    match lock_existing(path, FlockArg::LockSharedNonblock) {
        Ok(lock) => Ok(lock.is_none()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// The lock of a file that is there, if nobody has it.
fn lock_existing(path: &Path, how: FlockArg) -> std::io::Result<Option<Flock<File>>> {
    match Flock::lock(File::open(path)?, how) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, nix::errno::Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, error)) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_is_listed_while_it_lives_and_a_dead_ones_record_is_swept() {
        let folder = tempfile::tempdir().unwrap();
        let state = State::open(folder.path()).unwrap();
        let lease =
            Lease::take(&state, "debian-dvm", "", ("debian-12".into(), 1), Keeping::Launcher, Some("blue"))
                .unwrap();
        let listed = &list(&state).unwrap()[0];
        assert_eq!((&listed.name, listed.label.as_deref()), (&lease.number().to_string(), Some("blue")));
        // What a killed keeper leaves: a record without a lock.
        fs::copy(&lease.path, state.clones().join("disp5")).unwrap();
        fs::write(state.call_socket("disp5"), "").unwrap();
        assert_eq!(list(&state).unwrap().len(), 1);
        sweep(&state).unwrap();
        assert!(!state.call_socket("disp5").exists());
        assert_eq!(fs::read_dir(state.clones()).unwrap().count(), 1);
        drop(lease);
        assert_eq!(fs::read_dir(state.clones()).unwrap().count(), 0);
    }

    #[test]
    fn the_socket_of_a_qube_that_runs_again_is_left_when_its_dead_runners_record_is_swept() {
        let folder = tempfile::tempdir().unwrap();
        let state = State::open(folder.path()).unwrap();
        qube::tests::dvm("work").save(&state).unwrap();
        let socket = state.call_socket("work");
        let die = || {
            let template = ("debian-12".to_owned(), 1);
            let (dvm, keeping, qube) = ("work", Keeping::Runner, Some("work"));
            let claim = Claim { dvm, root_hash: "", template, keeping, label: None, qube };
            let lease = Lease::claim(&state, claim).unwrap();
            fs::copy(&lease.path, state.clones().join("disp5")).unwrap();
            drop(lease);
            fs::write(&socket, "").unwrap();
        };
        die();
        let running = qube::hold_running(&state, "work").unwrap();
        sweep(&state).unwrap();
        assert!(socket.exists() && !state.clones().join("disp5").exists());
        drop(running);
        die();
        sweep(&state).unwrap();
        assert!(!socket.exists());
    }
}
