//! The bytes to the peer.

use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use nix::poll::PollFlags;
use vchan::end::{Peer, Want};
use vchan::link::Link;

use crate::Slot;

/// What there is to wait for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Wants {
    /// Bytes to read, or that the peer goes.
    pub bytes: bool,
    /// Room to write.
    pub room: bool,
}

/// A stream of bytes each way, whose calls never block.
pub trait Channel {
    /// Reads what there is; 0: nothing now. An error, [`ErrorKind::UnexpectedEof`] among them, comes when the peer has gone and all is read.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize>;
    /// Writes what fits; 0: nothing now.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize>;
    /// Has the peer tell of what is wanted. `true`: some of it is there, and poll is not to wait.
    fn ask(&self, wants: Wants) -> bool;
    /// What poll waits for.
    fn slot(&self, wants: Wants) -> Slot<'_>;
    /// Takes notice of what poll said of the slot.
    fn hear(&mut self);
    /// Whether the peer is known to have gone, whatever it has left to read.
    fn is_gone(&self) -> bool;
    /// Tells the peer that this end goes. Nothing is read or written afterwards.
    fn hang_up(&mut self);
}

impl<C: Channel + ?Sized> Channel for Box<C> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        (**self).read(buffer)
    }
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        (**self).write(bytes)
    }
    fn ask(&self, wants: Wants) -> bool {
        (**self).ask(wants)
    }
    fn slot(&self, wants: Wants) -> Slot<'_> {
        (**self).slot(wants)
    }
    fn hear(&mut self) {
        (**self).hear();
    }
    fn is_gone(&self) -> bool {
        (**self).is_gone()
    }
    fn hang_up(&mut self) {
        (**self).hang_up();
    }
}

/// A vchan. A server's, too, before its client has come.
impl Channel for Link {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        // Asked first: what it wrote before it went is seen by the read then.
        let gone = self.end.peer() == Peer::Gone;
        match self.end.read(buffer).map_err(io::Error::other)? {
            (0, _) if gone && !buffer.is_empty() => Err(ErrorKind::UnexpectedEof.into()),
            (count, tell) => {
                self.tell(tell);
                Ok(count)
            }
        }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.end.peer() == Peer::Gone {
            return Err(ErrorKind::BrokenPipe.into());
        }
        let (count, tell) = self.end.write(bytes).map_err(io::Error::other)?;
        self.tell(tell);
        Ok(count)
    }

    fn ask(&self, wants: Wants) -> bool {
        // A lie is met by the next read or write.
        let asked = |wanted: bool, want| wanted && self.end.ask(want).unwrap_or(true);
        let [bytes, room] = [asked(wants.bytes, Want::Bytes), asked(wants.room, Want::Room)];
        bytes || room || wants != Wants::default() && self.end.peer() == Peer::Gone
    }

    fn slot(&self, _wants: Wants) -> Slot<'_> {
        Some((self.as_fd(), PollFlags::POLLIN))
    }

    fn hear(&mut self) {
        Link::hear(self);
    }

    fn is_gone(&self) -> bool {
        self.end.peer() == Peer::Gone
    }

    fn hang_up(&mut self) {
        Link::hang_up(self);
    }
}

/// A connected socket that nobody else has.
#[derive(Debug)]
pub struct Socket(UnixStream);

impl Socket {
    /// Takes it over.
    pub fn new(stream: UnixStream) -> io::Result<Socket> {
        stream.set_nonblocking(true)?;
        Ok(Socket(stream))
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Channel for Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.0.read(buffer) {
            Ok(0) if !buffer.is_empty() => Err(ErrorKind::UnexpectedEof.into()),
            other => nothing_now(other),
        }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        nothing_now(self.0.write(bytes))
    }

    fn ask(&self, _wants: Wants) -> bool {
        false
    }

    /// None while nothing is wanted: poll would tell of a hang-up for ever.
    fn slot(&self, wants: Wants) -> Slot<'_> {
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::POLLIN, wants.bytes);
        flags.set(PollFlags::POLLOUT, wants.room);
        (!flags.is_empty()).then(|| (self.0.as_fd(), flags))
    }

    fn hear(&mut self) {}

    /// A socket tells it only behind what is left to read.
    fn is_gone(&self) -> bool {
        false
    }

    fn hang_up(&mut self) {
        // Fails where the peer was first.
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

fn nothing_now(done: io::Result<usize>) -> io::Result<usize> {
    match done {
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(0),
        other => other,
    }
}
