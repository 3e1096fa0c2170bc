//! The two ways bytes go between the host and a pipe, within their windows: what commands and calls have in common.
//!
//! Invariants:
//! - Nothing here blocks.
//! - A pipe is read only with credit from the host and room in the outbox: a stalled reader stalls the writer, nothing else.
//! - What waits for a pipe is within the window granted to the host. A pipe that nobody reads any more has the rest dropped and credited.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{fcntl, FcntlArg, OFlag};
use nix::unistd::pipe2;
use qrexec::{ProtocolError, ReceiveWindow, SendWindow, INITIAL_WINDOW};

use crate::failure::{Failure, Step};
use crate::outbox::{Outbox, Taken, ROOM};
use crate::sys::{self, PollSlot};

/// Room of a fast stream's pipe; a pipe begins with 64 KiB.
const PIPE_BYTES: i32 = 256 << 10;

/// Bytes of the host's, on their way into a pipe.
pub struct Sink {
    pipe: Option<OwnedFd>,
    queue: VecDeque<u8>,
    eof: bool,
    window: ReceiveWindow,
}

/// What is to be told to the host about a sink.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct News {
    /// Nobody reads the pipe any more.
    pub closed: bool,
    /// So many more bytes may be sent.
    pub credit: Option<u32>,
}

/// Bytes of a pipe's, on their way to the host.
pub struct Source {
    pipe: Option<OwnedFd>,
    kind: u16,
    window: SendWindow,
    wide: bool,
}

impl Sink {
    /// Takes our end of a pipe, which must not block.
    pub fn new(pipe: OwnedFd) -> Self {
        Self { pipe: Some(pipe), queue: VecDeque::new(), eof: false, window: ReceiveWindow::default() }
    }

    /// What it waits for.
    pub fn slot(&self) -> PollSlot {
        let events = if self.queue.is_empty() { 0 } else { libc::POLLOUT };
        sys::slot(self.pipe.as_ref().map(AsFd::as_fd), events)
    }

    /// Whether nothing more will go into the pipe.
    pub fn is_closed(&self) -> bool {
        self.pipe.is_none()
    }

    /// Takes bytes that came in frames of that name.
    pub fn receive(&mut self, frame: &'static str, pieces: &[IoSlice<'_>]) -> Result<News, ProtocolError> {
        let count = pieces.iter().map(|piece| piece.len()).sum();
        self.window.received(count)?;
        if self.eof {
            return Err(ProtocolError::Malformed { frame, what: "comes after the stream's end" });
        }
        let mut news = News::default();
        let mut written = if self.queue.is_empty() { self.write(pieces, &mut news) } else { 0 };
        if self.pipe.is_none() {
            self.used(count - written, &mut news);
            return Ok(news);
        }
        for piece in pieces {
            let (_, rest) = piece.split_at(written.min(piece.len()));
            written -= piece.len() - rest.len();
            self.queue.extend(rest);
        }
        Ok(news)
    }

    /// Nothing more comes; the pipe is closed once all is in it.
    pub fn end(&mut self) {
        self.eof = true;
        if self.queue.is_empty() {
            self.pipe = None;
        }
    }

    /// Forgets pipe and bytes.
    pub fn close(&mut self) {
        (self.pipe, self.queue) = (None, VecDeque::new());
    }

    /// Goes on, after its slot had these events.
    pub fn drain(&mut self, events: i16) -> News {
        let mut news = News::default();
        if events & libc::POLLERR != 0 {
            self.nobody_reads(&mut news);
            return news;
        }
        let queue = std::mem::take(&mut self.queue);
        let (front, back) = queue.as_slices();
        let written = self.write(&[IoSlice::new(front), IoSlice::new(back)], &mut news);
        self.queue = queue;
        self.queue.drain(..written);
        if self.pipe.is_none() {
            self.drop_queue(&mut news);
        } else if self.eof && self.queue.is_empty() {
            self.pipe = None;
        }
        news
    }

    /// Writes what the pipe takes, and credits it.
    fn write(&mut self, bytes: &[IoSlice<'_>], news: &mut News) -> usize {
        let Some(pipe) = &self.pipe else { return 0 };
        match nix::sys::uio::writev(pipe, bytes) {
            Ok(written) => {
                self.used(written, news);
                written
            }
            Err(Errno::EAGAIN | Errno::EINTR) => 0,
            Err(_) => {
                self.nobody_reads(news);
                0
            }
        }
    }

    fn nobody_reads(&mut self, news: &mut News) {
        self.pipe = None;
        news.closed = !self.eof;
        self.drop_queue(news);
    }

    fn drop_queue(&mut self, news: &mut News) {
        let dropped = std::mem::take(&mut self.queue).len();
        self.used(dropped, news);
    }

    fn used(&mut self, count: usize, news: &mut News) {
        let before = self.window.size();
        let credit = self.window.consumed(count).filter(|_| !self.eof);
        news.credit = news.credit.into_iter().chain(credit).reduce(u32::saturating_add);
        if self.window.size() > before {
            self.pipe.iter().for_each(widen);
        }
    }
}

impl Source {
    /// Takes our end of a pipe, which must not block, and whose bytes go in frames of this kind.
    pub fn new(pipe: OwnedFd, kind: u16) -> Self {
        Self { pipe: Some(pipe), kind, window: SendWindow::default(), wide: false }
    }

    /// What it waits for, if there is room in the outbox.
    pub fn slot(&self, room: bool) -> PollSlot {
        let wanted = room && !self.is_stalled();
        sys::slot(self.pipe.as_ref().filter(|_| wanted).map(AsFd::as_fd), libc::POLLIN)
    }

    /// Whether more may come.
    pub fn is_open(&self) -> bool {
        self.pipe.is_some()
    }

    /// Whether it may not send for want of credit.
    pub fn is_stalled(&self) -> bool {
        self.window.left() == 0
    }

    /// Takes some frames' worth at most; after the end the pipe is closed.
    pub fn pump(&mut self, stream: u32, outbox: &mut Outbox) -> Taken {
        let Some(pipe) = self.pipe.as_ref().filter(|_| outbox.waiting() < ROOM) else {
            return Taken::Nothing;
        };
        let taken = outbox.take_from(pipe.as_fd(), self.kind, stream, self.window.left());
        match taken {
            Taken::Bytes(count) => self.window.sent(count),
            Taken::Nothing => {}
            Taken::Eof => self.pipe = None,
        }
        taken
    }

    /// Takes credit.
    pub fn credit(&mut self, bytes: u32) -> Result<(), ProtocolError> {
        self.window.credit(bytes)?;
        if !self.wide && self.window.left() > INITIAL_WINDOW as usize {
            self.wide = true;
            self.pipe.iter().for_each(widen);
        }
        Ok(())
    }

    /// Forgets the pipe. `true`: it was open.
    pub fn close(&mut self) -> bool {
        self.pipe.take().is_some()
    }
}

/// A pipe into a program: (its end, ours).
pub fn pipe_to() -> Result<(OwnedFd, OwnedFd), Failure> {
    let (theirs, ours) = pipe2(OFlag::O_CLOEXEC).step(|| "make a pipe")?;
    Ok((theirs, unblocked(ours)?))
}

/// A pipe out of a program: (its end, ours).
pub fn pipe_from() -> Result<(OwnedFd, OwnedFd), Failure> {
    let (ours, theirs) = pipe2(OFlag::O_CLOEXEC).step(|| "make a pipe")?;
    Ok((theirs, unblocked(ours)?))
}

/// Gives the pipe of a fast stream room for as much as goes at once: it is filled and emptied in fewer turns. A system may allow no
/// larger ones; then it stays as it is, as one does that its program has made larger still.
fn widen(pipe: &OwnedFd) {
    if fcntl(pipe.as_raw_fd(), FcntlArg::F_GETPIPE_SZ).is_ok_and(|bytes| bytes >= PIPE_BYTES) {
        return;
    }
    let _ = fcntl(pipe.as_raw_fd(), FcntlArg::F_SETPIPE_SZ(PIPE_BYTES));
}

/// The two ends of a pipe are two open files: theirs goes on to block.
fn unblocked(end: OwnedFd) -> Result<OwnedFd, Failure> {
    fcntl(end.as_raw_fd(), FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).step(|| "set up a pipe")?;
    Ok(end)
}
