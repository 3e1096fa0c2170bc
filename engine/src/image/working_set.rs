//! The working set: the pages of memory that a launch touches, recorded once by [`crate::build`]'s rehearsal, and brought
//! into the page cache at once by every launch that finds them gone from it.
//!
//! Invariants:
//! - runs are sorted, disjoint and not mergeable once they have been through [`normalized`];
//! - reading ahead is advice: nothing waits for it, nothing fails by it, and nobody looks at a byte of it. A launch without
//!   it is the same launch, later;
//! - a launch whose pages are all there pays [`PROBES`] one-byte reads from the page cache, and no thread.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::thread::{self, JoinHandle};

use nix::fcntl::{posix_fadvise, PosixFadviseAdvice};
use rustix::io::ReadWriteFlags;

use super::hot::HotFiles;
use crate::units::{ByteCount, ByteOffset, PageCount, PageIndex, PageRange};

/// Runs in a manifest at most: 24 bytes of JSON each at the most, a fifth of what a manifest may have.
pub const RUNS_MAX: usize = 32 << 10;
/// Pages that are read ahead at most, in order of address: 256 MiB, which is several times what a desktop's launch touches.
pub const READ_AHEAD_MAX: PageCount = PageCount(64 << 10);
/// Two runs with no more pages between them are read as one: on an SSD a request costs as much as some eight pages.
const GAP_CLOSED: PageCount = PageCount(8);
/// Bytes asked for at a time. The kernel cuts a longer request to the device's read-ahead window, whose default this is
/// (VM_READAHEAD_PAGES).
const PIECE: ByteCount = ByteCount(128 << 10);
/// Places looked at to tell whether the set is in the page cache: if a fifth of it is gone, one of them is in all but one
/// of a thousand cases.
const PROBES: usize = 32;

/// Sorts runs and merges those that touch, overlap, or have at most `gap` pages between them.
pub fn normalized(mut runs: Vec<PageRange>, gap: PageCount) -> Vec<PageRange> {
    runs.retain(|run| !run.is_empty());
    runs.sort_unstable_by_key(|run| run.first);
    let mut merged: Vec<PageRange> = Vec::with_capacity(runs.len());
    for run in runs {
        match merged.last_mut() {
            Some(last) if run.first.0 <= last.end().0.saturating_add(gap.0) => {
                last.count.0 = last.end().max(run.end()).0 - last.first.0;
            }
            _ => merged.push(run),
        }
    }
    merged
}

/// What is kept of the pages a host says were touched: within memory, sorted, disjoint, and at most [`RUNS_MAX`] runs, for
/// which gaps are closed, small ones first.
pub fn bounded(touched: Vec<PageRange>, memory: PageCount) -> Vec<PageRange> {
    let all = PageRange { first: PageIndex(0), count: memory };
    let within = touched.iter().filter_map(|run| run.intersection(all)).collect();
    let mut runs = normalized(within, PageCount::ZERO);
    let mut gap = PageCount(1);
    while runs.len() > RUNS_MAX {
        runs = normalized(runs, gap);
        gap.0 *= 2;
    }
    runs
}

/// What is asked for of a working set as recorded: in few runs, at most [`READ_AHEAD_MAX`] pages.
///
/// Holes of the image are asked for, too. No disk is, but a fault on one that is not in the page cache would have the kernel
/// read all that lies around it, up to the 2 MiB of a huge page, which QEMU wishes for its memory.
fn to_read(set: Vec<PageRange>) -> Vec<PageRange> {
    let mut left = READ_AHEAD_MAX;
    let mut runs = normalized(set, GAP_CLOSED);
    runs.iter_mut().for_each(|run| {
        run.count = run.count.min(left);
        left.0 -= run.count.0;
    });
    runs.retain(|run| !run.is_empty());
    runs
}

/// Has the kernel read what a launch from `image` reads first, if it is not in the page cache: device state, deltas, and the
/// working set. Answers at once; the thread it answers with, if there is anything to do, ends when all has been asked for.
pub fn read_ahead(image: &HotFiles) -> Option<JoinHandle<()>> {
    if image.working_set.is_empty() || is_warm(image) {
        return None;
    }
    let start = || -> io::Result<JoinHandle<()>> {
        let (state, memory) = (image.device_state.try_clone()?, image.memory.try_clone()?);
        let deltas: Vec<File> =
            image.deltas.iter().map(|(_, file)| file.try_clone()).collect::<io::Result<_>>()?;
        let set = image.working_set.clone();
        thread::Builder::new().name("read-ahead".to_owned()).spawn(move || {
            // In the order in which QEMU, or another host, gets to them: disks are opened first.
            let asked = deltas.iter().chain([&state]).try_for_each(ask_for_all);
            let runs = to_read(set);
            let asked = asked.and_then(|()| runs.iter().try_for_each(|run| ask_for_run(&memory, *run)));
            if let Err(error) = asked {
                tracing::debug!(%error, "the working set cannot be read ahead");
            }
        })
    };
    start().inspect_err(|error| tracing::debug!(%error, "the working set cannot be read ahead")).ok()
}

/// Whether the places looked at are all in the page cache. Where the file system cannot tell, they are not.
fn is_warm(image: &HotFiles) -> bool {
    let runs = &image.working_set;
    let step = runs.len().div_ceil(PROBES).max(1);
    let places = runs.iter().step_by(step).map(|run| run.first.offset());
    is_cached(&image.device_state, ByteOffset(0)) && places.into_iter().all(|at| is_cached(&image.memory, at))
}

/// Whether the page that holds the byte at `at` can be read without waiting for a disk (RWF_NOWAIT, preadv2(2)).
fn is_cached(file: &File, at: ByteOffset) -> bool {
    let mut byte = [0u8; 1];
    let mut slices = [IoSliceMut::new(&mut byte)];
    rustix::io::preadv2(file, &mut slices, at.0, ReadWriteFlags::NOWAIT).is_ok_and(|read| read == 1)
}

fn ask_for_all(file: &File) -> io::Result<()> {
    let pages = ByteCount(file.metadata()?.len()).pages_covering();
    ask_for_run(file, PageRange { first: PageIndex(0), count: pages })
}

fn ask_for_run(file: &File, run: PageRange) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    let (start, end) = (run.first.offset().0, run.end().offset().0);
    for at in (start..end).step_by(PIECE.0 as usize) {
        let len = PIECE.0.min(end - at);
        let advice = PosixFadviseAdvice::POSIX_FADV_WILLNEED;
        posix_fadvise(file.as_raw_fd(), at as i64, len as i64, advice)?;
    }
    Ok(())
}

#[cfg(test)]
#[path = "working_set_tests.rs"]
mod tests;
