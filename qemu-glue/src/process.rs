//! Starting a confined QEMU, and being sure of its end.
//!
//! Invariants:
//! - QEMU dies with the process that started it, however that dies (PDEATHSIG, set after the uid changed and checked
//!   against a parent already gone), and when its [`Process`] is dropped.
//! - It runs under a uid of its own where we are root, with no new privileges, with Landlock forbidding every file to be
//!   opened for writing or made (where the kernel has it), and QEMU's own seccomp sandbox on top.
//! - It leaves no core dump, and guest memory is in none.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use landlock::{
    AccessFs, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreatedAttr, ABI,
};
use nix::sys::memfd::{memfd_create, MemFdCreateFlag};
use rustix::process::Pid;

use crate::probe::Accel;
use crate::sys::{self, ChildPlan};

/// The first of the 10,000 uids that domains run under: above those of systemd's containers (systemd's
/// docs/UIDS-GIDS.md), below 2^31.
pub const UID_BASE: u32 = 1_900_000_000;

/// How long QEMU may take from exec to opening its memory file. It is its first step after reading its options.
const OPEN_LIMIT: Duration = Duration::from_secs(10);

/// For glibc's allocator (mallopt(3)): one arena, grown in large steps and never trimmed. A vCPU thread's own arena grows
/// page by page, which costs a launch 400 calls of mprotect and as many faults on a lock all threads share.
const ALLOCATOR: [(&str, &str); 3] =
    [("MALLOC_ARENA_MAX", "1"), ("MALLOC_TOP_PAD_", "4194304"), ("MALLOC_TRIM_THRESHOLD_", "268435456")];

/// What to start.
pub struct Launch<'a> {
    /// The program.
    pub program: &'a Path,
    /// Its arguments.
    pub arguments: Vec<OsString>,
    /// How guests run, which decides on the right to /dev/kvm.
    pub accel: Accel,
    /// Descriptors it inherits.
    pub inherit: Vec<RawFd>,
    /// Whose uid it gets when we are root.
    pub slot: u32,
    /// Whether it starts below foreground priority, until [`Process::to_foreground`].
    pub background: bool,
    /// Whether it locks memory by root's right.
    pub keep_ipc_lock: bool,
    /// The memory image to answer with when QEMU opens it for writing ([`crate::plan::Memory::PrivateCaught`]).
    pub catch_memory_open: Option<&'a File>,
}

/// A running QEMU.
pub struct Process {
    child: Child,
    stderr: File,
    background: bool,
    ended: bool,
}

impl Process {
    /// Forks, confines and execs.
    pub fn start(launch: Launch<'_>) -> io::Result<Process> {
        let stderr = memfd("qemu-stderr")?;
        let mut command = Command::new(launch.program);
        command
            .args(launch.arguments)
            .env_clear()
            .envs(ALLOCATOR)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr.try_clone()?);
        let (catch_open, caught) = match launch.catch_memory_open {
            None => (None, None),
            Some(file) => {
                let (ours, theirs) = UnixStream::pair()?;
                (Some(OwnedFd::from(theirs)), Some((ours, file)))
            }
        };
        // Who is not root may lower a priority and never raise it again: then a spare starts like any other clone.
        let background = launch.background && nix::unistd::geteuid().is_root();
        let plan = ChildPlan {
            inherit: launch.inherit,
            become_user: own_user(launch.slot, launch.accel),
            landlock: forbid_writing()?,
            catch_open,
            background,
            keep_ipc_lock: launch.keep_ipc_lock,
        };
        sys::plan_child(&mut command, plan);
        let child = command.spawn()?;
        let mut process = Process { child, stderr, background, ended: false };
        if let Some((socket, file)) = caught {
            let listener = sys::receive_listener(socket.as_fd())?;
            if let Err(error) = sys::answer_open(listener, file, OPEN_LIMIT) {
                return Err(io::Error::other(format!(
                    "QEMU did not open its memory ({error}){}",
                    process.last_words()
                )));
            }
        }
        Ok(process)
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Ends the time in the background.
    pub fn to_foreground(&mut self) -> io::Result<()> {
        if std::mem::take(&mut self.background) {
            // QEMU is alone in a process group of its own; the group's priority is that of all its threads.
            rustix::process::setpriority_pgrp(Pid::from_child(&self.child).into(), 0)?;
        }
        Ok(())
    }

    /// What it said on stderr, with a leading `: `, or nothing. Ends it first.
    pub fn last_words(&mut self) -> String {
        let _ = self.end();
        let mut text = String::new();
        let read = self.stderr.rewind().and_then(|()| (&self.stderr).take(4096).read_to_string(&mut text));
        match read {
            Ok(_) if !text.trim().is_empty() => format!(": {}", text.trim()),
            _ => String::new(),
        }
    }

    /// Waits until it has ended by itself.
    pub fn wait(&mut self) -> io::Result<ExitStatus> {
        let status = self.child.wait()?;
        self.ended = true;
        Ok(status)
    }

    /// How it ends, if it does by itself within a second: one that has hung up is about to.
    pub fn ending(&mut self) -> Option<ExitStatus> {
        let deadline = Instant::now() + Duration::from_secs(1);
        loop {
            let status = self.child.try_wait().ok().flatten();
            self.ended |= status.is_some();
            if status.is_some() || Instant::now() >= deadline {
                return status;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Kills it and waits until it is gone and its memory free.
    pub fn end(&mut self) -> io::Result<()> {
        if !self.ended {
            self.child.kill()?;
            self.wait()?;
        }
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.end();
    }
}

/// An anonymous file in memory, closed on exec unless inherited on purpose.
pub fn memfd(name: &str) -> io::Result<File> {
    let name = std::ffi::CString::new(name)?;
    let flags = MemFdCreateFlag::MFD_CLOEXEC | MemFdCreateFlag::MFD_ALLOW_SEALING;
    Ok(File::from(memfd_create(&name, flags)?))
}

/// For `inherit`: the numbers of these descriptors.
pub fn numbers<'a, F: AsRawFd + 'a>(files: impl IntoIterator<Item = &'a F>) -> Vec<RawFd> {
    files.into_iter().map(AsRawFd::as_raw_fd).collect()
}

/// The uid of its own, and the group that may open /dev/kvm; `None` when we are not root and cannot change it.
fn own_user(slot: u32, accel: Accel) -> Option<(u32, Option<u32>)> {
    if !nix::unistd::geteuid().is_root() {
        return None;
    }
    let group =
        (accel == Accel::Kvm).then(|| std::fs::metadata("/dev/kvm").map(|meta| meta.gid()).ok()).flatten();
    Some((UID_BASE + slot, group))
}

/// A rule set under which no file can be opened for writing, made or removed, but for the devices QEMU opens itself.
/// `None` where the kernel has no Landlock (before 5.13, or switched off).
fn forbid_writing() -> io::Result<Option<OwnedFd>> {
    let abi = ABI::V3;
    let writing = AccessFs::from_write(abi);
    let rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(writing)
        .and_then(|rules| rules.create())
        .and_then(|rules| match PathFd::new("/dev/kvm") {
            Ok(device) => rules.add_rule(PathBeneath::new(device, AccessFs::WriteFile)),
            Err(_) => Ok(rules),
        })
        .map_err(io::Error::other)?;
    Ok(rules.into())
}
