//! How many spares there shall be, and when. Pure: what is, in; what to do, out.
//!
//! Invariants:
//! - never more spares than wanted, those being made included; at most one is made at a time on the whole machine;
//! - a spare that is not of the savefile which serves now, or is too old, goes at once, and so does one when memory is short;
//! - none is made within [`REFILL_DELAY`] of the last launch, which needs the processor itself, unless launches come so fast that this
//!   would mean never: then after [`REFILL_LATEST`].

use std::time::{Duration, Instant};

/// Under emulation a launch is over within this time.
pub const REFILL_DELAY: Duration = Duration::from_millis(400);
/// The longest that launches one after the other keep a spare from being made.
pub const REFILL_LATEST: Duration = Duration::from_secs(3);
/// After the first failure to make one. Doubled with each further, up to [`RETRY_MAX`].
pub const RETRY: Duration = Duration::from_secs(1);
/// The longest wait after failures.
pub const RETRY_MAX: Duration = Duration::from_secs(300);

/// How much memory there is, measured by what one more clone may come to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Memory {
    /// For a launch beside one more spare.
    Plenty,
    /// For a launch.
    Enough,
    /// Not even for that.
    Short,
}

/// One DVM template, as it is.
#[derive(Debug, Clone)]
pub struct Situation {
    /// How many spares there shall be.
    pub wanted: u32,
    /// The age at which a spare goes.
    pub age_max: Duration,
    /// Whether its savefile serves.
    pub fresh: bool,
    /// The machine's memory.
    pub memory: Memory,
    /// Whether a spare of any template is being made.
    pub making_somewhere: bool,
    /// How many of this one are.
    pub making: u32,
    /// The spares there are.
    pub waiting: Vec<Waiting>,
    /// When a clone was last asked for.
    pub last_launch: Option<Instant>,
    /// Since when there have been too few.
    pub too_few_since: Option<Instant>,
    /// How often making one has failed in a row, and when it last did.
    pub failures: Option<(u32, Instant)>,
}

/// One spare.
#[derive(Debug, Clone, Copy)]
pub struct Waiting {
    /// Since when it waits.
    pub since: Instant,
    /// Whether it is of the savefile which serves now.
    pub current: bool,
}

/// What to do.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Decision {
    /// The spares to end, by their place in [`Situation::waiting`].
    pub end: Vec<usize>,
    /// Whether to make one.
    pub make: bool,
    /// When to look again, if nothing happens before.
    pub again: Option<Instant>,
}

/// Decides.
pub fn decide(situation: &Situation, now: Instant) -> Decision {
    let mut decision = Decision::default();
    let mut left: Vec<usize> = Vec::new();
    for (at, spare) in situation.waiting.iter().enumerate() {
        let good = spare.current && situation.fresh && now < spare.since + situation.age_max;
        if good { &mut left } else { &mut decision.end }.push(at);
    }
    // The newest stay.
    left.sort_by_key(|at| std::cmp::Reverse(situation.waiting[*at].since));
    let mut keep = (situation.wanted as usize).min(left.len());
    if situation.memory == Memory::Short {
        // One at a time: the next look tells whether it was enough.
        keep = keep.min(left.len().saturating_sub(1));
    }
    decision.end.extend(left.drain(keep..));
    let oldest = left.iter().map(|at| situation.waiting[*at].since + situation.age_max).min();
    decision.again = oldest;

    let too_few = (left.len() as u32 + situation.making) < situation.wanted;
    if too_few && situation.fresh && situation.memory == Memory::Plenty && !situation.making_somewhere {
        let when = not_before(situation, now);
        decision.make = when <= now;
        decision.again = oldest.into_iter().chain((!decision.make).then_some(when)).min();
    }
    decision
}

/// The earliest time for another spare.
fn not_before(situation: &Situation, now: Instant) -> Instant {
    let calm = situation.last_launch.map_or(now, |at| at + REFILL_DELAY);
    let latest = situation.too_few_since.map_or(now, |at| at + REFILL_LATEST);
    let retry = situation.failures.map_or(now, |(times, at)| at + retry_after(times));
    calm.min(latest).max(retry)
}

/// How long to wait after so many failures in a row.
pub fn retry_after(failures: u32) -> Duration {
    RETRY.saturating_mul(1 << failures.saturating_sub(1).min(16)).min(RETRY_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const AGE: Duration = Duration::from_secs(3600);

    fn calm(now: Instant) -> Situation {
        Situation {
            wanted: 1,
            age_max: AGE,
            fresh: true,
            memory: Memory::Plenty,
            making_somewhere: false,
            making: 0,
            waiting: vec![],
            last_launch: None,
            too_few_since: Some(now),
            failures: None,
        }
    }

    #[test]
    fn a_missing_spare_is_made_a_moment_after_the_last_launch_and_in_a_rush_at_the_latest() {
        let now = Instant::now() + AGE;
        assert!(decide(&calm(now), now).make);
        let just = Situation { last_launch: Some(now), ..calm(now) };
        let decision = decide(&just, now);
        assert!(!decision.make);
        assert_eq!(decision.again, Some(now + REFILL_DELAY));
        assert!(decide(&just, now + REFILL_DELAY).make);
        let rush =
            Situation { last_launch: Some(now), too_few_since: Some(now - REFILL_LATEST), ..calm(now) };
        assert!(decide(&rush, now).make);
    }

    #[test]
    fn failures_are_waited_for_longer_and_longer() {
        let now = Instant::now() + AGE;
        let failed = |times, at| Situation { failures: Some((times, at)), ..calm(now) };
        assert!(!decide(&failed(1, now), now).make);
        assert!(decide(&failed(1, now - RETRY), now).make);
        assert!(!decide(&failed(4, now - RETRY * 7), now).make);
        assert!(decide(&failed(4, now - RETRY * 8), now).make);
        assert_eq!(retry_after(u32::MAX), RETRY_MAX);
    }

    #[test]
    fn stale_old_and_surplus_spares_go_and_with_little_memory_one_of_the_good() {
        let now = Instant::now() + AGE * 2;
        let spare = |age: Duration, current| Waiting { since: now - age, current };
        let second = Duration::from_secs(1);
        let waiting =
            vec![spare(second, false), spare(AGE, true), spare(second * 2, true), spare(second, true)];
        let situation = Situation { waiting, ..calm(now) };
        assert_eq!(decide(&situation, now).end, [0, 1, 2], "the newest stays");
        let two = Situation { wanted: 2, ..situation.clone() };
        assert_eq!(decide(&two, now).end, [0, 1]);
        assert_eq!(decide(&two, now).again, Some(now + AGE - second * 2));
        let short = Situation { memory: Memory::Short, ..two };
        assert_eq!(decide(&short, now).end, [0, 1, 2]);
        assert!(!decide(&short, now).make);
    }

    proptest! {
        #[test]
        fn never_more_than_wanted_and_every_spare_that_must_go_goes(
            wanted in 0u32..4, making in 0u32..3, fresh: bool, memory in 0..3,
            spares in proptest::collection::vec((0u64..7200, any::<bool>()), 0..6),
        ) {
            let now = Instant::now() + AGE * 3;
            let memory = [Memory::Plenty, Memory::Enough, Memory::Short][memory as usize];
            let waiting: Vec<Waiting> = spares.iter()
                .map(|(age, current)| Waiting { since: now - Duration::from_secs(*age), current: *current })
                .collect();
            let situation = Situation {
                wanted, making, fresh, memory, waiting, making_somewhere: making > 0, ..calm(now)
            };
            let decision = decide(&situation, now);
            let left = situation.waiting.len() - decision.end.len();
            prop_assert!(left as u32 <= wanted);
            prop_assert!(left as u32 + making + u32::from(decision.make) <= wanted.max(left as u32 + making));
            for (at, spare) in situation.waiting.iter().enumerate() {
                let bad = !fresh || !spare.current || now - spare.since >= AGE;
                prop_assert!(!bad || decision.end.contains(&at));
            }
            prop_assert!(decision.again.is_none_or(|again| again > now));
        }
    }
}
