//! The end that asked for the call: what it reads is the service's input, what the service says is written here.
//!
//! Invariants:
//! - The exit code counts once all that came before it is with its reader.
//! - Nothing is read from the channel while something waits for a reader, as in libqrexec: there is one piece at a time.
//! - A reader that has gone is told to the service, where libqrexec throws its output away and waits: once more comes for it, the call is over with
//!   the status of who died of SIGPIPE, and hanging up closes the service's pipe.

use nix::poll::PollFlags;
use qrexec::stock::{ClientEnd, FromService, Version, WireError};

use crate::channel::Channel;
use crate::flow::{Heard, Sink, Source, Turn, Wrote};
use crate::wire::Wire;
use crate::{Broken, Came, Slot, Streams, PIECE_BYTES, ROUNDS, SLOTS};

/// 128 + SIGPIPE.
const EXIT_UNREAD: i32 = 141;

/// See the module.
pub struct Client<C: Channel> {
    wire: Wire<C>,
    end: ClientEnd,
    stdin: Source,
    stdout: Sink,
    stderr: Sink,
    piece: Vec<u8>,
    agreed: bool,
    exit: Option<i32>,
}

impl<C: Channel> Client<C> {
    /// Begins to speak.
    pub fn new(channel: C, streams: Streams) -> Self {
        let mut hello = Vec::new();
        let end = ClientEnd::new(Version::NEWEST, &mut hello);
        Self {
            wire: Wire::new(channel, hello),
            end,
            stdin: Source::new(streams.stdin, 1),
            stdout: Sink::new(streams.stdout, 2),
            stderr: Sink::new(streams.stderr, 3),
            piece: vec![0; PIECE_BYTES],
            agreed: false,
            exit: None,
        }
    }

    /// Whether the peer has said its Hello.
    pub fn has_agreed(&self) -> bool {
        self.agreed
    }

    /// Forgets the channel without touching it, for one that a suspend of this domain has ended (`vchan::link::Link::abandon` says why). What it
    /// was mapped in stays until the process ends.
    pub fn abandon(self) {
        std::mem::forget(self.wire);
    }

    /// What to wait for.
    pub fn slots(&self) -> [Slot<'_>; SLOTS] {
        let channel = self.wire.channel().slot(self.wire.wants(self.listens()));
        [channel, self.stdin.slot(self.takes_stdin()), self.stdout.slot(), self.stderr.slot()]
    }

    /// Whether there is something to do already; has the peer tell when there is, if not. Legal just before poll.
    pub fn is_ready(&self) -> bool {
        let stdin = self.takes_stdin() && self.stdin.flows();
        let unread = self.listens() && self.wire.has_unread();
        stdin || unread || self.wire.channel().ask(self.wire.wants(self.listens()))
    }

    /// Does what can be done, after a poll or before the first. `Some`: the service's exit code, and the call is over.
    pub fn turn(&mut self, came: Came) -> Result<Option<i32>, Broken> {
        let mut turn = Turn::new(came);
        if turn.came(0) != PollFlags::empty() {
            self.wire.channel_mut().hear();
        }
        self.stdin.wake(&turn);
        self.stderr.wake(&turn);
        if self.stdout.wake(&turn) == Wrote::NoReader {
            return Ok(Some(EXIT_UNREAD));
        }
        for _ in 0..ROUNDS {
            if !self.round(&mut turn)? {
                break;
            }
        }
        Ok(self.exit.filter(|_| self.stdout.is_drained() && self.stderr.is_drained()))
    }

    fn listens(&self) -> bool {
        self.exit.is_none() && self.stdout.is_drained() && self.stderr.is_drained()
    }

    fn takes_stdin(&self) -> bool {
        self.end.takes_stdin() && self.wire.takes_more()
    }

    /// One piece each way. `false`: nothing moved.
    fn round(&mut self, turn: &mut Turn) -> Result<bool, Broken> {
        let flushed = self.wire.flush();
        let drained = (self.stdout.drain(turn), self.stderr.drain(turn));
        self.check(drained.0)?;
        let heard = self.listens() && self.hear(turn)?;
        let spoken = self.takes_stdin() && self.stdin.flows() && self.speak(turn)?;
        Ok(flushed || heard || spoken)
    }

    fn hear(&mut self, turn: &mut Turn) -> Result<bool, Broken> {
        let Self { wire, end, stdin, stdout, stderr, .. } = self;
        let bytes = wire.hear().map_err(Broken::Gone)?;
        let mut input = bytes;
        let mut wrote = Wrote::On;
        while stdout.is_drained() && stderr.is_drained() && wrote == Wrote::On {
            match end.receive(&mut input)? {
                None => break,
                Some(FromService::Agreed(_)) => self.agreed = true,
                Some(FromService::Stdout(bytes)) => wrote = stdout.take(bytes, turn),
                // Its reader is nobody's concern, as in libqrexec.
                Some(FromService::Stderr(bytes)) => drop(stderr.take(bytes, turn)),
                Some(FromService::StdoutEof) => stdout.end(),
                Some(FromService::StderrEof) => stderr.end(),
                Some(FromService::Exit(code)) => {
                    self.exit = Some(code);
                    stdin.close();
                }
            }
        }
        let count = bytes.len() - input.len();
        wire.consume(count);
        self.check(wrote)?;
        Ok(count > 0)
    }

    fn check(&mut self, wrote: Wrote) -> Result<(), Broken> {
        match wrote {
            Wrote::On => Ok(()),
            Wrote::NoReader => {
                self.exit = Some(EXIT_UNREAD);
                Ok(())
            }
            Wrote::Failed(errno) => Err(Broken::Output { stream: "stdout", source: errno.into() }),
        }
    }

    fn speak(&mut self, turn: &mut Turn) -> Result<bool, WireError> {
        match self.stdin.read(&mut self.piece, turn) {
            Heard::Nothing => return Ok(false),
            Heard::Bytes(count) => {
                let bytes = self.piece.get(..count).unwrap_or_default();
                self.end.stdin(bytes, self.wire.out())?;
            }
            Heard::End => self.end.stdin_eof(self.wire.out())?,
        }
        self.wire.flush();
        Ok(true)
    }
}
