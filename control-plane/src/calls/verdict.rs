//! What `qrexec-policy-exec` tells the holder that started it, on a pipe whose number is in its environment: one line. `+` and why, or `-` and
//! why not.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// Names the pipe.
pub const VARIABLE: &str = "DISPVM_CALL_VERDICT";
/// A pipe takes so much at once or not at all (PIPE_BUF).
const LINE_BYTES_MAX: usize = 4096;
/// So many refusals are logged in each such time.
const REFUSALS_LOGGED: u32 = 20;
const REFUSALS_PERIOD: Duration = Duration::from_secs(60);

/// What was decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The call may not happen.
    Refused,
    /// It may.
    Accepted,
}

/// Hears it; one that says nothing refuses. Does not wait: the pipe is readable, or at its end.
pub(super) fn hear(verdict: OwnedFd, refusals: &mut Refusals) -> Verdict {
    let (verdict, why) = read(verdict);
    match verdict {
        Verdict::Refused => refusals.log(&why),
        Verdict::Accepted => tracing::info!("{why}"),
    }
    verdict
}

/// Reads it, with the reason.
pub(super) fn read(verdict: OwnedFd) -> (Verdict, String) {
    let mut line = [0; LINE_BYTES_MAX];
    let count = File::from(verdict).read(&mut line).unwrap_or(0);
    let text = String::from_utf8_lossy(line.get(..count).unwrap_or_default());
    match parse(&text) {
        Some((verdict, why)) => (verdict, why.to_owned()),
        None => (Verdict::Refused, "a call ended before it was decided".to_owned()),
    }
}

fn parse(line: &str) -> Option<(Verdict, &str)> {
    let line = line.trim_end();
    if let Some(why) = line.strip_prefix('+') {
        return Some((Verdict::Accepted, why));
    }
    line.strip_prefix('-').map(|why| (Verdict::Refused, why))
}

/// What is logged of calls that do not happen: the guest says how many there are, and the log is dom0's disk.
#[derive(Debug)]
pub(super) struct Refusals {
    since: Instant,
    logged: u32,
}

impl Refusals {
    pub(super) fn none() -> Refusals {
        Refusals { since: Instant::now(), logged: 0 }
    }

    /// Logs one, if not too many have been of late.
    pub(super) fn log(&mut self, text: &str) {
        match self.count(Instant::now()) {
            ..REFUSALS_LOGGED => tracing::warn!("{text}"),
            REFUSALS_LOGGED => tracing::warn!("{text}; what is refused in the next minute is not logged"),
            _ => {}
        }
    }

    /// How many came before this one in its minute.
    fn count(&mut self, now: Instant) -> u32 {
        if now.saturating_duration_since(self.since) >= REFUSALS_PERIOD {
            *self = Refusals { since: now, logged: 0 };
        }
        self.logged = self.logged.saturating_add(1);
        self.logged - 1
    }
}

/// Tells it.
pub struct Teller(Option<File>);

impl Teller {
    /// To whoever waits for it, if anybody does. What runs afterwards does not get the pipe.
    pub fn of_environment() -> Teller {
        let number = std::env::var(VARIABLE).ok().and_then(|number| number.parse::<u16>().ok());
        let opened = number.filter(|number| *number > 2).and_then(|number| {
            let own = File::options().write(true).open(format!("/proc/self/fd/{number}")).ok();
            own.filter(|_| nix::unistd::close(number.into()).is_ok())
        });
        Teller(opened)
    }

    /// Says it, once. Answers whether there is still a call: a holder that has gone hears nothing, and its guest is gone as well.
    pub fn tell(&mut self, accepted: bool, why: &str) -> bool {
        let Some(mut pipe) = self.0.take() else { return true };
        let mut line = format!("{}{why}", if accepted { '+' } else { '-' }).into_bytes();
        line.truncate(LINE_BYTES_MAX);
        pipe.write_all(&line).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_does_not_say_how_much_is_logged() {
        let mut refusals = Refusals::none();
        let start = Instant::now();
        let logged = (0..100_000).filter(|_| refusals.count(start) <= REFUSALS_LOGGED).count();
        assert_eq!(logged, REFUSALS_LOGGED as usize + 1);
        assert_eq!(refusals.count(start + 2 * REFUSALS_PERIOD), 0, "the next are told again");
    }

    #[test]
    fn verdicts_are_read_as_they_are_told() {
        let told = |tell: &dyn Fn(&mut Teller) -> bool| {
            let (reader, writer) = std::io::pipe().unwrap();
            assert!(tell(&mut Teller(Some(File::from(OwnedFd::from(writer))))));
            hear(reader.into(), &mut Refusals::none())
        };
        assert_eq!(told(&|teller| teller.tell(true, "a rule")), Verdict::Accepted);
        assert_eq!(told(&|teller| teller.tell(false, "+")), Verdict::Refused);
        for line in ["", "=1 2", "a rule"] {
            assert_eq!(parse(line), None, "{line}");
        }
    }

    #[test]
    fn a_verdict_that_nobody_hears_is_known_to_be_in_vain() {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut teller = Teller(Some(File::from(OwnedFd::from(writer))));
        assert!(!teller.tell(true, "allowed"));
    }
}
