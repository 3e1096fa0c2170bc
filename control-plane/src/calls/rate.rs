//! How often a guest may call: each call costs us a process that reads the policy and the records, whatever becomes of it.
//!
//! A bucket of [`BURST`] tokens, of which each call takes one and [`PER_SECOND`] come back each second. A call without a token is refused. Of what is
//! logged of calls there is a smaller one.

use std::time::{Duration, Instant};

/// As many as may run at a time: who starts all of them at once is not refused.
const BURST: u32 = super::outgoing::CALLS_OUT_MAX as u32;
/// A call that is refused takes some 2 ms of a processor (measured), one that is not a few more: a guest can have us busy with about half of one. And
/// who makes one call after the other, each with processes in dom0 or a guest at its end, takes some 10 ms for each, and never notices.
const PER_SECOND: u32 = 100;

/// See the module.
#[derive(Debug)]
pub(super) struct Rate {
    burst: u32,
    per_second: u32,
    tokens: u32,
    /// When the last token came back.
    since: Instant,
    /// Whether it is known that calls are refused.
    told: bool,
}

/// What becomes of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Turn {
    Taken,
    /// It is refused; `news`: the one before was not.
    TooOften {
        news: bool,
    },
}

impl Rate {
    /// Of calls.
    pub(super) fn new() -> Rate {
        Rate::of(BURST, PER_SECOND)
    }

    /// So many at once, and so many a second, at least one.
    pub(super) fn of(burst: u32, per_second: u32) -> Rate {
        Rate { burst, per_second: per_second.max(1), tokens: burst, since: Instant::now(), told: false }
    }

    /// Takes a token, if there is one.
    pub(super) fn take(&mut self, now: Instant) -> Turn {
        let period = Duration::from_secs(1) / self.per_second;
        let back = now.saturating_duration_since(self.since).as_nanos() / period.as_nanos();
        let back = u32::try_from(back).unwrap_or(u32::MAX);
        if back >= self.burst - self.tokens {
            (self.tokens, self.since) = (self.burst, now);
        } else {
            self.tokens += back;
            self.since += period * back;
        }
        match self.tokens.checked_sub(1) {
            Some(left) => {
                self.tokens = left;
                // Known for as long as calls come faster than they may.
                self.told &= left < self.burst / 2;
                Turn::Taken
            }
            None => Turn::TooOften { news: !std::mem::replace(&mut self.told, true) },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_taken_and_then_so_many_a_second() {
        let mut rate = Rate::new();
        let start = rate.since;
        let taken = |rate: &mut Rate, at: Instant, count: u32| {
            (0..count).filter(|_| rate.take(at) == Turn::Taken).count() as u32
        };
        assert_eq!(taken(&mut rate, start, 10 * BURST), BURST);
        assert_eq!(rate.take(start), Turn::TooOften { news: false }, "it was told before");
        let mut all = 0;
        for ms in 1..=10_000 {
            all += taken(&mut rate, start + Duration::from_millis(ms), 3);
        }
        assert_eq!(all, 10 * PER_SECOND);
        assert_eq!(rate.take(start + Duration::from_secs(10)), Turn::TooOften { news: false }, "it went on");
        let later = start + Duration::from_secs(3600);
        assert_eq!(taken(&mut rate, later, BURST), BURST, "no more than a burst comes back");
        assert_eq!(rate.take(later), Turn::TooOften { news: true });
        assert_eq!(rate.take(start), Turn::TooOften { news: false }, "a clock that went back");
    }

    #[test]
    fn who_calls_no_faster_than_that_is_never_refused() {
        let mut rate = Rate::new();
        let start = rate.since;
        let calls = (0..100_000).map(|call| start + Duration::from_millis(10) * call);
        assert!(calls.into_iter().all(|at| rate.take(at) == Turn::Taken));
    }
}
