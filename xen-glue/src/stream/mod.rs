//! `xl save` files: read, checked, written; guests taken out of them and put into them.
//!
//! ```text
//! xl header, configuration │ libxl header, records ─ LIBXC_CONTEXT ─┐ … END
//!                                    image header, domain header, records, END
//! ```
//!
//! Invariants:
//! - a stream is untrusted. Every number is checked before it is used (length, magic, version, bounds, arithmetic), and a
//!   stream makes nobody allocate more than it has bytes, and for one record no more than [`RECORD_BYTES_MAX`];
//! - a reader holds one record at a time, of page data one page and the list of those to come: streams have gigabytes;
//! - an error says where: the offset in the file, the record, what is wrong with it;
//! - only PVH guests are taken over. PV guests and guests with an emulator are read and told of, and refused by name.
//!
//! Sources: `docs/specs/{libxl,libxc}-migration-stream.pandoc`, `tools/libs/guest/xg_sr_stream_format.h` and, for the file's own
//! header, `tools/xl/xl.h` of Xen 4.17. Judge of what is written here: `verify-stream-v2` of Debian's xen-utils.
//!
//! Reading order: [`xl_header`], [`libxl`], [`libxc`], [`records`], [`pages`] (the parts), `order` (which record may follow), [`reader`],
//! [`writer`], [`config`]; then [`import`] and [`export`].

mod error;
mod input;
mod order;

pub mod config;
pub mod export;
pub mod import;
pub mod libxc;
pub mod libxl;
pub mod pages;
pub mod reader;
pub mod records;
pub mod writer;
pub mod xl_header;

pub use error::{Fault, Place, StreamError};

/// The longest body of a libxc record: libxc's own limit (REC_LENGTH_MAX).
pub const RECORD_BYTES_MAX: u32 = 128 << 20;

/// The result of reading.
pub type Result<T> = std::result::Result<T, StreamError>;
