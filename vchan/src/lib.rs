//! Xen's libxenvchan, for either end: the layout in shared pages, the arithmetic of the counters, and the devices that lend the pages.
//!
//! Invariants: the peer may write any byte of the shared pages at any time. So every counter of the peer's is read once and
//! checked against the ring's size before it is used; this end's own counters are kept here and only shown to the peer; the layout
//! is what was read at the start. A peer that lies gets an error, never this end's memory.
//!
//! | module | what is in it |
//! |---|---|
//! | [`layout`] | where what is in the first page, and which pages the rings have (pure) |
//! | [`counters`] | how much can be read and written, and where (pure) |
//! | [`shared`] | `unsafe`: loads, stores and copies in shared pages, with their barriers |
//! | [`end`] | one end: read, write, ask to be told, be live, hang up |
//! | [`devices`] | `unsafe`: the ioctls by which a kernel grants pages, maps granted ones, has event channels |
//! | [`link`] | an end with its pages and its event channel, as a server or as a client of another domain |
//! | this one | what this project's two ends have agreed on |
//!
//! Source: Xen's `xen/include/public/io/libxenvchan.h` and the behaviour of `tools/libs/vchan/`. Another vchan library can be at
//! the other end.
//!
//! # The agent's channel
//! As in Qubes the guest's agent is the server (its pages, its event channel) and dom0 the client. All nodes are below the guest's own
//! `/local/domain/N`; what the guest writes it writes by relative path.
//!
//! 1. **Offer.** The agent writes [`OFFER`]`/event-channel`, then `OFFER/ring-ref`: whoever sees the second can read the first. It
//!    writes its `Hello` into the ring without waiting for anybody. It makes the first offer when it starts, unasked.
//! 2. **Connect.** The host maps the pages. `cli_live` is 2 ([`Awaited`](end::Peer::Awaited)) in a fresh offer: anything else is what a host
//!    before this one has left, and is no offer. Then it sets it to live and notifies.
//! 3. **Let go.** Whichever end leaves clears its live byte and notifies; a killed host has its kernel do it. The agent answers by
//!    unmapping and ending the grants and the event channel, and *then* removes `OFFER`: a host that sees it gone knows that the
//!    guest holds nothing of the channel, and can capture it.
//! 4. **Ask.** A host that finds no `OFFER/ring-ref` counts [`REQUEST`] up, in one transaction with having found none, so that no
//!    request is left over which an offer has met already. The agent watches it, and offers anew when its value is not the
//!    one it read last; it reads it after each offer.
//! 5. **Restore.** A channel does not survive a suspend, and must be let go before. After it (in a restored clone, or when the
//!    suspend was cancelled) the guest's kernel registers all watches again, each of which fires at once. The agent watches
//!    its `domid` for this alone, and offers anew, unasked. Should it have been suspended with a channel after all, it
//!    notices that `OFFER/ring-ref` is not what it wrote.

pub mod counters;
pub mod devices;
pub mod end;
pub mod layout;
pub mod link;
pub mod shared;

/// The agent's port. Qubes' own agents have 111 (qubesdb), 512 (qrexec) and those up from 513 (qrexec's data), 4713 (audio) and
/// 6000 (GUI) of a guest, some of them with dom0: with none of these in its way both kinds of agent can serve in one guest. It is no port of
/// anything else, and has no further meaning.
pub const PORT: u16 = 3349;

/// Where the agent offers its channel, below its domain's node: `data/vchan/<the client's domid>/<port>`, as Qubes' libvchan has
/// it. Dom0 is the client.
pub const OFFER: &str = "data/vchan/0/3349";
/// The node below [`OFFER`] with the grant of the first page, decimal.
pub const RING_REF: &str = "ring-ref";
/// The node below [`OFFER`] with the guest's event channel, decimal.
pub const EVENT_CHANNEL: &str = "event-channel";
/// The node by which a host asks for an offer: a counter, readable by the guest.
pub const REQUEST: &str = "data/dispvm-offer";

/// The agent's rings: 16 KiB for what the host says, 64 KiB for what the guest says, which is the output of commands. A guest
/// has these pages once.
pub const AGENT_ORDERS: layout::Orders = layout::Orders { left: 14, right: 16 };

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_path_has_the_port() {
        assert_eq!(OFFER, format!("data/vchan/0/{PORT}"));
    }
}
