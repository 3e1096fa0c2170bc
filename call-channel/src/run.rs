//! Either end in a loop of its own.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ExitStatus};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use rustix::process::{pidfd_open, Pid, PidfdFlags};

use crate::channel::Channel;
use crate::client::Client;
use crate::port::Port;
use crate::service::{Service, Step};
use crate::{Broken, Came, Slot, Streams, NOTHING_CAME, SLOTS};

/// What ends a call besides its two ends.
#[derive(Debug, Default, Clone, Copy)]
pub struct Watch<'a> {
    /// Readable or hung up: whoever wanted the call does not any more.
    pub until: Option<BorrowedFd<'a>>,
    /// Of whoever has the peer come to a client. Readable: it will not, unless it has said its Hello by then; from there on only the hang-up counts.
    pub broker: Option<BorrowedFd<'a>>,
    /// When the peer has to have said its Hello.
    pub hello_by: Option<Instant>,
}

/// A program that answers a call.
pub struct Running {
    /// The other ends of its pipes.
    pub streams: Streams,
    /// How it ends.
    pub exit: Box<dyn Exit>,
}

/// How a program ends. Its descriptor is readable once it has.
pub trait Exit: AsFd {
    /// Its status, 128 + N for signal N; `None`: it has not ended.
    fn status(&mut self) -> io::Result<Option<i32>>;
}

struct ChildExit {
    child: Child,
    pidfd: OwnedFd,
}

impl Running {
    /// A child, with those of its pipes that it was given.
    pub fn of(mut child: Child) -> io::Result<Running> {
        let own = |fd: Option<OwnedFd>| fd.map(Port::own).transpose();
        let streams = Streams {
            stdin: own(child.stdin.take().map(OwnedFd::from))?,
            stdout: own(child.stdout.take().map(OwnedFd::from))?,
            stderr: own(child.stderr.take().map(OwnedFd::from))?,
        };
        let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?;
        Ok(Running { streams, exit: Box::new(ChildExit { child, pidfd }) })
    }
}

impl AsFd for ChildExit {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

impl Exit for ChildExit {
    fn status(&mut self) -> io::Result<Option<i32>> {
        Ok(self.child.try_wait()?.map(status))
    }
}

/// The status as a shell would give it.
pub fn status(exit: ExitStatus) -> i32 {
    exit.code().or(exit.signal().map(|signal| 128 + signal)).unwrap_or(255)
}

/// Carries a call from the end that asked for it, until it is over: the service's exit code.
pub fn run_client<C: Channel>(channel: C, streams: Streams, watch: Watch<'_>) -> Result<i32, Broken> {
    let mut client = Client::new(channel, streams);
    let mut came = NOTHING_CAME;
    let mut told = PollFlags::empty();
    loop {
        if let Some(exit) = client.turn(came)? {
            return Ok(exit);
        }
        // What the peer had said before the broker spoke has been heard now.
        let readable = told.contains(PollFlags::POLLIN);
        if readable && !client.has_agreed() {
            return Err(Broken::NotMet);
        }
        if !readable && !told.is_empty() {
            return Err(Broken::HungUp);
        }
        let hello_by = watch.hello_by.filter(|_| !client.has_agreed());
        let wanted = if client.has_agreed() { PollFlags::empty() } else { PollFlags::POLLIN };
        let ready = client.is_ready();
        (came, told) =
            wait(client.slots(), watch, watch.broker.map(|broker| (broker, wanted)), ready, hello_by)?;
        if told.is_empty() {
            late(hello_by)?;
        }
    }
}

/// Carries a call from the end where it is answered. `start` is called once the peer is there, and gives what runs, or the exit code if nothing
/// does. When this returns, the exit code is with the peer; a broken call leaves the program to whoever started it.
pub fn run_service<C: Channel>(
    channel: C,
    start: impl FnOnce() -> Result<Running, i32>,
    watch: Watch<'_>,
) -> Result<i32, Broken> {
    let mut service = Service::new(channel);
    let (mut start, mut exit, mut status) = (Some(start), None::<Box<dyn Exit>>, 0);
    let mut came = NOTHING_CAME;
    loop {
        match service.turn(came)? {
            Step::Over => return Ok(status),
            Step::On => {}
            Step::Agreed => match start.take().map(|start| start()) {
                Some(Ok(running)) => {
                    service.begin(running.streams);
                    exit = Some(running.exit);
                }
                Some(Err(code)) => {
                    service.end(code);
                    status = code;
                }
                None => {}
            },
        }
        let hello_by = watch.hello_by.filter(|_| !service.has_agreed());
        let deadline = service.deadline().into_iter().chain(hello_by).min();
        let ready = service.is_ready();
        let also = exit.as_deref().map(|exit| (exit.as_fd(), PollFlags::POLLIN));
        let ended;
        (came, ended) = wait(service.slots(), watch, also, ready, deadline)?;
        late(hello_by)?;
        let code = exit
            .as_mut()
            .filter(|_| !ended.is_empty())
            .map(|exit| exit.status())
            .transpose()
            .map_err(Broken::Wait)?;
        if let Some(code) = code.flatten() {
            (exit, status) = (None, code);
            service.end(code);
        }
    }
}

fn late(by: Option<Instant>) -> Result<(), Broken> {
    match by.is_some_and(|by| Instant::now() >= by) {
        true => Err(Broken::Late),
        false => Ok(()),
    }
}

/// Waits for a slot, for `also`, or until a time: what came at the slots, and what at `also`.
fn wait(
    slots: [Slot<'_>; SLOTS],
    watch: Watch<'_>,
    also: Slot<'_>,
    at_once: bool,
    deadline: Option<Instant>,
) -> Result<(Came, PollFlags), Broken> {
    let until = watch.until.map(|fd| (fd, PollFlags::POLLIN));
    let all: Vec<Slot<'_>> = slots.into_iter().chain([until, also]).collect();
    let mut polled: Vec<PollFd<'_>> =
        all.iter().flatten().map(|(fd, flags)| PollFd::new(*fd, *flags)).collect();
    match poll(&mut polled, timeout(at_once, deadline)) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(errno) => return Err(Broken::Wait(errno.into())),
    }
    let mut polled = polled.iter();
    let mut came = all.iter().map(|slot| {
        let polled = slot.as_ref().and_then(|_| polled.next());
        polled.and_then(|polled| polled.revents()).unwrap_or(PollFlags::empty())
    });
    let mut next = || came.next().unwrap_or(PollFlags::empty());
    let at_slots = std::array::from_fn(|_| next());
    if !next().is_empty() {
        return Err(Broken::HungUp);
    }
    Ok((at_slots, next()))
}

fn timeout(at_once: bool, deadline: Option<Instant>) -> PollTimeout {
    match deadline {
        _ if at_once => PollTimeout::ZERO,
        None => PollTimeout::NONE,
        Some(deadline) => {
            let left = deadline.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        }
    }
}
