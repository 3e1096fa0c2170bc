//! The way to a guest's vchan.

use std::io;

use vchan::link::{Link, Offer};

use crate::hypercalls::{DomId, Hypercalls, Shutdown};
use crate::sys::Privcmd;

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
        vchan::link::connect(self.domid.0, offer)
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
