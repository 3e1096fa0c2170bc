//! Where commands run: whose they are, with which environment, in which cgroup.
//!
//! Invariants: all of it is read before the guest is frozen. A command's cgroup is never the agent's own, so a freeze stops it too.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use qrexec::{Exec, User};

use crate::account::Account;
use crate::cgroup::{self, ROOT};
use crate::failure::{Failure, Step};
use crate::services::Services;
use crate::session::{self, Session};
use crate::sys::{c_string, CStrings, Launch};

/// The cgroup of commands when there is no session's to join.
const FALLBACK_CGROUP: &str = "dispvm-commands";
/// Commands up to this size are read: coreutils and the like.
const SMALL_BYTES: u64 = 192 << 10;
/// And no more than this of them: it lies in the savefile.
const READ_BYTES_MAX: u64 = 16 << 20;
const DEFAULT_PATH: &[u8] = b"/usr/local/bin:/usr/bin:/bin";

/// Where commands run.
pub struct Place {
    user: Account,
    root: Account,
    user_env: Vec<(Vec<u8>, Vec<u8>)>,
    cgroup: Option<OwnedFd>,
    cgroup_path: Option<String>,
    changes_user: bool,
    resets_oom: bool,
    services: Services,
}

impl Place {
    /// In the session; without one, as the user in a cgroup of its own.
    pub fn in_session(session: Option<&Session>) -> Result<Self, Failure> {
        let etc = Path::new("/etc");
        let user = Account::of(session::UID, etc);
        let user_env = session.map_or_else(|| user.login_env(), |session| session.env.clone());
        let path = match session {
            Some(session) => cgroup::of_process(&session.pid.to_string())?,
            None => String::new(),
        };
        let path = if can_hold_commands(&path)? { path } else { format!("/{FALLBACK_CGROUP}") };
        let folder = Path::new(ROOT).join(path.trim_start_matches('/'));
        fs::create_dir_all(&folder).step(|| format!("make {}", folder.display()))?;
        let services = Services::below("/", &user.name);
        let cgroup = File::open(&folder).step(|| format!("open {}", folder.display()))?;
        Ok(Self {
            user,
            root: Account::of(0, etc),
            user_env,
            cgroup: Some(cgroup.into()),
            cgroup_path: Some(path),
            changes_user: true,
            resets_oom: is_protected(),
            services,
        })
    }

    /// As this process itself, whoever it is and wherever it runs.
    pub fn here() -> Self {
        let account = Account::of(nix::unistd::getuid().as_raw(), Path::new("/etc"));
        Self {
            services: Services::below("/", &account.name),
            user_env: account.login_env(),
            user: account.clone(),
            root: account,
            cgroup: None,
            cgroup_path: None,
            changes_user: false,
            resets_oom: false,
        }
    }

    /// With services of other folders than this machine's.
    pub fn with_services(self, services: Services) -> Self {
        Self { services, ..self }
    }

    /// The services that are called here.
    pub fn services(&self) -> &Services {
        &self.services
    }

    /// Who a command line's user is; `None` within: whoever the service says. `None`: nobody that commands run as.
    pub fn user_named(&self, name: &str) -> Option<Option<User>> {
        match name {
            "DEFAULT" => Some(None),
            "root" => Some(Some(User::Root)),
            // By this name callers know it, whatever it is called here.
            name if name == "user" || name == self.user.name => Some(Some(User::User)),
            _ => None,
        }
    }

    /// The top-level cgroup that must not be frozen for a command to start.
    pub fn top_cgroup(&self) -> Option<&str> {
        self.cgroup_path().and_then(cgroup::top)
    }

    /// The cgroup of commands, from the root.
    pub fn cgroup_path(&self) -> Option<&str> {
        self.cgroup_path.as_deref()
    }

    /// Looks every command up as starting it would, so that folders and files are in the kernel's caches, found and not found alike, and
    /// reads the small ones: a clone's first command need not wait for its disk.
    pub fn look_around(&self) {
        self.services.look_around();
        let path =
            self.user_env.iter().find(|(key, _)| key == b"PATH").map_or(DEFAULT_PATH, |(_, value)| value);
        let folders = path.split(|byte| *byte == b':').map(|folder| Path::new(OsStr::from_bytes(folder)));
        let entries = folders.filter_map(|folder| fs::read_dir(folder).ok()).flatten().flatten();
        let names: BTreeSet<OsString> = entries.map(|entry| entry.file_name()).collect();
        let mut budget = READ_BYTES_MAX;
        for name in names {
            let found = candidates(name.as_bytes(), path).into_iter().find_map(|file| {
                let file = PathBuf::from(OsString::from_vec(file));
                fs::metadata(&file).ok().map(|metadata| (file, metadata))
            });
            let Some((file, metadata)) = found.filter(|(_, metadata)| metadata.is_file()) else { continue };
            if metadata.len() <= SMALL_BYTES.min(budget) && fs::read(&file).is_ok() {
                budget -= metadata.len();
            }
        }
    }

    /// All that a child needs to become `exec`.
    pub fn launch<'a>(
        &'a self,
        exec: Exec,
        stdio: [BorrowedFd<'a>; 3],
        keep: Option<BorrowedFd<'a>>,
    ) -> Launch<'a> {
        let (account, mut env) = match exec.user {
            User::User => (&self.user, self.user_env.clone()),
            User::Root => (&self.root, self.root.login_env()),
        };
        env.retain(|(key, _)| exec.env.iter().all(|(other, _)| key != other));
        env.extend(exec.env);
        let path = env.iter().find(|(key, _)| key == b"PATH").map_or(DEFAULT_PATH, |(_, value)| value);
        let folders = match exec.cwd {
            Some(folder) => vec![c_string(folder)],
            None => vec![c_string(account.home.clone().into()), c_string(b"/".to_vec())],
        };
        Launch {
            candidates: candidates(&exec.argv[0], path).into_iter().map(c_string).collect(),
            argv: CStrings::new(exec.argv),
            env: CStrings::new(env.into_iter().map(|(key, value)| [key, value].join(&b'='))),
            folders,
            become_user: self.changes_user.then(|| (account.uid, account.gid, account.groups.clone())),
            stdio,
            keep,
            resets_oom: self.resets_oom,
            cgroup: self.cgroup.as_ref().map(AsFd::as_fd),
        }
    }
}

/// Whether whoever started the agent asked the OOM killer to spare it.
fn is_protected() -> bool {
    fs::read_to_string("/proc/self/oom_score_adj").is_ok_and(|score| score.trim_end() != "0")
}

/// Whether commands started in this cgroup would be frozen with the rest: not in the root, which can't be frozen, not in the agent's own.
fn can_hold_commands(path: &str) -> Result<bool, Failure> {
    let own = cgroup::of_process("self")?;
    Ok(cgroup::top(path).is_some_and(|name| cgroup::top(&own) != Some(name)))
}

/// The paths at which a command may be, in the order of PATH.
fn candidates(name: &[u8], path: &[u8]) -> Vec<Vec<u8>> {
    if name.contains(&b'/') {
        return vec![name.to_vec()];
    }
    let folders =
        path.split(|byte| *byte == b':').map(|folder| if folder.is_empty() { b"." } else { folder });
    folders.map(|folder| [folder, name].join(&b'/')).collect()
}

#[cfg(test)]
mod tests {
    use super::candidates;

    #[test]
    fn commands_are_looked_up_in_path() {
        assert_eq!(
            candidates(b"cat", b"/bin::/b"),
            [b"/bin/cat".to_vec(), b"./cat".to_vec(), b"/b/cat".to_vec()]
        );
        assert_eq!(candidates(b"./cat", b"/bin"), [b"./cat".to_vec()]);
    }
}
