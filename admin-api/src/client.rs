//! Calls over the socket, each on a connection of its own. They block, but never for ever: connecting, sending and waiting
//! for the reply have limits of time. Only [`events`] waits as long as nothing happens.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{connect, setsockopt, socket, sockopt, AddressFamily, SockFlag, SockType, UnixAddr};
use nix::sys::time::{TimeVal, TimeValLike};

use crate::error::{ApiError, DecodeError};
use crate::event::{Event, EVENT_BYTES_MAX};
use crate::reply::{Reply, REPLY_BYTES_MAX};
use crate::request::Request;

/// How long a server may take to accept a connection, and to read a request.
pub const SEND_TIME_MAX: Duration = Duration::from_secs(10);

/// How long a method may take: starting a qube waits for its agent (60 s unless its qrexec_timeout says more), and copying a
/// volume for the disk.
pub const REPLY_TIME_MAX: Duration = Duration::from_secs(600);

/// Carries out a call, and gives what it answers.
pub fn call(socket: &Path, request: &Request) -> Result<Vec<u8>, ApiError> {
    call_within(socket, request, REPLY_TIME_MAX)
}

/// The same with a limit of time of the caller's.
pub fn call_within(socket: &Path, request: &Request, limit: Duration) -> Result<Vec<u8>, ApiError> {
    let mut stream = send(socket, request)?;
    let deadline = Instant::now() + limit;
    let mut bytes = Vec::new();
    let mut piece = [0; 4096];
    loop {
        let late = || ApiError::TimedOut { what: request.method.clone(), after: limit };
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(late());
        }
        stream.set_read_timeout(Some(left)).map_err(io_error("set the time limit of the reply"))?;
        match stream.read(&mut piece) {
            Ok(0) => break,
            Ok(len) => bytes.extend_from_slice(piece.get(..len).unwrap_or_default()),
            Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
            Err(err) if err.kind() == io::ErrorKind::WouldBlock => return Err(late()),
            Err(err) if err.kind() == io::ErrorKind::ConnectionReset => break, // hung up on, which is an answer
            Err(err) => return Err(io_error("read the reply")(err)),
        }
        if bytes.len() > REPLY_BYTES_MAX {
            return Err(DecodeError::TooLong { what: "reply", limit: REPLY_BYTES_MAX }.into());
        }
    }
    if bytes.is_empty() {
        return Err(ApiError::Empty);
    }
    match Reply::decode(&bytes)? {
        Reply::Ok(data) => Ok(data),
        Reply::Exception(exception) => Err(ApiError::Exception(exception)),
        Reply::Event(_) => {
            Err(DecodeError::malformed("reply", "is an event, which was not asked for").into())
        }
    }
}

/// Events about a qube, or about all if it is `dom0` (`admin.Events`). The first one is `connection-established`.
pub fn events(socket: &Path, destination: &str) -> Result<Events, ApiError> {
    let stream = send(socket, &Request::new("admin.Events", destination))?;
    Ok(Events { stream, bytes: Vec::new(), is_over: false })
}

/// Events as they come. It ends when the server closes the connection, or after an error.
#[derive(Debug)]
pub struct Events {
    stream: UnixStream,
    bytes: Vec<u8>,
    is_over: bool,
}

impl Events {
    /// How long the next one may take; `None` for as long as it takes. When it is over, `next` gives [`ApiError::TimedOut`], and
    /// may be called again.
    pub fn set_limit(&mut self, limit: Option<Duration>) -> Result<(), ApiError> {
        self.stream.set_read_timeout(limit).map_err(io_error("set the time limit of events"))
    }

    fn receive(&mut self) -> Result<Option<Event>, ApiError> {
        loop {
            if self.bytes.starts_with(b"2\0") {
                return self.failure();
            }
            if let Some((event, len)) = Event::decode(&self.bytes)? {
                self.bytes.drain(..len.min(self.bytes.len()));
                return Ok(Some(event));
            }
            if !self.more()? {
                return match self.bytes.is_empty() {
                    true => Ok(None),
                    false => Err(DecodeError::malformed("event", "has no end").into()),
                };
            }
        }
    }

    /// The server would rather not: what it says is a whole reply.
    fn failure(&mut self) -> Result<Option<Event>, ApiError> {
        while self.bytes.len() <= EVENT_BYTES_MAX && self.more()? {}
        match Reply::decode(&self.bytes)? {
            Reply::Exception(exception) => Err(ApiError::Exception(exception)),
            _ => Err(DecodeError::malformed("event", "is none").into()),
        }
    }

    /// Reads what is there, up to a piece; false at the end.
    fn more(&mut self) -> Result<bool, ApiError> {
        let mut piece = [0; 4096];
        loop {
            return match self.stream.read(&mut piece) {
                Ok(len) => {
                    self.bytes.extend_from_slice(piece.get(..len).unwrap_or_default());
                    Ok(len > 0)
                }
                Err(err) if err.kind() == io::ErrorKind::Interrupted => continue,
                Err(err) if err.kind() == io::ErrorKind::ConnectionReset => Ok(false),
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => {
                    let after = self.stream.read_timeout().ok().flatten().unwrap_or_default();
                    Err(ApiError::TimedOut { what: "admin.Events".into(), after })
                }
                Err(err) => Err(io_error("read events")(err)),
            };
        }
    }
}

impl Iterator for Events {
    type Item = Result<Event, ApiError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.is_over {
            return None;
        }
        let next = self.receive();
        self.is_over = !matches!(next, Ok(Some(_)) | Err(ApiError::TimedOut { .. }));
        next.transpose()
    }
}

/// Connects, sends the request, and shuts that side: the request's end.
fn send(path: &Path, request: &Request) -> Result<UnixStream, ApiError> {
    let bytes = request.encode()?;
    let connect_error = |source| ApiError::Connect { path: path.to_owned(), source };
    let mut stream = UnixStream::from(open(path).map_err(|errno| connect_error(errno.into()))?);
    let sent = stream.write_all(&bytes).and_then(|()| stream.shutdown(Shutdown::Write));
    match sent {
        // Who is hung up on while still speaking may have been answered: the reply says.
        Ok(()) => Ok(stream),
        Err(err) if matches!(err.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::NotConnected) => {
            Ok(stream)
        }
        Err(err) if err.kind() == io::ErrorKind::WouldBlock => {
            Err(ApiError::TimedOut { what: request.method.clone(), after: SEND_TIME_MAX })
        }
        Err(err) => Err(io_error("send the call")(err)),
    }
}

/// A connection. The limit of time for sending holds for connecting too, which waits while the server's queue is full: so it is
/// set before, and the standard library's way is not taken.
fn open(path: &Path) -> Result<OwnedFd, Errno> {
    let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&fd, sockopt::SendTimeout, &TimeVal::seconds(SEND_TIME_MAX.as_secs() as i64))?;
    connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(fd)
}

fn io_error(step: &'static str) -> impl FnOnce(io::Error) -> ApiError {
    move |source| ApiError::Io { step, source }
}
