//! Living clones' records, `clones/dispN`: JSON, locked by the clone's keeper as long as it lives.
//!
//! A record whose lock is free is a dead clone's: every reader ignores it, and the next command removes it. There is
//! nothing else to clean up after a killed keeper, for its clone's processes die with it and its files have no names.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use engine::identity::CloneNumber;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::names;
use crate::state::{self, State};

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
    /// Its label, where that is not the DVM template's.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub label: Option<String>,
}

/// What keeps a clone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Keeping {
    /// The command that made it, and uses it.
    Launcher,
    /// A keeper of `dispvmd`'s, which answers to SIGUSR1.
    Keeper,
}

/// A name and its record, held as long as the clone lives. Dropping it removes the record and sends the name to rest.
pub struct Lease {
    state: State,
    number: CloneNumber,
    path: PathBuf,
    /// Whether the name goes to rest when the clone ends.
    rests: bool,
    _lock: Flock<File>,
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
        loop {
            let number = names::take(state, |number| {
                is_alive(&state.clones().join(number.to_string())).unwrap_or(true)
            })?;
            let path = state.clones().join(number.to_string());
            let Some(mut lock) = state::try_lock(&path)? else { continue };
            // A sweep may have removed the file between its opening and its locking.
            let same =
                fs::metadata(&path).ok().zip(lock.metadata().ok()).is_some_and(|(a, b)| a.ino() == b.ino());
            if !same {
                continue;
            }
            let label = label.map(str::to_owned);
            let record = CloneRecord {
                name: number.to_string(),
                dvm: dvm.to_owned(),
                root_hash: root_hash.to_owned(),
                template,
                pid: std::process::id(),
                keeping,
                started: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
                label,
            };
            let bytes = serde_json::to_vec(&record).map_err(Error::failed("write the clone's record"))?;
            lock.write_all(&bytes).map_err(Error::io("write", &path))?;
            return Ok(Lease { state: state.clone(), number, path, rests: true, _lock: lock });
        }
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
        let _ = fs::remove_file(self.state.call_socket(&self.number.to_string()));
        let _ = fs::remove_file(&self.path);
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
        let number = path.file_name().and_then(|name| name.to_str()?.strip_prefix("disp")?.parse().ok());
        if let Ok(Some(lock)) = lock_existing(&path, FlockArg::LockExclusiveNonblock) {
            if let Some(name) = path.file_name().and_then(|name| name.to_str()) {
                let _ = fs::remove_file(state.call_socket(name));
            }
            let _ = fs::remove_file(&path);
            // Its seven days begin now, as far as anybody can tell.
            if let Some(number) = number.and_then(CloneNumber::new) {
                names::give_back(state, number)?;
            }
            drop(lock);
        }
    }
    Ok(())
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
}
