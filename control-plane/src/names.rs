//! Names of clones: `disp0` to `disp9999`, random, not used again for seven days.
//!
//! The ledger is one file of 10,000 little-endian u64: for each number, the second since 1970 at which it was last in
//! use, 0 for never. A name is stamped when it is given out, and again when it is given back, so that the seven days
//! count from the end and a killed keeper's name is in quarantine all the same.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use engine::identity::{CloneNumber, CLONE_NUMBERS};

use crate::error::{Error, Kind, Result};
use crate::state::{self, State};

/// How long a name rests.
pub const QUARANTINE: Duration = Duration::from_secs(7 * 24 * 3600);

/// Bytes of one entry.
const ENTRY: u64 = 8;

/// Gives out a name that is neither alive nor in quarantine.
pub fn take(state: &State, alive: impl Fn(CloneNumber) -> bool) -> Result<CloneNumber> {
    let path = state.names();
    let ledger = state::lock(&path)?;
    let mut bytes = vec![0u8; (u64::from(CLONE_NUMBERS) * ENTRY) as usize];
    let have = (&*ledger).read(&mut bytes).map_err(Error::io("read", &path))?;
    bytes[have..].fill(0);
    let now = now_s();
    let rested = |number: u32| {
        let at = (number as usize) * ENTRY as usize;
        let last = u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        // A stamp from the future is a clock that was set back. By more than seven days, nobody knows how long the name has rested, and
        // to wait until the clock has caught up could be for years.
        last == 0 || now.abs_diff(last) >= QUARANTINE.as_secs()
    };
    let start = random_u32().map_err(Error::failed("draw a name"))? % CLONE_NUMBERS;
    // From a random place with a random stride that visits every number: 10,000 = 2^4 · 5^4, so any stride ending
    // in 1, 3, 7 or 9 does.
    let stride = [1, 3, 7, 9][(start % 4) as usize]
        + 10 * (random_u32().map_err(Error::failed("draw a name"))? % 1000);
    (0..CLONE_NUMBERS)
        .map(|step| (u64::from(start) + u64::from(step) * u64::from(stride)) % u64::from(CLONE_NUMBERS))
        .filter_map(|number| CloneNumber::new(number as u32))
        .find(|number| rested(number.get()) && !alive(*number))
        .map(|number| stamp(&ledger, number, now).map(|()| number).map_err(Error::io("write", &path)))
        .unwrap_or_else(|| {
            Err(Error::new(Kind::Refused, "all 10,000 names were in use within the last seven days"))
        })
}

/// Takes a name back: its seven days begin.
pub fn give_back(state: &State, number: CloneNumber) -> Result<()> {
    let path = state.names();
    let ledger = state::lock(&path)?;
    stamp(&ledger, number, now_s()).map_err(Error::io("write", &path))
}

/// Takes a name back that nobody was ever told: it may be given out at once.
pub fn forget(state: &State, number: CloneNumber) -> Result<()> {
    let path = state.names();
    let ledger = state::lock(&path)?;
    stamp(&ledger, number, 0).map_err(Error::io("write", &path))
}

fn stamp(ledger: &File, number: CloneNumber, now: u64) -> io::Result<()> {
    ledger.write_all_at(&now.to_le_bytes(), u64::from(number.get()) * ENTRY)
}

fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs().max(1)
}

fn random_u32() -> io::Result<u32> {
    let mut bytes = [0u8; 4];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(u32::from_le_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn every_name_is_given_out_once_and_then_none() {
        let folder = tempfile::tempdir().unwrap();
        let state = State::open(folder.path()).unwrap();
        let mut seen = HashSet::new();
        for _ in 0..300 {
            assert!(seen.insert(take(&state, |_| false).unwrap()));
        }
        assert!(take(&state, |_| true).is_err());
        assert_ne!(seen.iter().max().unwrap().get(), 299, "names are random");
        // All but one in quarantine: that one is found.
        let ledger = File::options().write(true).open(state.names()).unwrap();
        for number in (0..CLONE_NUMBERS).filter_map(CloneNumber::new).filter(|n| n.get() != 4711) {
            stamp(&ledger, number, now_s()).unwrap();
        }
        stamp(&ledger, CloneNumber::new(4711).unwrap(), now_s() - QUARANTINE.as_secs()).unwrap();
        assert_eq!(take(&state, |_| false).unwrap().get(), 4711);
        assert!(take(&state, |_| false).is_err());
    }
    #[test]
    fn a_clock_that_jumps_frees_no_name_too_early_and_none_never() {
        let folder = tempfile::tempdir().unwrap();
        let state = State::open(folder.path()).unwrap();
        let ledger = File::options().write(true).create(true).truncate(true).open(state.names()).unwrap();
        let (hour, year) = (3600, 365 * 24 * 3600);
        let all_but = |number: u32, last: u64| {
            for number in (0..CLONE_NUMBERS).filter_map(CloneNumber::new) {
                stamp(&ledger, number, now_s()).unwrap();
            }
            stamp(&ledger, CloneNumber::new(number).unwrap(), last).unwrap();
        };
        all_but(1, now_s() + hour);
        assert!(take(&state, |_| false).is_err(), "set back by an hour, it rests on");
        for last in [now_s() + year, u64::MAX] {
            all_but(1, last);
            assert_eq!(take(&state, |_| false).unwrap().get(), 1, "set back by a year");
        }
    }
}
