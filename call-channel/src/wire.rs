//! What waits between an end and its channel: one piece that came, and what is to go.

use std::io;

use crate::channel::{Channel, Wants};
use crate::PIECE_BYTES;

/// A channel and what waits at it. Dropping it hangs up.
pub struct Wire<C: Channel> {
    channel: C,
    piece: Vec<u8>,
    /// Where in the piece the bytes are that have not been looked at.
    unread: std::ops::Range<usize>,
    out: Vec<u8>,
    written: usize,
    /// Nothing more can go.
    mute: bool,
}

impl<C: Channel> Wire<C> {
    /// `out` goes first.
    pub fn new(channel: C, out: Vec<u8>) -> Self {
        Self { channel, piece: vec![0; PIECE_BYTES], unread: 0..0, out, written: 0, mute: false }
    }

    /// Writes what the channel takes. `true`: some went.
    pub fn flush(&mut self) -> bool {
        let before = self.written;
        while let Some(rest) = self.out.get(self.written..).filter(|rest| !rest.is_empty()) {
            match self.channel.write(rest) {
                Ok(0) => return self.written > before,
                Ok(count) => self.written += count,
                // What it said before it went is still to be read, and reading tells how it went.
                Err(_) => self.mute = true,
            }
            if self.mute {
                break;
            }
        }
        let some = self.written > before;
        self.out.clear();
        self.written = 0;
        some
    }

    /// Whether all that was to go is with the channel, or will never be.
    pub fn is_flushed(&self) -> bool {
        self.out.is_empty()
    }

    /// Whether more may be put into [`out`](Self::out): what was there has gone, and the peer may hear it.
    pub fn takes_more(&self) -> bool {
        self.is_flushed() && !self.mute
    }

    /// Whether the peer has gone, as far as that can be told without reading.
    pub fn is_gone(&self) -> bool {
        self.mute || self.channel.is_gone()
    }

    /// Where to append what is to go.
    pub fn out(&mut self) -> &mut Vec<u8> {
        &mut self.out
    }

    /// The bytes to look at; reads more where there are none. Empty: there is nothing now.
    pub fn hear(&mut self) -> io::Result<&[u8]> {
        if self.unread.is_empty() {
            let count = self.channel.read(&mut self.piece)?;
            self.unread = 0..count;
        }
        Ok(self.piece.get(self.unread.clone()).unwrap_or_default())
    }

    /// Whether there are bytes that nobody has looked at.
    pub fn has_unread(&self) -> bool {
        !self.unread.is_empty()
    }

    /// Takes note that so many of them have been looked at.
    pub fn consume(&mut self, count: usize) {
        self.unread.start = (self.unread.start + count).min(self.unread.end);
    }

    /// What to wait for; `listens`: bytes that come are of use.
    pub fn wants(&self, listens: bool) -> Wants {
        Wants { bytes: listens, room: !self.is_flushed() }
    }

    /// The channel.
    pub fn channel(&self) -> &C {
        &self.channel
    }

    /// The channel, to tell it what poll said.
    pub fn channel_mut(&mut self) -> &mut C {
        &mut self.channel
    }
}

impl<C: Channel> Drop for Wire<C> {
    fn drop(&mut self) {
        self.channel.hang_up();
    }
}
