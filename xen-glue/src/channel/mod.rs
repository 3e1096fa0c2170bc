//! The agent's channel: a vchan that the guest's agent offers, joined to a socket of this machine's by a thread, the pump.
//!
//! Invariants:
//! - the guest is not trusted: what it writes into pages and nodes is checked (crate `vchan`), and what it sends without being read fills
//!   its ring and stops there;
//! - nothing of the guest stays mapped when the [`Channel`] is dropped, or when the guest has gone: a domain of which a page is mapped
//!   cannot end;
//! - the thread waits in one poll for everything, and dropping the channel wakes it.
//!
//! What both ends have agreed on is in the documentation of crate `vchan`.
//!
//! | module | what is in it |
//! |---|---|
//! | [`offer`] | finding the guest's offer, asking for one, seeing that it is gone |
//! | [`link`] | the way from an offer to the connected vchan |
//! | `carry` | bytes between link and socket |
//! | `pump` | the thread's life, from the search for an offer to the end |

mod carry;
pub mod link;
pub mod offer;
mod pump;

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::hypercalls::DomId;
use crate::threads;
use crate::xenstore::{Xenstore, XenstoreError};
use link::{Reach, XenReach};
use offer::Nook;
use pump::Pump;

/// What the pump is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    /// Carry bytes.
    Carry,
    /// Deliver what is on its way, disconnect, and see that the guest has let go, until then.
    LetGo {
        /// When.
        deadline: Instant,
        /// How long that was.
        limit: Duration,
    },
    /// Disconnect at once.
    Stop,
}

/// What channel and pump tell each other.
struct Control {
    order: Mutex<Order>,
    wake: EventFd,
    connected: OnceLock<Instant>,
}

impl Control {
    fn order(&self) -> Order {
        *self.order.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn give(&self, order: Order) {
        *self.order.lock().unwrap_or_else(PoisonError::into_inner) = order;
        // Fails when it has been rung 2^64 times.
        let _ = self.wake.write(1);
    }
}

/// Why a guest has not let the channel go.
#[derive(Debug, thiserror::Error)]
pub enum LetGoError {
    /// Time is over.
    #[error("the agent of domain {domid} has not let go of its channel after {} s", limit.as_secs_f32())]
    Late {
        /// The guest.
        domid: DomId,
        /// How long it had.
        limit: Duration,
    },
    /// The domain is no more, or the channel had ended before.
    #[error("the channel to domain {0} had ended before it was let go")]
    Ended(DomId),
    /// Xenstore failed.
    #[error("cannot let go of the channel to domain {domid}")]
    Xenstore {
        /// The guest.
        domid: DomId,
        /// How.
        source: XenstoreError,
    },
}

/// How a pump's life ended.
type Outcome = Result<(), LetGoError>;

/// A channel to the agent of one guest. Dropping it disconnects and unmaps everything.
pub struct Channel {
    domid: DomId,
    control: Arc<Control>,
    outcome: Receiver<Outcome>,
    thread: Option<JoinHandle<()>>,
}

impl Channel {
    /// Begins to look for the agent of a domain that xenstore knows. Returns at once: this end of the channel, a non-blocking socket, takes
    /// and gives bytes when the guest has offered its vchan, and hangs up when the guest has.
    pub fn open(domid: DomId) -> io::Result<(UnixStream, Channel)> {
        let store = Xenstore::open().map_err(io::Error::other)?;
        Channel::over(domid, store, Box::new(XenReach::new(domid)))
    }

    /// The same, over a connection to xenstored and another way to reach the guest.
    pub fn over(domid: DomId, store: Xenstore, reach: Box<dyn Reach>) -> io::Result<(UnixStream, Channel)> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        theirs.set_nonblocking(true)?;
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let control = Control { order: Mutex::new(Order::Carry), wake, connected: OnceLock::new() };
        let control = Arc::new(control);
        let (tell, outcome) = mpsc::channel();
        let nook = Nook::new(store, domid).map_err(io::Error::other)?;
        let pump = Pump::new(domid, nook, reach, ours, Arc::clone(&control));
        let thread = threads::spawn(format!("channel-{domid}"), move || {
            // Nobody listens where the channel was dropped.
            let _ = tell.send(pump.run());
        })?;
        Ok((theirs, Channel { domid, control, outcome, thread: Some(thread) }))
    }

    /// When the vchan was connected; `None`: not yet.
    pub fn connected_at(&self) -> Option<Instant> {
        self.control.connected.get().copied()
    }

    /// Delivers what is on its way, disconnects, and waits until the guest holds nothing of the channel: it can be captured then. The
    /// socket hangs up.
    pub fn let_go(&mut self, limit: Duration) -> Result<(), LetGoError> {
        self.control.give(Order::LetGo { deadline: Instant::now() + limit, limit });
        // The pump keeps the time; what it waits for beyond that is one answer of xenstored's.
        let outcome = match self.outcome.recv_timeout(limit.saturating_mul(2)) {
            Ok(outcome) => outcome,
            Err(RecvTimeoutError::Disconnected) => Err(LetGoError::Ended(self.domid)),
            Err(RecvTimeoutError::Timeout) => Err(LetGoError::Late { domid: self.domid, limit }),
        };
        self.stop();
        outcome
    }

    fn stop(&mut self) {
        self.control.give(Order::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        self.stop();
    }
}

#[cfg(test)]
mod tests;
