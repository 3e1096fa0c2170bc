//! The guest's offer, as xenstore has it.

use vchan::link::Offer;
use vchan::{EVENT_CHANNEL, OFFER, REQUEST, RING_REF};

use crate::hypercalls::DomId;
use crate::xenstore::{Access, Node, Nodes, Perm, Xenstore, XenstoreError};

/// Tokens of the watches.
const OFFERED: &str = "offer";
const RELEASED: &str = "released";

/// The nodes of one guest, watched.
pub struct Nook {
    store: Xenstore,
    domid: DomId,
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
    pub fn new(store: Xenstore, domid: DomId) -> Result<Nook, XenstoreError> {
        let nook = Nook { store, domid };
        nook.store.watch(&nook.path(&format!("{OFFER}/{RING_REF}")), OFFERED)?;
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
        self.store.read(&self.path(&format!("{OFFER}/{RING_REF}"))).map(|value| value.is_some())
    }

    /// What the guest offers. What cannot be read as an offer is none.
    pub fn offer(&self) -> Result<Option<Offer>, XenstoreError> {
        let grant = self.number(RING_REF)?;
        let port = self.number(EVENT_CHANNEL)?;
        Ok(grant.zip(port).map(|(grant, port)| Offer { grant, port }))
    }

    /// Asks the guest for an offer, unless one stands.
    pub fn ask(&self) -> Result<(), XenstoreError> {
        let (ring_ref, request) = (self.path(&format!("{OFFER}/{RING_REF}")), self.path(REQUEST));
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
        let value = self.store.read(&self.path(&format!("{OFFER}/{name}")))?;
        Ok(value.and_then(|value| value.parse().ok()))
    }

    fn path(&self, below: &str) -> String {
        format!("/local/domain/{}/{below}", self.domid)
    }
}
