//! A command's conversation: the caller's stdin, stdout and stderr on one side, the agent's frames on the other, and
//! between them nothing that grows: a stalled reader stops its own stream and no other.
//!
//! Invariants:
//! - No descriptor of the caller is made non-blocking (it may be shared with others): one is written to only when poll says so,
//!   and then no more than a pipe takes without blocking.
//! - The clone ends with the caller: when its stdout or stderr has no reader any more, and on SIGHUP, SIGINT, SIGTERM.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use engine::agent::AgentError;
use engine::host::{Domain, HostError};
use engine::timeline::Timeline;
use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::{read, write};
use qrexec::{Exit, Failed, GuestFrame, HostFrame, ReceiveWindow, SendWindow};

use crate::agent_link::{AgentLink, COMMAND_STREAM};

/// What a pipe that polls writable takes without blocking (PIPE_BUF, pipe(7)).
const WRITE_BYTES: usize = 4096;
/// How much of stdin is read at once.
const READ_BYTES: usize = 64 << 10;

/// How a command's conversation ended.
#[derive(Debug)]
pub enum Ending {
    /// The command ended.
    Exited(Exit),
    /// The caller hung up: nobody reads what the command writes.
    HungUp,
    /// A signal ended it.
    Signal(Signal),
}

/// Why it broke.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The guest's side.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// The host's side.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The guest could not start the command for another reason than that it is not there.
    #[error("cannot start the command in the guest: {0}")]
    NotStarted(String),
    /// The guest does not keep to the protocol.
    #[error("the guest breaks the protocol: {0}")]
    Protocol(#[from] qrexec::ProtocolError),
    /// The caller's side.
    #[error("cannot {step}")]
    Io {
        /// What was being done.
        step: &'static str,
        /// The system's error.
        source: io::Error,
    },
}

/// The signals that end a clone, blocked and read from a descriptor, so that no step is torn.
pub struct Signals(SignalFd);

impl Signals {
    /// Blocks them. Call before anything is started.
    pub fn block() -> io::Result<Signals> {
        let mut set = SigSet::empty();
        for signal in [Signal::SIGHUP, Signal::SIGINT, Signal::SIGTERM, Signal::SIGQUIT] {
            set.add(signal);
        }
        set.thread_block()?;
        Ok(Signals(SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?))
    }

    /// One that has come, if any.
    pub fn pending(&mut self) -> Option<Signal> {
        let info = self.0.read_signal().ok().flatten()?;
        Signal::try_from(info.ssi_signo as i32).ok()
    }
}

impl AsFd for Signals {
    /// Readable when one is pending.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The caller's three streams.
pub struct Caller<'a> {
    /// Read until its end.
    pub stdin: BorrowedFd<'a>,
    /// Gets the command's stdout.
    pub stdout: BorrowedFd<'a>,
    /// Gets the command's stderr.
    pub stderr: BorrowedFd<'a>,
}

/// What else wants attention while a command runs: a domain's own events, or word from whoever keeps the domain.
pub trait Attended {
    /// Readable when [`Attended::attend`] has something to do.
    fn events(&self) -> BorrowedFd<'_>;
    /// Does it. An error means that the clone cannot go on.
    fn attend(&mut self) -> Result<(), HostError>;
}

impl Attended for Box<dyn Domain> {
    fn events(&self) -> BorrowedFd<'_> {
        (**self).events()
    }

    fn attend(&mut self) -> Result<(), HostError> {
        self.serve()
    }
}

/// Carries a command's streams until it ends. The command has been sent already.
pub fn run(
    link: &mut AgentLink,
    domain: &mut dyn Attended,
    caller: &Caller<'_>,
    signals: &mut Signals,
    timeline: &mut Timeline,
) -> Result<Ending, SessionError> {
    let mut pump = Pump::default();
    loop {
        while let Some(frame) = link.next_frame()? {
            pump.take(frame, timeline)?;
        }
        link.flush()?;
        if let Some(exit) = pump.exit.filter(|_| pump.stdout.is_done() && pump.stderr.is_done()) {
            return Ok(Ending::Exited(exit));
        }
        let ready = pump.wait(link, &*domain, caller, signals)?;
        if ready.signal {
            if let Some(signal) = signals.pending() {
                return Ok(Ending::Signal(signal));
            }
        }
        if ready.domain {
            domain.attend()?;
        }
        if ready.stdin {
            pump.stdin.read(caller.stdin, link)?;
        }
        // One at a time: both may be the same pipe, which poll has promised room for one.
        let (which, output, fd, flags) = match ready.stdout.is_empty() {
            false => (HostFrameOf::Stdout, &mut pump.stdout, caller.stdout, ready.stdout),
            true => (HostFrameOf::Stderr, &mut pump.stderr, caller.stderr, ready.stderr),
        };
        let hung_up = output.write(flags, fd, link, which)?;
        if hung_up {
            return Ok(Ending::HungUp);
        }
    }
}

#[derive(Default)]
struct Pump {
    stdin: Input,
    stdout: Output,
    stderr: Output,
    exit: Option<Exit>,
    thawed: bool,
}

/// What poll found.
struct Ready {
    signal: bool,
    domain: bool,
    stdin: bool,
    stdout: PollFlags,
    stderr: PollFlags,
}

impl Pump {
    fn take(&mut self, frame: GuestFrame, timeline: &mut Timeline) -> Result<(), SessionError> {
        match frame {
            GuestFrame::Done(qrexec::Op::Thaw) if !self.thawed => {
                self.thawed = true;
                timeline.mark("thawed");
            }
            GuestFrame::Stdout { bytes, .. } => {
                if !self.stdout.seen_any {
                    timeline.mark("first_byte");
                }
                self.stdout.receive(bytes)?;
            }
            GuestFrame::Stderr { bytes, .. } => self.stderr.receive(bytes)?,
            GuestFrame::StdinCredit { bytes, .. } => self.stdin.window.credit(bytes)?,
            GuestFrame::StdinClosed { .. } => self.stdin.ended = true,
            GuestFrame::Exited { exit, .. } if self.exit.is_none() => {
                timeline.mark("exited");
                self.exit = Some(exit);
            }
            GuestFrame::Failed { failed, .. } => return Err(SessionError::NotStarted(failed_text(&failed))),
            _ => {}
        }
        Ok(())
    }

    fn wait(
        &self,
        link: &AgentLink,
        domain: &dyn Attended,
        caller: &Caller<'_>,
        signals: &Signals,
    ) -> Result<Ready, SessionError> {
        let agent =
            if link.wants_to_send() { PollFlags::POLLIN | PollFlags::POLLOUT } else { PollFlags::POLLIN };
        let stdin = if self.stdin.wants() { PollFlags::POLLIN } else { PollFlags::empty() };
        let mut fds = [
            PollFd::new(signals.0.as_fd(), PollFlags::POLLIN),
            PollFd::new(domain.events(), PollFlags::POLLIN),
            PollFd::new(link.as_fd(), agent),
            PollFd::new(caller.stdout, self.stdout.interest()),
            PollFd::new(caller.stderr, self.stderr.interest()),
            PollFd::new(caller.stdin, stdin),
        ];
        // A stdin at its end would be ready for ever: it is left out once it is of no interest.
        let count = if stdin.is_empty() { fds.len() - 1 } else { fds.len() };
        match poll(&mut fds[..count], PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(SessionError::Io { step: "wait", source: error.into() }),
        }
        let flags = |at: usize| fds[at].revents().unwrap_or(PollFlags::empty());
        Ok(Ready {
            signal: !flags(0).is_empty(),
            domain: !flags(1).is_empty(),
            stdout: flags(3),
            stderr: flags(4),
            stdin: count == fds.len() && !flags(5).is_empty(),
        })
    }
}

fn failed_text(failed: &Failed) -> String {
    format!("{}: {}", failed.step, failed.message)
}

/// The caller's stdin, on its way to the guest.
#[derive(Default)]
struct Input {
    window: SendWindow,
    ended: bool,
}

impl Input {
    fn wants(&self) -> bool {
        !self.ended && self.window.left() > 0
    }

    fn read(&mut self, fd: BorrowedFd<'_>, link: &mut AgentLink) -> Result<(), SessionError> {
        let mut buffer = [0u8; READ_BYTES];
        let most = self.window.left().min(READ_BYTES);
        match read(fd.as_raw_fd(), &mut buffer[..most]) {
            Ok(count) if count > 0 => {
                self.window.sent(count);
                link.queue_stdin(&buffer[..count]);
            }
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            // Its end; or none that can be read: nohup's write-only /dev/null, a folder, a terminal that is gone.
            Ok(_) | Err(_) => {
                self.ended = true;
                link.queue(&HostFrame::StdinEof { stream: COMMAND_STREAM })?;
            }
        }
        Ok(())
    }
}

/// Which credit an output stream is paid with.
#[derive(Clone, Copy)]
enum HostFrameOf {
    Stdout,
    Stderr,
}

/// One of the command's output streams, on its way to the caller. Holds no more than its window.
#[derive(Default)]
struct Output {
    window: ReceiveWindow,
    pending: VecDeque<u8>,
    seen_any: bool,
}

impl Output {
    fn receive(&mut self, bytes: Vec<u8>) -> Result<(), SessionError> {
        self.window.received(bytes.len())?;
        self.seen_any = true;
        self.pending.extend(bytes);
        Ok(())
    }

    fn is_done(&self) -> bool {
        self.pending.is_empty()
    }

    fn interest(&self) -> PollFlags {
        // Without interest, poll still tells that the reader has gone.
        if self.pending.is_empty() {
            PollFlags::empty()
        } else {
            PollFlags::POLLOUT
        }
    }

    /// Writes what `fd` takes. Says whether its reader has gone.
    fn write(
        &mut self,
        ready: PollFlags,
        fd: BorrowedFd<'_>,
        link: &mut AgentLink,
        which: HostFrameOf,
    ) -> Result<bool, SessionError> {
        if ready.intersects(PollFlags::POLLERR | PollFlags::POLLHUP) {
            return Ok(true);
        }
        if !ready.contains(PollFlags::POLLOUT) || self.pending.is_empty() {
            return Ok(false);
        }
        let (front, _) = self.pending.as_slices();
        let part = &front[..front.len().min(WRITE_BYTES)];
        match write(fd, part) {
            Ok(count) => {
                self.pending.drain(..count);
                if let Some(bytes) = self.window.consumed(count) {
                    link.queue(&match which {
                        HostFrameOf::Stdout => HostFrame::StdoutCredit { stream: COMMAND_STREAM, bytes },
                        HostFrameOf::Stderr => HostFrame::StderrCredit { stream: COMMAND_STREAM, bytes },
                    })?;
                }
                Ok(false)
            }
            Err(Errno::EPIPE) => Ok(true),
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(false),
            Err(error) => Err(SessionError::Io { step: "write the command's output", source: error.into() }),
        }
    }
}
