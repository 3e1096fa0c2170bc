//! When each step of a domain's birth was over, for the launcher's timeline.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// Steps and their moments. Threads that watch for one share it.
#[derive(Clone, Debug, Default)]
pub struct Steps(Arc<Mutex<Vec<(&'static str, Instant)>>>);

impl Steps {
    /// `step` is over now.
    pub fn mark(&self, step: &'static str) {
        self.mark_at(step, Instant::now());
    }

    /// `step` was over then.
    pub fn mark_at(&self, step: &'static str, at: Instant) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push((step, at));
    }

    /// Those since the last call.
    pub fn take(&self) -> Vec<(&'static str, Instant)> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
