//! A connected vchan: the guest's pages mapped, its event channel bound.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

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
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
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
