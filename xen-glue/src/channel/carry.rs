//! Bytes between a link and a socket, both ways.
//!
//! Invariants: bytes are taken from the socket only as far as the ring has room, and from the ring only when all that was taken before is in the
//! socket. So a side that does not read stops the other, and no more than [`PIECE_BYTES`] are ever held here.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;

use vchan::counters::Lie;
use vchan::end::{Peer, Want};
use vchan::link::Link;

/// The most that is taken at once: the guest's whole ring.
const PIECE_BYTES: usize = 64 << 10;

/// What there is left to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Going {
    /// More may come.
    On,
    /// This machine's side has hung up, and all it said is in the ring.
    HostGone,
    /// The guest has hung up or lies, and all it said is in the socket.
    GuestGone,
}

/// What has to happen before more can be carried.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Waits {
    /// For bytes in the socket.
    pub socket_bytes: bool,
    /// For room in the socket.
    pub socket_room: bool,
    /// For nothing: there is more to carry at once.
    pub nothing: bool,
}

/// A link and a socket.
pub struct Carrier {
    stream: UnixStream,
    piece: Vec<u8>,
    held: std::ops::Range<usize>,
    /// The socket gave nothing when it was last asked.
    silent: bool,
}

impl Carrier {
    pub fn new(stream: UnixStream) -> Carrier {
        Carrier { stream, piece: vec![0; PIECE_BYTES], held: 0..0, silent: false }
    }

    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Carries what can be carried now.
    pub fn carry(&mut self, link: &mut Link) -> Going {
        match self.feed_socket(link).and_then(|going| Ok((going, self.feed_ring(link)?))) {
            Ok((Going::On, going)) => going,
            Ok((going, _)) => going,
            Err(lie) => {
                tracing::warn!(%lie, "the guest's channel is given up");
                Going::GuestGone
            }
        }
    }

    /// Whether nothing is on its way to this machine's side, and it has said nothing that is not in the ring.
    pub fn is_quiet(&self, link: &Link) -> bool {
        self.silent && self.held.is_empty() && link.end.readable().map_or(true, |count| count == 0)
    }

    /// What has to be waited for; the guest is asked to tell where it is about the ring.
    pub fn waits(&self, link: &Link) -> Waits {
        // A lie is met when something is carried.
        let bytes = self.held.is_empty() && link.end.ask(Want::Bytes).unwrap_or(true);
        let room = link.end.ask(Want::Room).unwrap_or(true);
        let gone = self.held.is_empty() && link.end.peer() == Peer::Gone;
        Waits { socket_bytes: room, socket_room: !self.held.is_empty(), nothing: bytes || gone }
    }

    fn feed_socket(&mut self, link: &mut Link) -> Result<Going, Lie> {
        loop {
            while !self.held.is_empty() {
                match self.stream.write(&self.piece[self.held.clone()]) {
                    Ok(count) => self.held.start += count,
                    Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(Going::On),
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(_) => return Ok(Going::HostGone),
                }
            }
            // Asked first: what it wrote before it went is seen by the read then.
            let gone = link.end.peer() == Peer::Gone;
            let (count, tell) = link.end.read(&mut self.piece)?;
            link.tell(tell);
            self.held = 0..count;
            match (count, gone) {
                (0, true) => return Ok(Going::GuestGone),
                (0, false) => return Ok(Going::On),
                _ => {}
            }
        }
    }

    /// Through a buffer of its own: `piece` may hold bytes for the socket.
    fn feed_ring(&mut self, link: &mut Link) -> Result<Going, Lie> {
        let mut buffer = [0; 16 << 10];
        loop {
            let room = link.end.writable()?.min(buffer.len());
            if room == 0 {
                self.silent = false;
                return Ok(Going::On);
            }
            match self.stream.read(&mut buffer[..room]) {
                Ok(0) => return Ok(Going::HostGone),
                Ok(count) => {
                    // The room only grows: the guest can take it back by a lie alone, which is met here.
                    let (written, tell) = link.end.write(&buffer[..count])?;
                    link.tell(tell);
                    if written < count {
                        return Ok(Going::GuestGone);
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.silent = true;
                    return Ok(Going::On);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return Ok(Going::HostGone),
            }
        }
    }
}
