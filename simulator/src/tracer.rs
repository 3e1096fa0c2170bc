//! A process traced from outside (ptrace): the system calls with which its main thread opens or changes files of the state
//! folder are counted and named, and one of them can be made to fail, or the process be killed before it.
//!
//! Only the main thread is traced, for its calls come in the same order in every run; what other threads write is met with
//! limits instead ([`crate::plan::Plan::FileBytes`]). The tracee asks to be traced and stops itself ([`stop_for_tracer`]).
//! All calls for one tracee must come from the thread that started it (ptrace(2)). x86-64 only, as is the rest.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::libc::{self, user_regs_struct};
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{kill, raise, Signal};
use nix::sys::wait::{waitpid, WaitStatus};
use nix::unistd::Pid;

use crate::plan::{FileFault, Plan};

/// In the tracee: from here on the parent sees every system call of this thread.
pub fn stop_for_tracer() -> io::Result<()> {
    ptrace::traceme()?;
    Ok(raise(Signal::SIGSTOP)?)
}

/// Where a system call's path is among its arguments.
enum Place {
    /// A path.
    Path(usize),
    /// A folder's descriptor, and a path.
    At(usize),
    /// A descriptor.
    Fd,
}

/// The system calls counted.
const CALLS: [(libc::c_long, &str, Place); 21] = [
    (libc::SYS_open, "open", Place::Path(0)),
    (libc::SYS_openat, "open", Place::At(0)),
    (libc::SYS_mkdir, "mkdir", Place::Path(0)),
    (libc::SYS_mkdirat, "mkdir", Place::At(0)),
    (libc::SYS_rename, "rename", Place::Path(0)),
    (libc::SYS_renameat, "rename", Place::At(0)),
    (libc::SYS_renameat2, "rename", Place::At(0)),
    (libc::SYS_unlink, "unlink", Place::Path(0)),
    (libc::SYS_unlinkat, "unlink", Place::At(0)),
    (libc::SYS_rmdir, "rmdir", Place::Path(0)),
    (libc::SYS_chmod, "chmod", Place::Path(0)),
    (libc::SYS_write, "write", Place::Fd),
    (libc::SYS_pwrite64, "write", Place::Fd),
    (libc::SYS_writev, "write", Place::Fd),
    (libc::SYS_copy_file_range, "copy", Place::Fd),
    (libc::SYS_ftruncate, "truncate", Place::Fd),
    (libc::SYS_fallocate, "allocate", Place::Fd),
    (libc::SYS_fsync, "sync", Place::Fd),
    (libc::SYS_fdatasync, "sync", Place::Fd),
    (libc::SYS_fchmod, "chmod", Place::Fd),
    (libc::SYS_flock, "lock", Place::Fd),
];

/// Lets a tracee that has stopped itself run to its end, by `plan`. Answers how it ended, and the calls counted. While
/// the plan holds it at a call, `meanwhile` is done.
pub fn run(
    pid: Pid,
    root: &Path,
    plan: Plan,
    meanwhile: &mut dyn FnMut() -> io::Result<()>,
) -> io::Result<(WaitStatus, Vec<String>)> {
    let first = waitpid(pid, None)?;
    if !matches!(first, WaitStatus::Stopped(_, Signal::SIGSTOP)) {
        return Ok((first, Vec::new()));
    }
    ptrace::setoptions(pid, Options::PTRACE_O_TRACESYSGOOD | Options::PTRACE_O_EXITKILL)?;
    let (mut calls, mut signal, mut inside, mut inject) = (Vec::new(), None, false, None);
    loop {
        match ptrace::syscall(pid, signal.take()) {
            // Killed meanwhile: the wait tells.
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(error) => return Err(error.into()),
        }
        match waitpid(pid, None)? {
            WaitStatus::PtraceSyscall(_) if !inside => {
                inside = true;
                let before = calls.len();
                inject = enter(pid, root, plan, &mut calls)?;
                if calls.len() > before && plan == Plan::Meanwhile(calls.len() as u64) {
                    meanwhile()?;
                }
            }
            WaitStatus::PtraceSyscall(_) => {
                inside = false;
                if let Some(errno) = inject.take() {
                    change(pid, |regs| regs.rax = (-i64::from(errno as i32)) as u64)?;
                }
            }
            WaitStatus::Stopped(_, other) => signal = Some(other),
            ended @ (WaitStatus::Exited(..) | WaitStatus::Signaled(..)) => return Ok((ended, calls)),
            _ => {}
        }
    }
}

/// At a call's beginning: counts it, if it is one to count. `Some`: it is made to fail with this.
fn enter(pid: Pid, root: &Path, plan: Plan, calls: &mut Vec<String>) -> io::Result<Option<Errno>> {
    let Ok(regs) = ptrace::getregs(pid) else { return Ok(None) };
    let Some((_, name, place)) = CALLS.iter().find(|(number, ..)| *number as u64 == regs.orig_rax) else {
        return Ok(None);
    };
    let unlocks = regs.orig_rax == libc::SYS_flock as u64 && regs.rsi & libc::LOCK_UN as u64 != 0;
    let path = path_of(pid, &regs, place).filter(|_| !unlocks);
    let Some(inside) = path.as_deref().and_then(|path| path.strip_prefix(root).ok()) else { return Ok(None) };
    calls.push(format!("F {name} {}", without_numbers(&inside.to_string_lossy())));
    match plan {
        Plan::File(at, fault) if at == calls.len() as u64 => {
            if fault == FileFault::Kill {
                kill(pid, Signal::SIGKILL)?;
                return Ok(None);
            }
            // No call has this number: the kernel does nothing.
            change(pid, |regs| regs.orig_rax = u64::MAX)?;
            Ok(fault.errno())
        }
        _ => Ok(None),
    }
}

fn change(pid: Pid, change: impl FnOnce(&mut user_regs_struct)) -> io::Result<()> {
    let mut regs = ptrace::getregs(pid)?;
    change(&mut regs);
    Ok(ptrace::setregs(pid, regs)?)
}

fn path_of(pid: Pid, regs: &user_regs_struct, place: &Place) -> Option<PathBuf> {
    let arguments = [regs.rdi, regs.rsi, regs.rdx];
    let of_fd = |fd: u64| fs::read_link(format!("/proc/{pid}/fd/{}", fd as i32)).ok();
    match place {
        Place::Path(at) => string(pid, arguments[*at]),
        Place::Fd => of_fd(arguments[0]),
        Place::At(at) => {
            let path = string(pid, arguments[at + 1])?;
            match path.is_absolute() {
                true => Some(path),
                false => Some(of_fd(arguments[*at])?.join(path)),
            }
        }
    }
}

/// The text at an address of the tracee.
fn string(pid: Pid, address: u64) -> Option<PathBuf> {
    let mut bytes = vec![0; libc::PATH_MAX as usize];
    let have = File::open(format!("/proc/{pid}/mem")).ok()?.read_at(&mut bytes, address).ok()?;
    let end = bytes[..have].iter().position(|byte| *byte == 0)?;
    Some(String::from_utf8(bytes[..end].to_vec()).ok()?.into())
}

/// A path in which what differs between two runs of one seed (names of clones, process ids, hashes, boot ids) is replaced.
fn without_numbers(path: &str) -> String {
    let part = |part: &str| match part {
        _ if part.starts_with("disp") => "dispN".to_owned(),
        _ if part.ends_with(".tmp") && part.len() > 8 => "ASIDE.tmp".to_owned(),
        _ if part.len() > 64 => "SET".to_owned(),
        _ => part.trim_end_matches(" (deleted)").to_owned(),
    };
    path.split('/').map(part).collect::<Vec<_>>().join("/")
}
