//! Signals while a qube starts: nobody is at a poll loop yet, and a boot takes long. One that comes ends the process at once, and with it
//! the guest and all there is of it.
//!
//! They are blocked from the beginning, in every thread that is started meanwhile: later on they are the poll loop's alone.

use std::io::{self, PipeWriter};
use std::os::fd::AsFd;
use std::thread::JoinHandle;

use nix::poll::{poll, PollFd, PollFlags, PollTimeout};

use crate::session::Signals;

/// See the module.
pub(super) struct Impatient {
    /// Dropped, it ends the thread.
    started: PipeWriter,
    thread: JoinHandle<Signals>,
}

impl Impatient {
    /// Blocks signals, and heeds them from now on. Call before other threads are started.
    pub(super) fn begin() -> io::Result<Impatient> {
        let mut signals = Signals::block()?;
        let (until, started) = io::pipe()?;
        let watch = move || loop {
            let mut fds = [
                PollFd::new(signals.as_fd(), PollFlags::POLLIN),
                PollFd::new(until.as_fd(), PollFlags::POLLIN),
            ];
            let _ = poll(&mut fds, PollTimeout::NONE);
            let is_over = fds[1].revents().is_some_and(|flags| !flags.is_empty());
            match signals.pending() {
                Some(signal) => std::process::exit(128 + signal as i32),
                None if is_over => return signals,
                None => {}
            }
        };
        let thread = std::thread::Builder::new().name("impatient".to_owned()).spawn(watch)?;
        Ok(Impatient { started, thread })
    }

    /// The signals, for who listens to them from now on.
    pub(super) fn end(self) -> io::Result<Signals> {
        drop(self.started);
        self.thread.join().map_err(|_| io::Error::other("the thread that heeds signals has panicked"))
    }
}
