//! Freezing everything but the agent, through cgroup v2.
//!
//! Invariants: the agent is alone in a top-level cgroup; "everything else" is every other top-level cgroup. What thawing writes to
//! is open before anything is frozen, so a thaw is one write for each. A freeze that does not succeed thaws what it had frozen. Nothing
//! is synced here: a sync after the freeze would wait for frozen tasks.

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::failure::{Failure, Step};
use crate::sys;

/// Where cgroup v2 is mounted.
pub const ROOT: &str = "/sys/fs/cgroup";
const OWN: &str = "dispvm-agent";
const FREEZE_MAX: Duration = Duration::from_secs(5);
/// The kernel tells of changes; should it not, we look again.
const LOOK_AGAIN_MS: u32 = 10;

/// The freezer of a cgroup hierarchy.
pub struct Freezer {
    root: PathBuf,
    own: String,
    frozen: Vec<Group>,
    whole: bool,
}

struct Group {
    name: String,
    freeze: File,
    events: File,
}

impl Freezer {
    /// Moves this process to a top-level cgroup of its own, unless it is in one.
    pub fn enter() -> Result<Self, Failure> {
        let root = Path::new(ROOT);
        let current = of_process("self")?;
        if is_top_level(&current) {
            return Ok(Self::new(root, current.trim_start_matches('/')));
        }
        let own = root.join(OWN);
        if !own.is_dir() {
            fs::create_dir(&own).step(|| format!("make {}", own.display()))?;
        }
        fs::write(own.join("cgroup.procs"), "0").step(|| format!("enter {}", own.display()))?;
        Ok(Self::new(root, OWN))
    }

    /// A freezer of all groups directly in `root` but `own`.
    pub fn new(root: &Path, own: &str) -> Self {
        Self { root: root.into(), own: own.into(), frozen: Vec::new(), whole: false }
    }

    /// Whether a group is still frozen.
    pub fn is_frozen(&self) -> bool {
        !self.frozen.is_empty()
    }

    /// Whether all are: nobody but the agent has run since the freeze.
    pub fn is_whole(&self) -> bool {
        self.whole
    }

    /// Freezes all other groups and waits until they are. Those beside the groups on the way down to `apart` are frozen on their own
    /// as well, so that they stay it when the group at the top is thawed for who starts in `apart`.
    pub fn freeze(&mut self, apart: Option<&str>) -> Result<(), Failure> {
        self.thaw()?;
        self.frozen = self.siblings(apart.unwrap_or_default())?;
        let frozen = self.frozen.iter().try_for_each(Group::freeze);
        let deadline = Instant::now() + FREEZE_MAX;
        let frozen =
            frozen.and_then(|()| self.frozen.iter().try_for_each(|group| group.wait_frozen(deadline)));
        self.whole = frozen.is_ok();
        if frozen.is_err() {
            let _ = self.thaw();
        }
        frozen
    }

    /// Thaws everything. Groups that can't be thawed don't keep others from it; the first failure is told.
    pub fn thaw(&mut self) -> Result<(), Failure> {
        self.whole = false;
        let mut first = Ok(());
        for group in self.frozen.drain(..) {
            first = first.and(group.thaw());
        }
        first
    }

    /// Thaws one group, if it is frozen.
    pub fn thaw_group(&mut self, name: &str) -> Result<(), Failure> {
        match self.frozen.iter().position(|group| group.name == name) {
            Some(at) => {
                self.whole = false;
                self.frozen.swap_remove(at).thaw()
            }
            None => Ok(()),
        }
    }

    fn siblings(&self, apart: &str) -> Result<Vec<Group>, Failure> {
        let tops = self.children("")?.into_iter().filter(|name| *name != self.own);
        let mut names: Vec<String> = tops.collect();
        let mut way = String::new();
        for part in apart.split('/').filter(|part| !part.is_empty()) {
            if !way.is_empty() {
                let next = format!("{way}/{part}");
                names.extend(self.children(&way)?.into_iter().filter(|name| *name != next));
            }
            way = if way.is_empty() { part.into() } else { format!("{way}/{part}") };
        }
        names.into_iter().map(|name| Group::open(&self.root, name)).collect()
    }

    /// The groups directly in `parent`, by their paths from the root.
    fn children(&self, parent: &str) -> Result<Vec<String>, Failure> {
        let folder = self.root.join(parent);
        let entries = fs::read_dir(&folder).step(|| format!("list {}", folder.display()))?.flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        let groups = names.filter(|name| folder.join(name).join("cgroup.freeze").exists());
        Ok(groups.map(|name| if parent.is_empty() { name } else { format!("{parent}/{name}") }).collect())
    }
}

impl Group {
    fn open(root: &Path, name: String) -> Result<Self, Failure> {
        let folder = root.join(&name);
        let freeze = OpenOptions::new().write(true).open(folder.join("cgroup.freeze"));
        let freeze = freeze.step(|| format!("open the freezer of {name}"))?;
        let events =
            File::open(folder.join("cgroup.events")).step(|| format!("open the events of {name}"))?;
        Ok(Self { name, freeze, events })
    }

    fn freeze(&self) -> Result<(), Failure> {
        self.freeze.write_all_at(b"1", 0).step(|| format!("freeze {}", self.name))
    }

    fn thaw(&self) -> Result<(), Failure> {
        self.freeze.write_all_at(b"0", 0).step(|| format!("thaw {}", self.name))
    }

    fn wait_frozen(&self, deadline: Instant) -> Result<(), Failure> {
        let step = || format!("wait until {} is frozen", self.name);
        loop {
            let mut text = [0; 128];
            let length = self.events.read_at(&mut text, 0).step(step)?;
            if text[..length].split(|byte| *byte == b'\n').any(|line| line == b"frozen 1") {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(Failure::ours(step(), libc::ETIMEDOUT, "not frozen within 5 s"));
            }
            sys::poll(&mut [sys::slot(Some(self.events.as_fd()), libc::POLLPRI)], Some(LOOK_AGAIN_MS))
                .step(step)?;
        }
    }
}

/// The cgroup v2 path of a process, from the root.
pub fn of_process(pid: &str) -> Result<String, Failure> {
    let file = format!("/proc/{pid}/cgroup");
    let text = fs::read_to_string(&file).step(|| format!("read {file}"))?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::"));
    path.map(String::from).ok_or_else(|| Failure::ours(format!("read {file}"), libc::ENOENT, "no cgroup v2"))
}

/// The top-level group a path is in, if it is in any.
pub fn top(path: &str) -> Option<&str> {
    path.trim_start_matches('/').split('/').next().filter(|name| !name.is_empty())
}

fn is_top_level(path: &str) -> bool {
    top(path).is_some_and(|name| path.trim_start_matches('/') == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn top_level_groups_are_told_from_nested_ones() {
        assert_eq!(top("/user.slice/user-1000.slice/session-1.scope"), Some("user.slice"));
        assert_eq!(top("/"), None);
        assert!(is_top_level("/dispvm-agent.service"));
        assert!(!is_top_level("/system.slice/dispvm-agent.service"));
        assert!(!is_top_level("/"));
    }

    /// A hierarchy to play in, where this machine has cgroup v2 and lets us write to it.
    fn playground() -> Option<PathBuf> {
        let mounts = [ROOT, "/sys/fs/cgroup/unified"];
        let root = mounts.iter().map(Path::new).find(|root| root.join("cgroup.procs").exists())?;
        let folder = root.join(format!("dispvm-test-{}", std::process::id()));
        fs::create_dir(&folder).ok()?;
        fs::write(folder.join("cgroup.freeze"), "0").ok()?;
        Some(folder)
    }

    fn is_frozen(group: &Path) -> bool {
        fs::read_to_string(group.join("cgroup.events")).expect("events").contains("frozen 1")
    }

    #[test]
    fn siblings_freeze_and_thaw_and_the_own_group_never_does() {
        let Some(root) = playground() else {
            eprintln!("skipped: no writable cgroup v2 here");
            return;
        };
        let groups: Vec<PathBuf> = ["own", "user", "empty"].iter().map(|name| root.join(name)).collect();
        groups.iter().for_each(|group| fs::create_dir(group).expect("mkdir"));
        let mut sleeper = std::process::Command::new("sleep").arg("60").spawn().expect("sleep");
        fs::write(groups[1].join("cgroup.procs"), sleeper.id().to_string()).expect("move");
        let states = || groups.iter().map(|group| is_frozen(group)).collect::<Vec<_>>();

        let mut freezer = Freezer::new(&root, "own");
        freezer.freeze(None).expect("freezes");
        assert_eq!((states(), freezer.is_frozen()), (vec![false, true, true], true));
        freezer.thaw_group("user").expect("thaws");
        assert!(states()[2] && !freezer.is_whole());
        let nested = ["user/login", "user/login/session", "user/manager"].map(|name| root.join(name));
        nested.iter().for_each(|group| fs::create_dir(group).expect("mkdir"));
        freezer.freeze(Some("/user/login/session")).expect("freezes again");
        assert_eq!(states(), [false, true, true]);
        freezer.thaw_group("user").expect("thaws");
        let nested_states = || nested.each_ref().map(|group| is_frozen(group));
        assert_eq!((states(), nested_states()), (vec![false, false, true], [false, false, true]));
        freezer.thaw().expect("thaws");
        assert_eq!(nested_states(), [false; 3]);
        nested.iter().rev().for_each(|group| fs::remove_dir(group).expect("rmdir"));
        freezer.freeze(None).expect("freezes a third time");
        freezer.thaw().expect("thaws");
        assert!(!freezer.is_frozen());

        sleeper.kill().expect("kill");
        sleeper.wait().expect("wait");
        groups.iter().chain([&root]).for_each(|group| fs::remove_dir(group).expect("rmdir"));
    }
}
