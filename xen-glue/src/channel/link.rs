//! A connected vchan, and how one is got from an offer.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use vchan::end::{read_grants, read_layout, End};
use vchan::layout::at;
use vchan::shared::Shared;

use super::offer::Offer;
use crate::hypercalls::{DomId, Hypercalls, Shutdown};
use crate::sys::evtchn::EventChannel;
use crate::sys::gntdev::Gntdev;
use crate::sys::Privcmd;

/// How one end of a vchan tells the other to look.
pub trait Bell: AsFd + Send {
    /// Rings at the other end. A failure shows as its silence.
    fn ring(&self);
    /// Takes notice of having been rung.
    fn hear(&self);
}

/// A connected vchan. The order of the fields is that in which it ends: pages are unmapped before their device is closed.
pub struct Link {
    /// The rings.
    pub end: End,
    /// The event channel.
    pub bell: Box<dyn Bell>,
    /// What must outlive the mapping.
    pub keep: Option<Gntdev>,
}

impl Link {
    /// Rings if the other end has asked for it.
    pub fn tell(&self, wanted: bool) {
        if wanted {
            self.bell.ring();
        }
    }

    /// Says good-bye; dropping the link does the rest.
    pub fn hang_up(&self) {
        self.end.hang_up();
        self.bell.ring();
    }
}

/// The way to a guest.
pub trait Reach: Send {
    /// Connects to what it offers. An error: this is no offer, or not any more.
    fn connect(&self, offer: Offer) -> io::Result<Link>;
    /// Whether the guest will never run again, whatever xenstore says.
    fn is_over(&self) -> bool;
}

/// By grants and event channels.
pub struct XenReach {
    domid: DomId,
    privcmd: Option<Privcmd>,
}

impl XenReach {
    /// To a domain.
    pub fn new(domid: DomId) -> XenReach {
        // Without it the domain's node in xenstore alone tells whether it is there.
        XenReach { domid, privcmd: Privcmd::open().ok().flatten() }
    }
}

impl Reach for XenReach {
    fn connect(&self, offer: Offer) -> io::Result<Link> {
        let gntdev = Gntdev::open()?;
        let (place, mapping) = gntdev.map(self.domid, &[offer.grant])?;
        let page = Shared::new(mapping);
        let layout = read_layout(&page).map_err(io::Error::other)?;
        let (left, right) = read_grants(&page, &layout);
        let ring = |grants: &[u32]| -> io::Result<Option<Shared>> {
            if grants.is_empty() {
                return Ok(None);
            }
            gntdev.map(self.domid, grants).map(|(_, mapping)| Some(Shared::new(mapping)))
        };
        let (left, right) = (ring(&left)?, ring(&right)?);
        let bell = EventChannel::bind(self.domid, offer.port)?;
        let end = End::connect(page, left, right, layout).map_err(io::Error::other)?;
        // Only now: a stale offer's byte is not ours to clear.
        gntdev.clear_at_end(place + at::CLI_LIVE as u64, bell.port())?;
        let link = Link { end, bell: Box::new(bell), keep: Some(gntdev) };
        link.bell.ring();
        Ok(link)
    }

    fn is_over(&self) -> bool {
        let Some(privcmd) = &self.privcmd else { return false };
        match privcmd.info(self.domid) {
            Ok(Some(info)) => info.is_dying() || info.shutdown().is_some_and(|why| why != Shutdown::Suspend),
            Ok(None) => true,
            Err(_) => false,
        }
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

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}
