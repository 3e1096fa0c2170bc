//! The guest's offer, as xenstore has it.

use vchan::link::Offer;
use vchan::{EVENT_CHANNEL, OFFER, REQUEST, RING_REF};

use crate::hypercalls::DomId;
use crate::xenstore::{Access, Node, Nodes, Perm, Xenstore, XenstoreError};

/// Tokens of the watches.
const OFFERED: &str = "offer";
const RELEASED: &str = "released";

/// Which vchan of a guest is meant. The paths are below the guest's own node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    offer: String,
    /// By what it is asked for; `None`: it comes by itself.
    request: Option<&'static str>,
}

impl Place {
    /// Our agent's own.
    pub fn agent() -> Place {
        Place { offer: OFFER.to_owned(), request: Some(REQUEST) }
    }

    /// What the guest serves to dom0 at another port.
    pub fn port(port: u16) -> Place {
        Place { offer: format!("data/vchan/0/{port}"), request: None }
    }
}

/// The nodes of one guest, watched.
pub struct Nook {
    store: Xenstore,
    domid: DomId,
    place: Place,
}

/// What has changed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct News {
    /// The guest's offer.
    pub offer: bool,
    /// Some domain is no more.
    pub domains: bool,
}

impl Nook {
    /// Begins to watch.
    pub fn new(store: Xenstore, domid: DomId, place: Place) -> Result<Nook, XenstoreError> {
        let nook = Nook { store, domid, place };
        nook.store.watch(&nook.offered(RING_REF), OFFERED)?;
        nook.store.watch("@releaseDomain", RELEASED)?;
        Ok(nook)
    }

    /// The connection: readable when there may be news.
    pub fn store(&self) -> &Xenstore {
        &self.store
    }

    /// Takes the news there are.
    pub fn news(&self) -> Result<News, XenstoreError> {
        let mut news = News::default();
        while let Some(event) = self.store.next_event()? {
            match event.token.as_str() {
                OFFERED => news.offer = true,
                _ => news.domains = true,
            }
        }
        Ok(news)
    }

    /// Whether xenstore has the domain.
    pub fn is_there(&self) -> Result<bool, XenstoreError> {
        self.store.read(&self.path("domid")).map(|domid| domid.is_some())
    }

    /// Whether the guest has an offer standing, or something that looks like one.
    pub fn stands(&self) -> Result<bool, XenstoreError> {
        self.store.read(&self.offered(RING_REF)).map(|value| value.is_some())
    }

    /// What the guest offers. What cannot be read as an offer is none.
    pub fn offer(&self) -> Result<Option<Offer>, XenstoreError> {
        let grant = self.number(RING_REF)?;
        let port = self.number(EVENT_CHANNEL)?;
        Ok(grant.zip(port).map(|(grant, port)| Offer { grant, port }))
    }

    /// Asks the guest for an offer, unless one stands, or such an offer is not to be asked for.
    pub fn ask(&self) -> Result<(), XenstoreError> {
        let Some(request) = self.place.request else { return Ok(()) };
        let (ring_ref, request) = (self.offered(RING_REF), self.path(request));
        let readable = [Perm::new(0, Access::None), Perm::new(self.domid.0, Access::Read)];
        self.store.transaction("ask the agent for its channel", |transaction| {
            if transaction.read(&ring_ref)?.is_some() {
                return Ok(());
            }
            let last = transaction.read(&request)?.and_then(|count| count.parse::<u32>().ok());
            let count = last.unwrap_or(0).wrapping_add(1);
            transaction.write_all(&[Node::new(&request, count).with(&readable)])
        })
    }

    fn number(&self, name: &str) -> Result<Option<u32>, XenstoreError> {
        let value = self.store.read(&self.offered(name))?;
        Ok(value.and_then(|value| value.parse().ok()))
    }

    fn offered(&self, name: &str) -> String {
        self.path(&format!("{}/{name}", self.place.offer))
    }

    fn path(&self, below: &str) -> String {
        format!("/local/domain/{}/{below}", self.domid)
    }
}
