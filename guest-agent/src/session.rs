//! The login session: its side, which leaves its environment in a file, and the agent's, which reads it.
//!
//! Invariants: the file appears whole, by a rename. The agent believes it only when it is the session user's own plain file, and
//! takes from it an environment and a process number, nothing that gives the user more than it has.

use std::convert::Infallible;
use std::env;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::failure::{Failure, Step};

/// The session's user.
pub const UID: u32 = 1000;
const FILE: &str = "dispvm-session";
/// More than any login's environment.
const FILE_BYTES_MAX: u64 = 256 << 10;
const PAUSE: Duration = Duration::from_millis(20);
const WAIT_MAX: Duration = Duration::from_secs(60);

/// What systemd tells a service about itself, which is not true of the commands.
const NOT_INHERITED: [&str; 11] = [
    "INVOCATION_ID",
    "JOURNAL_STREAM",
    "LISTEN_FDNAMES",
    "LISTEN_FDS",
    "LISTEN_PID",
    "MAINPID",
    "MANAGERPID",
    "NOTIFY_SOCKET",
    "SYSTEMD_EXEC_PID",
    "WATCHDOG_PID",
    "WATCHDOG_USEC",
];

/// The session as the agent knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Session {
    /// The process that stands for it.
    pub pid: u32,
    /// Its environment.
    pub env: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Leaves this process's environment for the agent, and stays until a signal ends it.
pub fn run() -> Result<Infallible, Failure> {
    let folder = env::var_os("XDG_RUNTIME_DIR")
        .map_or_else(|| runtime_folder(nix::unistd::getuid().as_raw()), PathBuf::from);
    let pid = std::process::id();
    let aside = folder.join(format!(".{FILE}.{pid}"));
    fs::write(&aside, describe(pid)).step(|| format!("write {}", aside.display()))?;
    let target = folder.join(FILE);
    fs::rename(&aside, &target).step(|| format!("rename {} to {}", aside.display(), target.display()))?;
    loop {
        nix::unistd::pause();
    }
}

fn describe(pid: u32) -> Vec<u8> {
    let mut text = pid.to_string().into_bytes();
    for (key, value) in env::vars_os() {
        if NOT_INHERITED.iter().any(|name| key == *name) {
            continue;
        }
        text.push(0);
        text.extend_from_slice(key.as_bytes());
        text.push(b'=');
        text.extend_from_slice(&value.into_vec());
    }
    text
}

/// Where a user's session keeps its files.
pub fn runtime_folder(uid: u32) -> PathBuf {
    PathBuf::from(format!("/run/user/{uid}"))
}

impl Session {
    /// Waits for the session to come up, for a minute at most.
    pub fn wait(folder: &Path, uid: u32) -> Option<Self> {
        let deadline = Instant::now() + WAIT_MAX;
        loop {
            match Self::read(folder, uid) {
                Ok(session) => return Some(session),
                Err(_) if Instant::now() >= deadline => return None,
                Err(_) => sleep(PAUSE),
            }
        }
    }

    /// Reads what the session left.
    pub fn read(folder: &Path, uid: u32) -> io::Result<Self> {
        let options = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC;
        let file = OpenOptions::new().read(true).custom_flags(options).open(folder.join(FILE))?;
        let metadata = file.metadata()?;
        if !metadata.is_file() || metadata.uid() != uid {
            return Err(io::Error::other("not the user's own file"));
        }
        let session =
            Self::parse(&read_limited(file)?).ok_or_else(|| io::Error::other("not a session's file"))?;
        fs::metadata(format!("/proc/{}", session.pid))?;
        Ok(session)
    }

    fn parse(text: &[u8]) -> Option<Self> {
        let mut parts = text.split(|byte| *byte == 0);
        let pid = std::str::from_utf8(parts.next()?).ok()?.parse().ok()?;
        let env = parts.filter_map(|part| {
            let equals = part.iter().position(|byte| *byte == b'=')?;
            Some((part[..equals].to_vec(), part[equals + 1..].to_vec()))
        });
        Some(Self { pid, env: env.collect() })
    }
}

fn read_limited(file: File) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut text)?;
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(io::Error::other("over 256 KiB"));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leave(text: &[u8]) -> (tempfile::TempDir, u32) {
        let folder = tempfile::tempdir().expect("tempdir");
        fs::write(folder.path().join(FILE), text).expect("write");
        (folder, nix::unistd::getuid().as_raw())
    }

    #[test]
    fn the_agent_reads_what_the_session_left() {
        let (folder, uid) = leave(&describe(std::process::id()));
        let session = Session::read(folder.path(), uid).expect("reads");
        assert_eq!(session.pid, std::process::id());
        let path = env::var_os("PATH").expect("PATH").into_vec();
        assert!(session.env.contains(&(b"PATH".to_vec(), path)));
    }

    #[test]
    fn files_of_others_and_of_the_dead_are_not_believed() {
        let (folder, uid) = leave(b"1\0A=B");
        assert!(Session::read(folder.path(), uid + 1).is_err());
        let (folder, uid) = leave(b"4194999\0A=B");
        assert!(Session::read(folder.path(), uid).is_err());
        let (folder, uid) = leave(b"not a number");
        assert!(Session::read(folder.path(), uid).is_err());
        let (folder, uid) = leave(&vec![b'1'; FILE_BYTES_MAX as usize + 1]);
        assert!(Session::read(folder.path(), uid).is_err());
    }
}
