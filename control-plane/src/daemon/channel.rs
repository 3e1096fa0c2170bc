//! Messages over a Unix socket that keeps their bounds (SOCK_SEQPACKET, unix(7)), with descriptors beside them.
//!
//! Invariants: no message longer than [`MESSAGE_BYTES_MAX`] and no more than [`FDS_MAX`] descriptors are taken in; a descriptor that comes
//! unasked is closed; none survives an exec.

use std::fs;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use rustix::fs::{Mode, OFlags};
use rustix::net::{
    self, AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};
use serde::de::DeserializeOwned;
use serde::Serialize;

use super::protocol::{encode, parse, MESSAGE_BYTES_MAX};

/// No message has more: the three streams of a call.
pub const FDS_MAX: usize = 3;
/// A peer that has not read for so long will not.
const SEND_LIMIT: Duration = Duration::from_secs(5);
/// Connections that wait to be accepted; more callers than this wait in connect(2).
const BACKLOG: i32 = 128;

/// One end of a conversation.
#[derive(Debug)]
pub struct Channel(OwnedFd);

/// Where conversations begin.
#[derive(Debug)]
pub struct Listener(OwnedFd);

impl Listener {
    /// Listens on a path; what may be there is replaced, so whoever calls holds a lock. Only the folder's owner gets there.
    pub fn bind(path: &Path) -> io::Result<Listener> {
        let socket = new_socket(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        with_short_path(path, |address| net::bind(&socket, address))?;
        net::listen(&socket, BACKLOG)?;
        Ok(Listener(socket))
    }

    /// The next conversation, if one waits; not blocking. One by somebody who is neither root nor our own user is refused.
    pub fn accept(&self) -> io::Result<Option<Channel>> {
        let channel = match net::accept_with(&self.0, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(socket) => Channel(socket),
            Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::CONNABORTED) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let peer = net::sockopt::socket_peercred(&channel.0)?.uid;
        if peer.is_root() || peer == rustix::process::geteuid() {
            return Ok(Some(channel));
        }
        tracing::warn!(uid = peer.as_raw(), "refused a caller");
        Ok(None)
    }
}

impl Channel {
    /// Two ends of a conversation of its own, blocking.
    pub fn pair() -> io::Result<(Channel, Channel)> {
        let flags = SocketFlags::CLOEXEC;
        let (a, b) = net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        Ok((Channel(a), Channel(b)))
    }

    /// Begins a conversation, blocking from then on. One with whom too many wait already is an error (`WouldBlock`), and so is, later, one
    /// who does not read for [`SEND_LIMIT`].
    pub fn connect(path: &Path) -> io::Result<Channel> {
        let socket = new_socket(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
        with_short_path(path, |address| net::connect(&socket, address))?;
        rustix::fs::fcntl_setfl(&socket, OFlags::RDWR)?;
        net::sockopt::set_socket_timeout(&socket, net::sockopt::Timeout::Send, Some(SEND_LIMIT))?;
        Ok(Channel(socket))
    }

    /// Whether the other end has gone.
    pub fn is_hung_up(&self) -> bool {
        let mut fds = [PollFd::new(self.as_fd(), PollFlags::empty())];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    /// Sends a message. A peer that is gone is an error; one that does not read, on a socket that does not block, too.
    pub fn send(&self, message: &impl Serialize, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.send_bytes(&encode(message).map_err(io::Error::other)?, fds)
    }

    /// As [`Channel::send`], with bytes of another form than JSON.
    pub fn send_bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(io::Error::other("too many descriptors for one message"));
        }
        net::sendmsg(&self.0, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
        Ok(())
    }

    /// The next message and its descriptors; `None` when the other end is gone.
    pub fn receive<T: DeserializeOwned>(&self) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
        let Some((bytes, fds)) = self.receive_bytes(MESSAGE_BYTES_MAX)? else { return Ok(None) };
        let message = parse(&bytes).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        Ok(Some((message, fds)))
    }

    /// As [`Channel::receive`], of at most `bytes_max` bytes of any form.
    pub fn receive_bytes(&self, bytes_max: usize) -> io::Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
        let mut bytes = vec![0u8; bytes_max];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut slices = [IoSliceMut::new(&mut bytes)];
        let received = match net::recvmsg(&self.0, &mut slices, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::CONNRESET) => return Ok(None),
            received => received?,
        };
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        if received.bytes == 0 {
            return Ok(None);
        }
        if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a message that is too long"));
        }
        bytes.truncate(received.bytes);
        Ok(Some((bytes, fds)))
    }

    /// Tells the other end that nothing more comes.
    pub fn shut_down_sending(&self) -> io::Result<()> {
        Ok(net::shutdown(&self.0, net::Shutdown::Write)?)
    }

    /// As [`Channel::receive`], but for no longer than `limit`.
    pub fn receive_within<T: DeserializeOwned>(
        &self,
        limit: Duration,
    ) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left.as_micros().div_ceil(1000)).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(self.as_fd(), PollFlags::POLLIN)], timeout) {
                Ok(0) if left.is_zero() => return Err(io::ErrorKind::TimedOut.into()),
                Ok(0) | Err(nix::errno::Errno::EINTR) => {}
                Ok(_) => return self.receive(),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<OwnedFd> for Channel {
    fn from(fd: OwnedFd) -> Channel {
        Channel(fd)
    }
}

fn new_socket(flags: SocketFlags) -> io::Result<OwnedFd> {
    Ok(net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?)
}

/// A socket's address has room for 107 bytes of path, a state folder's path may be longer: it is reached by a descriptor of its folder.
fn with_short_path(
    path: &Path,
    run: impl FnOnce(&SocketAddrUnix) -> rustix::io::Result<()>,
) -> io::Result<()> {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let folder = rustix::fs::open(folder, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let short = Path::new("/proc/self/fd").join(folder.as_raw_fd().to_string()).join(name);
    Ok(run(&SocketAddrUnix::new(&short)?)?)
}

#[cfg(test)]
mod tests {
    use super::super::protocol::Hello;
    use super::*;

    #[test]
    fn a_message_and_its_descriptors_arrive_and_the_end_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x".repeat(120)).join("socket");
        fs::create_dir(path.parent().unwrap()).unwrap();
        let listener = Listener::bind(&path).unwrap();
        let caller = Channel::connect(&path).unwrap();
        let served = listener.accept().unwrap().unwrap();
        assert!(listener.accept().unwrap().is_none());
        let (mine, theirs) = Channel::pair().unwrap();
        caller.send(&Hello::Status, &[theirs.as_fd(), theirs.as_fd()]).unwrap();
        drop(theirs);
        let (hello, fds) = served.receive::<Hello>().unwrap().unwrap();
        assert_eq!((hello, fds.len()), (Hello::Status, 2));
        Channel::from(fds.into_iter().next().unwrap()).send(&Hello::Changed, &[]).unwrap();
        assert_eq!(mine.receive::<Hello>().unwrap().unwrap().0, Hello::Changed);
        drop(caller);
        assert!(served.receive::<Hello>().unwrap().is_none());
    }

    #[test]
    fn what_is_no_message_is_an_error_and_takes_no_more_than_its_room() {
        let (a, b) = Channel::pair().unwrap();
        net::send(&a.0, b"[]", SendFlags::NOSIGNAL).unwrap();
        assert_eq!(b.receive::<Hello>().unwrap_err().kind(), io::ErrorKind::InvalidData);
        net::send(&a.0, &vec![b' '; MESSAGE_BYTES_MAX + 1], SendFlags::NOSIGNAL).unwrap();
        assert_eq!(b.receive::<Hello>().unwrap_err().kind(), io::ErrorKind::InvalidData);
        let limit = Duration::from_millis(5);
        assert_eq!(b.receive_within::<Hello>(limit).unwrap_err().kind(), io::ErrorKind::TimedOut);
    }
}
