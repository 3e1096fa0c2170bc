//! When each phase of a launch or a build ended, counted from one start. Phases are in order and named once.

use std::time::{Duration, Instant};

/// Named moments after a start.
#[derive(Debug, Clone)]
pub struct Timeline {
    start: Instant,
    marks: Vec<(&'static str, Duration)>,
}

impl Timeline {
    /// Starts counting at `start`.
    pub fn since(start: Instant) -> Self {
        Timeline { start, marks: Vec::with_capacity(16) }
    }

    /// Records that `phase` ended now.
    pub fn mark(&mut self, phase: &'static str) {
        self.marks.push((phase, self.start.elapsed()));
    }

    /// Adds phases that somebody else has timed, each in its place.
    pub fn weave(&mut self, steps: impl IntoIterator<Item = (&'static str, Instant)>) {
        let start = self.start;
        self.marks.extend(steps.into_iter().map(|(step, at)| (step, at.saturating_duration_since(start))));
        self.marks.sort_by_key(|(_, at)| *at);
    }

    /// Each phase with the moment it ended, from the start, in ms.
    pub fn marks_ms(&self) -> impl Iterator<Item = (&'static str, f64)> + '_ {
        self.marks.iter().map(|(phase, at)| (*phase, at.as_secs_f64() * 1e3))
    }

    /// Each phase with how long it took, in ms.
    pub fn phases_ms(&self) -> impl Iterator<Item = (&'static str, f64)> + '_ {
        let starts = std::iter::once(Duration::ZERO).chain(self.marks.iter().map(|(_, at)| *at));
        self.marks
            .iter()
            .zip(starts)
            .map(|((phase, end), begin)| (*phase, end.saturating_sub(begin).as_secs_f64() * 1e3))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_timed_comes_in_its_place() {
        let start = Instant::now();
        let mut timeline = Timeline::since(start);
        std::thread::sleep(Duration::from_millis(3));
        timeline.mark("restored");
        timeline.weave([
            ("filled", start + Duration::from_millis(2)),
            ("created", start + Duration::from_millis(1)),
        ]);
        let names: Vec<&str> = timeline.marks_ms().map(|(name, _)| name).collect();
        assert_eq!(names, ["created", "filled", "restored"]);
    }

    #[test]
    fn phases_add_up_to_the_last_mark() {
        let mut timeline = Timeline::since(Instant::now());
        for phase in ["restore", "identity", "run"] {
            std::thread::sleep(Duration::from_millis(2));
            timeline.mark(phase);
        }
        let total: f64 = timeline.phases_ms().map(|(_, ms)| ms).sum();
        let (last, at) = timeline.marks_ms().last().unwrap();
        assert_eq!(last, "run");
        assert!((total - at).abs() < 1e-6, "{total} != {at}");
        assert!(timeline.phases_ms().all(|(_, ms)| ms >= 2.0));
    }
}
