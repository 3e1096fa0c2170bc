//! What a program in the guest and its agent say to each other, over a socket that keeps messages apart (SOCK_SEQPACKET, unix(7)).
//!
//! The program says one thing, the payload of a `Call` frame. The agent answers `Accepted`, with three descriptors: the service's stdin
//! to write, its stdout and stderr to read. Its last message is one of the others; without one, the connection to the host was lost.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use qrexec::PAYLOAD_BYTES_MAX;
use rustix::net::{
    self, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};

/// Descriptors that go with `Accepted`.
const FDS: usize = 3;
/// Bytes of an answer: a sentence fits.
const ANSWER_BYTES_MAX: usize = 512;

/// An answer of the agent's.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    /// The call may happen.
    Accepted,
    /// It may not.
    Refused,
    /// It is over, with this status.
    Exited(u8),
    /// It could not be made, for this reason.
    Problem(String),
}

impl Answer {
    fn encode(&self) -> Vec<u8> {
        match self {
            Self::Accepted => vec![1],
            Self::Refused => vec![2],
            Self::Exited(status) => vec![3, *status],
            Self::Problem(reason) => {
                [&[4], reason.as_bytes()].concat().into_iter().take(ANSWER_BYTES_MAX).collect()
            }
        }
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        match bytes {
            [1] => Some(Self::Accepted),
            [2] => Some(Self::Refused),
            [3, status] => Some(Self::Exited(*status)),
            [4, reason @ ..] => Some(Self::Problem(String::from_utf8_lossy(reason).into_owned())),
            _ => None,
        }
    }

    /// Says it to a program, at once or not at all: only one that sends garbage and never reads has no room for two answers.
    pub fn send(&self, socket: impl AsFd, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(io::Error::other("more than three descriptors"));
        }
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        net::sendmsg(socket, &[IoSlice::new(&self.encode())], &mut control, flags)?;
        Ok(())
    }

    /// The agent's next answer and its descriptors; `None` when it has hung up. Waits on a socket that blocks.
    pub fn receive(socket: impl AsFd) -> io::Result<Option<(Self, Vec<OwnedFd>)>> {
        let mut bytes = [0; ANSWER_BYTES_MAX];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut slices = [IoSliceMut::new(&mut bytes)];
        let received = loop {
            match net::recvmsg(&socket, &mut slices, &mut control, RecvFlags::CMSG_CLOEXEC) {
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::CONNRESET) => return Ok(None),
                received => break received?.bytes,
            }
        };
        let rights = control.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(rights) => Some(rights),
            _ => None,
        });
        let fds = rights.flatten().collect();
        let said = bytes.get(..received).filter(|said| !said.is_empty());
        let Some(said) = said else { return Ok(None) };
        let answer = Self::parse(said).ok_or_else(|| io::Error::other("not an answer"))?;
        Ok(Some((answer, fds)))
    }
}

/// Takes what a program has said unheard, and lets it say no more: of a socket that is closed with something unread in it, the kernel (6.18) tells the
/// other end that, in place of the answer.
pub fn hear_no_more(socket: impl AsFd) {
    let _ = net::shutdown(&socket, net::Shutdown::Read);
    while net::recv(&socket, &mut [0; 1][..], RecvFlags::DONTWAIT).is_ok_and(|(count, _)| count > 0) {}
}

/// What a program said; `None`: nothing yet. An error: it has hung up. Descriptors it may have sent along, the kernel drops. A message
/// that is too long is cut, and then no call: two texts in their limits take up less.
pub fn hear(socket: impl AsFd) -> io::Result<Option<Vec<u8>>> {
    let mut bytes = vec![0; PAYLOAD_BYTES_MAX];
    match net::recv(socket, &mut bytes[..], RecvFlags::DONTWAIT) {
        Ok((0, _)) => Err(io::ErrorKind::UnexpectedEof.into()),
        Ok((count, _)) => {
            bytes.truncate(count);
            Ok(Some(bytes))
        }
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(None),
        Err(error) => Err(error.into()),
    }
}
