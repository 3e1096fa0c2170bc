//! What waits to be written to the host.
//!
//! Invariants: whole frames, in order. Output of commands is taken in only while less than [`ROOM`] waits; the host is listened to
//! only while less than [`FULL`] waits, so answers can't pile up without bound either.

use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;
use qrexec::{GuestFrame, RawFrame, HEADER_BYTES, PAYLOAD_BYTES_MAX};

/// Bytes beyond which no more output of commands is taken in: two frames keep any port busy.
pub const ROOM: usize = 2 * PAYLOAD_BYTES_MAX;
/// Bytes beyond which the host is not listened to: it sends without ever reading.
pub const FULL: usize = 1 << 20;

/// A bounded queue of bytes.
pub struct Outbox {
    /// Longer than what waits, so that a pipe can be read right into it; never shortened, for making it longer again would zero it.
    bytes: Vec<u8>,
    written: usize,
    /// What waits ends there.
    end: usize,
    frame: Vec<u8>,
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
        let bytes = vec![0; ROOM + HEADER_BYTES + PAYLOAD_BYTES_MAX];
        Self { bytes, written: 0, end: 0, frame: Vec::new() }
    }
}

impl Outbox {
    /// Appends a frame.
    pub fn push(&mut self, frame: &GuestFrame) {
        self.frame.clear();
        frame.encode(&mut self.frame);
        let end = self.end + self.frame.len();
        self.make_room(end);
        self.bytes[self.end..end].copy_from_slice(&self.frame);
        self.end = end;
    }

    /// Bytes that wait.
    pub fn waiting(&self) -> usize {
        self.end - self.written
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        (self.written, self.end) = (0, 0);
    }

    /// Takes everything that waits, for a reader inside the agent.
    pub fn drain(&mut self) -> Vec<u8> {
        let bytes = self.bytes[self.written..self.end].to_vec();
        self.clear();
        bytes
    }

    /// Reads a pipe once, at most `limit` bytes, and appends what came as one frame.
    pub fn take_from(&mut self, pipe: BorrowedFd<'_>, kind: u16, stream: u32, limit: usize) -> Taken {
        let limit = limit.min(PAYLOAD_BYTES_MAX);
        let payload = self.end + HEADER_BYTES;
        self.make_room(payload + limit);
        match nix::unistd::read(pipe.as_raw_fd(), &mut self.bytes[payload..payload + limit]) {
            Ok(0) => Taken::Eof,
            Ok(count) => {
                self.bytes[self.end..payload].copy_from_slice(&RawFrame::header(kind, stream, count));
                self.end = payload + count;
                Taken::Bytes(count)
            }
            Err(Errno::EAGAIN | Errno::EINTR) => Taken::Nothing,
            Err(_) => Taken::Eof,
        }
    }

    fn make_room(&mut self, end: usize) {
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
    }

    /// Writes as much as the port takes now.
    pub fn flush(&mut self, mut write: impl FnMut(&[u8]) -> io::Result<usize>) -> io::Result<()> {
        while self.waiting() > 0 {
            match write(&self.bytes[self.written..self.end]) {
                Ok(count) => self.written += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        if self.waiting() == 0 {
            self.clear();
        } else if self.written >= ROOM {
            self.bytes.copy_within(self.written..self.end, 0);
            (self.written, self.end) = (0, self.waiting());
        }
        Ok(())
    }
}
