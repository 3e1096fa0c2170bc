//! What one turn of a holder's loop waits for: descriptors, each with what it is, and a moment.

use std::os::fd::BorrowedFd;
use std::time::Instant;

use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};

/// See the module.
pub(super) struct Watch<'a, S> {
    fds: Vec<PollFd<'a>>,
    sources: Vec<S>,
    until: Option<Instant>,
}

impl<'a, S> Watch<'a, S> {
    pub(super) fn new() -> Watch<'a, S> {
        Watch { fds: Vec::with_capacity(16), sources: Vec::with_capacity(16), until: None }
    }

    pub(super) fn add(&mut self, source: S, fd: BorrowedFd<'a>, flags: PollFlags) {
        self.fds.push(PollFd::new(fd, flags));
        self.sources.push(source);
    }

    /// Waits no longer than until then.
    pub(super) fn until(&mut self, moment: Instant) {
        self.until = Some(self.until.map_or(moment, |until| until.min(moment)));
    }

    /// Waits; what is ready, in the order in which it was added.
    pub(super) fn wait(mut self) -> Result<Vec<(S, PollFlags)>, Errno> {
        let timeout = match self.until {
            None => PollTimeout::NONE,
            Some(until) => {
                let left = until.saturating_duration_since(Instant::now());
                PollTimeout::try_from(left.as_micros().div_ceil(1000)).unwrap_or(PollTimeout::MAX)
            }
        };
        match poll(&mut self.fds, timeout) {
            Ok(_) => {}
            Err(Errno::EINTR) => return Ok(Vec::new()),
            Err(error) => return Err(error),
        }
        let flags = self.fds.iter().map(|fd| fd.revents().unwrap_or(PollFlags::empty()));
        Ok(self.sources.into_iter().zip(flags).filter(|(_, flags)| !flags.is_empty()).collect())
    }
}
