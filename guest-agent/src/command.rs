//! One running command: its process, its three pipes, and their windows.
//!
//! Invariants:
//! - Nothing here blocks, but for starting: the agent waits while its child becomes the command. Its end is told by its pidfd.
//! - Its bytes flow as `flow` says. A command that closed its stdin has the rest dropped and credited.
//! - `Exited` is the last frame, after both ends of output. Output ends with EOF, or, when a background process keeps a pipe open,
//!   once the command has exited and the pipes have been idle for [`LINGER`]: as sshd does, so that `daemon &` ends.

use std::io::IoSlice;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use qrexec::{kind, Exec, Exit, GuestFrame, ProtocolError, User};

use crate::failure::Failure;
use crate::flow::{pipe_from, pipe_to, News, Sink, Source};
use crate::outbox::{Outbox, Taken, ROOM};
use crate::place::Place;
use crate::sys::{self, LaunchError, PollSlot, Zygote};

/// Slots of poll that each command has: end, stdin, stdout, stderr.
pub const SLOTS: usize = 4;
/// How long an ended command's idle pipes are kept for the processes it left behind.
const LINGER: Duration = Duration::from_millis(100);

/// A command.
pub struct Command {
    stream: u32,
    pid: i32,
    pidfd: OwnedFd,
    stdin: Sink,
    stdout: Source,
    stderr: Source,
    /// It had something to say, and stdout may have left no room for it.
    stderr_waits: bool,
    exit: Option<Exit>,
    last_activity: Instant,
    abandoned: bool,
}

/// Why a command did not start.
pub enum NotStarted {
    /// There is no such command, or it can't be executed.
    Exit(Exit),
    /// Something else.
    Failure(Failure),
}

/// A process that waits, before a capture, for the command that it will be.
pub struct Unborn {
    zygote: Zygote,
    pipes: Pipes,
}

/// Our ends: stdin, stdout, stderr.
pub type Pipes = [OwnedFd; 3];

impl Command {
    /// Starts `exec`. `keep` stays open in it.
    pub fn start(stream: u32, exec: Exec, place: &Place, keep: Option<&OwnedFd>) -> Result<Self, NotStarted> {
        let (started, ours) = spawn(exec, place, keep)?;
        Ok(Self::new(stream, started, ours))
    }

    /// Starts `exec` in a process that waits for one. `thaw` lets it run.
    pub fn bear(
        stream: u32,
        exec: Exec,
        place: &Place,
        unborn: Unborn,
        thaw: impl FnOnce() -> Result<(), Failure>,
    ) -> Result<Self, NotStarted> {
        let Unborn { zygote, pipes } = unborn;
        let launch = place.launch(exec, pipes.each_ref().map(AsFd::as_fd), None);
        let started = zygote.launch(&launch, || thaw().map_err(NotStarted::Failure))?;
        drop(launch);
        Ok(Self::new(stream, started, pipes))
    }

    fn new(stream: u32, (pid, pidfd): (i32, OwnedFd), [stdin, stdout, stderr]: Pipes) -> Self {
        Self {
            stream,
            pid,
            pidfd,
            stdin: Sink::new(stdin),
            stdout: Source::new(stdout, kind::STDOUT),
            stderr: Source::new(stderr, kind::STDERR),
            stderr_waits: false,
            exit: None,
            last_activity: Instant::now(),
            abandoned: false,
        }
    }

    /// The stream, as long as the host knows of the command.
    pub fn stream(&self) -> Option<u32> {
        (!self.abandoned).then_some(self.stream)
    }

    /// Kills it and forgets its pipes; nothing more is told of it, it only waits to be reaped.
    pub fn abandon(&mut self) {
        self.signal(libc::SIGKILL);
        self.abandoned = true;
        self.stdin.close();
        self.stdout.close();
        self.stderr.close();
    }

    /// Signals its process group, unless it has ended.
    pub fn signal(&self, signal: i32) {
        if self.exit.is_none() {
            sys::signal_group(self.pid, signal);
        }
    }

    /// Bytes for its stdin.
    pub fn stdin(&mut self, pieces: &[IoSlice<'_>], outbox: &mut Outbox) -> Result<(), ProtocolError> {
        let news = self.stdin.receive("Stdin", pieces)?;
        self.tell(news, outbox);
        Ok(())
    }

    /// The end of its stdin.
    pub fn stdin_eof(&mut self) {
        self.stdin.end();
    }

    /// More of its stdout may be sent.
    pub fn stdout_credit(&mut self, bytes: u32) -> Result<(), ProtocolError> {
        self.stdout.credit(bytes)
    }

    /// More of its stderr may be sent.
    pub fn stderr_credit(&mut self, bytes: u32) -> Result<(), ProtocolError> {
        self.stderr.credit(bytes)
    }

    /// What it waits for.
    pub fn slots(&self, room: bool) -> [PollSlot; SLOTS] {
        let end = self.exit.is_none().then(|| self.pidfd.as_fd());
        [sys::slot(end, libc::POLLIN), self.stdin.slot(), self.stdout.slot(room), self.stderr.slot(room)]
    }

    /// When it has to be looked at even if nothing happens: its pipes linger.
    pub fn deadline(&self) -> Option<Instant> {
        self.lingers().then(|| self.last_activity + LINGER)
    }

    /// Does what it can do. `true`: it is over, and all has been told.
    pub fn serve(&mut self, ready: &[PollSlot], outbox: &mut Outbox) -> bool {
        let is_ready = |at: usize| ready.get(at).is_some_and(|slot| slot.revents != 0);
        if is_ready(0) {
            self.reap();
        }
        if is_ready(1) {
            let news = self.stdin.drain(ready[1].revents);
            self.tell(news, outbox);
        }
        let first = is_ready(3) && self.stderr_waits && self.pump_stderr(outbox);
        let pumped =
            [first, is_ready(2) && self.pump_stdout(outbox), is_ready(3) && self.pump_stderr(outbox)];
        self.stderr_waits = is_ready(3) && outbox.waiting() >= ROOM;
        if pumped.contains(&true) {
            self.last_activity = Instant::now();
        }
        if self.deadline().is_some_and(|deadline| Instant::now() >= deadline) {
            self.stop_lingering(outbox);
        }
        self.finish(outbox)
    }

    fn reap(&mut self) {
        let Some(status) = sys::reap(self.pid) else { return };
        self.exit = Some(match libc::WIFSIGNALED(status) {
            true => Exit::Signal(libc::WTERMSIG(status) as u8),
            false => Exit::Code(libc::WEXITSTATUS(status) as u8),
        });
        self.last_activity = Instant::now();
    }

    fn tell(&self, news: News, outbox: &mut Outbox) {
        let stream = self.stream;
        if news.closed && self.exit.is_none() {
            outbox.push(&GuestFrame::StdinClosed { stream });
        }
        if let Some(bytes) = news.credit {
            outbox.push(&GuestFrame::StdinCredit { stream, bytes });
        }
    }

    /// `true`: something came.
    fn pump_stdout(&mut self, outbox: &mut Outbox) -> bool {
        let taken = self.stdout.pump(self.stream, outbox);
        if taken == Taken::Eof {
            outbox.push(&GuestFrame::StdoutEof { stream: self.stream });
        }
        matches!(taken, Taken::Bytes(_))
    }

    /// `true`: something came.
    fn pump_stderr(&mut self, outbox: &mut Outbox) -> bool {
        let taken = self.stderr.pump(self.stream, outbox);
        if taken == Taken::Eof {
            outbox.push(&GuestFrame::StderrEof { stream: self.stream });
        }
        matches!(taken, Taken::Bytes(_))
    }

    /// It has ended, and whatever keeps its pipes open may write more: neither lacks credit for that.
    fn lingers(&self) -> bool {
        let open = || [&self.stdout, &self.stderr].into_iter().filter(|output| output.is_open());
        self.exit.is_some() && open().next().is_some() && !open().any(Source::is_stalled)
    }

    /// Closes pipes that are idle indeed: they could be read, and gave nothing.
    fn stop_lingering(&mut self, outbox: &mut Outbox) {
        self.last_activity = Instant::now();
        let more = [self.pump_stdout(outbox), self.pump_stderr(outbox)];
        if more != [false, false] || outbox.waiting() >= ROOM {
            return;
        }
        let stream = self.stream;
        if self.stdout.close() {
            outbox.push(&GuestFrame::StdoutEof { stream });
        }
        if self.stderr.close() {
            outbox.push(&GuestFrame::StderrEof { stream });
        }
    }

    fn finish(&mut self, outbox: &mut Outbox) -> bool {
        let output_open = self.stdout.is_open() || self.stderr.is_open();
        let Some(exit) = self.exit.filter(|_| !output_open) else { return false };
        if !self.abandoned {
            outbox.push(&GuestFrame::Exited { stream: self.stream, exit });
        }
        true
    }
}

impl Unborn {
    /// One that can become any command of the user's that starts at home.
    pub fn new(place: &Place) -> Result<Self, NotStarted> {
        let (theirs, ours) = pipes()?;
        let launch = place.launch(Exec::user(["unknown yet"]), theirs.each_ref().map(AsFd::as_fd), None);
        let zygote = Zygote::new(&launch)?;
        Ok(Self { zygote, pipes: ours })
    }

    /// Whether it can become this command.
    pub fn suits(&self, exec: &Exec) -> bool {
        exec.user == User::User && exec.cwd.is_none() && self.zygote.is_alive()
    }
}

impl From<LaunchError> for NotStarted {
    fn from(error: LaunchError) -> Self {
        match error {
            LaunchError::Step(step, error) => Self::Failure(Failure::system(step, error)),
            LaunchError::Exec(error) => match error.raw_os_error().unwrap_or(0) {
                errno @ (libc::ENOENT | libc::ENOTDIR) => Self::Exit(Exit::NotFound(errno as u32)),
                errno => Self::Exit(Exit::NotExecutable(errno as u32)),
            },
        }
    }
}

impl From<Failure> for NotStarted {
    fn from(failure: Failure) -> Self {
        Self::Failure(failure)
    }
}

/// Starts a process with three pipes: its number and its descriptor, and our ends, which don't block. `keep` stays open in it.
pub fn spawn(
    exec: Exec,
    place: &Place,
    keep: Option<&OwnedFd>,
) -> Result<((i32, OwnedFd), Pipes), NotStarted> {
    let (theirs, ours) = pipes()?;
    let launch = place.launch(exec, theirs.each_ref().map(AsFd::as_fd), keep.map(AsFd::as_fd));
    Ok((sys::launch(&launch)?, ours))
}

/// A command's three pipes: its ends, and ours, which don't block.
fn pipes() -> Result<(Pipes, Pipes), Failure> {
    let [(stdin_theirs, stdin), (stdout_theirs, stdout), (stderr_theirs, stderr)] =
        [pipe_to()?, pipe_from()?, pipe_from()?];
    Ok(([stdin_theirs, stdout_theirs, stderr_theirs], [stdin, stdout, stderr]))
}
