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

use super::wire::{path_and_value, strings, words, Event, Message, Op, Perm, WireError};
use crate::hypercalls::DomId;

const SOCKETS: [&str; 2] = ["/run/xenstored/socket", "/var/run/xenstored/socket"];
const DEVICE: &str = "/dev/xen/xenbus";
/// Requests sent before the first answer is read. An answer is at most 4 KiB; so many fit into a socket's buffer.
const FLIGHT_MAX: usize = 32;
/// A xenstored that says nothing for so long is taken for dead.
const REPLY_LIMIT: Duration = Duration::from_secs(30);
/// How often a transaction is tried: each failure means that somebody else's succeeded.
const TRANSACTION_TRIES: u32 = 100;

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub enum XenstoreError {
    /// Xenstored said no.
    #[error("cannot {op} {path} in xenstore: {errno}")]
    Refused {
        /// What it was asked.
        op: Op,
        /// Of which node, or domain.
        path: String,
        /// Why not.
        errno: Errno,
    },
    /// The connection failed.
    #[error("cannot {op} {path} in xenstore")]
    Io {
        /// What was asked.
        op: Op,
        /// Of which node, or domain.
        path: String,
        /// The system's error.
        source: io::Error,
    },
    /// It cannot be said, or the answer makes no sense.
    #[error("cannot {op} {path} in xenstore")]
    Wire {
        /// What was asked.
        op: Op,
        /// Of which node, or domain.
        path: String,
        /// What is wrong with it.
        source: WireError,
    },
    /// There is no xenstored.
    #[error("no xenstored answers at {} or {DEVICE}. Hint: this must be a Xen dom0, as root", SOCKETS[0])]
    Absent(#[source] io::Error),
    /// A transaction never went through.
    #[error("a xenstore transaction to {what} failed {TRANSACTION_TRIES} times against others")]
    Contended {
        /// What it was to do.
        what: &'static str,
    },
    /// A node did not become what was waited for.
    #[error("{path} in xenstore: not {wanted} after {} s", limit.as_secs_f32())]
    Timeout {
        /// The node.
        path: String,
        /// What it was to become.
        wanted: &'static str,
        /// How long it was waited for.
        limit: Duration,
    },
}

impl XenstoreError {
    /// Whether xenstored refused with this.
    pub fn is(&self, wanted: Errno) -> bool {
        matches!(self, XenstoreError::Refused { errno, .. } if *errno == wanted)
    }
}

/// The result of a request.
pub type Result<T> = std::result::Result<T, XenstoreError>;

/// A node as it shall be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Where.
    pub path: String,
    /// What it says.
    pub value: String,
    /// Who may do what; empty: the same as with its parent.
    pub perms: Vec<Perm>,
}

impl Node {
    /// A node with its parent's permissions.
    pub fn new(path: impl Into<String>, value: impl ToString) -> Node {
        Node { path: path.into(), value: value.to_string(), perms: Vec::new() }
    }

    /// The same with permissions of its own, which nodes made below it inherit.
    pub fn with(self, perms: &[Perm]) -> Node {
        Node { perms: perms.to_vec(), ..self }
    }
}

/// A request before it has a number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    op: Op,
    path: String,
    payload: std::result::Result<Vec<u8>, WireError>,
}

impl Request {
    fn of_path(op: Op, path: &str) -> Request {
        Request { op, path: path.to_owned(), payload: words([path]) }
    }
    fn write(path: &str, value: &str) -> Request {
        Request { op: Op::Write, path: path.to_owned(), payload: path_and_value(path, value.as_bytes()) }
    }
    fn perms(path: &str, perms: &[Perm]) -> Request {
        let perms: Vec<String> = perms.iter().map(Perm::to_string).collect();
        let payload = words(std::iter::once(path).chain(perms.iter().map(String::as_str)));
        Request { op: Op::SetPerms, path: path.to_owned(), payload }
    }
    fn of_words(op: Op, path: &str, said: &[&str]) -> Request {
        Request { op, path: path.to_owned(), payload: words(said.iter().copied()) }
    }
    fn refused(&self, errno: Errno) -> XenstoreError {
        XenstoreError::Refused { op: self.op, path: self.path.clone(), errno }
    }
    fn io(&self, source: io::Error) -> XenstoreError {
        XenstoreError::Io { op: self.op, path: self.path.clone(), source }
    }
    fn wire(&self, source: WireError) -> XenstoreError {
        XenstoreError::Wire { op: self.op, path: self.path.clone(), source }
    }
}

/// What can be done with nodes, in a transaction or outside any.
pub trait Nodes {
    /// Sends requests and reads the answers, in the same order. The outer error is the connection's.
    fn ask(&self, requests: &[Request]) -> Result<Vec<Result<Vec<u8>>>>;

    /// Sends one request.
    fn ask_one(&self, request: Request) -> Result<Vec<u8>> {
        let mut answers = self.ask(std::slice::from_ref(&request))?;
        answers.pop().unwrap_or_else(|| Err(request.wire(WireError::Malformed("answer"))))
    }

    /// A node's value; `None` where there is no such node. What is not UTF-8 is replaced: a guest may have written it.
    fn read(&self, path: &str) -> Result<Option<String>> {
        let value = absent_is_none(self.ask_one(Request::of_path(Op::Read, path)))?;
        Ok(value.map(|value| String::from_utf8_lossy(&value).into_owned()))
    }

    /// Writes a node, and makes those above it as needed.
    fn write(&self, path: &str, value: &str) -> Result<()> {
        self.ask_one(Request::write(path, value)).map(drop)
    }

    /// Makes an empty node, unless it is there.
    fn mkdir(&self, path: &str) -> Result<()> {
        self.ask_one(Request::of_path(Op::Mkdir, path)).map(drop)
    }

    /// Removes a node and those below it; there need not be any.
    fn rm(&self, path: &str) -> Result<()> {
        absent_is_none(self.ask_one(Request::of_path(Op::Rm, path))).map(drop)
    }

    /// Removes several.
    fn rm_all(&self, paths: &[String]) -> Result<()> {
        let requests: Vec<Request> = paths.iter().map(|path| Request::of_path(Op::Rm, path)).collect();
        self.ask(&requests)?.into_iter().try_for_each(|answer| absent_is_none(answer).map(drop))
    }

    /// The names of a node's children; none where there is no such node.
    fn list(&self, path: &str) -> Result<Vec<String>> {
        let request = Request::of_path(Op::Directory, path);
        let names = absent_is_none(self.ask_one(request.clone()))?.unwrap_or_default();
        strings(&names).map_err(|err| request.wire(err))
    }

    /// Who may do what with a node.
    fn perms(&self, path: &str) -> Result<Vec<Perm>> {
        let request = Request::of_path(Op::GetPerms, path);
        let perms = strings(&self.ask_one(request.clone())?).map_err(|err| request.wire(err))?;
        perms.iter().map(|perm| Perm::parse(perm).map_err(|err| request.wire(err))).collect()
    }

    /// Says who may do what with a node.
    fn set_perms(&self, path: &str, perms: &[Perm]) -> Result<()> {
        self.ask_one(Request::perms(path, perms)).map(drop)
    }

    /// Writes nodes with their permissions, in this order. The first error is the result; those after it may be written.
    fn write_all(&self, nodes: &[Node]) -> Result<()> {
        let mut requests = Vec::with_capacity(nodes.len());
        for node in nodes {
            requests.push(Request::write(&node.path, &node.value));
            if !node.perms.is_empty() {
                requests.push(Request::perms(&node.path, &node.perms));
            }
        }
        self.ask(&requests)?.into_iter().try_for_each(|answer| answer.map(drop))
    }
}

fn absent_is_none(answer: Result<Vec<u8>>) -> Result<Option<Vec<u8>>> {
    match answer {
        Err(err) if err.is(Errno::ENOENT) => Ok(None),
        answer => answer.map(Some),
    }
}

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
            while let Some(message) = self.buffered(&mut state, &request)? {
                state.queue(message, &request)?;
            }
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
            while let Some(message) = self.buffered(&mut state, &request)? {
                state.queue(message, &request)?;
            }
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
mod tests {
    use std::sync::Arc;
    use std::thread;

    use super::super::simulated::Simulated;
    use super::super::wire::Access;
    use super::*;

    #[test]
    fn nodes_are_written_read_listed_and_removed() {
        let simulated = Simulated::new();
        let store = simulated.connect();
        let nodes: Vec<Node> = (0..100).map(|n| Node::new(format!("/a/b/{n}"), n)).collect();
        store.write_all(&nodes).unwrap();
        assert_eq!(store.read("/a/b/77").unwrap().as_deref(), Some("77"));
        assert_eq!(store.list("/a/b").unwrap().len(), 100);
        store.set_perms("/a/b", &[Perm::new(0, Access::None), Perm::new(7, Access::Read)]).unwrap();
        assert_eq!(store.perms("/a/b").unwrap().len(), 2);
        store.rm("/a").unwrap();
        store.rm("/a/b").unwrap();
        assert_eq!(store.read("/a/b/77").unwrap(), None);
        assert_eq!(store.list("/a").unwrap(), Vec::<String>::new());
        let refused = store.set_perms("/gone", &[]).unwrap_err();
        assert_eq!(refused.to_string(), "cannot set the permissions of /gone in xenstore: ENOENT: No such file or directory");
    }

    #[test]
    fn a_transaction_is_tried_again_and_not_for_ever() {
        let simulated = Simulated::new();
        let store = simulated.connect();
        simulated.fail_commits(3);
        let mut runs = 0;
        let count = |runs: &mut u32| {
            store.transaction("count", |tx| {
                *runs += 1;
                tx.write("/count", &runs.to_string())
            })
        };
        count(&mut runs).unwrap();
        assert_eq!((runs, simulated.get("/count").as_deref()), (4, Some("4")));
        simulated.fail_commits(u32::MAX);
        assert!(matches!(count(&mut runs), Err(XenstoreError::Contended { what: "count" })));
        assert_eq!(simulated.get("/count").as_deref(), Some("4"));
    }

    #[test]
    fn an_error_in_a_transaction_undoes_it() {
        let simulated = Simulated::new();
        let store = simulated.connect();
        let result: Result<()> = store.transaction("fail", |tx| {
            tx.write("/half", "done")?;
            tx.perms("/absent").map(drop)
        });
        assert!(result.unwrap_err().is(Errno::ENOENT));
        assert_eq!(simulated.get("/half"), None);
    }

    #[test]
    fn a_failure_at_any_request_is_an_error_and_the_connection_goes_on() {
        for at in 0..4 {
            let simulated = Simulated::new();
            let store = simulated.connect();
            simulated.fail_at(at, Errno::EIO);
            let nodes: Vec<Node> = (0..4).map(|n| Node::new(format!("/n/{n}"), n)).collect();
            assert!(store.write_all(&nodes).unwrap_err().is(Errno::EIO));
            store.write("/after", "1").unwrap();
            assert_eq!(simulated.get("/after").as_deref(), Some("1"));
        }
    }

    #[test]
    fn waiting_ends_with_the_value_or_the_time() {
        let simulated = Simulated::new();
        let store = Arc::new(simulated.connect());
        store.watch("/other", "mine").unwrap();
        let late = simulated.clone();
        let writer = thread::spawn(move || {
            thread::sleep(Duration::from_millis(20));
            late.set("/other/x", "1");
            late.set("/state", "4");
        });
        let limit = Duration::from_secs(10);
        let state = store.wait_for("/state", "4", limit, |value| (value == Some("4")).then_some(4)).unwrap();
        assert_eq!(state, 4);
        writer.join().unwrap();
        // What came for others meanwhile is still there: the first event of a watch and the change.
        let paths: Vec<String> =
            std::iter::from_fn(|| store.next_event().unwrap()).map(|event| event.path).collect();
        assert_eq!(paths, ["/other", "/other/x"]);
        let limit = Duration::from_millis(30);
        let late = store.wait_for("/state", "5", limit, |value| (value == Some("5")).then_some(()));
        assert!(matches!(late, Err(XenstoreError::Timeout { wanted: "5", .. })));
    }

    #[test]
    fn threads_share_a_connection() {
        let simulated = Simulated::new();
        let store = simulated.connect();
        thread::scope(|scope| {
            for thread in 0..4 {
                let store = &store;
                scope.spawn(move || {
                    for n in 0..50 {
                        let path = format!("/t/{thread}/{n}");
                        store.write(&path, &path).unwrap();
                        assert_eq!(store.read(&path).unwrap(), Some(path));
                    }
                });
            }
        });
    }

    #[test]
    fn a_connection_that_answers_nonsense_is_given_up() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let store = Xenstore::over(ours);
        theirs.write_all(&[0xff; 64]).unwrap();
        assert!(matches!(store.read("/a"), Err(XenstoreError::Wire { .. })));
        assert!(matches!(store.read("/a"), Err(XenstoreError::Io { .. })));
    }

    #[test]
    fn guests_are_bound_by_permissions() {
        let simulated = Simulated::new();
        let dom0 = simulated.connect();
        let guest = simulated.connect_as(DomId(7));
        let readable = [Perm::new(0, Access::None), Perm::new(7, Access::Read)];
        let home = Node::new("/local/domain/7", "").with(&readable);
        let data = Node::new("/local/domain/7/data", "").with(&[Perm::new(7, Access::None)]);
        dom0.write_all(&[home, Node::new("/local/domain/7/name", "g"), data]).unwrap();
        assert_eq!(guest.read("name").unwrap().as_deref(), Some("g"));
        assert!(guest.write("name", "other").unwrap_err().is(Errno::EACCES));
        assert!(guest.read("/local/domain/0/domid").unwrap_err().is(Errno::EACCES));
        guest.write("data/x", "1").unwrap();
        assert_eq!(dom0.read("/local/domain/7/data/x").unwrap().as_deref(), Some("1"));
    }
}
