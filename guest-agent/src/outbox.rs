//! What waits to be written to the host.
//!
//! Invariants: whole frames, in order. Output of commands is taken in only while less than [`ROOM`] waits; the host is listened to
//! only while less than [`FULL`] waits, so answers can't pile up without bound either.

use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;
use qrexec::{GuestFrame, RawFrame, PAYLOAD_BYTES_MAX};

/// Bytes beyond which no more output of commands is taken in: two frames keep any port busy.
pub const ROOM: usize = 2 * PAYLOAD_BYTES_MAX;
/// Bytes beyond which the host is not listened to: it sends without ever reading.
pub const FULL: usize = 1 << 20;

/// A bounded queue of bytes.
pub struct Outbox {
    bytes: Vec<u8>,
    written: usize,
    scratch: Vec<u8>,
}

/// What reading a pipe gave.
#[derive(Debug, PartialEq, Eq)]
pub enum Taken {
    /// So many bytes.
    Bytes(usize),
    /// None now, maybe later.
    Nothing,
    /// None ever again.
    Eof,
}

impl Default for Outbox {
    fn default() -> Self {
        Self { bytes: Vec::new(), written: 0, scratch: vec![0; PAYLOAD_BYTES_MAX] }
    }
}

impl Outbox {
    /// Appends a frame.
    pub fn push(&mut self, frame: &GuestFrame) {
        frame.encode(&mut self.bytes);
    }

    /// Bytes that wait.
    pub fn waiting(&self) -> usize {
        self.bytes.len() - self.written
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.written = 0;
    }

    /// Takes everything that waits, for a reader inside the agent.
    pub fn drain(&mut self) -> Vec<u8> {
        let mut bytes = std::mem::take(&mut self.bytes);
        bytes.drain(..std::mem::take(&mut self.written));
        bytes
    }

    /// Reads a pipe once, at most `limit` bytes, and appends what came as one frame.
    pub fn take_from(&mut self, pipe: BorrowedFd<'_>, kind: u16, stream: u32, limit: usize) -> Taken {
        let limit = limit.min(self.scratch.len());
        match nix::unistd::read(pipe.as_raw_fd(), &mut self.scratch[..limit]) {
            Ok(0) => Taken::Eof,
            Ok(count) => {
                self.bytes.extend_from_slice(&RawFrame::header(kind, stream, count));
                self.bytes.extend_from_slice(&self.scratch[..count]);
                Taken::Bytes(count)
            }
            Err(Errno::EAGAIN | Errno::EINTR) => Taken::Nothing,
            Err(_) => Taken::Eof,
        }
    }

    /// Writes as much as the port takes now.
    pub fn flush(&mut self, mut write: impl FnMut(&[u8]) -> io::Result<usize>) -> io::Result<()> {
        while self.waiting() > 0 {
            match write(&self.bytes[self.written..]) {
                Ok(count) => self.written += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        if self.waiting() == 0 {
            self.clear();
        } else if self.written >= ROOM {
            self.bytes.drain(..std::mem::take(&mut self.written));
        }
        Ok(())
    }
}
