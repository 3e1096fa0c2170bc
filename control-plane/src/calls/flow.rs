//! The two ways of bytes through a holder, each within its credit window: none of them grows.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};

use call_channel::port::Port;
use nix::errno::Errno;
use nix::poll::PollFlags;
use qrexec::{ProtocolError, ReceiveWindow, SendWindow};

/// How much is read at once: a pipe's worth, a frame's worth.
pub(super) const READ_BYTES: usize = 64 << 10;

/// From a descriptor to the guest.
#[derive(Debug)]
pub(super) struct Input {
    port: Option<Port>,
    window: SendWindow,
}

/// What a descriptor had.
pub(super) enum Heard<'a> {
    Nothing,
    Bytes(&'a [u8]),
    /// Its end, told once.
    End,
}

impl Input {
    /// Without a descriptor, it has ended.
    pub(super) fn new(port: Option<Port>) -> Input {
        Input { port, window: SendWindow::default() }
    }

    /// What to wait for, if there is anything to wait for: at its end a descriptor would be ready for ever.
    pub(super) fn interest(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        let port = self.port.as_ref().filter(|_| self.window.left() > 0)?;
        Some((port.as_fd(), PollFlags::POLLIN))
    }

    pub(super) fn credit(&mut self, bytes: u32) -> Result<(), ProtocolError> {
        self.window.credit(bytes)
    }

    pub(super) fn has_ended(&self) -> bool {
        self.port.is_none()
    }

    /// Nothing more is read. Says whether that is news.
    pub(super) fn close(&mut self) -> bool {
        self.port.take().is_some()
    }

    pub(super) fn read<'a>(&mut self, buffer: &'a mut [u8; READ_BYTES]) -> Heard<'a> {
        let most = self.window.left().min(READ_BYTES);
        let Some(port) = self.port.as_ref().filter(|_| most > 0) else { return Heard::Nothing };
        match port.read(&mut buffer[..most]) {
            Ok(count) if count > 0 => {
                self.window.sent(count);
                Heard::Bytes(&buffer[..count])
            }
            Err(Errno::EAGAIN | Errno::EINTR) => Heard::Nothing,
            // Its end; or none that can be read: nohup's write-only /dev/null, a folder, a terminal that is gone.
            Ok(_) | Err(_) => {
                self.port = None;
                Heard::End
            }
        }
    }
}

/// From the guest to a descriptor. Holds no more than its window.
#[derive(Debug)]
pub(super) struct Output {
    port: Option<Port>,
    window: ReceiveWindow,
    pending: VecDeque<u8>,
    /// Nothing more comes from the guest.
    ended: bool,
    /// The port was told so, and takes its time.
    finishing: bool,
}

/// What became of a write.
pub(super) enum Wrote {
    /// So much credit is due, if any.
    On(Option<u32>),
    /// Nobody reads it any more.
    NoReader,
    /// The system's error.
    Failed(Errno),
}

impl Output {
    /// Without a descriptor, what comes is thrown away.
    pub(super) fn new(port: Option<Port>) -> Output {
        Output {
            port,
            window: ReceiveWindow::default(),
            pending: VecDeque::new(),
            ended: false,
            finishing: false,
        }
    }

    /// Takes bytes from the guest. Answers the credit that is due at once, which is where nobody reads them.
    pub(super) fn receive(&mut self, bytes: Vec<u8>) -> Result<Option<u32>, ProtocolError> {
        self.window.received(bytes.len())?;
        if self.port.is_none() {
            return Ok(self.window.consumed(bytes.len()));
        }
        self.pending.extend(bytes);
        Ok(None)
    }

    /// No more comes: its reader is told as soon as it has everything.
    pub(super) fn end(&mut self) {
        self.ended = true;
        self.close_if_done();
    }

    /// Whether the reader has all that came.
    pub(super) fn is_done(&self) -> bool {
        self.pending.is_empty() && !self.finishing
    }

    /// Whether what comes goes anywhere.
    pub(super) fn has_reader(&self) -> bool {
        self.port.is_some()
    }

    /// What comes from now on is thrown away. Answers the credit that is due for what waited.
    pub(super) fn close(&mut self) -> Option<u32> {
        (self.port, self.finishing) = (None, false);
        let waited = std::mem::take(&mut self.pending).len();
        self.window.consumed(waited)
    }

    /// Without anything to write, poll still tells that the reader has gone.
    pub(super) fn interest(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        let flags = if self.pending.is_empty() { PollFlags::empty() } else { PollFlags::POLLOUT };
        self.port.as_ref().map(|port| (port.as_fd(), flags))
    }

    /// Writes what the descriptor takes now. `polled_used` is whether one that has to be polled before each use has been used since the
    /// last poll.
    pub(super) fn write(&mut self, ready: PollFlags, polled_used: &mut bool) -> Wrote {
        let Some(port) = &self.port else { return Wrote::On(None) };
        if ready.intersects(PollFlags::POLLERR | PollFlags::POLLHUP | PollFlags::POLLNVAL) {
            return self.hang_up();
        }
        if !ready.contains(PollFlags::POLLOUT) || self.pending.is_empty() {
            return Wrote::On(None);
        }
        if port.is_polled() && std::mem::replace(polled_used, true) {
            return Wrote::On(None);
        }
        let (front, _) = self.pending.as_slices();
        match port.write(front) {
            Ok(count) => {
                self.pending.drain(..count);
                self.close_if_done();
                Wrote::On(self.window.consumed(count))
            }
            Err(Errno::EPIPE | Errno::ECONNRESET) => self.hang_up(),
            Err(Errno::EAGAIN | Errno::EINTR) => Wrote::On(None),
            Err(error) => Wrote::Failed(error),
        }
    }

    /// The port takes no more: of a file that is told, it is the end.
    fn hang_up(&mut self) -> Wrote {
        match self.port.as_ref().and_then(Port::failure) {
            Some(error) => Wrote::Failed(error),
            None if self.finishing => {
                (self.port, self.finishing) = (None, false);
                Wrote::On(None)
            }
            None => Wrote::NoReader,
        }
    }

    fn close_if_done(&mut self) {
        if self.ended && self.pending.is_empty() && !self.finishing {
            self.finishing = self.port.as_ref().is_some_and(Port::finish);
            if !self.finishing {
                self.port = None;
            }
        }
    }
}
