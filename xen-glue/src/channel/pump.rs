<<<<<<< HEAD
//! The thread that carries bytes between a vchan and a socket.
//!
//! Phases: waiting for the guest's offer → connected → over. Told to let go, it goes from connected to waiting for the guest to take its
//! offer back, answers, and is over.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use vchan::end::Want;
use vchan::{EVENT_CHANNEL, OFFER, REQUEST, RING_REF};

use super::link::Link;
use super::{DONE, LET_GO};
use crate::hypercalls::DomId;
use crate::xenstore::domain::home;
use crate::xenstore::{Nodes, Xenstore, XenstoreError};

/// Bytes held each way.
pub const BUFFER_BYTES: usize = 64 << 10;
/// The token of our watch.
const TOKEN: &str = "offer";

/// What runs on the thread.
pub struct Pump {
    domid: DomId,
    store: Xenstore,
    socket: UnixStream,
    commands: UnixStream,
    connected: Arc<OnceLock<Instant>>,
    to_guest: Bytes,
    to_host: Bytes,
}

/// Bytes on their way.
#[derive(Default)]
struct Bytes {
    buffer: Vec<u8>,
    done: usize,
}

/// What one who commands us wants.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Command {
    None,
    LetGo,
    End,
}

impl Pump {
    /// Over a socket whose other end is somebody's.
    pub fn new(
        domid: DomId,
        socket: UnixStream,
        commands: UnixStream,
        connected: Arc<OnceLock<Instant>>,
    ) -> io::Result<Pump> {
        socket.set_nonblocking(true)?;
        commands.set_nonblocking(true)?;
        let store = Xenstore::open().map_err(io::Error::other)?;
        Ok(Pump {
            domid,
            store,
            socket,
            commands,
            connected,
            to_guest: Bytes::default(),
            to_host: Bytes::default(),
        })
    }

    /// Carries until it is over; closes the socket then.
    pub fn run(mut self) {
        if let Err(error) = self.carry() {
            tracing::warn!("the channel to the agent of domain {} broke: {error}", self.domid);
        }
    }

    fn carry(&mut self) -> io::Result<()> {
        self.store.watch(&self.offer(), TOKEN).map_err(io::Error::other)?;
        self.ask_for_offer().map_err(io::Error::other)?;
        let Some(mut link) = self.await_offer()? else { return Ok(()) };
        let _ = self.connected.set(Instant::now());
        if self.exchange(&mut link)? == Command::LetGo {
            drop(link);
            self.await_withdrawal()?;
            (&self.commands).write_all(&[DONE])?;
        }
        Ok(())
    }

    fn offer(&self) -> String {
        format!("{}/{OFFER}", home(self.domid))
    }

    /// Counts the request up where no offer is: see the crate `vchan`.
    fn ask_for_offer(&self) -> Result<(), XenstoreError> {
        let (offer, request) =
            (format!("{}/{RING_REF}", self.offer()), format!("{}/{REQUEST}", home(self.domid)));
        self.store.transaction("ask a guest for its channel", |tx| {
            if tx.read(&offer)?.is_some() {
                return Ok(());
            }
            // A guest can have written anything here.
            let count: u32 = tx.read(&request)?.and_then(|count| count.parse().ok()).unwrap_or(0);
            tx.write(&request, &count.wrapping_add(1).to_string())
        })
    }

    /// Connects to the guest's offer as soon as there is one. `None`: nobody wants it any more.
    fn await_offer(&mut self) -> io::Result<Option<Link>> {
        loop {
            if let Some((ring_ref, event_channel)) = self.read_offer().map_err(io::Error::other)? {
                if let Some(link) = Link::connect(self.domid, ring_ref, event_channel)? {
                    return Ok(Some(link));
                }
            }
            let [store, command, socket] = wait([
                (self.store.as_fd(), true),
                (self.commands.as_fd(), true),
                (self.socket.as_fd(), false),
            ])?;
            if command {
                match self.command()? {
                    Command::LetGo => (&self.commands).write_all(&[DONE])?,
                    Command::None => continue,
                    Command::End => {}
                }
                return Ok(None);
            }
            if socket {
                return Ok(None);
            }
            if store {
                while self.store.next_event().map_err(io::Error::other)?.is_some() {}
=======
//! The thread of a channel: finds the guest's offer, connects, carries, lets go.

use std::io;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};

use super::carry::{Carrier, Going};
use super::link::{Link, Reach};
use super::offer::{News, Nook};
use super::{Control, LetGoError, Order, Outcome};
use crate::hypercalls::DomId;
use crate::xenstore::wire::Op;
use crate::xenstore::XenstoreError;

/// The thread's state.
pub struct Pump {
    domid: DomId,
    nook: Nook,
    reach: Box<dyn Reach>,
    carrier: Carrier,
    control: Arc<Control>,
}

/// What woke the thread.
struct Woken {
    store: bool,
    bell: bool,
    /// This machine's side has gone, and no room in the ring is left for what it said last.
    host_gone: bool,
}

/// How a vchan ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ended {
    /// It was disconnected, or there was none.
    Parted,
    /// The guest is no more.
    Over,
}

impl Pump {
    pub fn new(
        domid: DomId,
        nook: Nook,
        reach: Box<dyn Reach>,
        stream: UnixStream,
        control: Arc<Control>,
    ) -> Pump {
        Pump { domid, nook, reach, carrier: Carrier::new(stream), control }
    }

    /// Until the guest, this machine's side or the channel's owner ends it.
    pub fn run(mut self) -> Outcome {
        let domid = self.domid;
        let served = self.serve();
        // Whatever happened: now nothing is mapped any more, and this machine's side is told.
        let _ = self.carrier.stream().shutdown(Shutdown::Both);
        let gone = served.and_then(|ended| match self.control.order() {
            Order::LetGo { deadline, .. } => self.see_it_gone(deadline),
            _ => Ok(ended == Ended::Parted),
        });
        match (gone, self.control.order()) {
            (Ok(true), _) => Ok(()),
            (Ok(false), Order::LetGo { limit, .. }) if self.nook.is_there().unwrap_or(true) => {
                Err(LetGoError::Late { domid, limit })
            }
            (Ok(false), _) => Err(LetGoError::Ended(domid)),
            (Err(source), _) => {
                tracing::warn!(%domid, error = %source, "the channel's connection to xenstore failed");
                Err(LetGoError::Xenstore { domid, source })
>>>>>>> vchan
            }
        }
    }

<<<<<<< HEAD
    fn read_offer(&self) -> Result<Option<(u32, u32)>, XenstoreError> {
        let offer = self.offer();
        let number = |name: &str| -> Result<Option<u32>, XenstoreError> {
            Ok(self.store.read(&format!("{offer}/{name}"))?.and_then(|value| value.trim().parse().ok()))
        };
        let Some(ring_ref) = number(RING_REF)? else { return Ok(None) };
        Ok(number(EVENT_CHANNEL)?.map(|port| (ring_ref, port)))
    }

    /// Carries bytes until somebody hangs up or commands otherwise.
    fn exchange(&mut self, link: &mut Link) -> io::Result<Command> {
        let (mut letting_go, mut closed) = (false, false);
        loop {
            link.clear()?;
            let gone = link.is_gone();
            while self.carry_to_host(link)? {}
            if closed || letting_go {
                while self.to_guest.pour(|bytes| link.write(bytes))? {}
            } else {
                closed = self.carry_to_guest(link)?;
            }
            if letting_go && self.to_guest.is_empty() && self.to_host.is_empty() && link.is_read()? {
                return Ok(Command::LetGo);
            }
            if gone && self.to_host.is_empty() || closed && self.to_guest.is_empty() {
                return Ok(Command::End);
            }
            // What is asked for here and there already is not told: look again.
            let more = (self.to_host.is_empty() && link.ask(Want::Bytes)?)
                | (!self.to_guest.is_empty() && link.ask(Want::Room)?);
            if more || link.is_gone() != gone {
                continue;
            }
            let take = !closed && !letting_go && self.to_guest.is_empty();
            let [_, command, _] = self.wait_for_more(link, take)?;
            if command {
                match self.command()? {
                    Command::LetGo => letting_go = true,
                    Command::End => return Ok(Command::End),
                    Command::None => {}
                }
            }
        }
    }

    fn wait_for_more(&self, link: &Link, take: bool) -> io::Result<[bool; 3]> {
        let mut socket = PollFlags::empty();
        socket.set(PollFlags::POLLIN, take);
        socket.set(PollFlags::POLLOUT, !self.to_host.is_empty());
        let mut fds = [
            PollFd::new(link.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.commands.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.socket.as_fd(), socket),
        ];
        poll_all(&mut fds)
    }

    /// From the ring to the socket; whether anything moved.
    fn carry_to_host(&mut self, link: &mut Link) -> io::Result<bool> {
        let mut moved = false;
        if self.to_host.is_empty() {
            moved |= self.to_host.fill(|buffer| link.read(buffer))? > 0;
        }
        let socket = &self.socket;
        Ok(self.to_host.pour(|bytes| would_block_is_none((&mut &*socket).write(bytes)))? || moved)
    }

    /// From the socket to the ring, as much as either gives and takes. `true`: nobody writes to the socket any more.
    fn carry_to_guest(&mut self, link: &mut Link) -> io::Result<bool> {
        loop {
            if self.to_guest.is_empty() {
                let (socket, mut ended) = (&self.socket, false);
                let count = self.to_guest.fill(|buffer| match (&mut &*socket).read(buffer) {
                    Ok(0) => {
                        ended = true;
                        Ok(0)
                    }
                    other => would_block_is_none(other),
                })?;
                if count == 0 {
                    return Ok(ended);
                }
            }
            if !self.to_guest.pour(|bytes| link.write(bytes))? {
                return Ok(false);
            }
        }
    }

    fn command(&self) -> io::Result<Command> {
        let mut byte = [0];
        match (&mut &self.commands).read(&mut byte) {
            Ok(0) => Ok(Command::End),
            Ok(_) if byte[0] == LET_GO => Ok(Command::LetGo),
            Ok(_) => Ok(Command::None),
            Err(error) => would_block_is_none(Err(error)).map(|_| Command::None),
        }
    }

    /// Waits until the guest has taken its offer back: it holds nothing of the channel then.
    fn await_withdrawal(&self) -> io::Result<()> {
        let ring_ref = format!("{}/{RING_REF}", self.offer());
        loop {
            if self.store.read(&ring_ref).map_err(io::Error::other)?.is_none() {
                return Ok(());
            }
            let [_, command, _] = wait([
                (self.store.as_fd(), true),
                (self.commands.as_fd(), true),
                (self.socket.as_fd(), false),
            ])?;
            if command && self.command()? == Command::End {
                return Ok(());
            }
            while self.store.next_event().map_err(io::Error::other)?.is_some() {}
        }
    }
}

impl Bytes {
    fn is_empty(&self) -> bool {
        self.done == self.buffer.len()
    }

    /// Takes what `from` gives. Legal when empty.
    fn fill(&mut self, from: impl FnOnce(&mut [u8]) -> io::Result<usize>) -> io::Result<usize> {
        self.buffer.resize(BUFFER_BYTES, 0);
        self.done = 0;
        let count = from(&mut self.buffer);
        self.buffer.truncate(count.as_ref().map_or(0, |count| *count));
        count
    }

    /// Gives `to` what is there; whether it took anything.
    fn pour(&mut self, to: impl FnOnce(&[u8]) -> io::Result<usize>) -> io::Result<bool> {
        if self.is_empty() {
            return Ok(false);
        }
        let count = to(&self.buffer[self.done..])?;
        self.done += count;
        Ok(count > 0)
    }
}

fn would_block_is_none(result: io::Result<usize>) -> io::Result<usize> {
    match result {
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(0),
        other => other,
    }
}

/// Waits for one of three; a hang-up counts, whether or not one is to be read.
fn wait(of: [(BorrowedFd<'_>, bool); 3]) -> io::Result<[bool; 3]> {
    let mut fds =
        of.map(|(fd, read)| PollFd::new(fd, if read { PollFlags::POLLIN } else { PollFlags::empty() }));
    poll_all(&mut fds)
}

fn poll_all(fds: &mut [PollFd<'_>; 3]) -> io::Result<[bool; 3]> {
    match poll(fds, PollTimeout::NONE) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(errno) => return Err(errno.into()),
    }
    Ok([0, 1, 2].map(|at| fds[at].revents().is_some_and(|events| !events.is_empty())))
}
=======
    fn serve(&mut self) -> Result<Ended, XenstoreError> {
        let mut link = match self.meet()? {
            Ok(link) => link,
            Err(ended) => return Ok(ended),
        };
        let _ = self.control.connected.set(Instant::now());
        let ended = self.carry(&mut link);
        link.hang_up();
        ended
    }

    /// Waits for an offer that can be connected to, or tells how it ended before.
    fn meet(&mut self) -> Result<Result<Link, Ended>, XenstoreError> {
        let mut asked = false;
        while !self.is_over()? {
            match self.nook.offer()? {
                Some(offer) => match self.reach.connect(offer) {
                    Ok(link) => return Ok(Ok(link)),
                    // One that has just been let go, or a lie: the next is told by the watch.
                    Err(error) => tracing::debug!(domid = %self.domid, %error, "no vchan behind the offer"),
                },
                None if !asked => {
                    self.nook.ask()?;
                    asked = true;
                }
                None => {}
            }
            let mut news = News::default();
            while news == News::default() {
                if self.control.order() != Order::Carry || self.sleep(None, None)?.host_gone {
                    return Ok(Err(Ended::Parted));
                }
                news = self.nook.news()?;
            }
            // The request is met then; when this offer ends, the next is to be asked for.
            asked &= !self.nook.stands()?;
        }
        Ok(Err(Ended::Over))
    }

    fn carry(&mut self, link: &mut Link) -> Result<Ended, XenstoreError> {
        while self.carrier.carry(link) == Going::On {
            let deadline = match self.control.order() {
                Order::Carry => None,
                Order::Stop => break,
                Order::LetGo { deadline, .. } => Some(deadline),
            };
            if deadline.is_some_and(|deadline| self.carrier.is_quiet(link) || Instant::now() >= deadline) {
                break;
            }
            let woken = self.sleep(Some(link), deadline)?;
            if woken.host_gone {
                break;
            }
            if woken.bell {
                link.bell.hear();
            }
            if woken.store && self.nook.news()?.domains && self.is_over()? {
                // What it said last is still in the ring.
                self.carrier.carry(link);
                return Ok(Ended::Over);
            }
        }
        Ok(Ended::Parted)
    }

    fn is_over(&self) -> Result<bool, XenstoreError> {
        Ok(self.reach.is_over() || !self.nook.is_there()?)
    }

    /// Waits until the guest's nodes are gone, but not the guest. `false`: time is over, or the guest is.
    fn see_it_gone(&self, deadline: Instant) -> Result<bool, XenstoreError> {
        while self.nook.stands()? {
            if Instant::now() >= deadline || self.control.order() == Order::Stop {
                return Ok(false);
            }
            let mut slots = [
                PollFd::new(self.nook.store().as_fd(), PollFlags::POLLIN),
                PollFd::new(self.control.wake.as_fd(), PollFlags::POLLIN),
            ];
            wait(&mut slots, Some(deadline), false)?;
            let _ = self.control.wake.read();
            self.nook.news()?;
        }
        self.nook.is_there()
    }

    fn sleep(&self, link: Option<&Link>, deadline: Option<Instant>) -> Result<Woken, XenstoreError> {
        let waits = link.map(|link| self.carrier.waits(link)).unwrap_or_default();
        let mut stream = PollFlags::empty();
        stream.set(PollFlags::POLLIN, waits.socket_bytes);
        stream.set(PollFlags::POLLOUT, waits.socket_room);
        let mut slots = vec![
            PollFd::new(self.nook.store().as_fd(), PollFlags::POLLIN),
            PollFd::new(self.control.wake.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.carrier.stream().as_fd(), stream),
        ];
        slots.extend(link.map(|link| PollFd::new(link.as_fd(), PollFlags::POLLIN)));
        wait(&mut slots, deadline, waits.nothing)?;
        // Empty when something else woke the thread.
        let _ = self.control.wake.read();
        let came = |at: usize| slots.get(at).and_then(|slot| slot.revents()).unwrap_or(PollFlags::empty());
        let hangup = came(2).intersects(PollFlags::POLLHUP | PollFlags::POLLERR);
        Ok(Woken {
            store: !came(0).is_empty(),
            bell: !came(3).is_empty(),
            host_gone: hangup && !waits.socket_bytes,
        })
    }
}

/// Waits for one of the slots.
fn wait(slots: &mut [PollFd<'_>], deadline: Option<Instant>, at_once: bool) -> Result<(), XenstoreError> {
    let timeout = match deadline {
        _ if at_once => PollTimeout::ZERO,
        None => PollTimeout::NONE,
        Some(deadline) => {
            let left = deadline.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        }
    };
    match poll(slots, timeout) {
        // What was looked for is looked for again.
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(errno) => {
            let source = io::Error::from(errno);
            Err(XenstoreError::Io { op: Op::WatchEvent, path: "any node".to_owned(), source })
        }
    }
}
>>>>>>> vchan
