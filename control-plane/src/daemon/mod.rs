//! `dispvmd`: keeps spares, so that a launch finds its clone made already.
//!
//! Who does what:
//! - the **daemon** ([`server`], which listens; `survey`, what it knows; `upkeep`, what it does by itself) decides how many spares there
//!   shall be ([`policy`], pure) and hands them out;
//! - a **keeper** ([`keeper`]), one process per clone the daemon had made, owns the clone: its QEMU, its name, its end;
//! - a **launcher** ([`client`]) gets from the daemon the clone's agent and a *lifeline* to its keeper, and from there on talks to
//!   nobody else;
//! - whoever wants one and has no process for it (the Admin API) has a [`holder`] take the launcher's place;
//! - whoever wants a qube with a record of its own started (`starter`) has its runner ([`crate::run::runner`]) answer.
//!
//! Invariants:
//! - A spare is handed out once. The daemon tells its keeper before it gives the spare away, so that a keeper which finds
//!   itself without a daemon knows whether its clone is still a spare.
//! - A clone that was handed out lives as long as its lifeline, whoever holds it, and no longer. The daemon holds none.
//! - Nothing depends on the daemon: one that does not answer, or has no spare, leaves the launcher to its own devices.
//! - All talk is over one socket in the state folder ([`channel`]), bounded messages of JSON ([`protocol`]), with processes of the state
//!   folder's owner or root.

pub mod channel;
pub mod client;
pub mod holder;
pub mod keeper;
pub mod policy;
pub mod protocol;
pub mod server;
mod starter;
mod survey;
pub mod systemd;
mod upkeep;
