//! One call's data channel of Qubes' qrexec, at either end: descriptors on this side, messages on that.
//!
//! Invariants:
//! - The peer is hostile. What it sends is read by `qrexec::stock`; what it sends without being read fills its channel and stops there; it may
//!   go at any instant.
//! - Nothing grows: each end holds one piece of each way ([`PIECE_BYTES`]), and takes no more before that is gone. So a reader that stalls
//!   stops what comes to it, and nothing else on this machine.
//! - Nothing blocks but poll, and poll does not wake for nothing: each descriptor is waited for only while it is of use.
//!
//! | module | what is in it |
//! |---|---|
//! | [`port`], `file` | a descriptor that may be shared with others, used without blocking |
//! | [`channel`] | the bytes to the peer: a vchan, or a socket |
//! | `wire`, `flow` | what waits on either side |
//! | [`client`] | the end that asked for the call, step by step |
//! | [`service`] | the end where it is answered, step by step |
//! | [`run`] | either end in a loop of its own, for a process that does nothing else |

pub mod channel;
pub mod client;
mod file;
mod flow;
pub mod port;
pub mod run;
pub mod service;
mod wire;

pub use channel::{Channel, Socket, Wants};
pub use client::Client;
pub use run::{run_client, run_service, Running, Watch};
pub use service::Service;

use std::io;
use std::os::fd::BorrowedFd;

use nix::poll::PollFlags;

/// Bytes that are taken at once, either way: half a ring of the largest, so that one half fills while the other empties.
pub const PIECE_BYTES: usize = 32 << 10;

/// Pieces each way in one step of an end: more than fill a ring, so that a peer that is always ready leaves time for others.
const ROUNDS: usize = 8;

/// Descriptors of this side; what is not there is at its end, or goes nowhere.
#[derive(Debug, Default)]
pub struct Streams {
    /// Of a client, read; of a service, written.
    pub stdin: Option<port::Port>,
    /// Of a client, written; of a service, read.
    pub stdout: Option<port::Port>,
    /// Like stdout.
    pub stderr: Option<port::Port>,
}

impl Streams {
    /// A client's, which others may use too.
    pub fn of_client([stdin, stdout, stderr]: [BorrowedFd<'_>; 3]) -> io::Result<Streams> {
        use port::Port;
        let (stdin, stdout, stderr) = (Port::input(stdin)?, Port::output(stdout)?, Port::output(stderr)?);
        Ok(Streams { stdin: Some(stdin), stdout: Some(stdout), stderr: Some(stderr) })
    }
}

/// What is waited for at one place, if anything.
pub type Slot<'a> = Option<(BorrowedFd<'a>, PollFlags)>;
/// Slots of an end: the channel, stdin, stdout, stderr.
pub const SLOTS: usize = 4;
/// What came at each slot.
pub type Came = [PollFlags; SLOTS];
/// Nothing has.
pub const NOTHING_CAME: Came = [PollFlags::empty(); SLOTS];

/// How a call ended before it was over.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// The peer went, or its channel failed.
    #[error("the other end of the call has gone")]
    Gone(#[source] io::Error),
    /// The peer said what nobody may say.
    #[error("the other end of the call breaks the protocol")]
    Wire(#[from] qrexec::stock::WireError),
    /// What is written here can't be written any more, and not for want of a reader.
    #[error("cannot write {stream}")]
    Output {
        /// Which of the three.
        stream: &'static str,
        /// The system's error.
        source: io::Error,
    },
    /// Whoever wanted the call has hung up.
    #[error("whoever asked for the call has hung up")]
    HungUp,
    /// The peer does not come, as who was to have it come knows.
    #[error("the other end of the call does not come")]
    NotMet,
    /// The peer has not begun to speak in time.
    #[error("the other end of the call has not come in time")]
    Late,
    /// Waiting failed.
    #[error("cannot wait for the other end of the call")]
    Wait(#[source] io::Error),
}
