//! What can be done with nodes, and what can go wrong.

use std::io;
use std::time::Duration;

use nix::errno::Errno;

use super::wire::{path_and_value, strings, words, Op, Perm, WireError};

/// Where xenstored listens, on this machine.
pub(super) const SOCKETS: [&str; 2] = ["/run/xenstored/socket", "/var/run/xenstored/socket"];
/// The kernel's own connection, for a xenstored in another domain.
pub(super) const DEVICE: &str = "/dev/xen/xenbus";
/// How often a transaction is tried: each failure means that somebody else's succeeded.
pub(super) const TRANSACTION_TRIES: u32 = 100;

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
    pub(super) op: Op,
    pub(super) path: String,
    pub(super) payload: std::result::Result<Vec<u8>, WireError>,
}

impl Request {
    pub(super) fn of_path(op: Op, path: &str) -> Request {
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
    pub(super) fn of_words(op: Op, path: &str, said: &[&str]) -> Request {
        Request { op, path: path.to_owned(), payload: words(said.iter().copied()) }
    }
    pub(super) fn refused(&self, errno: Errno) -> XenstoreError {
        XenstoreError::Refused { op: self.op, path: self.path.clone(), errno }
    }
    pub(super) fn io(&self, source: io::Error) -> XenstoreError {
        XenstoreError::Io { op: self.op, path: self.path.clone(), source }
    }
    pub(super) fn wire(&self, source: WireError) -> XenstoreError {
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

pub(super) fn absent_is_none(answer: Result<Vec<u8>>) -> Result<Option<Vec<u8>>> {
    match answer {
        Err(err) if err.is(Errno::ENOENT) => Ok(None),
        answer => answer.map(Some),
    }
}
