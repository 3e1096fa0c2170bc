//! The end where the call is answered: what comes is written to a program, what the program says goes back, and how it ends.
//!
//! Invariants:
//! - No program is there before the peer's Hello ([`Step::Agreed`]): one whose version we don't speak has none started.
//! - The exit code is the last, after both ends of output. Output ends with EOF, or, when a background process keeps a pipe open, once the
//!   program has ended and its pipes have been idle for [`LINGER`]: as sshd does, so that `daemon &` ends.
//! - A peer that goes before that breaks the call, whatever it has left to read.

use std::io::ErrorKind;
use std::time::{Duration, Instant};

use nix::poll::PollFlags;
use qrexec::stock::{FromClient, ServiceEnd, Version, WireError};

use crate::channel::Channel;
use crate::flow::{Heard, Sink, Source, Turn};
use crate::wire::Wire;
use crate::{Broken, Came, Slot, Streams, PIECE_BYTES, ROUNDS, SLOTS};

/// How long an ended program's idle pipes are kept for the processes it left behind.
const LINGER: Duration = Duration::from_millis(100);

/// See the module.
pub struct Service<C: Channel> {
    wire: Wire<C>,
    end: ServiceEnd,
    state: State,
    stdin: Sink,
    stdout: Source,
    stderr: Source,
    /// Which of both outputs is read first: one that floods leaves the other its turn.
    stderr_first: bool,
    piece: Vec<u8>,
    exit: Option<i32>,
    last_activity: Instant,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The peer has said nothing.
    Fresh,
    /// It may be answered.
    Agreed,
    /// A program runs, or ran.
    Begun,
}

/// How far a call is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// It goes on.
    On,
    /// The peer has said its Hello: what it asks for is to [begin](Service::begin), or to [end](Service::end). Told once.
    Agreed,
    /// The exit code is in the channel: it is over.
    Over,
}

impl<C: Channel> Service<C> {
    /// Begins to speak.
    pub fn new(channel: C) -> Self {
        let mut hello = Vec::new();
        let end = ServiceEnd::new(Version::NEWEST, &mut hello);
        Self {
            wire: Wire::new(channel, hello),
            end,
            state: State::Fresh,
            stdin: Sink::new(None, 1),
            stdout: Source::new(None, 2),
            stderr: Source::new(None, 3),
            stderr_first: false,
            piece: vec![0; PIECE_BYTES],
            exit: None,
            last_activity: Instant::now(),
        }
    }

    /// Whether the peer has said its Hello.
    pub fn has_agreed(&self) -> bool {
        self.state != State::Fresh
    }

    /// Forgets the channel without touching it, for one that a suspend of this domain has ended (`vchan::link::Link::abandon` says why). What it
    /// was mapped in stays until the process ends.
    pub fn abandon(self) {
        std::mem::forget(self.wire);
    }

    /// A program runs, with these at the other ends of its pipes. Legal once, after [`Step::Agreed`].
    pub fn begin(&mut self, streams: Streams) {
        self.state = State::Begun;
        self.stdin = Sink::new(streams.stdin, 1);
        self.stdout = Source::new(streams.stdout, 2);
        self.stderr = Source::new(streams.stderr, 3);
    }

    /// The program has ended with this status, or never began. Its pipes may still have something.
    pub fn end(&mut self, status: i32) {
        self.state = State::Begun;
        self.exit.get_or_insert(status);
        self.stdin.close();
        self.last_activity = Instant::now();
    }

    /// What to wait for.
    pub fn slots(&self) -> [Slot<'_>; SLOTS] {
        let channel = self.wire.channel().slot(self.wire.wants(self.listens()));
        let wanted = self.speaks();
        [channel, self.stdin.slot(), self.stdout.slot(wanted), self.stderr.slot(wanted)]
    }

    /// Whether there is something to do already; has the peer tell when there is, if not. Legal just before poll.
    pub fn is_ready(&self) -> bool {
        let output = self.speaks() && (self.stdout.flows() || self.stderr.flows());
        let unread = self.listens() && self.wire.has_unread();
        let over = self.exit.is_some() && !self.has_output();
        output
            || unread
            || over && self.wire.is_flushed()
            || self.wire.channel().ask(self.wire.wants(self.listens()))
    }

    /// When to look again even if nothing happens.
    pub fn deadline(&self) -> Option<Instant> {
        self.lingers().then(|| self.last_activity + LINGER)
    }

    /// Does what can be done, after a poll or before the first.
    pub fn turn(&mut self, came: Came) -> Result<Step, Broken> {
        let mut turn = Turn::new(came);
        if turn.came(0) != PollFlags::empty() {
            self.wire.channel_mut().hear();
        }
        self.stdin.wake(&turn);
        self.stdout.wake(&turn);
        self.stderr.wake(&turn);
        for _ in 0..ROUNDS {
            let before = self.state;
            let moved = self.round(&mut turn)?;
            if before != self.state {
                return Ok(Step::Agreed);
            }
            if self.end.finished() {
                break;
            }
            if !moved {
                break;
            }
        }
        match self.end.finished() && self.wire.is_flushed() {
            true => Ok(Step::Over),
            false if self.state == State::Begun && self.wire.is_gone() => {
                Err(Broken::Gone(ErrorKind::UnexpectedEof.into()))
            }
            false => Ok(Step::On),
        }
    }

    /// A program's end is not news for a peer that has still to say its Hello, or that waits for the program.
    fn listens(&self) -> bool {
        self.state != State::Agreed && self.stdin.is_drained() && !self.end.finished()
    }

    fn speaks(&self) -> bool {
        self.state == State::Begun && self.wire.takes_more()
    }

    fn has_output(&self) -> bool {
        self.stdout.is_open() || self.stderr.is_open()
    }

    /// One piece each way. `false`: nothing moved.
    fn round(&mut self, turn: &mut Turn) -> Result<bool, Broken> {
        let flushed = self.wire.flush();
        // That nobody reads it is no concern of the client's, as in libqrexec.
        let _ = self.stdin.drain(turn);
        let heard = self.listens() && self.hear(turn)?;
        self.stderr_first = !self.stderr_first;
        let first = self.speak(self.stderr_first, turn)?;
        let second = self.speak(!self.stderr_first, turn)?;
        if first || second {
            self.last_activity = Instant::now();
        }
        if self.deadline().is_some_and(|deadline| Instant::now() >= deadline) {
            self.stop_lingering(turn)?;
        }
        self.finish()?;
        Ok(flushed || heard || first || second)
    }

    fn hear(&mut self, turn: &mut Turn) -> Result<bool, Broken> {
        let Self { wire, end, stdin, state, .. } = self;
        let bytes = wire.hear().map_err(Broken::Gone)?;
        let mut input = bytes;
        while stdin.is_drained() && *state != State::Agreed {
            match end.receive(&mut input)? {
                None => break,
                Some(FromClient::Agreed(_)) => *state = State::Agreed,
                Some(FromClient::Stdin(bytes)) => drop(stdin.take(bytes, turn)),
                Some(FromClient::StdinEof) => stdin.end(),
            }
        }
        let count = bytes.len() - input.len();
        wire.consume(count);
        Ok(count > 0)
    }

    /// Takes a piece of one output, if it has any. `true`: something came.
    fn speak(&mut self, stderr: bool, turn: &mut Turn) -> Result<bool, WireError> {
        let source = if stderr { &mut self.stderr } else { &mut self.stdout };
        if self.state != State::Begun || !self.wire.takes_more() || !source.is_open() || !source.flows() {
            return Ok(false);
        }
        self.pump(stderr, turn)
    }

    fn pump(&mut self, stderr: bool, turn: &mut Turn) -> Result<bool, WireError> {
        let Self { wire, end, piece, .. } = self;
        let source = if stderr { &mut self.stderr } else { &mut self.stdout };
        let (bytes, ended) = match source.read(piece, turn) {
            Heard::Nothing => return Ok(false),
            Heard::Bytes(count) => (piece.get(..count).unwrap_or_default(), false),
            Heard::End => (&[][..], true),
        };
        match (stderr, ended) {
            (false, false) => end.stdout(bytes, wire.out())?,
            (false, true) => end.stdout_eof(wire.out())?,
            (true, false) => end.stderr(bytes, wire.out())?,
            (true, true) => end.stderr_eof(wire.out())?,
        }
        wire.flush();
        Ok(true)
    }

    /// It has ended, and whatever keeps its pipes open may write more: the peer takes it.
    fn lingers(&self) -> bool {
        self.exit.is_some() && self.has_output() && self.wire.takes_more()
    }

    /// Closes pipes that are idle indeed: they could be read, and gave nothing.
    fn stop_lingering(&mut self, turn: &mut Turn) -> Result<(), WireError> {
        self.last_activity = Instant::now();
        for stderr in [false, true] {
            let source = if stderr { &self.stderr } else { &self.stdout };
            if !self.wire.takes_more() || source.is_open() && self.pump(stderr, turn)? {
                return Ok(());
            }
        }
        self.stdout.close();
        self.stderr.close();
        Ok(())
    }

    /// Says the exit code, and the ends of output that are missing, once nothing more can come.
    fn finish(&mut self) -> Result<(), WireError> {
        let Some(status) = self.exit.filter(|_| !self.has_output() && !self.end.finished()) else {
            return Ok(());
        };
        self.end.exit(status, self.wire.out())?;
        self.wire.flush();
        Ok(())
    }
}
