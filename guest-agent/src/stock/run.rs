//! What dom0 wants run: a command line, as a process.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use call_channel::port::Port;
use call_channel::Streams;
use qrexec::programs;
use qrexec::service::{CommandLine, EXIT_PROBLEM};
use qrexec::Exec;

use super::call::Line;
use crate::command::{self, NotStarted};
use crate::failure::{Failure, Step};
use crate::place::Place;
use crate::sys::{self, PollSlot};

/// A process of ours.
pub struct Child {
    pid: i32,
    pidfd: OwnedFd,
    kill_at: Option<Instant>,
}

/// A command that runs.
pub struct Started {
    /// Its process.
    pub child: Child,
    /// Our ends of its pipes; none where only that it starts is of interest.
    pub streams: Streams,
    /// Whether that is so.
    pub just: bool,
}

/// Starts what a line says, as whom it says. The error is a status.
pub fn start(line: &Line, place: &Place) -> Result<Started, u8> {
    let exec = read(&line.bytes, place).map_err(|()| EXIT_PROBLEM)?;
    let started = if line.just { start_alone(exec, place) } else { start_piped(exec, place) };
    started.map_err(|not_started| match not_started {
        NotStarted::Exit(exit) => exit.status(),
        NotStarted::Failure(failure) => {
            eprintln!("dispvm-agent: {failure}");
            EXIT_PROBLEM
        }
    })
}

/// Reads a line. Who is neither the session's user nor root runs nothing here.
fn read(line: &[u8], place: &Place) -> Result<Exec, ()> {
    let line = CommandLine::parse(line).map_err(drop)?;
    let user = place.user_named(&line.user).ok_or(())?;
    place.services().resolve(programs::command(&line.command, user)).map_err(drop)
}

fn start_piped(exec: Exec, place: &Place) -> Result<Started, NotStarted> {
    let ((pid, pidfd), pipes) = command::spawn(exec, place, None)?;
    let child = Child { pid, pidfd, kill_at: None };
    Ok(Started { child, streams: streams(pipes)?, just: false })
}

fn start_alone(exec: Exec, place: &Place) -> Result<Started, NotStarted> {
    let null = File::options().read(true).write(true).open("/dev/null").step(|| "open /dev/null")?;
    let launch = place.launch(exec, [null.as_fd(); 3], None);
    let (pid, pidfd) = sys::launch(&launch)?;
    Ok(Started { child: Child { pid, pidfd, kill_at: None }, streams: Streams::default(), just: true })
}

/// Ends of pipes of ours.
pub fn streams(pipes: [OwnedFd; 3]) -> Result<Streams, Failure> {
    let [stdin, stdout, stderr] = pipes.map(|pipe| Port::own(pipe).step(|| "set up a pipe"));
    Ok(Streams { stdin: Some(stdin?), stdout: Some(stdout?), stderr: Some(stderr?) })
}

impl Child {
    /// Ready when it has ended.
    pub fn slot(&self) -> PollSlot {
        sys::slot(Some(self.pidfd.as_fd()), libc::POLLIN)
    }

    /// Its status once it has ended: then it is no more.
    pub fn reap(&mut self) -> Option<i32> {
        sys::reap(self.pid).map(|status| match libc::WIFSIGNALED(status) {
            true => 128 + libc::WTERMSIG(status),
            false => libc::WEXITSTATUS(status),
        })
    }

    /// Tells its process group to end, and to be killed if it does not.
    pub fn told_to_end(self, limit: Duration) -> Self {
        sys::signal_group(self.pid, libc::SIGTERM);
        Self { kill_at: Some(Instant::now() + limit), ..self }
    }

    /// When it is to be killed.
    pub fn kill_at(&self) -> Option<Instant> {
        self.kill_at
    }

    /// Kills it, if it was told to end long enough ago.
    pub fn kill_if_due(&mut self) {
        if self.kill_at.is_some_and(|kill_at| kill_at <= Instant::now()) {
            self.kill_if_told();
        }
    }

    /// Kills it, if it was told to end.
    pub fn kill_if_told(&mut self) {
        if self.kill_at.take().is_some() {
            sys::signal_group(self.pid, libc::SIGKILL);
        }
    }
}
