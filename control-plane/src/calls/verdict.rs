//! What `qrexec-policy-exec` tells the holder that started it, on a pipe whose number is in its environment: one line, `+` or `-` and why.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;

/// Names the pipe.
pub const VARIABLE: &str = "DISPVM_CALL_VERDICT";
/// A pipe takes so much at once or not at all (PIPE_BUF).
const LINE_BYTES_MAX: usize = 4096;

/// Hears it; one that says nothing refuses. Does not wait: the pipe is readable, or at its end.
pub(super) fn hear(verdict: OwnedFd) -> bool {
    let mut line = [0; LINE_BYTES_MAX];
    let count = File::from(verdict).read(&mut line).unwrap_or(0);
    let text = String::from_utf8_lossy(line.get(1..count).unwrap_or_default());
    match line.first().filter(|_| count > 0) {
        Some(b'+') => {
            tracing::info!("{}", text.trim_end());
            true
        }
        Some(_) => {
            tracing::warn!("{}", text.trim_end());
            false
        }
        None => {
            tracing::warn!("a call ended before it was decided");
            false
        }
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

    /// Says it, once.
    pub fn tell(&mut self, accepted: bool, why: &str) {
        let Some(mut pipe) = self.0.take() else { return };
        let mut line = format!("{}{why}", if accepted { '+' } else { '-' }).into_bytes();
        line.truncate(LINE_BYTES_MAX);
        let _ = pipe.write_all(&line);
    }
}
