//! What waits between an end and its own descriptors.

use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::poll::PollFlags;

use crate::port::Port;
use crate::{Came, Slot};

/// What came of a poll, and what may still be done with it: a descriptor that has to be polled before each use may be another's twin, so one of
/// them is used once.
pub struct Turn {
    came: Came,
    polled_used: bool,
}

impl Turn {
    /// After a poll.
    pub fn new(came: Came) -> Self {
        Self { came, polled_used: false }
    }

    /// What came at a slot.
    pub fn came(&self, slot: usize) -> PollFlags {
        self.came.get(slot).copied().unwrap_or(PollFlags::empty())
    }

    fn may(&mut self, port: &Port, slot: usize, flags: PollFlags) -> bool {
        let ends = PollFlags::POLLHUP | PollFlags::POLLERR;
        !port.is_polled()
            || self.came(slot).intersects(flags | ends) && !std::mem::replace(&mut self.polled_used, true)
    }
}

/// A descriptor that is read.
pub struct Source {
    port: Option<Port>,
    slot: usize,
    /// It may have more: poll has said so, and the last read gave some.
    flows: bool,
}

/// What a source had.
pub enum Heard {
    Nothing,
    Bytes(usize),
    /// Its end, told once.
    End,
}

impl Source {
    /// Without a descriptor, its end is what it has.
    pub fn new(port: Option<Port>, slot: usize) -> Self {
        Self { flows: port.is_none(), port, slot }
    }

    /// What to wait for, if it is wanted.
    pub fn slot(&self, wanted: bool) -> Slot<'_> {
        let port = self.port.as_ref().filter(|_| wanted)?;
        Some((port.as_fd(), PollFlags::POLLIN))
    }

    pub fn is_open(&self) -> bool {
        self.port.is_some()
    }

    /// Nothing more is read.
    pub fn close(&mut self) {
        self.port = None;
    }

    /// Takes note of what poll said.
    pub fn wake(&mut self, turn: &Turn) {
        self.flows |= !turn.came(self.slot).is_empty();
    }

    /// Whether [`read`](Self::read) is worth the call.
    pub fn flows(&self) -> bool {
        self.flows
    }

    /// Reads once, whether poll said so or not.
    pub fn read(&mut self, buffer: &mut [u8], turn: &mut Turn) -> Heard {
        self.flows = false;
        let Some(port) = &self.port else { return Heard::End };
        if !turn.may(port, self.slot, PollFlags::POLLIN) {
            return Heard::Nothing;
        }
        match port.read(buffer) {
            Ok(count) if count > 0 => {
                self.flows = !port.is_polled();
                Heard::Bytes(count)
            }
            Err(Errno::EAGAIN) => Heard::Nothing,
            Err(Errno::EINTR) => {
                self.flows = true;
                Heard::Nothing
            }
            // Its end; or none that can be read: nohup's write-only /dev/null, a folder, a terminal that is gone.
            Ok(_) | Err(_) => {
                self.port = None;
                Heard::End
            }
        }
    }
}

/// A descriptor that is written.
pub struct Sink {
    port: Option<Port>,
    slot: usize,
    held: Vec<u8>,
    at: usize,
    ended: bool,
    /// There was a reader, and it has gone.
    lost: bool,
}

/// What became of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wrote {
    /// They are written or held.
    On,
    /// Nobody reads them.
    NoReader,
    /// The system's error.
    Failed(Errno),
}

impl Sink {
    /// Without a descriptor, what comes is thrown away.
    pub fn new(port: Option<Port>, slot: usize) -> Self {
        Self { port, slot, held: Vec::new(), at: 0, ended: false, lost: false }
    }

    /// What to wait for. Without anything to write, poll still tells that the reader has gone.
    pub fn slot(&self) -> Slot<'_> {
        let flags = if self.is_drained() { PollFlags::empty() } else { PollFlags::POLLOUT };
        self.port.as_ref().map(|port| (port.as_fd(), flags))
    }

    /// Whether all that came has been written, or never will be.
    pub fn is_drained(&self) -> bool {
        self.held.is_empty()
    }

    /// Takes bytes. Legal while it is drained.
    pub fn take(&mut self, bytes: &[u8], turn: &mut Turn) -> Wrote {
        if self.port.is_none() {
            return if self.lost { Wrote::NoReader } else { Wrote::On };
        }
        self.held.extend_from_slice(bytes);
        self.drain(turn)
    }

    /// No more comes: its reader is told as soon as it has everything.
    pub fn end(&mut self) {
        self.ended = true;
        self.close_if_done();
    }

    /// What it holds and what comes is thrown away.
    pub fn close(&mut self) {
        self.port = None;
        self.forget();
    }

    /// Takes note of what poll said: whether the reader has gone.
    pub fn wake(&mut self, turn: &Turn) -> Wrote {
        if turn.came(self.slot).intersects(PollFlags::POLLERR | PollFlags::POLLHUP | PollFlags::POLLNVAL) {
            let waited = !self.is_drained();
            self.lose();
            return if waited { Wrote::NoReader } else { Wrote::On };
        }
        Wrote::On
    }

    fn lose(&mut self) {
        self.lost |= self.port.is_some();
        self.close();
    }

    /// Writes what it holds.
    pub fn drain(&mut self, turn: &mut Turn) -> Wrote {
        while let Some(port) = self.port.as_ref().filter(|_| !self.held.is_empty()) {
            if !turn.may(port, self.slot, PollFlags::POLLOUT) {
                return Wrote::On;
            }
            match port.write(self.held.get(self.at..).unwrap_or_default()) {
                Ok(count) => self.at += count,
                Err(Errno::EAGAIN) => return Wrote::On,
                Err(Errno::EINTR) => {}
                Err(errno) => {
                    self.lose();
                    let no_reader = matches!(errno, Errno::EPIPE | Errno::ECONNRESET);
                    return if no_reader { Wrote::NoReader } else { Wrote::Failed(errno) };
                }
            }
            if self.at >= self.held.len() {
                self.forget();
            }
        }
        self.close_if_done();
        Wrote::On
    }

    fn forget(&mut self) {
        self.held.clear();
        self.at = 0;
    }

    fn close_if_done(&mut self) {
        if self.ended && self.is_drained() {
            self.port = None;
        }
    }
}
