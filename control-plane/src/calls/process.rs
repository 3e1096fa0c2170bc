//! The processes of a call that a guest makes: `qrexec-policy-exec`, and what comes of it.
//!
//! Invariants:
//! - who calls is the name under which the holder has the guest; target and service are what the guest says, parsed;
//! - the processes of a call are one group, told to end by SIGTERM, killed when they do not heed it, and never outlive a call that was told
//!   to end;
//! - what has ended stays a zombie until the call is forgotten: so long its number is nobody else's.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use call_channel::port::Port;
use nix::poll::PollFlags;
use nix::sys::signal::{killpg, Signal};
use nix::unistd::Pid;
use qrexec::service::{Service, Target};
use qrexec::Exit;
use rustix::fs::OFlags;
use rustix::io::FdFlags;
use rustix::process::{waitid, PidfdFlags, WaitId, WaitIdOptions, WaitIdStatus};

use super::programs;
use super::system_log;
use super::verdict::{self, Refusals, Verdict};
use crate::state::State;

/// How long a call's processes may take to end after SIGTERM, before SIGKILL.
const TERM_LIMIT: Duration = Duration::from_secs(5);
/// The same when we end ourselves: somebody waits for the guest to be gone.
const LAST_LIMIT: Duration = Duration::from_millis(500);

/// Who calls whom for what.
pub(super) struct Errand<'a> {
    pub(super) state: &'a State,
    /// The caller.
    pub(super) name: &'a str,
    pub(super) target: &'a Target,
    pub(super) service: &'a Service,
    /// Whether it is logged that it may not happen.
    pub(super) logged: bool,
}

/// The call's streams, from our side.
pub(super) struct Streams {
    pub(super) stdin: Port,
    pub(super) stdout: Port,
    pub(super) stderr: Port,
}

/// See the module.
pub(super) struct Process {
    child: Child,
    ended: OwnedFd,
    /// Says what was decided; taken once it has.
    verdict: Option<OwnedFd>,
    exit: Option<Exit>,
    kill_at: Option<Instant>,
    /// By when it was to end by itself.
    overdue_at: Option<Instant>,
}

impl Process {
    /// One whose streams the holder carries.
    pub(super) fn start(errand: &Errand<'_>) -> io::Result<(Process, Streams)> {
        let mut process = Process::spawn(errand, None, Stdio::piped)?;
        match process.take_streams() {
            Ok(streams) => Ok((process, streams)),
            Err(error) => {
                process.discard();
                Err(error)
            }
        }
    }

    /// One that carries its own streams, over a vchan that this domain serves at this port.
    pub(super) fn start_meeting(errand: &Errand<'_>, place: (u16, u32)) -> io::Result<Process> {
        Process::spawn(errand, Some(place), Stdio::null)
    }

    fn spawn(errand: &Errand<'_>, place: Option<(u16, u32)>, stdio: fn() -> Stdio) -> io::Result<Process> {
        let (verdict, tell) = io::pipe()?;
        let mut command = programs::command("qrexec-policy-exec", errand.state);
        if let Some((domain, port)) = place {
            command.args(["--meet", &domain.to_string(), "--port", &port.to_string()]);
        }
        command.arg("--").args([errand.name, &errand.target.to_string(), &errand.service.to_string()]);
        command.env(verdict::VARIABLE, tell.as_raw_fd().to_string());
        // We may be what came of another call.
        match errand.logged {
            true => command.env_remove(system_log::UNLOGGED),
            false => command.env(system_log::UNLOGGED, "1"),
        };
        command.stdin(stdio()).stdout(stdio()).stderr(stdio());
        command.process_group(0);
        rustix::io::fcntl_setfd(&tell, FdFlags::empty())?;
        rustix::fs::fcntl_setfl(&verdict, OFlags::NONBLOCK)?;
        let mut child = command.spawn()?;
        drop(tell);
        let pid = rustix::process::Pid::from_child(&child);
        match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
            Ok(ended) => Ok(Process {
                child,
                ended,
                verdict: Some(verdict.into()),
                exit: None,
                kill_at: None,
                overdue_at: None,
            }),
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(error.into())
            }
        }
    }

    fn take_streams(&mut self) -> io::Result<Streams> {
        let missing = || io::Error::other("a process without its pipes");
        let stdin: OwnedFd = self.child.stdin.take().ok_or_else(missing)?.into();
        let stdout: OwnedFd = self.child.stdout.take().ok_or_else(missing)?.into();
        let stderr: OwnedFd = self.child.stderr.take().ok_or_else(missing)?.into();
        Ok(Streams { stdin: Port::own(stdin)?, stdout: Port::own(stdout)?, stderr: Port::own(stderr)? })
    }

    fn discard(mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// What to wait for: the verdict, and the end.
    pub(super) fn interests(&self) -> [Option<(BorrowedFd<'_>, PollFlags)>; 2] {
        let decides = self.verdict.as_ref().map(|verdict| (verdict.as_fd(), PollFlags::POLLIN));
        let ended = Some((self.ended.as_fd(), PollFlags::POLLIN)).filter(|_| self.exit.is_none());
        [decides, ended]
    }

    pub(super) fn is_decided(&self) -> bool {
        self.verdict.is_none()
    }

    /// What was decided, once.
    pub(super) fn hear_verdict(&mut self, refusals: &mut Refusals) -> Option<Verdict> {
        self.verdict.take().map(|verdict| verdict::hear(verdict, refusals))
    }

    /// Notes how it has ended, if it has.
    pub(super) fn look(&mut self) {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        match waitid(WaitId::PidFd(self.ended.as_fd()), options) {
            Ok(Some(status)) => self.exit = Some(exit_of(&status)),
            Ok(None) | Err(rustix::io::Errno::INTR) => {}
            // Somebody else has reaped it, as the kernel does where SIGCHLD is ignored.
            Err(_) => self.exit = Some(Exit::Code(qrexec::service::EXIT_PROBLEM)),
        }
    }

    pub(super) fn exit(&self) -> Option<Exit> {
        self.exit
    }

    /// Has its group end.
    pub(super) fn end_soon(&mut self) {
        self.signal(Signal::SIGTERM);
        self.kill_at.get_or_insert(Instant::now() + TERM_LIMIT);
    }

    /// Gives it the same time to end by its own doing; its group hears of it only when that is over.
    pub(super) fn end_by_itself(&mut self) {
        self.overdue_at.get_or_insert(Instant::now() + TERM_LIMIT);
    }

    pub(super) fn kill_at(&self) -> Option<Instant> {
        self.kill_at.or(self.overdue_at)
    }

    /// Kills what was told to end long enough ago.
    pub(super) fn kill_if_due(&mut self) {
        if self.kill_at.is_some_and(|at| at <= Instant::now()) {
            self.kill_at = None;
            self.signal(Signal::SIGKILL);
        }
        if self.overdue_at.take_if(|at| *at <= Instant::now()).is_some() && self.exit.is_none() {
            self.end_soon();
        }
    }

    /// Of one that is known to have ended.
    pub(super) fn forget(mut self) {
        // Some of a group that was told to end may not heed it, and nobody counts them from here on.
        if self.kill_at.is_some() {
            self.signal(Signal::SIGKILL);
        }
        let _ = self.child.wait();
    }

    /// Also after the first process has ended: others of its group may go on.
    fn signal(&self, signal: Signal) {
        if let Ok(group) = i32::try_from(self.child.id()) {
            let _ = killpg(Pid::from_raw(group), signal);
        }
    }
}

/// Ends all of them, for the guest ends.
pub(super) fn end_all(mut processes: Vec<Process>) {
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        processes.iter().for_each(|process| process.signal(signal));
        let deadline = Instant::now() + LAST_LIMIT;
        for process in &mut processes {
            while process.exit.is_none() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(2));
                process.look();
            }
        }
    }
    // One that has become another user, or waits for a disk, is not ours to end: nor is its guest's end to wait for it.
    for mut process in processes.into_iter().filter(|process| process.exit.is_some()) {
        let _ = process.child.wait();
    }
}

fn exit_of(status: &WaitIdStatus) -> Exit {
    let number = |number: Option<i32>| number.and_then(|number| u8::try_from(number).ok());
    match (number(status.exit_status()), number(status.terminating_signal())) {
        (Some(code), _) => Exit::Code(code),
        (None, Some(signal)) => Exit::Signal(signal),
        (None, None) => Exit::Code(qrexec::service::EXIT_PROBLEM),
    }
}
