//! The socket: one thread that accepts, one for each call, and one that looks for qubes that come and go.
//!
//! Invariants: only root, our own user and members of the group `qubes` are heard; there are never more than [`CONNECTIONS_MAX`]
//! connections, with [`CALLS_MAX`] calls being answered and [`LISTENERS_MAX`] that listen for events; a request has [`REQUEST_LIMIT`] to come whole and at most
//! [`admin_api::REQUEST_BYTES_MAX`] bytes, and its answer [`ANSWER_LIMIT`] to be read. The socket appears under its name with its mode
//! and group, and takes the place of one only where nobody answers.

use std::fs;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::RecvTimeoutError;
use std::sync::Arc;
use std::time::{Duration, Instant};

use admin_api::{DecodeError, Reply, Request, REQUEST_BYTES_MAX};
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::unistd::Gid;

use super::answer::{told, Refusal};
use super::lobby::{Lobby, Places};
use super::world::Context;
use super::{api, events};
use crate::accounts::user_name;
use crate::clones;
use crate::error::{Error, Kind, Result};
use crate::qube::Qube;
use crate::state::State;
use crate::templates;

/// Calls that are answered at once; `qvm-ls` makes one at a time. Others wait for a place.
const CALLS_MAX: usize = 64;
/// Of these, calls that start or end qubes and wait for it, so that there is always room for others.
const LONG_CALLS_MAX: usize = 32;
/// Connections that listen for events.
const LISTENERS_MAX: usize = 32;
/// Connections of any kind, each a thread: some wait for a place beside those above. More wait in connect(2).
const CONNECTIONS_MAX: usize = 256;
/// How long one waits for a place: as long as a qube may take to start.
const PLACE_LIMIT: Duration = Duration::from_secs(300);
/// The client sends a request in one piece.
const REQUEST_LIMIT: Duration = Duration::from_secs(5);
/// A client that does not read its answer is hung up on.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// While there is no room for another call, or none could be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);
/// What the events' clients are looked after.
const LISTENER_POLL: Duration = Duration::from_millis(250);
/// The group whose members may call.
const GROUP: &str = "qubes";
const MODE: u32 = 0o660;

/// The socket while it is served. Dropping it removes it, if it is of our making.
#[derive(Debug)]
pub struct Served {
    path: Option<PathBuf>,
}

impl Drop for Served {
    fn drop(&mut self) {
        self.path.iter().for_each(|path| drop(fs::remove_file(path)));
    }
}

/// Serves the API on a socket at `path`, by threads that end with the process. Signals that somebody waits for are to be blocked
/// before, for these threads do not know of them.
pub fn serve(state: &State, path: &Path) -> Result<Served> {
    serve_on(state, bind(path)?)?;
    tracing::info!("the Admin API is at {}", path.display());
    Ok(Served { path: Some(path.to_owned()) })
}

/// The same, on a socket that somebody else has made and keeps.
pub fn serve_handed_over(state: &State, listener: UnixListener) -> Result<Served> {
    serve_on(state, listener).map(|()| Served { path: None })
}

fn serve_on(state: &State, listener: UnixListener) -> Result<()> {
    let server = Arc::new(Server {
        context: Context::new(state.clone()),
        lobby: Lobby::default(),
        connections: Places::new(CONNECTIONS_MAX),
        calls: Places::new(CALLS_MAX),
        long_calls: Places::new(LONG_CALLS_MAX),
        listeners: Places::new(LISTENERS_MAX),
    });
    if let Err(error) = remove_unstarted(state) {
        tracing::warn!("cannot remove disposables that were never started: {error}");
    }
    let looker = Arc::clone(&server);
    start("admin-look", move || looker.look_for_qubes())?;
    start("admin-accept", move || accept(&server, &listener))
}

/// Whoever had a disposable made by an earlier daemon, and has not started it, has lost its connection and will not.
fn remove_unstarted(state: &State) -> Result<()> {
    Qube::names(state)?.iter().try_for_each(|name| templates::remove_ended(state, name))
}

fn start(name: &str, run: impl FnOnce() + Send + 'static) -> Result<()> {
    let thread = std::thread::Builder::new().name(name.to_owned()).spawn(run);
    thread.map(drop).map_err(Error::failed("start a thread for the Admin API"))
}

/// A socket that has its mode and group before it has its name.
fn bind(path: &Path) -> Result<UnixListener> {
    if UnixStream::connect(path).is_ok() {
        return Err(Error::new(Kind::Refused, format!("somebody answers at {} already", path.display()))
            .hint("stop that service, or give another --api-socket"));
    }
    if fs::symlink_metadata(path).is_ok_and(|there| !is_socket(&there)) {
        return Err(Error::new(Kind::Refused, format!("{} is no socket", path.display()))
            .hint("give another --api-socket"));
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let aside = path.with_file_name(format!(".{name}.{}", std::process::id()));
    let _ = fs::remove_file(&aside);
    let bound = UnixListener::bind(&aside).map_err(Error::io("listen on", &aside))?;
    let named = fs::set_permissions(&aside, fs::Permissions::from_mode(MODE)).and_then(|()| {
        if let Some((gid, _)) = group() {
            // Who is not root may not be able to; then only the owner gets in.
            let _ = nix::unistd::chown(&aside, None, Some(gid));
        }
        fs::rename(&aside, path)
    });
    named.map_err(|error| {
        let _ = fs::remove_file(&aside);
        Error::io("listen on", path)(error)
    })?;
    Ok(bound)
}

fn is_socket(there: &fs::Metadata) -> bool {
    std::os::unix::fs::FileTypeExt::is_socket(&there.file_type())
}

/// The group's number and its members, as /etc/group has them.
fn group() -> Option<(Gid, Vec<String>)> {
    let groups = fs::read_to_string("/etc/group").ok()?;
    let mut fields = groups.lines().find(|line| line.split(':').next() == Some(GROUP))?.split(':').skip(2);
    let gid = fields.next()?.parse().ok()?;
    let members = fields.next().unwrap_or_default();
    Some((Gid::from_raw(gid), members.split(',').map(str::to_owned).collect()))
}

struct Server {
    context: Context,
    lobby: Lobby,
    connections: Places,
    calls: Places,
    long_calls: Places,
    listeners: Places,
}

fn accept(server: &Arc<Server>, listener: &UnixListener) {
    loop {
        let Some(place) = server.connections.take() else {
            std::thread::sleep(ACCEPT_PAUSE);
            continue;
        };
        let stream = match listener.accept() {
            Ok((stream, _)) => Arc::new(stream),
            // Out of descriptors: those who wait are heard when others have gone.
            Err(error) => {
                tracing::warn!("cannot accept a call: {error}");
                std::thread::sleep(ACCEPT_PAUSE);
                continue;
            }
        };
        if !may_call(&stream) {
            continue;
        }
        server.lobby.enter(&stream);
        let server = Arc::clone(server);
        let call = move || {
            let _place = place;
            if let Err(error) = server.answer(&stream) {
                tracing::debug!("a call was not answered: {error}");
            }
            server.lobby.leave(&stream);
            let _ = stream.shutdown(Shutdown::Both);
        };
        if let Err(error) = std::thread::Builder::new().name("admin-call".to_owned()).spawn(call) {
            tracing::warn!("cannot start a thread for a call: {error}");
            std::thread::sleep(ACCEPT_PAUSE);
        }
    }
}

/// Root, our own user, and members of the group. What the socket's mode says already is asked again of the peer itself.
fn may_call(stream: &UnixStream) -> bool {
    let Ok(peer) = rustix::net::sockopt::socket_peercred(stream) else { return false };
    if peer.uid.is_root() || peer.uid == rustix::process::geteuid() {
        return true;
    }
    let is_member = group().is_some_and(|(gid, members)| {
        gid == Gid::from_raw(peer.gid.as_raw())
            || user_name(peer.uid.as_raw()).is_some_and(|name| members.contains(&name))
    });
    if !is_member {
        tracing::warn!(uid = peer.uid.as_raw(), "refused a caller of the Admin API");
    }
    is_member
}

impl Server {
    fn answer(&self, peer: &Arc<UnixStream>) -> io::Result<()> {
        let mut stream: &UnixStream = peer;
        stream.set_write_timeout(Some(ANSWER_LIMIT))?;
        let received = receive(stream);
        self.lobby.leave(peer);
        let request = match received? {
            Ok(request) => request,
            Err(error) => {
                tracing::warn!("a call that is none: {error}");
                return Ok(());
            }
        };
        if request.method == "admin.Events" {
            return self.tell_events(stream, &request);
        }
        let _long = match api::takes_long(&request) {
            true => Some(self.long_calls.wait(PLACE_LIMIT)?),
            false => None,
        };
        let _place = self.calls.wait(PLACE_LIMIT)?;
        let answer = api::call(&self.context, &request);
        // Whoever has made, started or ended a qube, or has tried to, hears of it before the next look.
        if api::makes_or_ends(&request.method) {
            self.look();
        }
        match answer {
            Ok(data) => stream.write_all(&Reply::Ok(data).encode()),
            Err(refusal) => self.refuse(stream, &request, refusal),
        }
    }

    fn tell_events(&self, mut stream: &UnixStream, request: &Request) -> io::Result<()> {
        let about = match api::events_about(&self.context, request) {
            Ok(about) => about,
            Err(refusal) => return self.refuse(stream, request, refusal),
        };
        let Some(_place) = self.listeners.take() else {
            tracing::warn!("more than {LISTENERS_MAX} clients want events");
            return Ok(());
        };
        let events = self.context.events.listen(&about);
        // From here on differences are told.
        self.look();
        loop {
            match events.recv_timeout(LISTENER_POLL) {
                Ok(event) => stream.write_all(&Reply::Event(event).encode())?,
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
                Err(RecvTimeoutError::Timeout) if has_gone(stream) => return Ok(()),
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    fn refuse(&self, mut stream: &UnixStream, request: &Request, refusal: Refusal) -> io::Result<()> {
        let Request { method, argument, source, destination, payload } = request;
        match refusal {
            Refusal::Exception(exception) => {
                let exception = told(exception, source, &self.context.state);
                stream.write_all(&Reply::Exception(exception).encode())
            }
            Refusal::Silent(why) => {
                let bytes = payload.len();
                tracing::warn!(
                    "hung up on {method}+{argument} ({source} → {destination}, {bytes} bytes): {why}"
                );
                Ok(())
            }
        }
    }

    fn look(&self) {
        if let Err(error) = self.context.events.look(&self.context) {
            tracing::warn!("cannot look for qubes that come and go: {error}");
        }
    }

    fn look_for_qubes(&self) {
        loop {
            // What a runner that was killed has left: its record, and with it a disposable that was to go when it ends.
            let swept = clones::sweep(&self.context.state).and_then(|()| events::sweep(&self.context));
            if let Err(error) = swept {
                tracing::warn!("cannot remove what is left of disposables that have ended: {error}");
            }
            self.look();
            std::thread::sleep(events::LOOK_EVERY);
        }
    }
}

/// Reads a request up to the end of the stream; however slowly it trickles, it has one limit of time.
fn receive(mut stream: &UnixStream) -> io::Result<std::result::Result<Request, DecodeError>> {
    let deadline = Instant::now() + REQUEST_LIMIT;
    let (mut bytes, mut piece) = (Vec::new(), [0; 4096]);
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut piece) {
            Ok(0) => return Ok(Request::decode(&bytes)),
            Ok(len) => bytes.extend_from_slice(piece.get(..len).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        if bytes.len() > REQUEST_BYTES_MAX {
            return Ok(Request::decode(&bytes));
        }
    }
}

/// Whether the other end is closed, and not only shut for sending, as every client's is.
fn has_gone(stream: &UnixStream) -> bool {
    let mut fds = [PollFd::new(stream.as_fd(), PollFlags::empty())];
    poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}
