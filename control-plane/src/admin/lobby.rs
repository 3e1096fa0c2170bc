//! Room for callers: who has not said what it wants, and who is being answered.
//!
//! Invariants: silent peers have places of their own, and the newest comes in at the oldest one's cost, so that no number of them keeps
//! a caller out who says at once what it wants; what takes long has places of its own too, and so what does not always has some.

use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Peers that have not said all of what they want. A client sends it in one piece.
const SILENT_MAX: usize = 64;
/// How soon a place that has become free is taken.
const POLL: Duration = Duration::from_millis(5);

/// Who has come in and not said what it wants, in the order in which they came.
#[derive(Default)]
pub(super) struct Lobby(Mutex<VecDeque<Arc<UnixStream>>>);

impl Lobby {
    /// Lets a peer in. If it is one too many, the oldest is shown out.
    pub(super) fn enter(&self, peer: &Arc<UnixStream>) {
        let mut silent = self.lock();
        silent.push_back(Arc::clone(peer));
        if silent.len() > SILENT_MAX {
            // Whoever reads what it says finds its end.
            silent.pop_front().into_iter().for_each(|oldest| drop(oldest.shutdown(Shutdown::Both)));
        }
    }

    /// It has said what it wants, or has gone.
    pub(super) fn leave(&self, peer: &Arc<UnixStream>) {
        self.lock().retain(|other| !Arc::ptr_eq(other, peer));
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Arc<UnixStream>>> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// A limited number of places.
pub(super) struct Places {
    taken: Arc<AtomicUsize>,
    max: usize,
}

/// One of them; given back when dropped.
pub(super) struct Place(Arc<AtomicUsize>);

impl Places {
    pub(super) fn new(max: usize) -> Places {
        Places { taken: Arc::default(), max }
    }

    /// One, if there is one.
    pub(super) fn take(&self) -> Option<Place> {
        let more = |taken: usize| (taken < self.max).then_some(taken + 1);
        self.taken
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, more)
            .ok()
            .map(|_| Place(Arc::clone(&self.taken)))
    }

    /// One, as soon as there is one.
    pub(super) fn wait(&self, limit: Duration) -> io::Result<Place> {
        let deadline = Instant::now() + limit;
        loop {
            match self.take() {
                Some(place) => return Ok(place),
                None if Instant::now() >= deadline => return Err(io::ErrorKind::TimedOut.into()),
                None => std::thread::sleep(POLL),
            }
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn one_silent_peer_too_many_comes_in_at_the_oldest_ones_cost() {
        let lobby = Lobby::default();
        let mut others = Vec::new();
        for _ in 0..=SILENT_MAX + 1 {
            let (ours, theirs) = UnixStream::pair().unwrap();
            theirs.set_nonblocking(true).unwrap();
            let ours = Arc::new(ours);
            lobby.enter(&ours);
            if others.is_empty() {
                lobby.leave(&ours);
            }
            others.push((ours, theirs));
        }
        let ended = |at: usize| matches!((&others[at].1).read(&mut [0]), Ok(0));
        assert!(!ended(0), "it had left");
        assert!(ended(1) && !ended(2) && !ended(SILENT_MAX + 1));
    }

    #[test]
    fn a_place_is_had_when_another_gives_it_back() {
        let places = Places::new(1);
        let first = places.take().unwrap();
        assert!(places.take().is_none() && places.wait(Duration::ZERO).is_err());
        std::thread::scope(|scope| {
            let second = scope.spawn(|| places.wait(Duration::from_secs(10)).is_ok());
            drop(first);
            assert!(second.join().unwrap());
        });
        assert!(places.take().is_some());
    }
}
