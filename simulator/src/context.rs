//! What a simulated machine shares with its hosts, domains and agents, and, through a folder, with those of other
//! processes: what went against the rules, who has been whom, which boots there were.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::rng::mix;
use crate::steps::Steps;

/// One process's part of a simulation.
pub struct Context {
    /// Counts steps.
    pub steps: Steps,
    seed: u64,
    folder: PathBuf,
    process: String,
}

impl Context {
    /// In the simulation at `folder`, whose folders are made if need be.
    pub fn new(folder: &Path, seed: u64, steps: Steps) -> io::Result<Context> {
        for name in ["boots", "slots", "machine-ids", "entropies"] {
            fs::create_dir_all(folder.join(name))?;
        }
        let nanos = std::time::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_nanos());
        let process = format!("{}-{nanos}", std::process::id());
        Ok(Context { steps, seed, folder: folder.to_owned(), process })
    }

    /// A number no other boot of this simulation has, and which follows from the seed and how many there were before.
    pub fn new_boot(&self) -> io::Result<u64> {
        for count in 1.. {
            match File::create_new(self.folder.join("boots").join(count.to_string())) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                made => return made.map(|_| mix(self.seed, count)),
            }
        }
        Err(io::ErrorKind::QuotaExceeded.into())
    }

    /// Notes that something `unique` of a `kind` was given out, and whether it never was before by another process.
    fn is_first(&self, kind: &str, unique: &str) -> io::Result<bool> {
        let path = self.folder.join(kind).join(unique);
        match File::create_new(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                Ok(fs::read_to_string(&path)? == self.process)
            }
            made => made?.write_all(self.process.as_bytes()).map(|()| true),
        }
    }

    /// Notes a domain's slot; one another process ever had is against the rules: names rest for seven days.
    pub fn use_slot(&self, slot: u32) -> io::Result<()> {
        if !self.is_first("slots", &slot.to_string())? {
            self.violation(&format!("the name disp{slot} was given out twice"));
        }
        Ok(())
    }

    /// Notes a clone's machine-id and entropy.
    pub fn use_identity(&self, machine_id: &str, entropy: &[u8]) -> io::Result<()> {
        if !self.is_first("machine-ids", machine_id)? {
            self.violation(&format!("two clones have the machine-id {machine_id}"));
        }
        let entropy = blake3::hash(entropy).to_hex();
        match File::create_new(self.folder.join("entropies").join(&entropy[..32])) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                self.violation("two identities have the same entropy");
                Ok(())
            }
            made => made.map(drop),
        }
    }

    /// Notes that a rule was broken; the driver finds it, however this process ends.
    pub fn violation(&self, what: &str) {
        let line = format!("{what}\n");
        let file = File::options().append(true).create(true).open(violations(&self.folder));
        if file.and_then(|mut file| file.write_all(line.as_bytes())).is_err() {
            eprintln!("dispvm-simulator: {what}, and it cannot be noted");
            std::process::abort();
        }
    }

    /// Waits while the simulation's guests are to be slow to start.
    pub fn dawdle(&self) {
        while self.folder.join(SLOW).exists() {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }

    /// The name of this simulation's files in memory.
    pub fn memfd_name(&self) -> String {
        memfd_name(&self.folder)
    }
}

/// While a file of this name is among the notes, no guest comes up.
pub const SLOW: &str = "slow";

/// Where broken rules are noted.
pub fn violations(folder: &Path) -> PathBuf {
    folder.join("violations")
}

/// The slots that domains of the simulation have had.
pub fn slots(folder: &Path) -> io::Result<Vec<u32>> {
    Ok(fs::read_dir(folder.join("slots"))?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect())
}

/// The name of a simulation's files in memory: what is left of them can be told from another's.
pub fn memfd_name(folder: &Path) -> String {
    format!("dispvm-sim-{}", &blake3::hash(folder.as_os_str().as_encoded_bytes()).to_hex()[..16])
}
