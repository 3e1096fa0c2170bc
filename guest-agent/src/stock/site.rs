//! Where vchans are: this guest's own offers, and those of others.

use std::io::{self, ErrorKind};

use call_channel::Channel;
use qrexec::stock::control::Endpoint;
use vchan::devices::gntdev::Gntdev;
use vchan::layout::Orders;
use vchan::link::{self, Link, Offer};
use vchan::{EVENT_CHANNEL, RING_REF};

use crate::port::xenbus::{Request, Xenbus};
use crate::sys::PollSlot;

/// What vchans are made by. Failures of what takes something back show as its being there still.
pub trait Site: Sized {
    /// A vchan's end.
    type Link: Channel;

    /// Finds it.
    fn open() -> io::Result<Self>;
    /// Offers dom0 the control channel. `None`: another agent's offer stands.
    fn offer(&mut self) -> io::Result<Option<Self::Link>>;
    /// Takes the offer back. Legal when nothing of it is held any more.
    fn withdraw(&mut self);
    /// Connects to what another domain serves at this port, if it does.
    fn connect(&mut self, endpoint: Endpoint) -> Option<Self::Link>;
    /// Begins to watch for that: [`hear`](Self::hear) tells of it.
    fn watch(&mut self, endpoint: Endpoint) -> io::Result<()>;
    /// Watches no more, if it did.
    fn unwatch(&mut self, endpoint: Endpoint);
    /// Serves a vchan to another domain at this port.
    fn serve(&mut self, endpoint: Endpoint) -> io::Result<Self::Link>;
    /// Takes that back, if there was such a thing. Legal when nothing of it is held any more.
    fn end_serving(&mut self, endpoint: Endpoint);
    /// Forgets a link that a suspend has ended.
    fn abandon(&mut self, link: Self::Link);
    /// A slot of poll: readable when there may be news.
    fn slot(&self) -> PollSlot;
    /// Whether there are news already.
    fn has_news(&self) -> bool;
    /// Takes the news. An error: there will be none any more.
    fn hear(&mut self) -> io::Result<()>;
}

/// Where the control channel is offered, as Qubes' agent has it: `data/vchan/<dom0>/512`.
const CONTROL: &str = "data/vchan/0/512";
/// A node there by which this agent knows its own: what it finds when it starts anew, one that was killed has left.
const MARK: &str = "data/vchan/0/512/dispvm";
const HOST: u16 = 0;
/// A page each way: its messages are few.
const CONTROL_ORDERS: Orders = Orders { left: 12, right: 12 };
/// 32 KiB each way: a guest has a thousand grants to give with gntalloc, and 64 calls.
const CALL_ORDERS: Orders = Orders { left: 15, right: 15 };

/// Xen's. A connection to xenstored of its own: what it waits for is not what the agent's port waits for.
pub struct XenSite {
    xenbus: Xenbus,
    domid: u16,
    watched: Vec<Endpoint>,
    served: Vec<Endpoint>,
}

impl XenSite {
    fn write_offer(&mut self, folder: &str, offer: Offer, reader: u16) -> io::Result<()> {
        let mut requests = Vec::new();
        for (name, value) in [(EVENT_CHANNEL, offer.port), (RING_REF, offer.grant)] {
            let path = format!("{folder}/{name}");
            requests.push(Request::write(&path, &value.to_string()));
            // Dom0 may read all of it.
            if reader != HOST {
                requests
                    .push(Request::set_perms(&path, &[&format!("n{}", self.domid), &format!("r{reader}")]));
            }
        }
        self.xenbus.ask(&requests).map(drop)
    }

    fn number(&mut self, path: &str) -> Option<u32> {
        let value = self.xenbus.read(path).ok()??;
        std::str::from_utf8(&value).ok()?.trim().parse().ok()
    }

    fn served_by(&self, endpoint: Endpoint) -> String {
        format!("/local/domain/{}/data/vchan/{}/{}", endpoint.domain, self.domid, endpoint.port)
    }
}

fn served_here(endpoint: Endpoint) -> String {
    format!("data/vchan/{}/{}", endpoint.domain, endpoint.port)
}

fn domid(endpoint: Endpoint) -> io::Result<u16> {
    u16::try_from(endpoint.domain).map_err(|_| ErrorKind::InvalidInput.into())
}

/// Takes an endpoint out of a list. `false`: it was not there.
fn take(list: &mut Vec<Endpoint>, endpoint: Endpoint) -> bool {
    let found = list.iter().position(|one| *one == endpoint);
    found.map(|at| list.swap_remove(at)).is_some()
}

impl Site for XenSite {
    type Link = Link;

    fn open() -> io::Result<Self> {
        // Without it nothing that dom0 serves could be connected to, and it is better told so.
        Gntdev::open().map_err(|error| io::Error::new(error.kind(), format!("/dev/xen/gntdev: {error}")))?;
        let mut site = Self { xenbus: Xenbus::open()?, domid: 0, watched: Vec::new(), served: Vec::new() };
        let domid = site.number("domid").and_then(|domid| u16::try_from(domid).ok());
        site.domid = domid.ok_or_else(|| io::Error::other("xenstore has no domid"))?;
        if site.xenbus.read(MARK)?.is_some() {
            site.withdraw();
        }
        Ok(site)
    }

    fn offer(&mut self) -> io::Result<Option<Link>> {
        if self.xenbus.read(&format!("{CONTROL}/{RING_REF}"))?.is_some() {
            return Ok(None);
        }
        let (link, offer) = link::serve(HOST, CONTROL_ORDERS)?;
        self.xenbus.ask(&[Request::write(MARK, "")])?;
        self.write_offer(CONTROL, offer, HOST)?;
        Ok(Some(link))
    }

    fn withdraw(&mut self) {
        let _ = self.xenbus.ask(&[Request::rm(CONTROL)]);
    }

    fn connect(&mut self, endpoint: Endpoint) -> Option<Link> {
        let folder = self.served_by(endpoint);
        let grant = self.number(&format!("{folder}/{RING_REF}"))?;
        let port = self.number(&format!("{folder}/{EVENT_CHANNEL}"))?;
        // What a server before has left is no offer: there may be another.
        link::connect(domid(endpoint).ok()?, Offer { grant, port }).ok()
    }

    fn watch(&mut self, endpoint: Endpoint) -> io::Result<()> {
        let path = self.served_by(endpoint);
        self.xenbus.watch(&path, &path)?;
        self.watched.push(endpoint);
        Ok(())
    }

    fn unwatch(&mut self, endpoint: Endpoint) {
        if take(&mut self.watched, endpoint) {
            let path = self.served_by(endpoint);
            let _ = self.xenbus.ask(&[Request::unwatch(&path, &path)]);
        }
    }

    fn serve(&mut self, endpoint: Endpoint) -> io::Result<Link> {
        let peer = domid(endpoint)?;
        let (link, offer) = link::serve(peer, CALL_ORDERS)?;
        self.served.push(endpoint);
        self.write_offer(&served_here(endpoint), offer, peer)?;
        Ok(link)
    }

    fn end_serving(&mut self, endpoint: Endpoint) {
        if take(&mut self.served, endpoint) {
            let _ = self.xenbus.ask(&[Request::rm(&served_here(endpoint))]);
        }
    }

    fn abandon(&mut self, link: Link) {
        link.abandon();
    }

    fn slot(&self) -> PollSlot {
        self.xenbus.slot()
    }

    fn has_news(&self) -> bool {
        self.xenbus.has_event()
    }

    fn hear(&mut self) -> io::Result<()> {
        while self.xenbus.event()?.is_some() {}
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_paths_have_the_port() {
        assert_eq!(CONTROL, format!("data/vchan/{HOST}/{}", vchan::QREXEC_PORT));
        assert!(MARK.starts_with(&format!("{CONTROL}/")));
    }
}
