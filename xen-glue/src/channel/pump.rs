//! The thread of a channel: finds the guest's offer, connects, carries, lets go.

use std::io;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use vchan::link::Link;

use super::carry::{Carrier, Going};
use super::link::Reach;
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
            }
        }
    }

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
            if self.control.order() != Order::Carry {
                return Ok(Err(Ended::Parted));
            }
            // Looked for before sleeping: what came between the answers above wakes nobody any more.
            while self.nook.news()? == News::default() {
                if self.sleep(None, None)?.host_gone || self.control.order() != Order::Carry {
                    return Ok(Err(Ended::Parted));
                }
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
                link.hear();
            }
            // Until there are no news: some may have come with the last look's answers.
            while woken.store && self.nook.news()?.domains {
                if self.is_over()? {
                    // What it said last is still in the ring.
                    self.carrier.carry(link);
                    return Ok(Ended::Over);
                }
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
            // Some may have come with the last look's answer, and wakes nobody any more.
            if self.nook.news()? != News::default() {
                continue;
            }
            let mut slots = [
                PollFd::new(self.nook.store().as_fd(), PollFlags::POLLIN),
                PollFd::new(self.control.wake.as_fd(), PollFlags::POLLIN),
            ];
            wait(&mut slots, Some(deadline), false)?;
            let _ = self.control.wake.read();
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
