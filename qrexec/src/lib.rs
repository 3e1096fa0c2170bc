//! The framed messages between host and guest agent: a pure codec, shared by both, that does no I/O.
//!
//! Invariants:
//! - One byte stream carries frames, back to back: a 12-byte little-endian header {kind u16, reserved u16 = 0, stream u32,
//!   length u32 ≤ [`PAYLOAD_BYTES_MAX`]}, then `length` bytes. Each side takes the other for hostile.
//! - No bytes panic. No length field sizes an allocation: buffers grow with what really arrived, up to a frame's limit.
//! - Parsing a frame validates it: what a [`HostFrame`] or [`GuestFrame`] holds is within every limit named here.
//! - Stream 0 is the control stream. Commands, which the host asks for, have other streams below 2^31, and calls, which programs in the
//!   guest ask for, those from there on; each is used once per connection.
//! - Bytes of commands and calls flow within windows: [`INITIAL_WINDOW`] to begin with, for each stream and each of stdin, stdout
//!   and stderr, and as much more as credit frames say. Control frames need no credit, so they always flow.
//!
//! What is on the way to a running command (`Identify`, `Exec`, `Exited`) has a fixed layout and no text to parse: a restored
//! guest runs each instruction for the first time, and under emulation that is what costs. `Hello` and `Failed` are JSON.
//!
//! Files in reading order: `frame` (header), `decoder`, `host` and `guest` (typed frames), `exec`, `call`, `identity`, `exit`,
//! `window`.
//! Beside them, Qubes' own protocol: `stock` (docs/qrexec.md), the texts it carries, `service`, what
//! they run in a guest, `programs`, and one of these, `vmexec`.

mod call;
mod decoder;
mod error;
mod exec;
mod exit;
mod frame;
mod guest;
mod host;
mod identity;
pub mod programs;
pub mod service;
pub mod stock;
pub mod vmexec;
mod window;

pub use call::{Call, CALL_STREAM};
pub use decoder::{Decoder, Piece};
pub use error::ProtocolError;
pub use exec::{Exec, User, ARGV_COUNT_MAX, ENV_COUNT_MAX};
pub use exit::Exit;
pub use frame::{kind, RawFrame, HEADER_BYTES, PAYLOAD_BYTES_MAX};
pub use guest::{Failed, GuestFrame, Hello, Op, TEXT_BYTES_MAX};
pub use host::HostFrame;
pub use identity::{Identity, Network, DNS_COUNT_MAX, ENTROPY_BYTES, HOSTNAME_BYTES_MAX};
pub use window::{ReceiveWindow, SendWindow, GROWN_WINDOW, INITIAL_WINDOW, WINDOW_MAX};

/// The protocol's version, said in [`Hello`]. 2 has calls, 3 `ServeCalls`; an older agent that comes out of an older savefile says no Hello, and
/// is understood as long as it is not asked for what it does not know.
pub const PROTOCOL: u32 = 3;

/// Commands that may run at a time, and calls: more than any front end needs, few enough to bound the agent's memory.
pub const STREAMS_MAX: usize = 64;

/// Bytes of a prerun hook: it is held in the guest's memory while it runs.
pub const PRERUN_BYTES_MAX: usize = 16 << 20;
