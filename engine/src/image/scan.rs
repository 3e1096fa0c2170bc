//! Finds the pages of an image that are not zero, and a fingerprint of each.
//!
//! Invariants of a [`Scan`]:
//! - `data` and `zero` are sorted, disjoint, not mergeable, and together exactly the scope;
//! - `prints` has one fingerprint per data page, in page order;
//! - a fingerprint only suggests that two pages are equal: whoever uses it compares the pages.
//!
//! Holes are skipped by SEEK_DATA before a byte is read; what is left is read in pieces, in parallel, and each piece is looked
//! at while it is in the cache.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::unistd::{lseek, Whence};
use rayon::prelude::*;

use crate::units::{ByteCount, ByteOffset, PageCount, PageIndex, PageRange, PAGE_BYTES};

/// What one task reads at a time: fits a second-level cache beside its neighbours.
const PIECE_PAGES: u64 = 64;
/// Pieces in one task, so that tasks are worth being stolen.
const TASK_PAGES: u64 = PIECE_PAGES * 16;

/// Which pages of a file belong to the image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    /// All of them: guest memory.
    Whole,
    /// These, sorted and disjoint; a delta is as its base elsewhere.
    Runs(Vec<PageRange>),
}

/// What an image holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scan {
    /// Runs of pages that are not zero.
    pub data: Vec<PageRange>,
    /// Runs of pages that are.
    pub zero: Vec<PageRange>,
    /// A fingerprint of each data page, in page order.
    pub prints: Vec<u64>,
}

impl Scan {
    /// Number of data pages.
    pub fn data_pages(&self) -> PageCount {
        PageCount(self.prints.len() as u64)
    }

    fn push(&mut self, page: PageIndex, print: Option<u64>) {
        let one = PageRange { first: page, count: PageCount(1) };
        match print {
            Some(print) => {
                self.prints.push(print);
                append(&mut self.data, one);
            }
            None => append(&mut self.zero, one),
        }
    }

    /// Adds what was found behind this scan's last page.
    fn extend(&mut self, later: Scan) {
        later.data.into_iter().for_each(|run| append(&mut self.data, run));
        later.zero.into_iter().for_each(|run| append(&mut self.zero, run));
        self.prints.extend(later.prints);
    }
}

/// Scans `pages` pages of `file` within `scope`; `done` is told of every run of pages that is finished.
///
/// The file's read position is moved. Errors: those of `lseek` and `pread`; a file shorter than the image is `UnexpectedEof`; a
/// scope that is not sorted, disjoint and within the image is `InvalidInput`.
pub fn scan(
    file: &File,
    pages: PageCount,
    scope: &Scope,
    done: &(dyn Fn(PageCount) + Sync),
) -> io::Result<Scan> {
    let scope = check_scope(scope, pages)?;
    let metadata = file.metadata()?;
    if metadata.is_file() && metadata.len() < pages.bytes().0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let extents = data_extents(file, pages)?;
    let tasks = plan_tasks(&scope, &extents);
    let scans = tasks.par_iter().map_init(new_piece, |piece, task| {
        let found = scan_task(file, *task, piece);
        done(task.pages().count);
        found
    });
    let parts: Vec<Scan> = scans.collect::<io::Result<_>>()?;
    let mut whole = Scan::default();
    parts.into_iter().for_each(|part| whole.extend(part));
    Ok(whole)
}

/// A run that is either a hole, or to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Task {
    Hole(PageRange),
    Read(PageRange),
}

impl Task {
    fn pages(self) -> PageRange {
        match self {
            Task::Hole(pages) | Task::Read(pages) => pages,
        }
    }
}

fn check_scope(scope: &Scope, pages: PageCount) -> io::Result<Vec<PageRange>> {
    let Scope::Runs(runs) = scope else {
        return Ok(vec![PageRange { first: PageIndex(0), count: pages }]);
    };
    let sorted = runs.windows(2).all(|pair| pair[0].end() <= pair[1].first);
    if !sorted || runs.iter().any(|run| run.end().0 > pages.0) {
        let why = "the runs of an image are not sorted, disjoint and within it";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
    }
    Ok(runs.clone())
}

/// Cuts the scope at the extents' ends and into pieces of work. Pure.
fn plan_tasks(scope: &[PageRange], extents: &[PageRange]) -> Vec<Task> {
    let mut tasks = Vec::new();
    let mut extents = extents.iter().copied().peekable();
    for &run in scope {
        let mut at = run.first;
        while at < run.end() {
            while extents.next_if(|extent| extent.end() <= at).is_some() {}
            let rest = PageRange { first: at, count: PageCount(run.end().0 - at.0) };
            let data = extents.peek().and_then(|extent| extent.intersection(rest));
            let task = match data {
                Some(data) if data.first == at => {
                    Task::Read(PageRange { first: at, count: data.count.min(PageCount(TASK_PAGES)) })
                }
                Some(data) => Task::Hole(PageRange { first: at, count: PageCount(data.first.0 - at.0) }),
                None => Task::Hole(rest),
            };
            at = task.pages().end();
            tasks.push(task);
        }
    }
    tasks
}

fn scan_task(file: &File, task: Task, piece: &mut [u8]) -> io::Result<Scan> {
    let mut found = Scan::default();
    match task {
        Task::Hole(pages) if !pages.is_empty() => found.zero.push(pages),
        Task::Hole(_) => {}
        Task::Read(pages) => {
            let mut first = pages.first;
            while first < pages.end() {
                let count = PageCount((pages.end().0 - first.0).min(PIECE_PAGES));
                let bytes = &mut piece[..count.buffer_len()];
                file.read_exact_at(bytes, first.offset().0)?;
                for (page, bytes) in (first.0..).zip(bytes.chunks_exact(PAGE_BYTES)) {
                    found.push(PageIndex(page), (!is_zero(bytes)).then(|| fingerprint(bytes)));
                }
                first = PageIndex(first.0 + count.0);
            }
        }
    }
    Ok(found)
}

/// The runs of pages that may hold data, sorted and disjoint: everything else is a hole.
pub fn data_extents(file: &File, pages: PageCount) -> io::Result<Vec<PageRange>> {
    let mut extents = Vec::new();
    let end = pages.bytes().0;
    let mut at = 0;
    while at < end {
        let Some(data) = seek(file, at, Whence::SeekData)?.filter(|&data| data < end) else { break };
        let hole = seek(file, data, Whence::SeekHole)?.unwrap_or(end).min(end);
        let first = PageIndex::holding(ByteOffset(data));
        let count = PageCount(ByteCount(hole).pages_covering().0 - first.0);
        append(&mut extents, PageRange { first, count });
        at = hole.max(data + 1);
    }
    Ok(extents)
}

/// Where the next data or hole begins. A file that knows no holes (a block device) is data throughout.
fn seek(file: &File, from: u64, whence: Whence) -> io::Result<Option<u64>> {
    let searches_data = matches!(whence, Whence::SeekData);
    match lseek(file.as_raw_fd(), from as i64, whence) {
        Ok(found) => Ok(Some(found as u64)),
        Err(Errno::ENXIO) => Ok(None),
        Err(Errno::EINVAL) => Ok(searches_data.then_some(from)),
        Err(errno) => Err(errno.into()),
    }
}

/// Appends a run behind the others, merging it with the last one where they touch or overlap.
fn append(runs: &mut Vec<PageRange>, run: PageRange) {
    match runs.last_mut() {
        Some(last) if last.end() >= run.first => {
            last.count = PageCount(last.end().max(run.end()).0 - last.first.0);
        }
        _ => runs.push(run),
    }
}

fn new_piece() -> Vec<u8> {
    vec![0; PageCount(PIECE_PAGES).buffer_len()]
}

/// Whether all bytes are zero. The inner loop has no branch, so the compiler makes vectors of it.
pub fn is_zero(bytes: &[u8]) -> bool {
    let mut blocks = bytes.chunks_exact(256);
    let blocks_zero = blocks.all(|block| block.iter().fold(0, |seen, &byte| seen | byte) == 0);
    blocks_zero && bytes.chunks_exact(256).remainder().iter().all(|&byte| byte == 0)
}

/// A 64-bit fingerprint of a page: four independent lanes of a folded 64 × 64 → 128 bit product. Fast, not collision-proof:
/// a guest can make collisions, which costs it the sharing of those pages and nothing else.
pub fn fingerprint(page: &[u8]) -> u64 {
    const KEYS: [u64; 4] =
        [0x9e37_79b9_7f4a_7c15, 0xbf58_476d_1ce4_e5b9, 0x94d0_49bb_1331_11eb, 0xd6e8_feb8_6659_fd93];
    let mut lanes = KEYS;
    for block in page.chunks_exact(64) {
        for (lane, (pair, key)) in lanes.iter_mut().zip(block.chunks_exact(16).zip(KEYS)) {
            let (low, high) = pair.split_at(8);
            *lane = fold(word(low) ^ key, word(high) ^ *lane);
        }
    }
    let [a, b, c, d] = lanes;
    fold(fold(a, b ^ KEYS[0]), fold(c, d ^ KEYS[1]) ^ KEYS[2])
}

fn fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    (product as u64) ^ ((product >> 64) as u64)
}

fn word(bytes: &[u8]) -> u64 {
    bytes.try_into().map_or(0, u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn tasks_cover_the_scope_and_read_only_extents() {
        let scope = [PageRange::new(0, 10), PageRange::new(20, 5)];
        let extents = [PageRange::new(2, 3), PageRange::new(8, 14)];
        assert_eq!(
            plan_tasks(&scope, &extents),
            [
                Task::Hole(PageRange::new(0, 2)),
                Task::Read(PageRange::new(2, 3)),
                Task::Hole(PageRange::new(5, 3)),
                Task::Read(PageRange::new(8, 2)),
                Task::Read(PageRange::new(20, 2)),
                Task::Hole(PageRange::new(22, 3)),
            ]
        );
    }

    #[test]
    fn zeros_data_and_holes_are_told_apart() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[0; 2 * PAGE_BYTES]).unwrap();
        file.write_all(&[7; PAGE_BYTES]).unwrap();
        file.set_len(100 * PAGE_BYTES as u64).unwrap();
        let found = scan(&file, PageCount(100), &Scope::Whole, &|_| {}).unwrap();
        assert_eq!(found.data, [PageRange::new(2, 1)]);
        assert_eq!(found.zero, [PageRange::new(0, 2), PageRange::new(3, 97)]);
        assert_eq!(found.prints, [fingerprint(&[7; PAGE_BYTES])]);
    }

    #[test]
    fn a_single_set_bit_makes_a_page_data() {
        for place in [0, 1, 255, 256, 2048, PAGE_BYTES - 1] {
            let mut page = vec![0; PAGE_BYTES];
            assert!(is_zero(&page));
            page[place] = 0x80;
            assert!(!is_zero(&page), "byte {place}");
            assert_ne!(fingerprint(&page), fingerprint(&[0; PAGE_BYTES]), "byte {place}");
        }
    }

    #[test]
    fn a_short_file_and_a_wild_scope_are_errors() {
        let file = tempfile::tempfile().unwrap();
        assert!(scan(&file, PageCount(1), &Scope::Whole, &|_| {}).is_err());
        file.set_len(10 * PAGE_BYTES as u64).unwrap();
        for runs in [vec![PageRange::new(5, 6)], vec![PageRange::new(5, 2), PageRange::new(0, 1)]] {
            assert!(scan(&file, PageCount(10), &Scope::Runs(runs), &|_| {}).is_err());
        }
    }
}
