//! What calls between dom0 and one guest need of Xen where each has a vchan of its own, as Qubes' qrexec has it: the channel of the guest's agent,
//! and the nodes by which the guest finds what dom0 serves.
//!
//! Invariant: the nodes are readable by that guest alone, and gone with the domain at the latest
//! ([`crate::xenstore::domain::withdraw`]), whoever wrote them.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use vchan::link::{self, Link, Offer};
use vchan::{EVENT_CHANNEL, RING_REF};

use crate::channel::offer::{News, Nook, Place};
use crate::channel::Channel;
use crate::host::XenHost;
use crate::hypercalls::DomId;
use crate::xenstore::domain::vchans;
use crate::xenstore::{Access, Node, Nodes, Perm, Xenstore};

/// Between an offer that is none and the next look.
const PAUSE: Duration = Duration::from_millis(10);

/// A guest that runs.
pub struct CallGuest {
    domid: DomId,
    store: Xenstore,
}

impl XenHost {
    /// The domain of one of our slots; `None`: there is none that lives.
    pub fn call_guest(&self, slot: u32) -> io::Result<Option<CallGuest>> {
        let domains = self.hypercalls().list().map_err(io::Error::other)?;
        let is_it = |uuid| self.owner().slot(uuid) == Some(slot);
        let found = domains.iter().find(|domain| is_it(&domain.uuid) && !domain.is_dying());
        let Some(domid) = found.map(|domain| domain.domid) else { return Ok(None) };
        Ok(Some(CallGuest { domid, store: Xenstore::open().map_err(io::Error::other)? }))
    }
}

impl CallGuest {
    /// Over a connection to xenstored.
    pub fn over(domid: DomId, store: Xenstore) -> CallGuest {
        CallGuest { domid, store }
    }

    /// The domain.
    pub fn domid(&self) -> DomId {
        self.domid
    }

    /// Begins to look for the channel of Qubes' agent: see [`Channel::open`].
    pub fn control(&self) -> io::Result<(UnixStream, Channel)> {
        Channel::open(self.domid, Place::port(vchan::QREXEC_PORT))
    }

    /// Tells the guest of what is served to it at a port of dom0's. Whoever sees the grant can read the event channel.
    pub fn publish(&self, port: u32, offer: Offer) -> io::Result<()> {
        let readable = [Perm::new(0, Access::None), Perm::new(self.domid.0, Access::Read)];
        let node =
            |name: &str, value: u32| Node::new(format!("{}/{name}", self.path(port)), value).with(&readable);
        let nodes = [node(EVENT_CHANNEL, offer.port), node(RING_REF, offer.grant)];
        self.store.write_all(&nodes).map_err(io::Error::other)
    }

    /// Takes that back.
    pub fn withdraw(&self, port: u32) -> io::Result<()> {
        self.store.rm(&self.path(port)).map_err(io::Error::other)
    }

    fn path(&self, port: u32) -> String {
        format!("{}/{port}", vchans(self.domid))
    }
}

/// Waits for what a domain serves to dom0 at a port, and connects to it. An error: `until` is readable, or the time is over.
pub fn meet(domid: DomId, port: u16, until: BorrowedFd<'_>, deadline: Instant) -> io::Result<Link> {
    let store = Xenstore::open().map_err(io::Error::other)?;
    let nook = Nook::new(store, domid, Place::port(port)).map_err(io::Error::other)?;
    loop {
        if let Some(offer) = nook.offer().map_err(io::Error::other)? {
            match link::connect(domid.0, offer) {
                Ok(link) => return Ok(link),
                // What one before it has left is no offer: there may be another. A guest that writes others without end waits as well.
                Err(_) => std::thread::sleep(PAUSE),
            }
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        // Looked for before sleeping: what came between the answers above wakes nobody any more.
        let news = nook.news().map_err(io::Error::other)? != News::default();
        let timeout =
            PollTimeout::try_from(if news { Duration::ZERO } else { left }).unwrap_or(PollTimeout::MAX);
        let mut polled =
            [PollFd::new(nook.store().as_fd(), PollFlags::POLLIN), PollFd::new(until, PollFlags::POLLIN)];
        match poll(&mut polled, timeout) {
            Err(Errno::EINTR) | Ok(_) => {}
            Err(errno) => return Err(errno.into()),
        }
        let ended = polled.get(1).and_then(|slot| slot.any());
        if ended.unwrap_or(true) {
            return Err(io::ErrorKind::Interrupted.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypercalls::Uuid;
    use crate::xenstore::simulated::Simulated;

    #[test]
    fn what_is_served_is_the_guests_to_read_and_gone_with_its_call_or_the_domain() {
        let xenstore = Simulated::new();
        let guest = CallGuest::over(DomId(7), xenstore.connect());
        let store = xenstore.connect();
        for port in [513, 514] {
            guest.publish(port, Offer { grant: 9, port: 5 }).unwrap();
            let ring_ref = format!("/local/domain/0/data/vchan/7/{port}/ring-ref");
            assert_eq!(store.read(&ring_ref).unwrap().as_deref(), Some("9"));
            let perms: Vec<String> = store.perms(&ring_ref).unwrap().iter().map(Perm::to_string).collect();
            assert_eq!(perms, ["n0", "r7"]);
        }
        guest.withdraw(513).unwrap();
        guest.withdraw(513).unwrap();
        assert_eq!(store.list("/local/domain/0/data/vchan/7").unwrap(), ["514"]);
        crate::xenstore::domain::withdraw(&store, DomId(7), &Uuid([1; 16])).unwrap();
        assert_eq!(store.list("/local/domain/0/data/vchan").unwrap(), [""; 0]);
    }
}
