//! Xenstore, as the guest's kernel lets it be asked: `/dev/xen/xenbus`.
//!
//! Invariants: one message per write, as the device takes them, and none before the last one is answered: the kernel (6.1) reads a
//! message's payload from the file's one buffer when it sends it, which may be after the next write has filled that. Watch events
//! that come between answers are kept, one per token: they say that something changed, not what.
//!
//! Source: Xen's `xen/include/public/io/xs_wire.h`. A message is a header of four u32 (type, request, transaction, length) and its payload.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use crate::sys::{self, PollSlot};

const DEVICE: &str = "/dev/xen/xenbus";
const HEADER_BYTES: usize = 16;
const PAYLOAD_MAX: usize = 4096;

const READ: u32 = 2;
const WATCH: u32 = 4;
const UNWATCH: u32 = 5;
const WRITE: u32 = 11;
const RM: u32 = 13;
const SET_PERMS: u32 = 14;
const WATCH_EVENT: u32 = 15;
const ERROR: u32 = 16;

/// A request: its type and its payload.
pub struct Request(u32, Vec<u8>);

impl Request {
    /// A node's value.
    pub fn read(path: &str) -> Self {
        Self(READ, [path.as_bytes(), b"\0"].concat())
    }

    /// A node's new value; nodes above it are made.
    pub fn write(path: &str, value: &str) -> Self {
        Self(WRITE, [path.as_bytes(), b"\0", value.as_bytes()].concat())
    }

    /// An end of a node and those below it.
    pub fn rm(path: &str) -> Self {
        Self(RM, [path.as_bytes(), b"\0"].concat())
    }

    /// Who may do what with a node: its owner first, which need not be named again.
    pub fn set_perms(path: &str, perms: &[&str]) -> Self {
        let mut payload = [path.as_bytes(), b"\0"].concat();
        perms.iter().for_each(|perm| payload.extend([perm.as_bytes(), b"\0"].concat()));
        Self(SET_PERMS, payload)
    }

    /// The end of a watch.
    pub fn unwatch(path: &str, token: &str) -> Self {
        Self(UNWATCH, [path.as_bytes(), b"\0", token.as_bytes(), b"\0"].concat())
    }

    fn path(&self) -> String {
        String::from_utf8_lossy(self.1.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned()
    }
}

/// The answer to a request; `None`: there is no such node.
pub type Answer = Option<Vec<u8>>;

/// A connection to xenstored.
pub struct Xenbus {
    file: File,
    last_request: u32,
    unread: Vec<u8>,
    events: Vec<Vec<u8>>,
}

impl Xenbus {
    /// Opens the device.
    pub fn open() -> io::Result<Self> {
        let options = libc::O_NONBLOCK | libc::O_CLOEXEC;
        let file = OpenOptions::new().read(true).write(true).custom_flags(options).open(DEVICE)?;
        Ok(Self::over(file.into()))
    }

    /// Over a non-blocking file that leads to a xenstored.
    pub fn over(file: OwnedFd) -> Self {
        Self { file: file.into(), last_request: 0, unread: Vec::new(), events: Vec::new() }
    }

    /// Asks one after the other, and waits for the answers.
    pub fn ask(&mut self, requests: &[Request]) -> io::Result<Vec<Answer>> {
        requests.iter().map(|request| self.ask_one(request)).collect()
    }

    fn ask_one(&mut self, request: &Request) -> io::Result<Answer> {
        let Request(kind, payload) = request;
        self.last_request = self.last_request.wrapping_add(1);
        let mut message = Vec::with_capacity(HEADER_BYTES + payload.len());
        for word in [*kind, self.last_request, 0, payload.len() as u32] {
            message.extend_from_slice(&word.to_ne_bytes());
        }
        message.extend_from_slice(payload);
        self.send(&message)?;
        let answer = self.answer(self.last_request);
        answer.map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", request.path())))
    }

    /// A node's value.
    pub fn read(&mut self, path: &str) -> io::Result<Answer> {
        Ok(self.ask(&[Request::read(path)])?.pop().flatten())
    }

    /// Watches a node and waits for the event that comes at once, so that each that comes later tells of a change.
    pub fn watch(&mut self, path: &str, token: &str) -> io::Result<()> {
        self.ask(&[Request(WATCH, [path.as_bytes(), b"\0", token.as_bytes(), b"\0"].concat())])?;
        while self.event()?.is_none_or(|event| event != token.as_bytes()) {
            self.wait(libc::POLLIN)?;
        }
        Ok(())
    }

    /// The token of an event, if there is one.
    pub fn event(&mut self) -> io::Result<Option<Vec<u8>>> {
        while let Some((kind, _, payload)) = self.message()? {
            self.keep(kind, payload);
        }
        Ok(self.events.pop())
    }

    /// Whether an event is there that came between answers: it wakes nobody who polls.
    pub fn has_event(&self) -> bool {
        !self.events.is_empty()
    }

    /// Waits until there is something to read.
    pub fn wait_for_event(&mut self) -> io::Result<Vec<u8>> {
        loop {
            match self.event()? {
                Some(token) => return Ok(token),
                None => self.wait(libc::POLLIN)?,
            }
        }
    }

    /// A slot of poll: readable when there may be an event.
    pub fn slot(&self) -> PollSlot {
        sys::slot(Some(self.file.as_fd()), libc::POLLIN)
    }

    fn answer(&mut self, number: u32) -> io::Result<Answer> {
        loop {
            match self.message()? {
                Some((ERROR, request, name)) if request == number => return error(&name),
                Some((kind, request, payload)) if kind != WATCH_EVENT && request == number => {
                    return Ok(Some(payload))
                }
                Some((kind, _, payload)) => self.keep(kind, payload),
                None => self.wait(libc::POLLIN)?,
            }
        }
    }

    fn keep(&mut self, kind: u32, payload: Vec<u8>) {
        // Path and token, each with its NUL.
        let token = payload.split(|byte| *byte == 0).nth(1).map(<[u8]>::to_vec);
        let token = token.filter(|token| kind == WATCH_EVENT && !self.events.contains(token));
        self.events.extend(token);
    }

    /// The next message, if it is there in full.
    fn message(&mut self) -> io::Result<Option<(u32, u32, Vec<u8>)>> {
        loop {
            if let Some(header) = self.unread.first_chunk::<HEADER_BYTES>() {
                let word = |at: usize| {
                    u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
                };
                let (kind, request, length) = (word(0), word(4), word(12) as usize);
                if length > PAYLOAD_MAX {
                    return Err(io::Error::other("xenstored sent too long a message"));
                }
                if self.unread.len() >= HEADER_BYTES + length {
                    let payload = self.unread.drain(..HEADER_BYTES + length).skip(HEADER_BYTES).collect();
                    return Ok(Some((kind, request, payload)));
                }
            }
            let mut buffer = [0; HEADER_BYTES + PAYLOAD_MAX];
            match (&self.file).read(&mut buffer) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(count) => self.unread.extend_from_slice(&buffer[..count]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// All of it: the device takes a message whole, and a socket's buffer has room.
    fn send(&self, message: &[u8]) -> io::Result<()> {
        loop {
            match (&self.file).write(message) {
                Ok(count) if count == message.len() => return Ok(()),
                Ok(_) => return Err(ErrorKind::WriteZero.into()),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.wait(libc::POLLOUT)?,
                Err(error) => return Err(error),
            }
        }
    }

    fn wait(&self, events: i16) -> io::Result<()> {
        sys::poll(&mut [sys::slot(Some(self.file.as_fd()), events)], None)
    }
}

fn error(name: &[u8]) -> io::Result<Answer> {
    let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
    match name {
        b"ENOENT" => Ok(None),
        _ => Err(io::Error::other(format!("xenstored says {}", String::from_utf8_lossy(name)))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    fn message(kind: u32, request: u32, payload: &[u8]) -> Vec<u8> {
        let words = [kind, request, 0, payload.len() as u32];
        words.iter().flat_map(|word| word.to_ne_bytes()).chain(payload.iter().copied()).collect()
    }

    fn pair() -> (Xenbus, UnixStream) {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        ours.set_nonblocking(true).expect("non-blocking");
        (Xenbus::over(ours.into()), theirs)
    }

    #[test]
    fn answers_and_events_come_in_any_mixture() {
        let (mut xenbus, mut store) = pair();
        let mut said = message(WATCH_EVENT, 0, b"domid\0d\0");
        said.extend(message(READ, 1, b"7"));
        said.extend(message(WATCH_EVENT, 0, b"domid\0d\0"));
        said.extend(message(ERROR, 2, b"ENOENT\0"));
        said.extend(message(WATCH_EVENT, 0, b"other\0o\0"));
        store.write_all(&said).expect("said");
        let answers = xenbus.ask(&[Request::read("domid"), Request::rm("x")]).expect("answers");
        assert_eq!(answers, [Some(b"7".to_vec()), None]);
        assert!(xenbus.has_event());
        let mut tokens = [xenbus.event().expect("one"), xenbus.event().expect("one")];
        tokens.sort();
        assert_eq!(tokens, [Some(b"d".to_vec()), Some(b"o".to_vec())]);
        assert_eq!(xenbus.event().expect("none"), None);
        assert!(!xenbus.has_event());
    }

    #[test]
    fn refusals_and_lies_are_errors() {
        let (mut xenbus, mut store) = pair();
        store.write_all(&message(ERROR, 1, b"EACCES\0")).expect("said");
        let refused = xenbus.read("x").expect_err("refused").to_string();
        assert!(refused.contains("EACCES"), "{refused}");
        let mut long = message(READ, 2, b"");
        long[12..16].copy_from_slice(&5000u32.to_ne_bytes());
        store.write_all(&long).expect("said");
        assert!(xenbus.read("x").is_err());
        drop(store);
        assert!(xenbus.read("x").is_err());
    }

    #[test]
    fn requests_are_as_xenstored_takes_them() {
        let (mut xenbus, mut store) = pair();
        store.write_all(&message(WRITE, 1, b"OK\0")).expect("said");
        store.write_all(&message(RM, 2, b"OK\0")).expect("said");
        xenbus.ask(&[Request::write("a/b", "12"), Request::rm("a")]).expect("asked");
        let mut heard = [0; 100];
        let count = store.read(&mut heard).expect("heard");
        assert_eq!(&heard[..count], [message(WRITE, 1, b"a/b\x0012"), message(RM, 2, b"a\0")].concat());
    }
}
