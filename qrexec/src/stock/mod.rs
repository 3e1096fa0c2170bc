//! Qubes' own qrexec on its vchans, protocol v2 to v4: a pure codec and the two ends of either channel. docs/qrexec.md is its byte map.
//!
//! Invariants:
//! - Each side takes the other for hostile: no bytes panic, and a length is checked against its kind and version before a byte of the
//!   body is kept. A control message grows with what really arrived, up to its kind's limit; a data channel keeps 12 bytes.
//! - A channel begins with one `Hello` each way, and speaks the smaller of the two versions from there on.
//! - What breaks the protocol breaks it for ever. Stock peers that are merely odd (data after an end, a client's stderr) are heard
//!   as libqrexec hears them: their bytes go nowhere.
//!
//! The facts are those of QubesOS/qubes-core-qrexec: libqrexec/qrexec.h (079c2f89), libqrexec/remote.c (27077c29),
//! libqrexec/process_io.c (0701529b), daemon/qrexec-daemon.c (0516ffcb and a later 4.2 text), agent/qrexec-agent-data.c (0802df70).
//!
//! Files in reading order: `negotiate`, `message`, `control`, `decoder`, `control_end`, `data`.

pub mod control;
mod control_end;
pub mod data;
mod decoder;
mod error;
pub mod message;
pub mod negotiate;

pub use control::{FromAgent, ToAgent};
pub use control_end::{ControlEnd, Said};
pub use data::{ClientEnd, FromClient, FromService, ServiceEnd};
pub use decoder::{Decoder, RawMessage};
pub use error::WireError;
pub use message::{Header, Rules, HEADER_BYTES};
pub use negotiate::Version;
