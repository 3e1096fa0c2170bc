//! A connection to xenstored.
//!
//! Invariants:
//! - requests of one connection are answered in order, so several are sent before the first answer is read; their number
//!   is bounded ([`FLIGHT_MAX`]), so that neither side ever waits for the other to read;
//! - watch events that come between answers are queued, and never lost;
//! - after an error of the stream or the protocol the connection is broken for good: no answer can be taken for another's.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};

use super::nodes::{
    absent_is_none, Nodes, Request, Result, XenstoreError, DEVICE, SOCKETS, TRANSACTION_TRIES,
};
use super::wire::{strings, Event, Message, Op, WireError};
use crate::hypercalls::DomId;

/// Requests sent before the first answer is read. An answer is at most 4 KiB; so many fit into a socket's buffer.
const FLIGHT_MAX: usize = 32;
/// A xenstored that says nothing for so long is taken for dead.
const REPLY_LIMIT: Duration = Duration::from_secs(30);

/// A connection to xenstored. Threads may share it; they wait for each other.
#[derive(Debug)]
pub struct Xenstore {
    stream: File,
    /// Requests sent before the first answer is read.
    flight_max: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    last_request: u32,
    last_token: u32,
    unread: Vec<u8>,
    events: VecDeque<Event>,
    broken: bool,
}

impl Xenstore {
    /// Connects to this machine's xenstored: its socket, or the kernel's connection where it runs in another domain.
    pub fn open() -> Result<Xenstore> {
        for path in SOCKETS.iter().filter(|path| Path::new(path).exists()) {
            if let Ok(stream) = UnixStream::connect(path) {
                return Ok(Xenstore::over(stream));
            }
        }
        let device = File::options().read(true).write(true).open(DEVICE).map_err(XenstoreError::Absent)?;
        // The device takes one message per write and answers it before it takes the next.
        Ok(Xenstore { stream: device, flight_max: 1, state: Mutex::default() })
    }

    /// Over a stream that leads to a xenstored.
    pub fn over(stream: UnixStream) -> Xenstore {
        Xenstore { stream: OwnedFd::from(stream).into(), flight_max: FLIGHT_MAX, state: Mutex::default() }
    }

    /// Does `body` in a transaction, again and again while others' changes are in its way. So `body` must be able to run
    /// more than once. Its error ends the transaction without effect.
    pub fn transaction<T>(
        &self,
        what: &'static str,
        mut body: impl FnMut(&Transaction<'_>) -> Result<T>,
    ) -> Result<T> {
        for _ in 0..TRANSACTION_TRIES {
            let start = Request::of_words(Op::TransactionStart, what, &[""]);
            let id = self.ask_one(start.clone())?;
            let id = strings(&id).ok().and_then(|words| words.first()?.parse().ok());
            let id = id.ok_or_else(|| start.wire(WireError::Malformed("transaction number")))?;
            let transaction = Transaction { store: self, id };
            let done = body(&transaction);
            let word = if done.is_ok() { "T" } else { "F" };
            let ended = transaction.ask_one(Request::of_words(Op::TransactionEnd, what, &[word]));
            match (done, ended) {
                (Err(err), _) if !err.is(Errno::EAGAIN) => return Err(err),
                (Err(_), _) => {}
                (Ok(_), Err(err)) if err.is(Errno::EAGAIN) => {}
                (Ok(done), ended) => return ended.map(|_| done),
            }
        }
        Err(XenstoreError::Contended { what })
    }

    /// Tells xenstored of a domain whose ring is at `gfn` and whose port is `port`: from now on its guest may ask.
    pub fn introduce(&self, domid: DomId, gfn: u64, port: u32) -> Result<()> {
        let said = [domid.to_string(), gfn.to_string(), port.to_string()];
        let said: Vec<&str> = said.iter().map(String::as_str).collect();
        self.ask_one(Request::of_words(Op::Introduce, &format!("domain {domid}"), &said)).map(drop)
    }

    /// Has xenstored let go of a domain's ring. A domain it does not know is no error.
    pub fn release(&self, domid: DomId) -> Result<()> {
        let words = [domid.to_string()];
        let request = Request::of_words(Op::Release, &format!("domain {domid}"), &[&words[0]]);
        absent_is_none(self.ask_one(request)).map(drop)
    }

    /// Has xenstored forget that a domain has shut down: it goes on after all.
    pub fn resume(&self, domid: DomId) -> Result<()> {
        let word = domid.to_string();
        self.ask_one(Request::of_words(Op::Resume, &format!("domain {domid}"), &[&word])).map(drop)
    }

    /// Watches a node and those below it; an event comes at once, and one per change.
    pub fn watch(&self, path: &str, token: &str) -> Result<()> {
        self.ask_one(Request::of_words(Op::Watch, path, &[path, token])).map(drop)
    }

    /// Ends a watch and forgets its events.
    pub fn unwatch(&self, path: &str, token: &str) -> Result<()> {
        let request = Request::of_words(Op::Unwatch, path, &[path, token]);
        let answer = self.ask_one(request).map(drop);
        self.lock().events.retain(|event| event.token != token);
        answer
    }

    /// The next event, if one is there. Once it answers `None`, [`Xenstore::as_fd`] is readable when there is one again.
    pub fn next_event(&self) -> Result<Option<Event>> {
        let request = Request::of_path(Op::WatchEvent, "any node");
        let mut state = self.lock();
        while state.events.is_empty() && self.readable(Duration::ZERO).map_err(|err| request.io(err))? {
            self.fill(&mut state, &request)?;
            self.queue_events(&mut state, &request)?;
        }
        Ok(state.events.pop_front())
    }

    /// Waits until `look` answers something of the node's value (`None`: there is no node), which it is shown at once and
    /// at every change. `wanted` is for the error when time runs out: "connected".
    pub fn wait_for<T>(
        &self,
        path: &str,
        wanted: &'static str,
        limit: Duration,
        mut look: impl FnMut(Option<&str>) -> Option<T>,
    ) -> Result<T> {
        let deadline = Instant::now() + limit;
        let token = {
            let mut state = self.lock();
            state.last_token = state.last_token.wrapping_add(1);
            format!("wait-{}", state.last_token)
        };
        self.watch(path, &token)?;
        let result = loop {
            match self.await_event(path, &token, deadline) {
                Err(err) => break Err(err),
                Ok(false) => break Err(XenstoreError::Timeout { path: path.to_owned(), wanted, limit }),
                Ok(true) => match self.read(path).map(|value| look(value.as_deref())) {
                    Ok(None) => {}
                    Ok(Some(found)) => break Ok(found),
                    Err(err) => break Err(err),
                },
            }
        };
        let ended = self.unwatch(path, &token);
        result.and_then(|found| ended.map(|()| found))
    }

    /// Takes the events of a token; waits for one while there is none. `false`: time is over. Others wait meanwhile: were
    /// they to read, the event might come into the queue while this thread waits for it at the stream.
    fn await_event(&self, path: &str, token: &str, deadline: Instant) -> Result<bool> {
        let request = Request::of_path(Op::WatchEvent, path);
        let mut state = self.lock();
        loop {
            let before = state.events.len();
            state.events.retain(|event| event.token != token);
            if state.events.len() < before {
                return Ok(true);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if !self.readable(left).map_err(|err| request.io(err))? {
                return Ok(false);
            }
            self.fill(&mut state, &request)?;
            self.queue_events(&mut state, &request)?;
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn exchange(&self, transaction: u32, requests: &[Request]) -> Result<Vec<Result<Vec<u8>>>> {
        let mut state = self.lock();
        let mut answers = Vec::with_capacity(requests.len());
        for flight in requests.chunks(self.flight_max) {
            let first = state.last_request.wrapping_add(1);
            state.last_request = state.last_request.wrapping_add(flight.len() as u32);
            let mut bytes = Vec::new();
            for (at, request) in (0u32..).zip(flight) {
                let payload = request.payload.clone().map_err(|err| request.wire(err))?;
                let number = first.wrapping_add(at);
                let message = Message { op: request.op, request: number, transaction, payload };
                bytes.extend(message.to_bytes().map_err(|err| request.wire(err))?);
            }
            let broken = std::mem::replace(&mut state.broken, true);
            let Some(head) = flight.first() else { continue };
            if broken {
                return Err(head.io(io::ErrorKind::NotConnected.into()));
            }
            (&self.stream).write_all(&bytes).map_err(|err| head.io(err))?;
            for (at, request) in (0u32..).zip(flight) {
                answers.push(self.answer(&mut state, request, first.wrapping_add(at))?);
            }
            self.queue_events(&mut state, head)?;
            state.broken = false;
        }
        Ok(answers)
    }

    fn answer(&self, state: &mut State, request: &Request, number: u32) -> Result<Result<Vec<u8>>> {
        loop {
            match self.buffered(state, request)? {
                Some(message) if message.op == Op::WatchEvent => state.queue(message, request)?,
                Some(message) if message.request != number => {
                    return Err(request.wire(WireError::Malformed("order of answers")))
                }
                Some(message) if message.op == Op::Error => return Ok(Err(request.refused(message.errno()))),
                Some(message) if message.op == request.op => return Ok(Ok(message.payload)),
                Some(_) => return Err(request.wire(WireError::Malformed("answer"))),
                None if self.readable(REPLY_LIMIT).map_err(|err| request.io(err))? => {
                    self.fill(state, request)?;
                }
                None => return Err(request.io(io::ErrorKind::TimedOut.into())),
            }
        }
    }

    /// Whoever lets go of the lock has no whole message unread: the stream would not be readable for it any more.
    fn queue_events(&self, state: &mut State, request: &Request) -> Result<()> {
        while let Some(message) = self.buffered(state, request)? {
            state.queue(message, request)?;
        }
        Ok(())
    }

    fn buffered(&self, state: &mut State, request: &Request) -> Result<Option<Message>> {
        let parsed = Message::parse(&state.unread).map_err(|err| request.wire(err))?;
        Ok(parsed.map(|(message, used)| {
            state.unread.drain(..used);
            message
        }))
    }

    fn fill(&self, state: &mut State, request: &Request) -> Result<()> {
        let mut bytes = [0; 8192];
        let count = match (&self.stream).read(&mut bytes) {
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            read => read,
        };
        let count = count.map_err(|err| request.io(err))?;
        state.unread.extend_from_slice(&bytes[..count]);
        Ok(())
    }

    fn readable(&self, limit: Duration) -> io::Result<bool> {
        let deadline = Instant::now() + limit;
        loop {
            // One more than it is: a wait that ends a fraction early would be a busy one.
            let left = deadline.saturating_duration_since(Instant::now());
            let left = if left.is_zero() { 0 } else { left.as_millis() + 1 };
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(self.stream.as_fd(), PollFlags::POLLIN)], timeout) {
                Err(Errno::EINTR) => {}
                ready => return Ok(ready? > 0),
            }
        }
    }
}

impl State {
    fn queue(&mut self, message: Message, request: &Request) -> Result<()> {
        if message.op != Op::WatchEvent {
            return Err(request.wire(WireError::Malformed("watch event")));
        }
        let event = message.event().map_err(|err| request.wire(err))?;
        // One event per changed node is enough; so the queue is no longer than xenstored lets a guest have nodes.
        if !self.events.contains(&event) {
            self.events.push_back(event);
        }
        Ok(())
    }
}

impl AsFd for Xenstore {
    /// Readable when [`Xenstore::next_event`] may have something.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl Nodes for Xenstore {
    fn ask(&self, requests: &[Request]) -> Result<Vec<Result<Vec<u8>>>> {
        self.exchange(0, requests)
    }
}

/// Requests that come to be all at once, or not at all.
#[derive(Debug)]
pub struct Transaction<'a> {
    store: &'a Xenstore,
    id: u32,
}

impl Nodes for Transaction<'_> {
    fn ask(&self, requests: &[Request]) -> Result<Vec<Result<Vec<u8>>>> {
        self.store.exchange(self.id, requests)
    }
}

#[cfg(test)]
mod tests;
