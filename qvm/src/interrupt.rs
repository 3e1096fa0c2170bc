//! Signals that would end a tool half-way, for one that first takes back what it has done.
//!
//! A thread waits for them: a call of the API is not cut short, since what has become of it would not be known, and the tool looks here after each.
//! Who presses Ctrl-C again wants the end at once, and gets it; so does who sends another signal later. A terminal that closes sends two or three, one
//! right after the other.

use std::fs;
use std::io;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal};

use crate::outcome::{Failure, Outcome};

/// Those that somebody sends who wants the tool to end.
const ENDING: [Signal; 3] = [Signal::SIGHUP, Signal::SIGINT, Signal::SIGTERM];
/// Signals that come so soon after the first say nothing new.
const AT_ONCE: Duration = Duration::from_secs(1);
/// As a shell shows the end by a signal.
const BY_SIGNAL: u8 = 128;

/// Whether one has come: its number, or 0.
#[derive(Debug)]
pub struct Interrupts(Arc<AtomicU8>);

impl Interrupts {
    /// From now on a signal ends the tool only where it looks. One that is ignored, as under nohup, stays so.
    pub fn watch() -> io::Result<Interrupts> {
        let ignored = ignored();
        let mut signals = SigSet::empty();
        for signal in ENDING.into_iter().filter(|signal| ignored & bit(*signal) == 0) {
            signals.add(signal);
        }
        // Before there is the thread, which inherits it.
        signals.thread_block()?;
        let come = Arc::new(AtomicU8::new(0));
        let tell = Arc::clone(&come);
        thread::Builder::new().spawn(move || {
            let mut first: Option<Instant> = None;
            while let Ok(signal) = signals.wait() {
                let number = u8::try_from(signal as i32).unwrap_or(u8::MAX - BY_SIGNAL);
                let again = tell.swap(number, Ordering::Relaxed) != 0;
                if again && (signal == Signal::SIGINT || first.is_some_and(|at| at.elapsed() > AT_ONCE)) {
                    std::process::exit((BY_SIGNAL + number).into());
                }
                first.get_or_insert_with(Instant::now);
            }
        })?;
        Ok(Interrupts(come))
    }

    /// Fails once a signal has come.
    pub fn check(&self) -> Outcome<()> {
        match self.0.load(Ordering::Relaxed) {
            0 => Ok(()),
            number => Err(Failure::Runtime("interrupted".to_owned(), BY_SIGNAL + number)),
        }
    }
}

/// The signals that this process ignores, as bits; none where the kernel does not say.
fn ignored() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}

fn bit(signal: Signal) -> u64 {
    1 << (signal as i32 - 1)
}
