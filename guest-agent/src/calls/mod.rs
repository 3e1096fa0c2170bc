//! The calls of programs in the guest, and the socket where they begin.
//!
//! Invariants:
//! - At most [`STREAMS_MAX`] programs at a time, those included that are gone while the host has not said its last of them. One more takes
//!   the place of one that has connected and said nothing; if there is none, it is told so.
//! - No program makes the agent wait, and none sizes what the agent holds for it.
//! - A frozen guest has no call, and nobody waits at the socket: what is captured names no host.

mod call;
pub mod message;

use std::fs::{self, Permissions};
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use qrexec::{Call, HostFrame, ProtocolError, CALL_STREAM, STREAMS_MAX};
use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::failure::{Failure, Step};
use crate::outbox::{Outbox, ROOM};
use crate::sys::{self, PollSlot};
use call::{Call as Program, SLOTS};
use message::Answer;

/// Where programs find the agent. Everybody in the guest may call: the host's policy is what decides.
pub const SOCKET: &str = "/run/dispvm/qrexec.sock";
/// Programs that wait to be noticed; more than this wait in connect(2).
const BACKLOG: i32 = 64;

/// Another way for calls than the host's frames.
pub trait Other {
    /// Calls that go by it.
    fn count(&self) -> usize;
    /// Whether it takes calls now.
    fn takes_calls(&self) -> bool;
    /// Takes one, whose program is at this socket. Legal if it takes calls.
    fn begin(&mut self, client: OwnedFd, wanted: &Call);
}

/// A table of calls.
#[derive(Default)]
pub struct Calls {
    listener: Option<OwnedFd>,
    calls: Vec<Program>,
    begun: u32,
}

impl Calls {
    /// Listens at a path, whose folder it makes; what may be there of an earlier agent is replaced.
    pub fn listen(path: &Path) -> Result<Self, Failure> {
        let listener = bind(path).step(|| format!("listen at {}", path.display()))?;
        Ok(Self { listener: Some(listener), ..Self::default() })
    }

    /// Does what a call's frame says; other frames are not for here. Those of a call that is no more were under way when it ended.
    pub fn handle(
        &mut self,
        stream: u32,
        frame: HostFrame,
        outbox: &mut Outbox,
    ) -> Result<(), ProtocolError> {
        let Some(at) = self.find(stream) else { return Ok(()) };
        self.calls[at].handle(frame, outbox)?;
        if self.calls[at].is_over() {
            self.calls.remove(at);
        }
        Ok(())
    }

    /// Bytes of the service's stdout or stderr.
    pub fn output(
        &mut self,
        stream: u32,
        kind: u16,
        pieces: &[IoSlice<'_>],
        outbox: &mut Outbox,
    ) -> Result<(), ProtocolError> {
        self.find(stream).map_or(Ok(()), |at| self.calls[at].output(kind, pieces, outbox))
    }

    fn find(&self, stream: u32) -> Option<usize> {
        self.calls.iter().position(|call| call.stream() == Some(stream))
    }

    /// Ends all of them, as before a capture: the host is told, and whoever waits at the socket is sent away.
    pub fn end(&mut self, outbox: &mut Outbox) {
        self.calls.iter_mut().for_each(|call| call.hang_up(outbox));
        self.abandon();
        while self.accept().is_some() {}
    }

    /// Ends all of them, as when the host is gone.
    pub fn abandon(&mut self) {
        self.calls.clear();
    }

    /// Appends what they wait for.
    pub fn watch(&self, slots: &mut Vec<PollSlot>, outbox: &Outbox) {
        let room = outbox.waiting() < ROOM;
        let listener = self.listener.as_ref().filter(|_| room).map(AsFd::as_fd);
        slots.push(sys::slot(listener, libc::POLLIN));
        slots.extend(self.calls.iter().flat_map(|call| call.slots(room)));
    }

    /// Serves all, with the slots that [`watch`](Self::watch) appended, and takes the slots off the front of `ready`. Those that begin go the
    /// `other` way, if it takes them. Where the outbox is full before all had their turn, another is the first of the next.
    pub fn serve(&mut self, ready: &mut &[PollSlot], outbox: &mut Outbox, other: &mut dyn Other) {
        let Some((listener, rest)) = ready.split_first() else { return };
        *ready = rest;
        for call in &mut self.calls {
            let (slots, rest) = ready.split_at(SLOTS.min(ready.len()));
            *ready = rest;
            let next = CALL_STREAM | self.begun;
            if slots.iter().any(|slot| slot.revents != 0) && call.serve(slots, next, outbox, other) {
                self.begun = (self.begun + 1) & !CALL_STREAM;
            }
        }
        self.calls.retain(|call| !call.is_over());
        if outbox.waiting() >= ROOM && !self.calls.is_empty() {
            self.calls.rotate_left(1);
        }
        if listener.revents != 0 {
            self.admit(outbox, other);
        }
    }

    /// Takes one program in, whose message is mostly there already.
    fn admit(&mut self, outbox: &mut Outbox, other: &mut dyn Other) {
        let Some(mut call) = self.accept().map(Program::new) else { return };
        if self.calls.len() + other.count() >= STREAMS_MAX {
            let Some(silent) = self.calls.iter().position(Program::is_silent) else {
                return call.dismiss(&Answer::Problem(format!("{STREAMS_MAX} calls are under way")));
            };
            self.calls.remove(silent);
        }
        if call.ask(CALL_STREAM | self.begun, outbox, other) {
            self.begun = (self.begun + 1) & !CALL_STREAM;
        }
        if !call.is_over() {
            self.calls.push(call);
        }
    }

    fn accept(&self) -> Option<OwnedFd> {
        net::accept_with(self.listener.as_ref()?, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK).ok()
    }
}

fn bind(path: &Path) -> io::Result<OwnedFd> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    fs::set_permissions(path, Permissions::from_mode(0o666))?;
    net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stock::site::XenSite;
    use crate::stock::Stock;
    use qrexec::{Decoder, GuestFrame};

    fn caller(path: &Path) -> OwnedFd {
        let socket = net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .expect("socket");
        net::connect(&socket, &SocketAddrUnix::new(path).expect("short")).expect("connects");
        net::send(&socket, b"work\0svc\0", net::SendFlags::NOSIGNAL).expect("sends");
        socket
    }

    fn said(outbox: &mut Outbox) -> Vec<GuestFrame> {
        let (bytes, mut decoder) = (outbox.drain(), Decoder::new());
        let (mut input, mut frames) = (&bytes[..], Vec::new());
        while let Some(raw) = decoder.next(&mut input).expect("decodes") {
            frames.push(GuestFrame::parse(raw).expect("parses"));
        }
        frames
    }

    fn turn(calls: &mut Calls, outbox: &mut Outbox) -> Vec<GuestFrame> {
        let mut slots = Vec::new();
        calls.watch(&mut slots, outbox);
        sys::poll(&mut slots, Some(0)).expect("polls");
        calls.serve(&mut &slots[..], outbox, &mut Stock::<XenSite>::default());
        said(outbox)
    }

    #[test]
    fn before_a_capture_all_calls_end_and_afterwards_they_work_at_once() {
        let folder = tempfile::tempdir().expect("tempdir");
        let path = folder.path().join("socket");
        let (mut calls, mut outbox) = (Calls::listen(&path).expect("listens"), Outbox::default());
        let asked = caller(&path);
        let stream = match turn(&mut calls, &mut outbox).as_slice() {
            [GuestFrame::Call { stream, .. }] => *stream,
            other => panic!("unexpected: {other:?}"),
        };
        let waiting = [caller(&path), caller(&path)];
        calls.end(&mut outbox);
        assert_eq!(said(&mut outbox), [GuestFrame::CallHangup { stream }]);
        for caller in waiting.iter().chain([&asked]) {
            assert!(Answer::receive(caller).expect("reads").is_none(), "it has been sent away");
        }
        assert_eq!(turn(&mut calls, &mut outbox), [], "nobody waits");
        // What the host of before still says is of no concern to the next.
        calls.handle(stream, HostFrame::CallAccepted { stream }, &mut outbox).expect("ignored");
        let _next = caller(&path);
        let heard = turn(&mut calls, &mut outbox);
        assert!(
            matches!(&heard[..], [GuestFrame::Call { stream: next, .. }] if *next != stream),
            "{heard:?}"
        );
    }

    #[test]
    fn nobody_is_admitted_while_the_host_does_not_listen() {
        let folder = tempfile::tempdir().expect("tempdir");
        let path = folder.path().join("socket");
        let (mut calls, mut outbox) = (Calls::listen(&path).expect("listens"), Outbox::default());
        let _caller = caller(&path);
        outbox.push(&GuestFrame::Stdout { stream: 1, bytes: vec![0; ROOM] });
        assert!(turn(&mut calls, &mut outbox).iter().all(|frame| !matches!(frame, GuestFrame::Call { .. })));
        assert!(matches!(turn(&mut calls, &mut outbox)[..], [GuestFrame::Call { .. }]));
    }
}
