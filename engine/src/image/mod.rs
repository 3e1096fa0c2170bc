//! Images of a guest: finding what is in them, and the uncompressed set that hypervisors map.
//!
//! Invariants: an image is a whole number of pages; it is read with `pread`, never mapped, so that a file which shrinks under
//! the reader is an error and not a SIGBUS; a hot image is never rewritten, only replaced by name.

pub mod hot;
pub mod scan;
pub mod working_set;
