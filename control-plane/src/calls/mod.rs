//! qrexec calls on the host's side: into a guest that runs, by whoever holds it, and out of it.
//!
//! Who does what:
//! - the **holder** of a guest ([`Exchange`]) has its agent's channel, and listens at the guest's *call socket*, ROOT/calls/NAME.sock. It carries the
//!   streams of every call itself, in one loop;
//! - a **caller** ([`client`]) says there in one message what is to run ([`message`]), and gives its stdin, stdout and stderr along.
//!   From then on it has only to wait for the answer, how the command ended. If it hangs up, the command is ended;
//! - what runs when a [`service`] is called, or a command line of qrexec's, is the same whoever calls;
//! - of each command the holder knows whose it is and how it ends (`command`); its streams (`flow`) go through descriptors that never
//!   block the holder (`call_channel::port`).
//!
//! And out of it ([`outgoing`]): for each call the holder starts `qrexec-policy-exec`, which asks the policy ([`decide`]), says what it has
//! decided ([`verdict`]), and becomes what carries the call out ([`carry_out`]). So no text of a guest's is looked at in the holder but by the frame's
//! parsing, and a call's exit status is that process's.
//!
//! Invariants:
//! - a caller is root or our own user, and so is the folder's owner;
//! - at most [`CALLS_MAX`] commands run at a time beside the main one; peers that say nothing have [`GREETING_LIMIT`];
//! - what a stalled reader, a silent peer or a guest that does not listen can have us keep is bounded by the windows and by
//!   [`BACKLOG_MAX`]; none of them delays another stream, or a control message;
//! - frames of streams that are not there are dropped: they may have been under way when the stream ended.
//!
//! [`Exchange`]: exchange::Exchange
//! [`CALLS_MAX`]: requests::CALLS_MAX
//! [`GREETING_LIMIT`]: reception::GREETING_LIMIT
//! [`BACKLOG_MAX`]: exchange::BACKLOG_MAX

pub mod carriage;
pub mod carry_out;
pub mod client;
mod command;
pub mod decide;
pub mod exchange;
mod flow;
pub mod in_dom0;
pub mod message;
pub mod outgoing;
mod process;
pub mod programs;
mod rate;
pub mod ready;
pub mod reception;
pub mod requests;
pub mod service;
mod supervise;
pub mod system_log;
pub mod verdict;
mod verdict_log;
mod watch;
pub mod wire;

pub use exchange::Exchange;
