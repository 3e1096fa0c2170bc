//! A small xenstored in this process, which speaks the real protocol over socket pairs: for tests of all that uses xenstore.
//!
//! It keeps nodes with permissions and enforces them on guests, fires watches, runs transactions against snapshots, and fails
//! at any request it is told to. Coarser than the real one in one thing: a transaction fails when anything at all changed
//! meanwhile.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use nix::errno::Errno;

use super::client::Xenstore;
use super::wire::{strings, words, Access, Message, Op, Perm, ERRORS, PATH_MAX};
use crate::hypercalls::DomId;

/// A xenstored. Clones are the same one.
#[derive(Clone, Debug, Default)]
pub struct Simulated {
    shared: Arc<Mutex<Shared>>,
}

type Tree = BTreeMap<String, Stored>;

#[derive(Clone, Debug)]
struct Stored {
    value: Vec<u8>,
    perms: Vec<Perm>,
}

#[derive(Debug, Default)]
struct Shared {
    tree: Tree,
    /// Goes up with every change of the tree.
    changes: u64,
    connections: u32,
    transactions: BTreeMap<u32, Snapshot>,
    last_transaction: u32,
    watches: Vec<Watch>,
    introduced: BTreeMap<DomId, (u64, u32)>,
    requests: u64,
    fail_at: Option<(u64, Errno)>,
    failing_commits: u32,
}

#[derive(Debug)]
struct Snapshot {
    connection: u32,
    tree: Tree,
    at: u64,
    touched: Vec<Touched>,
}

#[derive(Debug)]
struct Watch {
    connection: u32,
    /// What it was set with: a guest's may be relative to its home, and so are its events then.
    said: String,
    /// The same, absolute.
    path: String,
    token: String,
    to: UnixStream,
}

/// A path that changed, and whether all below it went with it.
#[derive(Clone, Debug)]
struct Touched {
    path: String,
    removed: bool,
}

/// One side of a connection: who asks.
#[derive(Clone, Copy, Debug)]
struct Peer {
    connection: u32,
    domid: u16,
}

type Reply = Result<Vec<u8>, Errno>;

impl Simulated {
    /// An empty one, with dom0's nodes.
    pub fn new() -> Simulated {
        let simulated = Simulated::default();
        let dom0 = vec![Perm::new(0, Access::None)];
        simulated.lock().tree.insert("/".to_owned(), Stored { value: Vec::new(), perms: dom0 });
        simulated.set("/local/domain/0/domid", "0");
        simulated
    }

    /// A connection as dom0.
    pub fn connect(&self) -> Xenstore {
        self.connect_as(DomId(0))
    }

    /// A connection as a guest: bound by permissions, and relative paths are below its own `/local/domain/N`.
    ///
    /// # Panics
    /// When there can be no more sockets or threads.
    #[allow(clippy::expect_used)]
    pub fn connect_as(&self, domid: DomId) -> Xenstore {
        let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
        let connection = {
            let mut shared = self.lock();
            shared.connections += 1;
            shared.connections
        };
        let simulated = self.clone();
        let peer = Peer { connection, domid: domid.0 };
        thread::Builder::new().spawn(move || simulated.serve(&ours, peer)).expect("a thread");
        Xenstore::over(theirs)
    }

    /// Writes a node as dom0, as a back-end driver would.
    pub fn set(&self, path: &str, value: &str) {
        let mut shared = self.lock();
        put(&mut shared.tree, path, Some(value.as_bytes()), 0);
        shared.changed(&[Touched { path: path.to_owned(), removed: false }]);
    }

    /// A node's value.
    pub fn get(&self, path: &str) -> Option<String> {
        self.lock().tree.get(path).map(|node| String::from_utf8_lossy(&node.value).into_owned())
    }

    /// All nodes below a path, as `xenstore-ls -fp` prints them: `/path = "value"   (n0,r1)`.
    pub fn listing(&self, below: &str) -> Vec<String> {
        let line = |(path, node): (&String, &Stored)| {
            let perms: Vec<String> = node.perms.iter().map(Perm::to_string).collect();
            format!("{path} = \"{}\"   ({})", String::from_utf8_lossy(&node.value), perms.join(","))
        };
        self.lock().tree.iter().filter(|(path, _)| is_below(path, below)).map(line).collect()
    }

    /// The ring and port a domain was introduced with, while it is.
    pub fn introduced(&self, domid: DomId) -> Option<(u64, u32)> {
        self.lock().introduced.get(&domid).copied()
    }

    /// Lets watchers know that a domain shut down or went.
    pub fn release_domain(&self) {
        self.lock().fire(&[Touched { path: "@releaseDomain".to_owned(), removed: false }]);
    }

    /// How many requests came so far.
    pub fn requests(&self) -> u64 {
        self.lock().requests
    }

    /// Fails the `n`th request from now on, the next one being 0.
    pub fn fail_at(&self, n: u64, errno: Errno) {
        let mut shared = self.lock();
        shared.fail_at = Some((shared.requests + n, errno));
    }

    /// Fails the next `count` transactions with EAGAIN, as if somebody else had been quicker.
    pub fn fail_commits(&self, count: u32) {
        self.lock().failing_commits = count;
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self, mut stream: &UnixStream, peer: Peer) {
        let mut unread = Vec::new();
        let mut bytes = [0; 8192];
        while let Ok(count @ 1..) = stream.read(&mut bytes) {
            unread.extend_from_slice(&bytes[..count]);
            loop {
                match Message::parse(&unread) {
                    Ok(Some((message, used))) => {
                        unread.drain(..used);
                        self.lock().answer(stream, peer, &message);
                    }
                    Ok(None) => break,
                    Err(_) => return self.lock().forget(peer),
                }
            }
        }
        self.lock().forget(peer);
    }
}

impl Shared {
    fn answer(&mut self, stream: &UnixStream, peer: Peer, message: &Message) {
        let injected = self.fail_at.filter(|(at, _)| *at == self.requests).map(|(_, errno)| errno);
        self.requests += 1;
        let answer = injected.map_or_else(|| self.handle(stream, peer, message), Err);
        let (op, payload) = match answer {
            Ok(payload) => (message.op, payload),
            Err(errno) => (Op::Error, words([name_of(errno)]).unwrap_or_default()),
        };
        send(stream, &Message { op, payload, ..message.clone() });
        if let (Op::Watch, Op::Watch, Some(watch)) = (op, message.op, self.watches.last()) {
            watch.fire(&watch.path);
        }
    }

    fn handle(&mut self, stream: &UnixStream, peer: Peer, message: &Message) -> Reply {
        let end = message.payload.iter().position(|byte| *byte == 0).unwrap_or(message.payload.len());
        let (first, rest) = message.payload.split_at(end);
        let rest = rest.get(1..).unwrap_or_default();
        let first = std::str::from_utf8(first).map_err(|_| Errno::EINVAL)?;
        match message.op {
            Op::TransactionStart => Ok(self.begin(peer)),
            Op::TransactionEnd => self.end(peer, message.transaction, first),
            Op::Watch => {
                let token = strings(rest).map_err(|_| Errno::EINVAL)?.pop().ok_or(Errno::EINVAL)?;
                let to = stream.try_clone().map_err(|_| Errno::ENOMEM)?;
                let path = if first.starts_with('@') { first.to_owned() } else { absolute(first, peer)? };
                let watch = Watch { connection: peer.connection, said: first.to_owned(), path, token, to };
                if self.watches.iter().any(|known| known.is(peer, first, &watch.token)) {
                    return Err(Errno::EEXIST);
                }
                self.watches.push(watch);
                ok()
            }
            Op::Unwatch => {
                let token = strings(rest).map_err(|_| Errno::EINVAL)?.pop().ok_or(Errno::EINVAL)?;
                let before = self.watches.len();
                self.watches.retain(|watch| !watch.is(peer, first, &token));
                if self.watches.len() < before {
                    ok()
                } else {
                    Err(Errno::ENOENT)
                }
            }
            Op::Introduce | Op::Release | Op::Resume if peer.domid != 0 => Err(Errno::EACCES),
            Op::Introduce => {
                let numbers = strings(rest).map_err(|_| Errno::EINVAL)?;
                let [gfn, port] = numbers.as_slice() else { return Err(Errno::EINVAL) };
                let ring =
                    (gfn.parse().map_err(|_| Errno::EINVAL)?, port.parse().map_err(|_| Errno::EINVAL)?);
                self.introduced.insert(domid(first)?, ring);
                self.fire(&[Touched { path: "@introduceDomain".to_owned(), removed: false }]);
                ok()
            }
            Op::Release => {
                let known = self.introduced.remove(&domid(first)?);
                known.ok_or(Errno::ENOENT)?;
                self.fire(&[Touched { path: "@releaseDomain".to_owned(), removed: false }]);
                ok()
            }
            Op::Resume => self.introduced.get(&domid(first)?).map(|_| b"OK\0".to_vec()).ok_or(Errno::ENOENT),
            _ => self.on_tree(peer, message, first, rest),
        }
    }

    fn on_tree(&mut self, peer: Peer, message: &Message, path: &str, rest: &[u8]) -> Reply {
        let path = absolute(path, peer)?;
        let tree = match message.transaction {
            0 => &mut self.tree,
            id => &mut self.transactions.get_mut(&id).ok_or(Errno::ENOENT)?.tree,
        };
        let (reply, touched) = operate(tree, peer, message.op, &path, rest)?;
        match message.transaction {
            0 => self.changed(&touched),
            id => {
                if let Some(snapshot) = self.transactions.get_mut(&id) {
                    snapshot.touched.extend(touched);
                }
            }
        }
        Ok(reply)
    }

    fn begin(&mut self, peer: Peer) -> Vec<u8> {
        self.last_transaction += 1;
        let (tree, at) = (self.tree.clone(), self.changes);
        let snapshot = Snapshot { connection: peer.connection, tree, at, touched: Vec::new() };
        self.transactions.insert(self.last_transaction, snapshot);
        format!("{}\0", self.last_transaction).into_bytes()
    }

    fn end(&mut self, peer: Peer, id: u32, word: &str) -> Reply {
        let own = self.transactions.get(&id).is_some_and(|snapshot| snapshot.connection == peer.connection);
        let snapshot = self.transactions.remove(&id).filter(|_| own).ok_or(Errno::ENOENT)?;
        if word != "T" {
            return ok();
        }
        if self.failing_commits > 0 {
            self.failing_commits -= 1;
            return Err(Errno::EAGAIN);
        }
        if snapshot.at != self.changes {
            return Err(Errno::EAGAIN);
        }
        self.tree = snapshot.tree;
        self.changed(&snapshot.touched);
        ok()
    }

    fn changed(&mut self, touched: &[Touched]) {
        self.changes += u64::from(!touched.is_empty());
        self.fire(touched);
    }

    fn fire(&self, touched: &[Touched]) {
        for change in touched {
            for watch in &self.watches {
                if is_below(&change.path, &watch.path) {
                    watch.fire(&change.path);
                } else if change.removed && is_below(&watch.path, &change.path) {
                    watch.fire(&watch.path);
                }
            }
        }
    }

    fn forget(&mut self, peer: Peer) {
        self.watches.retain(|watch| watch.connection != peer.connection);
        self.transactions.retain(|_, snapshot| snapshot.connection != peer.connection);
    }
}

impl Watch {
    fn is(&self, peer: Peer, path: &str, token: &str) -> bool {
        self.connection == peer.connection && self.said == path && self.token == token
    }

    fn fire(&self, path: &str) {
        let home = self.path.len() - self.said.len();
        let payload = words([path.get(home..).unwrap_or(path), &self.token]).unwrap_or_default();
        send(&self.to, &Message { op: Op::WatchEvent, request: 0, transaction: 0, payload });
    }
}

/// Does what was asked with nodes; answers the reply and what changed.
fn operate(
    tree: &mut Tree,
    peer: Peer,
    op: Op,
    path: &str,
    rest: &[u8],
) -> Result<(Vec<u8>, Vec<Touched>), Errno> {
    let changed = |removed| vec![Touched { path: path.to_owned(), removed }];
    let node = tree.get(path);
    let may = |wanted: Access| match node.or_else(|| nearest(tree, path)) {
        Some(node) if allows(&node.perms, peer.domid, wanted) => Ok(()),
        _ => Err(Errno::EACCES),
    };
    match op {
        Op::Read => {
            may(Access::Read)?;
            Ok((node.ok_or(Errno::ENOENT)?.value.clone(), Vec::new()))
        }
        Op::GetPerms => {
            may(Access::Read)?;
            let perms: Vec<String> = node.ok_or(Errno::ENOENT)?.perms.iter().map(Perm::to_string).collect();
            Ok((words(perms.iter().map(String::as_str)).map_err(|_| Errno::E2BIG)?, Vec::new()))
        }
        Op::Directory => {
            may(Access::Read)?;
            node.ok_or(Errno::ENOENT)?;
            let names = tree.keys().filter_map(|known| child_of(known, path));
            Ok((words(names).map_err(|_| Errno::E2BIG)?, Vec::new()))
        }
        Op::Mkdir if node.is_some() => Ok((b"OK\0".to_vec(), Vec::new())),
        Op::Write | Op::Mkdir => {
            may(Access::Write)?;
            put(tree, path, (op == Op::Write).then_some(rest), peer.domid);
            Ok((b"OK\0".to_vec(), changed(false)))
        }
        Op::Rm if node.is_none() => match tree.contains_key(parent(path)) {
            true => Ok((b"OK\0".to_vec(), Vec::new())),
            false => Err(Errno::ENOENT),
        },
        Op::Rm => {
            may(Access::Write)?;
            tree.retain(|known, _| !is_below(known, path));
            Ok((b"OK\0".to_vec(), changed(true)))
        }
        Op::SetPerms => {
            let owner = node.ok_or(Errno::ENOENT)?.perms.first().map(|perm| perm.domid);
            let list = strings(rest).map_err(|_| Errno::EINVAL)?;
            let perms: Result<Vec<Perm>, _> = list.iter().map(|perm| Perm::parse(perm)).collect();
            let perms = perms.map_err(|_| Errno::EINVAL)?;
            match perms.first() {
                Some(first) if peer.domid == 0 || Some(first.domid) == owner && owner == Some(peer.domid) => {
                }
                _ => return Err(Errno::EACCES),
            }
            if let Some(node) = tree.get_mut(path) {
                node.perms = perms;
            }
            Ok((b"OK\0".to_vec(), changed(false)))
        }
        _ => Err(Errno::ENOSYS),
    }
}

/// Writes or makes a node and those above it, which inherit their parent's permissions.
fn put(tree: &mut Tree, path: &str, value: Option<&[u8]>, domid: u16) {
    if !tree.contains_key(path) {
        if path != "/" {
            put(tree, parent(path), None, domid);
        }
        let mut perms = tree.get(parent(path)).map(|node| node.perms.clone()).unwrap_or_default();
        if let (Some(owner), true) = (perms.first_mut(), domid != 0) {
            owner.domid = domid;
        }
        tree.insert(path.to_owned(), Stored { value: Vec::new(), perms });
    }
    if let (Some(node), Some(value)) = (tree.get_mut(path), value) {
        node.value = value.to_vec();
    }
}

fn allows(perms: &[Perm], domid: u16, wanted: Access) -> bool {
    let Some(owner) = perms.first() else { return false };
    let entry = perms.iter().skip(1).find(|perm| perm.domid == domid).unwrap_or(owner);
    domid == 0 || owner.domid == domid || entry.access == wanted || entry.access == Access::Both
}

fn nearest<'a>(tree: &'a Tree, path: &str) -> Option<&'a Stored> {
    tree.get(parent(path)).or_else(|| if path == "/" { None } else { nearest(tree, parent(path)) })
}

fn parent(path: &str) -> &str {
    match path.rsplit_once('/') {
        Some(("", _)) | None => "/",
        Some((parent, _)) => parent,
    }
}

fn child_of<'a>(path: &'a str, of: &str) -> Option<&'a str> {
    let name = path.strip_prefix(if of == "/" { "" } else { of })?.strip_prefix('/')?;
    (!name.is_empty() && !name.contains('/')).then_some(name)
}

fn is_below(path: &str, of: &str) -> bool {
    path == of || of == "/" || path.strip_prefix(of).is_some_and(|rest| rest.starts_with('/'))
}

fn absolute(path: &str, peer: Peer) -> Result<String, Errno> {
    let path = match path.starts_with('/') {
        true => path.to_owned(),
        false => format!("/local/domain/{}/{path}", peer.domid),
    };
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-/_@".contains(&byte);
    let bad = path.len() > PATH_MAX
        || path.contains("//")
        || path.len() > 1 && path.ends_with('/')
        || !path.bytes().all(allowed);
    if bad {
        Err(Errno::EINVAL)
    } else {
        Ok(path)
    }
}

fn domid(text: &str) -> Result<DomId, Errno> {
    text.parse().map(DomId).map_err(|_| Errno::EINVAL)
}

fn ok() -> Reply {
    Ok(b"OK\0".to_vec())
}

fn name_of(errno: Errno) -> &'static str {
    ERRORS.iter().find(|(known, _)| *known == errno).map_or("EIO", |(_, name)| name)
}

/// A peer that has gone is noticed where it is read from.
fn send(mut stream: &UnixStream, message: &Message) {
    if let Ok(bytes) = message.to_bytes() {
        let _ = stream.write_all(&bytes);
    }
}
