//! One running command: its process, its three pipes, and their windows.
//!
//! Invariants:
//! - Nothing here blocks, but for starting: the agent waits while its child becomes the command. Its end is told by its pidfd.
//! - A pipe is read only with credit from the host and room in the outbox: a stalled reader stalls the program, nothing else.
//! - What waits for stdin is within the window granted to the host. A command that closed its stdin has the rest dropped and credited.
//! - `Exited` is the last frame, after both ends of output. Output ends with EOF, or, when a background process keeps a pipe open,
//!   once the command has exited and the pipes have been idle for [`LINGER`]: as sshd does, so that `daemon &` ends.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use qrexec::{kind, Exec, Exit, GuestFrame, ProtocolError, ReceiveWindow, SendWindow, User};

use crate::failure::{Failure, Step};
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
    stdin: Stdin,
    stdout: Output,
    stderr: Output,
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
type Pipes = [OwnedFd; 3];

struct Stdin {
    pipe: Option<OwnedFd>,
    queue: VecDeque<u8>,
    eof: bool,
    window: ReceiveWindow,
}

struct Output {
    pipe: Option<OwnedFd>,
    kind: u16,
    window: SendWindow,
}

impl Command {
    /// Starts `exec`. `keep` stays open in it.
    pub fn start(stream: u32, exec: Exec, place: &Place, keep: Option<&OwnedFd>) -> Result<Self, NotStarted> {
        let (theirs, ours) = pipes()?;
        let launch = place.launch(exec, theirs.each_ref().map(AsFd::as_fd), keep.map(AsFd::as_fd));
        let started = sys::launch(&launch)?;
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
            stdin: Stdin {
                pipe: Some(stdin),
                queue: VecDeque::new(),
                eof: false,
                window: ReceiveWindow::default(),
            },
            stdout: Output { pipe: Some(stdout), kind: kind::STDOUT, window: SendWindow::default() },
            stderr: Output { pipe: Some(stderr), kind: kind::STDERR, window: SendWindow::default() },
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
        (self.stdin.pipe, self.stdout.pipe, self.stderr.pipe) = (None, None, None);
        self.stdin.queue = VecDeque::new();
    }

    /// Signals its process group, unless it has ended.
    pub fn signal(&self, signal: i32) {
        if self.exit.is_none() {
            sys::signal_group(self.pid, signal);
        }
    }

    /// Bytes for its stdin.
    pub fn stdin(&mut self, bytes: &[u8], outbox: &mut Outbox) -> Result<(), ProtocolError> {
        self.stdin.window.received(bytes.len())?;
        if self.stdin.eof {
            return Err(ProtocolError::Malformed { frame: "Stdin", what: "comes after StdinEof" });
        }
        let written = if self.stdin.queue.is_empty() { self.write_stdin(bytes, outbox) } else { 0 };
        if self.stdin.pipe.is_some() {
            self.stdin.queue.extend(&bytes[written..]);
        } else {
            self.consumed(bytes.len() - written, outbox);
        }
        Ok(())
    }

    /// The end of its stdin.
    pub fn stdin_eof(&mut self) {
        self.stdin.eof = true;
        if self.stdin.queue.is_empty() {
            self.stdin.pipe = None;
        }
    }

    /// More of its stdout may be sent.
    pub fn stdout_credit(&mut self, bytes: u32) -> Result<(), ProtocolError> {
        self.stdout.window.credit(bytes)
    }

    /// More of its stderr may be sent.
    pub fn stderr_credit(&mut self, bytes: u32) -> Result<(), ProtocolError> {
        self.stderr.window.credit(bytes)
    }

    /// What it waits for.
    pub fn slots(&self, room: bool) -> [PollSlot; SLOTS] {
        let end = self.exit.is_none().then(|| self.pidfd.as_fd());
        let stdin_events = if self.stdin.queue.is_empty() { 0 } else { libc::POLLOUT };
        [
            sys::slot(end, libc::POLLIN),
            sys::slot(self.stdin.pipe.as_ref().map(AsFd::as_fd), stdin_events),
            self.stdout.slot(room),
            self.stderr.slot(room),
        ]
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
            self.drain_stdin(ready[1].revents, outbox);
        }
        for (at, output) in [(2, &mut self.stdout), (3, &mut self.stderr)] {
            if is_ready(at) && output.pump(self.stream, outbox) {
                self.last_activity = Instant::now();
            }
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

    fn drain_stdin(&mut self, events: i16, outbox: &mut Outbox) {
        if events & libc::POLLERR != 0 {
            return self.stdin_closed(outbox);
        }
        let queue = std::mem::take(&mut self.stdin.queue);
        let written = self.write_stdin(queue.as_slices().0, outbox);
        self.stdin.queue = queue;
        self.stdin.queue.drain(..written);
        if self.stdin.pipe.is_none() {
            self.drop_stdin(outbox);
        } else if self.stdin.eof && self.stdin.queue.is_empty() {
            self.stdin.pipe = None;
        }
    }

    /// Writes what the pipe takes, and credits it.
    fn write_stdin(&mut self, bytes: &[u8], outbox: &mut Outbox) -> usize {
        let Some(pipe) = &self.stdin.pipe else { return 0 };
        match nix::unistd::write(pipe, bytes) {
            Ok(written) => {
                self.consumed(written, outbox);
                written
            }
            Err(Errno::EAGAIN | Errno::EINTR) => 0,
            Err(_) => {
                self.stdin_closed(outbox);
                0
            }
        }
    }

    fn stdin_closed(&mut self, outbox: &mut Outbox) {
        self.stdin.pipe = None;
        let is_news = !self.stdin.eof && self.exit.is_none();
        if is_news {
            outbox.push(&GuestFrame::StdinClosed { stream: self.stream });
        }
        self.drop_stdin(outbox);
    }

    fn drop_stdin(&mut self, outbox: &mut Outbox) {
        let dropped = std::mem::take(&mut self.stdin.queue).len();
        self.consumed(dropped, outbox);
    }

    fn consumed(&mut self, count: usize, outbox: &mut Outbox) {
        let credit = self.stdin.window.consumed(count);
        if let Some(bytes) = credit.filter(|_| !self.stdin.eof) {
            outbox.push(&GuestFrame::StdinCredit { stream: self.stream, bytes });
        }
    }

    /// It has ended, and whatever keeps its pipes open may write more: neither lacks credit for that.
    fn lingers(&self) -> bool {
        let outputs = [&self.stdout, &self.stderr];
        let open = outputs.iter().any(|output| output.pipe.is_some());
        let stalled = outputs.iter().any(|output| output.pipe.is_some() && output.window.left() == 0);
        self.exit.is_some() && open && !stalled
    }

    /// Closes pipes that are idle indeed: they could be read, and gave nothing.
    fn stop_lingering(&mut self, outbox: &mut Outbox) {
        self.last_activity = Instant::now();
        let more = [&mut self.stdout, &mut self.stderr].map(|output| output.pump(self.stream, outbox));
        if more == [false, false] && outbox.waiting() < ROOM {
            self.stdout.close(self.stream, outbox);
            self.stderr.close(self.stream, outbox);
        }
    }

    fn finish(&mut self, outbox: &mut Outbox) -> bool {
        let output_open = self.stdout.pipe.is_some() || self.stderr.pipe.is_some();
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

impl Output {
    fn slot(&self, room: bool) -> PollSlot {
        let wanted = room && self.window.left() > 0;
        sys::slot(self.pipe.as_ref().filter(|_| wanted).map(AsFd::as_fd), libc::POLLIN)
    }

    /// Takes one frame's worth. `true`: something came.
    fn pump(&mut self, stream: u32, outbox: &mut Outbox) -> bool {
        let Some(pipe) = &self.pipe else { return false };
        if outbox.waiting() >= ROOM {
            return false;
        }
        match outbox.take_from(pipe.as_fd(), self.kind, stream, self.window.left()) {
            Taken::Bytes(count) => {
                self.window.sent(count);
                true
            }
            Taken::Nothing => false,
            Taken::Eof => {
                self.close(stream, outbox);
                false
            }
        }
    }

    fn close(&mut self, stream: u32, outbox: &mut Outbox) {
        if self.pipe.take().is_none() {
            return;
        }
        outbox.push(&match self.kind {
            kind::STDOUT => GuestFrame::StdoutEof { stream },
            _ => GuestFrame::StderrEof { stream },
        });
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

/// A command's three pipes: its ends, and ours, which don't block.
fn pipes() -> Result<(Pipes, Pipes), Failure> {
    let [(stdin_theirs, stdin), (stdout, stdout_theirs), (stderr, stderr_theirs)] =
        [pipe()?, pipe()?, pipe()?];
    let ours = [stdin, stdout, stderr];
    for end in &ours {
        nix::fcntl::fcntl(end.as_raw_fd(), nix::fcntl::FcntlArg::F_SETFL(OFlag::O_NONBLOCK))
            .step(|| "set up a pipe")?;
    }
    Ok(([stdin_theirs, stdout_theirs, stderr_theirs], ours))
}

/// A pipe: (reading end, writing end), closed by exec.
fn pipe() -> Result<(OwnedFd, OwnedFd), Failure> {
    pipe2(OFlag::O_CLOEXEC).step(|| "make a pipe")
}
