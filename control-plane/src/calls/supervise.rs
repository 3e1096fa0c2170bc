//! A program of dom0's that serves a call, or runs before that (somebody is asked, or waited for), and all that it starts: they end with the holder of the guest that called, however that ends.
//!
//! The first process of a call is ours and stays: the kernel tells it when the holder has gone (PR_SET_PDEATHSIG), which it can tell nobody's
//! children. While there is a holder, that ends the call's processes itself, by their group; without one, this does as it would have.
//!
//! Invariants: from the start of what serves the call on, that alone has the call's streams, so their ends are its own; its status is ours.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::resource::{setrlimit, Resource};
use nix::sys::signal::{killpg, raise, SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::{getpgrp, getpid, getppid, Pid};
use qrexec::service::EXIT_PROBLEM;
use rpc_service::relay::take_standard_streams;
use rustix::process::{pidfd_open, set_parent_process_death_signal, PidfdFlags};

/// How long the program may take to end after SIGTERM, before its group gets SIGKILL.
const TERM_LIMIT: Duration = Duration::from_secs(5);
const TOLD: Option<rustix::process::Signal> = Some(rustix::process::Signal::TERM);

/// Runs the program with this process's standard input and output, to its end. A program that cannot be run is an error.
pub fn run(mut command: Command) -> io::Result<u8> {
    let (client_in, client_out) = take_standard_streams()?;
    command.stdin(client_in).stdout(client_out);
    Supervised::start(command)?.wait(false).map(status_of)
}

/// Runs one of the call's programs before what serves it, to its end. Afterwards this process is as it was; where there is no call any more, it ends
/// with the program.
pub fn run_before(command: Command) -> io::Result<ExitStatus> {
    let status = Supervised::start(command)?.wait(true)?;
    unblock();
    Ok(status)
}

fn unblock() {
    let _ = told().thread_unblock();
}

fn told() -> SigSet {
    let mut told = SigSet::empty();
    told.add(Signal::SIGTERM);
    told
}

/// A program that runs.
struct Supervised {
    child: Child,
    ended: OwnedFd,
    signals: SignalFd,
    holder: Pid,
}

impl Supervised {
    fn start(mut command: Command) -> io::Result<Supervised> {
        let holder = getppid();
        let signals = SignalFd::with_flags(&told(), SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
        // What the kernel tells too early would end us, and leave the program alone: whether there still is a holder is looked at later.
        set_parent_process_death_signal(None)?;
        let child = command.spawn();
        // Its copies of the streams.
        drop(command);
        // After the start: the program would have inherited it.
        let blocked = told().thread_block();
        set_parent_process_death_signal(TOLD)?;
        let mut child = child.inspect_err(|_| unblock())?;
        let watched = blocked
            .map_err(io::Error::from)
            .and_then(|()| Ok(pidfd_open(rustix::process::Pid::from_child(&child), PidfdFlags::empty())?));
        match watched {
            Ok(ended) => Ok(Supervised { child, ended, signals, holder }),
            Err(error) => {
                signal(&child, Signal::SIGTERM);
                let _ = child.wait();
                unblock();
                Err(error)
            }
        }
    }

    /// Waits for its end. Where SIGTERM `ends_us`, something was to come after the program that does not without a call.
    fn wait(mut self, ends_us: bool) -> io::Result<ExitStatus> {
        let mut deadline = None;
        loop {
            if deadline.is_none() && getppid() != self.holder {
                deadline = Some(Instant::now() + TERM_LIMIT);
                signal(&self.child, Signal::SIGTERM);
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            self.wait_a_while(left);
            let status = self.child.try_wait()?;
            if deadline.is_some() && (status.is_some() || left == Some(Duration::ZERO)) {
                // Us too, where we are the first of the group.
                signal(&self.child, Signal::SIGKILL);
            }
            // Whoever sent it: what follows depends on whether there is a holder.
            let is_told = self.signals.read_signal()?.is_some();
            match status {
                Some(_) if ends_us && (is_told || deadline.is_some()) => end(),
                Some(status) => return Ok(status),
                // A holder has told all of the group, and sees to it; anybody else may have told us alone.
                None if ends_us && is_told && getppid() == self.holder => {
                    signal(&self.child, Signal::SIGTERM);
                    end()
                }
                None => {}
            }
        }
    }

    fn wait_a_while(&self, left: Option<Duration>) {
        let timeout = left.map_or(PollTimeout::NONE, |left| {
            PollTimeout::try_from(left.as_micros().div_ceil(1000)).unwrap_or(PollTimeout::MAX)
        });
        let mut fds = [self.ended.as_fd(), self.signals.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        let _ = poll(&mut fds, timeout);
    }
}

/// Ends this process as SIGTERM does.
fn end() -> ! {
    unblock();
    let _ = raise(Signal::SIGTERM);
    std::process::exit(EXIT_PROBLEM.into())
}

fn signal(child: &Child, signal: Signal) {
    let group = getpgrp();
    let _ = match i32::try_from(child.id()) {
        // A group that is not the call's may have anybody in it.
        Ok(child) if group != getpid() => nix::sys::signal::kill(Pid::from_raw(child), signal),
        _ => killpg(group, signal),
    };
}

/// The program's status, which is ours; where a signal ended it, that ends us as well.
fn status_of(status: ExitStatus) -> u8 {
    if let Some(signal) = status.signal().and_then(|signal| Signal::try_from(signal).ok()) {
        // The core would be ours, of which nobody learns anything.
        let _ = setrlimit(Resource::RLIMIT_CORE, 0, 0);
        let _ = SigSet::all().thread_unblock();
        let _ = raise(signal);
    }
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(EXIT_PROBLEM)
}
