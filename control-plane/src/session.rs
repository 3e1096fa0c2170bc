//! A session in a guest, from its holder's point of view: whose streams its main command has, what else wants attention meanwhile,
//! and how it ends. The streams are carried by [`crate::calls`].
//!
//! Invariant: a clone ends with its caller: when its stdout or stderr has no reader any more, and on SIGHUP, SIGINT, SIGTERM.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use engine::agent::AgentError;
use engine::host::{Domain, HostError};
use engine::timeline::Timeline;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use qrexec::Exit;

use crate::agent_link::AgentLink;
use crate::calls::exchange::Hub;

/// How a session ended.
#[derive(Debug)]
pub enum Ending {
    /// The main command ended.
    Exited(Exit),
    /// The caller hung up: nobody reads what the command writes.
    HungUp,
    /// A signal ended it.
    Signal(Signal),
    /// The guest switched itself off.
    PoweredOff,
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

/// What else wants attention while commands run: a domain's own events, or word from whoever keeps the domain.
pub trait Attended {
    /// Readable when [`Attended::attend`] has something to do.
    fn events(&self) -> BorrowedFd<'_>;
    /// Does it. An error means that the clone cannot go on.
    fn attend(&mut self) -> Result<(), HostError>;
    /// Stops the guest's CPUs. One who cannot, refuses.
    fn pause(&mut self) -> Result<(), HostError>;
    /// Lets them run again.
    fn unpause(&mut self) -> Result<(), HostError>;
}

impl Attended for Box<dyn Domain> {
    fn events(&self) -> BorrowedFd<'_> {
        (**self).events()
    }

    fn attend(&mut self) -> Result<(), HostError> {
        self.serve()
    }

    fn pause(&mut self) -> Result<(), HostError> {
        (**self).pause()
    }

    fn unpause(&mut self) -> Result<(), HostError> {
        (**self).run()
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
    Hub::alone().run(link, domain, Some(caller), signals, timeline)
}
