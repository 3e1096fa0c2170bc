//! The end of a clone: kill, wait, and with that every byte it wrote is gone.
//!
//! There is nothing to erase: what a clone writes is its process's private memory, or encrypted under a key in it.
//! The one promise to keep is that the process is really gone when [`close`] returns.

use std::time::{Duration, Instant};

use crate::host::HostError;
use crate::launch::Clone;

/// Destroys the clone. Says how long it took until its memory was free.
pub fn close<A>(clone: Clone<A>) -> Result<Duration, HostError> {
    let start = Instant::now();
    let Clone { domain, agent } = clone;
    drop(agent);
    domain.destroy()?;
    Ok(start.elapsed())
}
