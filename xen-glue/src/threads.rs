//! Threads beside the launcher's own.
//!
//! Invariant: they take no signal. A signal goes to any thread that has not blocked it, so one of these would have a launcher killed by a
//! SIGINT that its own thread waits for, and its domain left behind.

use std::io;
use std::thread::{Builder, JoinHandle};

use nix::sys::signal::SigSet;

/// Starts one.
pub fn spawn<T: Send + 'static>(
    name: String,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    Builder::new().name(name).spawn(move || {
        // It fails for no set of signals there is.
        let _ = SigSet::all().thread_block();
        work()
    })
}
