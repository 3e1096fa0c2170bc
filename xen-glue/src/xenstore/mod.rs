//! Xenstore: where dom0 and its guests tell each other what is there and how it is doing.
//!
//! | module | what is in it |
//! |---|---|
//! | [`wire`] | messages as bytes |
//! | [`nodes`] | what can be done with nodes |
//! | [`client`] | a connection: requests, transactions, watches |
//! | [`domain`] | the nodes of a domain, and what is asked of its guest through them |
//! | [`devices`] | the nodes of its disks and its network card |
//! | [`simulated`] | a small xenstored in this process, for tests |

pub mod client;
pub mod devices;
pub mod domain;
pub mod nodes;
pub mod simulated;
pub mod wire;

pub use client::{Transaction, Xenstore};
pub use nodes::{Node, Nodes, XenstoreError};
pub use wire::{Access, Event, Perm};
