//! What waits to be written to the host.
//!
//! Invariants: whole frames, in order. Output of commands is taken in only while less than [`ROOM`] waits, and then at most [`TAKEN_MAX`]; the host
//! is listened to only while less than [`FULL`] waits, so answers can't pile up without bound either.

use std::io::{self, ErrorKind, IoSliceMut};
use std::os::fd::BorrowedFd;

use nix::errno::Errno;
use nix::sys::uio::readv;
use qrexec::{GuestFrame, RawFrame, HEADER_BYTES, PAYLOAD_BYTES_MAX};

/// Bytes beyond which no more output of commands is taken in: with what one of them gives at once, enough to keep any port busy.
pub const ROOM: usize = 2 * PAYLOAD_BYTES_MAX;
/// Bytes taken from a pipe at once: whoever fills it then has room for as much, and is woken up for it once.
const TAKEN_MAX: usize = 4 * PAYLOAD_BYTES_MAX;
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
        let bytes = vec![0; ROOM + TAKEN_MAX + 5 * HEADER_BYTES];
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

    /// Reads a pipe once, at most `limit` bytes, and appends what came, in as many frames as it fills.
    pub fn take_from(&mut self, pipe: BorrowedFd<'_>, kind: u16, stream: u32, limit: usize) -> Taken {
        let mut limit = limit.min(TAKEN_MAX);
        self.make_room(self.end + limit + limit.div_ceil(PAYLOAD_BYTES_MAX) * HEADER_BYTES);
        let frames = self.bytes[self.end..].chunks_mut(HEADER_BYTES + PAYLOAD_BYTES_MAX);
        let mut payloads: Vec<_> = frames.map_while(|frame| payload_of(frame, &mut limit)).collect();
        match readv(pipe, &mut payloads) {
            Ok(0) if payloads.is_empty() => Taken::Nothing,
            Ok(0) => Taken::Eof,
            Ok(count) => {
                self.frame(kind, stream, count);
                Taken::Bytes(count)
            }
            Err(Errno::EAGAIN | Errno::EINTR) => Taken::Nothing,
            Err(_) => Taken::Eof,
        }
    }

    /// Writes the headers of payloads that are in their places already.
    fn frame(&mut self, kind: u16, stream: u32, mut count: usize) {
        while count > 0 {
            let length = count.min(PAYLOAD_BYTES_MAX);
            let payload = self.end + HEADER_BYTES;
            self.bytes[self.end..payload].copy_from_slice(&RawFrame::header(kind, stream, length));
            self.end = payload + length;
            count -= length;
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

/// Where a frame's payload goes, as much of it as `left` allows.
fn payload_of<'a>(frame: &'a mut [u8], left: &mut usize) -> Option<IoSliceMut<'a>> {
    let payload = frame.get_mut(HEADER_BYTES..).filter(|_| *left > 0)?;
    let length = payload.len().min(*left);
    *left -= length;
    Some(IoSliceMut::new(&mut payload[..length]))
}
