//! How much of a guest's calls is logged. What was decided of each goes to the system's log, whose disk is dom0's, and the guest says how many there
//! are: refusals of [`BURST`] at once and of [`PER_SECOND`] after that, and of the others how many calls they were. What policy allows is always
//! logged.

use std::time::{Duration, Instant};

use super::rate::{Rate, Turn};
use super::system_log;

/// More than who makes calls by hand has in a second, or a script that begins.
const BURST: u32 = 20;
const PER_SECOND: u32 = 5;
/// From the first that is not logged to the line that says how many there were.
const TELL_AFTER: Duration = Duration::from_secs(10);
/// Under what name the line is logged: that of the verdicts.
const PROGRAM: &str = "qrexec-policy-exec";

/// See the module. Dropping it tells what is untold.
#[derive(Debug)]
pub(super) struct VerdictLog {
    caller: String,
    rate: Rate,
    unlogged: u32,
    tell_at: Option<Instant>,
}

impl VerdictLog {
    pub(super) fn of(caller: &str) -> VerdictLog {
        VerdictLog {
            caller: caller.to_owned(),
            rate: Rate::of(BURST, PER_SECOND),
            unlogged: 0,
            tell_at: None,
        }
    }

    /// Whether it is logged of a call that begins now if it is refused.
    pub(super) fn takes(&mut self, now: Instant) -> bool {
        let taken = self.rate.take(now) == Turn::Taken;
        if !taken {
            self.unlogged = self.unlogged.saturating_add(1);
            self.tell_at.get_or_insert(now + TELL_AFTER);
        }
        taken
    }

    /// When there is something to tell.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.tell_at
    }

    /// Tells how many were not logged, if it is time.
    pub(super) fn tell_if_due(&mut self, now: Instant) {
        if let Some(text) = self.due(now) {
            system_log::say(PROGRAM, &text);
        }
    }

    fn due(&mut self, now: Instant) -> Option<String> {
        self.tell_at.take_if(|at| *at <= now)?;
        self.untold()
    }

    fn untold(&mut self) -> Option<String> {
        let count = std::mem::take(&mut self.unlogged);
        (count > 0).then(|| {
            format!("{count} more calls of {}: only what was allowed of them is logged", self.caller)
        })
    }
}

impl Drop for VerdictLog {
    fn drop(&mut self) {
        if let Some(text) = self.untold() {
            system_log::say(PROGRAM, &text);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_calls_all_the_time_has_five_lines_a_second_and_one_of_the_others() {
        let mut log = VerdictLog::of("work");
        let start = Instant::now();
        let (mut logged, mut told) = (0, Vec::new());
        // 100 calls a second, for 30 s.
        for ms in (0..30_000).step_by(10) {
            let now = start + Duration::from_millis(ms);
            logged += u32::from(log.takes(now));
            told.extend(log.due(now));
        }
        assert!((BURST + 29 * PER_SECOND..=BURST + 30 * PER_SECOND).contains(&logged), "{logged}");
        assert_eq!(told.len(), 2, "{told:?}");
        let end = log.deadline().unwrap();
        assert_eq!(log.due(end - Duration::from_millis(1)), None);
        told.extend(log.due(end));
        let count = |text: &String| text.split(' ').next().unwrap().parse::<u32>().unwrap();
        assert_eq!(told.iter().map(count).sum::<u32>(), 3000 - logged, "each is logged or counted");
        assert_eq!(
            told[0].split_once(' ').unwrap().1,
            "more calls of work: only what was allowed of them is logged"
        );
        assert_eq!((log.deadline(), log.untold()), (None, None), "it is over");
    }

    #[test]
    fn who_calls_now_and_then_has_all_logged() {
        let mut log = VerdictLog::of("work");
        let start = Instant::now();
        assert!((0..1000).all(|call| log.takes(start + Duration::from_millis(200) * call)));
        assert_eq!(log.deadline(), None);
    }
}
