//! The agent's vchan: offered to dom0, let go when dom0 has gone, offered anew. What both ends have agreed on is in crate `vchan`.
//!
//! Invariants:
//! - once a channel is let go, nothing of it is left when its nodes disappear: no grant, no event channel. A guest may be captured then;
//! - a suspend ends a channel without anyone's doing. The agent is woken by a watch on `domid`, which the guest's kernel registers
//!   again after each suspend, and compares what it has offered with what the nodes say;
//! - the files of a channel that a suspend has ended are never closed ([`Link::abandon`] says why).

use std::io::{self, ErrorKind};
use std::os::fd::AsFd;

use vchan::end::{Peer, Want};
use vchan::link::{self, Link};
use vchan::{AGENT_ORDERS, EVENT_CHANNEL, OFFER, REQUEST, RING_REF};

use super::xenbus::{Answer, Request, Xenbus};
use super::{Heard, SLOTS};
use crate::sys::{self, PollSlot};

/// Tokens of the watches.
const RESUMED: &str = "resumed";
const ASKED: &str = "asked";
/// Nobody but the toolstack writes it, and only before the guest runs.
const DOMID: &str = "domid";

/// Dom0.
const HOST: u16 = 0;

/// The port.
pub struct Vchan {
    xenbus: Xenbus,
    offer: Option<Offer>,
    /// The last request that an offer has met.
    served: Answer,
    /// A suspend has ended the channel.
    void: bool,
}

/// A channel.
struct Offer {
    link: Link,
    /// The first page's grant.
    grant: u32,
}

impl Vchan {
    /// Makes the first offer.
    pub fn open() -> io::Result<Self> {
        let mut xenbus = Xenbus::open()?;
        xenbus.watch(DOMID, RESUMED)?;
        xenbus.watch(REQUEST, ASKED)?;
        let mut port = Self { xenbus, offer: None, served: None, void: false };
        // Left by an agent that was killed.
        port.xenbus.ask(&[Request::rm(OFFER)])?;
        port.offer()?;
        Ok(port)
    }

    /// Reads what there is.
    pub fn read(&mut self, buffer: &mut [u8]) -> Heard {
        let Some(offer) = self.offer.as_mut().filter(|_| !self.void) else { return Heard::Hangup };
        // Asked first: what it wrote before it went is seen by the read then.
        let gone = offer.link.end.peer() == Peer::Gone;
        match offer.link.end.read(buffer) {
            Ok((0, _)) if gone => Heard::Hangup,
            Ok((0, _)) => Heard::Nothing,
            Ok((count, tell)) => {
                offer.link.tell(tell);
                Heard::Bytes(count)
            }
            Err(_) => Heard::Hangup,
        }
    }

    /// Writes what fits.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Some(offer) = &mut self.offer else { return Err(ErrorKind::NotConnected.into()) };
        match offer.link.end.write(bytes) {
            Ok((0, _)) if !bytes.is_empty() => Err(ErrorKind::WouldBlock.into()),
            Ok((count, tell)) => {
                offer.link.tell(tell);
                Ok(count)
            }
            Err(lie) => Err(io::Error::other(lie)),
        }
    }

    /// Lets the channel go; offers another one after a suspend, or when a host asks for it.
    pub fn wait_for_host(&mut self) -> io::Result<()> {
        self.let_go()?;
        let mut resumed = std::mem::take(&mut self.void);
        while !resumed && self.xenbus.read(REQUEST)? == self.served {
            resumed = self.xenbus.wait_for_event()? == RESUMED.as_bytes();
        }
        self.offer()
    }

    /// Slots of poll: the event channel, and xenstore.
    pub fn slots(&self) -> [PollSlot; SLOTS] {
        let bell = self.offer.as_ref().map(|offer| offer.link.as_fd());
        [sys::slot(bell, libc::POLLIN), self.xenbus.slot()]
    }

    /// Whether what is waited for is there already; has the host tell when it comes if not.
    pub fn is_ready(&self, events: i16) -> bool {
        let Some(offer) = self.offer.as_ref().filter(|_| !self.void && !self.xenbus.has_event()) else {
            return true;
        };
        let ready = |event, want| events & event != 0 && offer.link.end.ask(want).unwrap_or(true);
        ready(libc::POLLIN, Want::Bytes)
            || ready(libc::POLLOUT, Want::Room)
            || offer.link.end.peer() == Peer::Gone
    }

    /// Takes notice of what woke the agent, and tells whether to read.
    pub fn is_heard(&mut self, slots: &[PollSlot], events: i16) -> bool {
        let woken = |at: usize| slots.get(at).is_some_and(|slot| slot.revents != 0);
        if woken(0) {
            self.offer.iter().for_each(|offer| offer.link.hear());
        }
        if woken(1) || self.xenbus.has_event() {
            self.void |= self.is_void().unwrap_or(true);
        }
        let Some(offer) = self.offer.as_ref().filter(|_| !self.void) else { return true };
        let listens = events & libc::POLLIN != 0;
        offer.link.end.peer() == Peer::Gone
            || offer.link.end.readable().map_or(true, |count| listens && count > 0)
    }

    /// Whether xenstore tells of a suspend that has ended the channel.
    fn is_void(&mut self) -> io::Result<bool> {
        let mut resumed = false;
        while let Some(token) = self.xenbus.event()? {
            resumed |= token == RESUMED.as_bytes();
        }
        // A request is met by the offer that stands.
        Ok(resumed && !self.stands()?)
    }

    /// Whether the offer's nodes are what was written, or there is no offer. A suspend leaves none of them.
    fn stands(&mut self) -> io::Result<bool> {
        let Some(offer) = &self.offer else { return Ok(true) };
        let written = offer.grant.to_string().into_bytes();
        Ok(self.xenbus.read(&format!("{OFFER}/{RING_REF}"))? == Some(written))
    }

    fn offer(&mut self) -> io::Result<()> {
        let (link, vchan::link::Offer { grant, port }) = link::serve(HOST, AGENT_ORDERS)?;
        let answers = self.xenbus.ask(&[
            Request::write(&format!("{OFFER}/{EVENT_CHANNEL}"), &port.to_string()),
            Request::write(&format!("{OFFER}/{RING_REF}"), &grant.to_string()),
            Request::read(REQUEST),
        ])?;
        self.served = answers.into_iter().last().flatten();
        self.offer = Some(Offer { link, grant });
        Ok(())
    }

    /// What woke the agent may have been the host's going and a suspend after it, so xenstore is asked here too. (A suspend between its
    /// answer and the close would be missed; a host of this project's sees the offer gone before it has the guest suspend.)
    fn let_go(&mut self) -> io::Result<()> {
        self.void |= !self.stands().unwrap_or(false);
        if let Some(offer) = self.offer.take() {
            match self.void {
                true => offer.link.abandon(),
                false => offer.link.hang_up(),
            }
        }
        self.xenbus.ask(&[Request::rm(OFFER)]).map(drop)
    }
}
