//! Files and folders from one qube to another, as Qubes' service `qubes.Filecopy` has them (QubesOS/qubes-linux-utils,
//! qrexec-lib/pack.c, unpack.c and libqubes-rpc-filecopy.h, as of R4.2).
//!
//! Invariants:
//! - the sender follows no symbolic link, and sends only what the receiver takes: it looks at everything before it calls;
//! - the receiver believes nothing. It makes files, folders and links below one folder, never outside of it, never through a symbolic
//!   link, and never in the place of what is there; what it cannot or will not do it tells the sender, with the name;
//! - a file has its name once all of it has come: what was cut off leaves no file;
//! - no length that was sent decides an allocation.
//!
//! Files in reading order: `header` (what goes over the wire), `name` (which names may), `walk` and `send`, `tree` and `receive`,
//! `job` (a whole call, for the front ends).

mod header;
mod job;
mod name;
mod receive;
mod send;
mod sum;
mod tree;
mod walk;

pub use header::{Header, Reply, HEADER_BYTES, REPLY_BYTES};
pub use job::{Job, JobError};
pub use name::{check_link, BadName, Characters, Name, NAME_BYTES_MAX};
pub use receive::{receive, Limits, ReceiveError, Received};
pub use send::{send, SendError};
pub use tree::Tree;
pub use walk::{survey, Survey, WalkError};

/// The service that receives.
pub const SERVICE: &str = "qubes.Filecopy";
/// Its argument for names that a terminal or a file manager may show as something else.
pub const UNSAFE_CHARACTERS: &str = "allow-unsafe-characters";
