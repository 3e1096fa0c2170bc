<<<<<<< HEAD
//! A connected vchan: the guest's pages mapped, its event channel bound.
=======
//! A connected vchan, and how one is got from an offer.
>>>>>>> vchan

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

<<<<<<< HEAD
use vchan::end::{read_grants, read_layout, End, NoEnd, Peer, RingPages, Want};
use vchan::shared::Shared;

use crate::hypercalls::DomId;
use crate::sys::evtchn::EventChannel;
use crate::sys::gntdev::{self, Grants, GRANTS_MAX};

/// The client's end. Dropping it unmaps the pages, at which the kernel tells the guest that we have gone.
pub struct Link {
    end: End,
    events: EventChannel,
    _page: Grants,
}

impl Link {
    /// Takes an offer. `None`: it is a stale one, of which another host has been the client.
    pub fn connect(domid: DomId, ring_ref: u32, event_channel: u32) -> io::Result<Option<Link>> {
        let (grants, page) = gntdev::map(domid, &[ring_ref])?;
        let page = Shared::new(page);
        let layout = read_layout(&page).map_err(io::Error::other)?;
        let (left, right) = read_grants(&page, &layout);
        let left = ring_pages(domid, &left, layout.left_pages())?;
        let right = ring_pages(domid, &right, layout.right_pages())?;
        let end = match End::connect(page, left, right, layout) {
            Err(NoEnd::Stale) => return Ok(None),
            other => other.map_err(io::Error::other)?,
        };
        let events = EventChannel::bind(domid, event_channel)?;
        grants.on_unmap(end.live_at(), events.port())?;
        events.notify()?;
        Ok(Some(Link { end, events, _page: grants }))
    }

    /// Reads what there is.
    pub fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let (count, tell) = self.end.read(buffer).map_err(io::Error::other)?;
        self.tell(tell)?;
        Ok(count)
    }

    /// Writes what fits.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let (count, tell) = self.end.write(bytes).map_err(io::Error::other)?;
        self.tell(tell)?;
        Ok(count)
    }

    /// Whether what is wanted is there; if not, the guest tells when it is.
    pub fn ask(&self, want: Want) -> io::Result<bool> {
        self.end.ask(want).map_err(io::Error::other)
    }

    /// Whether the guest has read all that was written.
    pub fn is_read(&self) -> io::Result<bool> {
        self.end.unread().map(|count| count == 0).map_err(io::Error::other)
    }

    /// Whether the guest's end has gone.
    pub fn is_gone(&self) -> bool {
        self.end.peer() == Peer::Gone
    }

    /// Takes the events that have come.
    pub fn clear(&self) -> io::Result<()> {
        self.events.clear()
    }

    fn tell(&self, tell: bool) -> io::Result<()> {
        if tell {
            self.events.notify()?;
        }
        Ok(())
=======
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
>>>>>>> vchan
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
<<<<<<< HEAD
        self.events.as_fd()
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.end.hang_up();
        let _ = self.events.notify();
    }
}

/// The pages of a ring of its own. The guest names them, so their number is checked before anything is mapped.
fn ring_pages(domid: DomId, grants: &[u32], wanted: usize) -> io::Result<RingPages> {
    if wanted == 0 {
        return Ok(None);
    }
    let grants = grants.get(..wanted.min(GRANTS_MAX)).filter(|grants| grants.len() == wanted);
    let grants = grants.ok_or_else(|| io::Error::other("the vchan names fewer pages than its rings have"))?;
    let (_, pages) = gntdev::map(domid, grants)?;
    Ok(Some(Shared::new(pages)))
}
=======
        self.bell.as_fd()
    }
}
>>>>>>> vchan
