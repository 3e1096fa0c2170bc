//! Progress of long work.
//!
//! Invariants: progress is told on the caller's own thread, at the start, at the end, and some twenty times a second
//! between; `done` never falls and never passes `total`. The work itself runs elsewhere and only adds to a counter.

use std::panic::resume_unwind;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{channel, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use crate::units::ByteCount;

const INTERVAL: Duration = Duration::from_millis(50);

/// A step of long work on a savefile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Looking for pages that are not zero.
    Scan,
    /// Compressing, hashing, writing.
    Encode,
    /// Reading, verifying, decoding, keeping nothing.
    Verify,
    /// Reading, verifying, decoding into images.
    Decode,
}

/// How far a step is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// The step.
    pub step: Step,
    /// Bytes of images done.
    pub done: ByteCount,
    /// Bytes of images in all.
    pub total: ByteCount,
}

/// Where progress goes.
pub type OnProgress<'a> = &'a dyn Fn(Progress);

/// For callers who don't care.
pub fn silent(_: Progress) {}

/// Adds up what several threads have done.
pub(crate) struct Meter {
    step: Step,
    done: AtomicU64,
    total: ByteCount,
}

impl Meter {
    pub fn new(step: Step, total: ByteCount) -> Meter {
        Meter { step, done: AtomicU64::new(0), total }
    }

    pub fn add(&self, bytes: ByteCount) {
        self.done.fetch_add(bytes.0, Ordering::Relaxed);
    }

    fn progress(&self) -> Progress {
        let done = ByteCount(self.done.load(Ordering::Relaxed)).min(self.total);
        Progress { step: self.step, done, total: self.total }
    }
}

/// Runs `work` on a thread of its own (so never on one of rayon's), and tells `report` how far the meter is meanwhile.
pub(crate) fn watched<R: Send>(meter: &Meter, report: OnProgress, work: impl FnOnce() -> R + Send) -> R {
    report(meter.progress());
    let result = thread::scope(|scope| {
        let (send, receive) = channel();
        let worker = scope.spawn(move || send.send(work()));
        loop {
            match receive.recv_timeout(INTERVAL) {
                Ok(result) => return result,
                Err(RecvTimeoutError::Timeout) => report(meter.progress()),
                Err(RecvTimeoutError::Disconnected) => match worker.join() {
                    Err(panic) => resume_unwind(panic),
                    Ok(_) => unreachable!("the worker answers before it hangs up"),
                },
            }
        }
    });
    report(meter.progress());
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    #[test]
    fn progress_begins_at_nothing_and_ends_at_all() {
        let meter = Meter::new(Step::Scan, ByteCount(10));
        let told = RefCell::new(Vec::new());
        let answer = watched(&meter, &|progress| told.borrow_mut().push(progress.done.0), || {
            meter.add(ByteCount(10));
            "done"
        });
        assert_eq!((answer, told.borrow().first(), told.borrow().last()), ("done", Some(&0), Some(&10)));
    }

    #[test]
    #[should_panic(expected = "the work's own panic")]
    fn a_panic_of_the_work_is_the_callers() {
        watched(&Meter::new(Step::Scan, ByteCount(1)), &silent, || panic!("the work's own panic"));
    }
}
