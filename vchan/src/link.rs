//! A vchan with all that belongs to it: one [`End`], what keeps its pages, its event channel; made as a server or as a client.
//!
//! Invariants: the fields of a [`Link`] end in their order. Pages are unmapped before their grants are given back or returned, and the event
//! channel is there until both have told the peer by it. A link that is dropped, or whose process is killed, is one that the peer sees
//! gone: the kernel clears the live byte.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use crate::devices::evtchn::EventChannel;
use crate::devices::gntalloc::Gntalloc;
use crate::devices::gntdev::Gntdev;
use crate::end::{read_grants, read_layout, write_grants, End, RingPages, Tell};
use crate::layout::{Layout, Orders, PAGE_BYTES};

/// How one end of a vchan tells the other to look. Its descriptor is readable when it was rung from there.
pub trait Bell: AsFd + Send {
    /// Rings at the other end. A failure shows as its silence.
    fn ring(&self);
    /// Takes notice of having been rung.
    fn hear(&self);
}

/// What a server writes into xenstore, for its client to find it by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offer {
    /// The grant of the first page: `ring-ref`.
    pub grant: u32,
    /// The server's port of the event channel: `event-channel`.
    pub port: u32,
}

/// A vchan's end and its means.
pub struct Link {
    /// The rings.
    pub end: End,
    keep: Keep,
    bell: Box<dyn Bell>,
}

/// What must outlive the mapping.
#[allow(dead_code)] // Held, not read.
enum Keep {
    Nothing,
    Granted(Gntalloc),
    Mapped(Gntdev),
}

impl Link {
    /// Over pages that need no device.
    pub fn over(end: End, bell: Box<dyn Bell>) -> Link {
        Link { end, keep: Keep::Nothing, bell }
    }

    /// Rings if the other end has asked for it.
    pub fn tell(&self, wanted: Tell) {
        if wanted {
            self.bell.ring();
        }
    }

    /// Takes notice of having been rung.
    pub fn hear(&self) {
        self.bell.hear();
    }

    /// Says good-bye; dropping the link does the rest.
    pub fn hang_up(&self) {
        self.end.hang_up();
        self.bell.ring();
    }

    /// Unmaps the pages, and leaves the files open until the process ends: for a link that a suspend of this domain has ended. Linux (6.1:
    /// `drivers/xen/evtchn.c`, and `gntalloc.c` for the byte that it clears at the end) would look for the event channel by the port's number,
    /// which is nobody's after the suspend (the kernel stops with `BUG`) or another driver's (whose channel it closes).
    pub fn abandon(self) {
        std::mem::forget((self.keep, self.bell));
    }
}

impl AsFd for Link {
    /// Readable when the other end has rung.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}

impl Bell for EventChannel {
    fn ring(&self) {
        let _ = self.notify();
    }

    fn hear(&self) {
        let _ = self.take();
    }
}

/// Makes a server's end for a domain. The caller writes the offer into xenstore, the event channel before the grant.
pub fn serve(peer: u16, orders: Orders) -> io::Result<(Link, Offer)> {
    let layout = Layout::new(orders).map_err(io::Error::other)?;
    let (left, right) = (layout.left_pages(), layout.right_pages());
    let bell = EventChannel::offer(peer)?;
    let device = Gntalloc::open()?;
    let granted = device.grant(peer, 1 + left + right)?;
    let ring = |first: usize, pages: usize| -> io::Result<RingPages> {
        let place = granted.place + (first * PAGE_BYTES) as u64;
        (pages > 0).then(|| device.map(place, pages)).transpose()
    };
    let page = device.map(granted.place, 1)?;
    let (first, rings) = granted.grants.split_first().ok_or(io::ErrorKind::InvalidData)?;
    let (left_grants, right_grants) = rings.split_at_checked(left).ok_or(io::ErrorKind::InvalidData)?;
    write_grants(&page, &layout, left_grants, right_grants);
    let end = End::serve(page, ring(1, left)?, ring(1 + left, right)?, layout).map_err(io::Error::other)?;
    device.clear_at_end(granted.place + end.live_at() as u64, bell.port())?;
    let offer = Offer { grant: *first, port: bell.port() };
    Ok((Link { end, keep: Keep::Granted(device), bell: Box::new(bell) }, offer))
}

/// Connects to what a domain offers. An error: this is no offer, or not any more.
pub fn connect(peer: u16, offer: Offer) -> io::Result<Link> {
    let device = Gntdev::open()?;
    let (place, page) = device.map(peer, &[offer.grant])?;
    let layout = read_layout(&page).map_err(io::Error::other)?;
    let (left, right) = read_grants(&page, &layout);
    let ring = |grants: &[u32]| -> io::Result<RingPages> {
        (!grants.is_empty()).then(|| device.map(peer, grants).map(|(_, pages)| pages)).transpose()
    };
    let (left, right) = (ring(&left)?, ring(&right)?);
    let bell = EventChannel::bind(peer, offer.port)?;
    let end = End::connect(page, left, right, layout).map_err(io::Error::other)?;
    // Only now: a stale offer's byte is not ours to clear.
    device.clear_at_end(place + end.live_at() as u64, bell.port())?;
    let link = Link { end, keep: Keep::Mapped(device), bell: Box::new(bell) };
    link.bell.ring();
    Ok(link)
}
