//! Qubes' Admin API as it is spoken on qubesd's unix socket: the codec of both sides, and a blocking client.
//!
//! Invariants:
//! - One connection carries one request: `METHOD+ARGUMENT SOURCE name DESTINATION\0PAYLOAD`, up to the end of the stream;
//!   then one reply up to the end of the stream, or events until either side closes.
//! - What a [`Request`] holds after decoding is printable ASCII without spaces, but for its payload; a request has at most
//!   [`REQUEST_BYTES_MAX`] bytes in all, and a reader takes no byte more than that into memory.
//! - No bytes panic, and no length in them sizes an allocation: there are no lengths in this protocol, only ends.
//! - Everything but `client` is pure.
//!
//! The wire was read from QubesOS/qubes-core-admin `qubes/api/__init__.py` (class QubesDaemonProtocol, R4.2 and R4.3) and
//! QubesOS/qubes-core-admin-client `qubesadmin/app.py` (QubesLocal), `qubesadmin/base.py` and `qubesadmin/events/__init__.py`.
//!
//! Files in reading order: `request`, `reply` (with `exception` and `event`), `lines` (what methods put into payloads and
//! answers), `client`, `error`.

pub mod client;
mod error;
mod event;
mod exception;
pub mod lines;
mod reply;
mod request;

pub use error::{ApiError, DecodeError, EncodeError};
pub use event::{Event, EVENT_BYTES_MAX};
pub use exception::{Exception, Kind};
pub use reply::{Reply, REPLY_BYTES_MAX};
pub use request::{Request, REQUEST_BYTES_MAX};

/// Where qubesd listens, and so where a client looks unless told otherwise.
pub const SOCKET_PATH: &str = "/var/run/qubesd.sock";

/// The name of the administrative domain: what the host itself is called, as source and as destination.
pub const ADMIN_VM: &str = "dom0";
