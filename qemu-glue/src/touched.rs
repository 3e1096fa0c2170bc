//! Which pages of the memory image a restored guest has touched, by what its QEMU has mapped of it.
//!
//! A page that was written is a private copy; one that was read is mapped, and with it those of its 16 neighbours (64 KiB,
//! aligned) that are in the page cache: the kernel maps around a fault (`fault_around_bytes`), and gives no way to tell them
//! apart. Measured on Debian, that makes three to four pages of one; read in one go, they cost half as much again.
//!
//! Formats: /proc/PID/maps (proc_pid_maps(5)) and /proc/PID/pagemap (proc_pid_pagemap(5)).

use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};

use engine::units::{PageIndex, PageRange, PAGE_SIZE};
use nix::sys::stat::{major, minor};

/// Entries of pagemap read at a time: 64 KiB, which stand for 32 MiB of memory.
const ENTRIES: usize = 8192;
const ENTRY_BYTES: usize = 8;
/// Bits of an entry: the page is in memory, or in swap.
const PRESENT: u64 = 1 << 63 | 1 << 62;

/// A file as /proc/PID/maps names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileId {
    device: (u64, u64),
    inode: u64,
}

impl FileId {
    /// Of an open file.
    pub fn of(meta: &Metadata) -> FileId {
        FileId { device: (major(meta.dev()), minor(meta.dev())), inode: meta.ino() }
    }
}

/// The pages of `file` that process `pid` has mapped or copied, sorted and disjoint.
///
/// Errors: those of reading another process's pagemap, for which the kernel wants the right to trace it.
pub fn touched(pid: u32, file: FileId) -> io::Result<Vec<PageRange>> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let mut mappings: Vec<Mapping> = maps.lines().filter_map(|line| Mapping::of(line, file)).collect();
    if mappings.is_empty() {
        return Err(io::Error::new(io::ErrorKind::NotFound, "guest memory is not mapped"));
    }
    mappings.sort_by_key(|mapping| mapping.first);
    let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
    let mut touched = Touched::default();
    let mut buffer = vec![0u8; ENTRIES * ENTRY_BYTES];
    for mapping in mappings {
        let mut done = 0;
        while done < mapping.pages {
            let count = ENTRIES.min((mapping.pages - done) as usize);
            let bytes = &mut buffer[..count * ENTRY_BYTES];
            pagemap.read_exact_at(bytes, (mapping.address_page + done) * ENTRY_BYTES as u64)?;
            touched.add(PageIndex(mapping.first.0 + done), bytes);
            done += count as u64;
        }
    }
    Ok(touched.0)
}

/// One mapping of the file: `pages` pages from `first` of the file on, at `address_page` of the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Mapping {
    address_page: u64,
    pages: u64,
    first: PageIndex,
}

impl Mapping {
    /// From a line of maps, if it is one of `file`: `start-end perms offset major:minor inode path`, all but the inode in hex.
    fn of(line: &str, file: FileId) -> Option<Mapping> {
        let mut words = line.split_ascii_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let (_perms, offset) = (words.next()?, words.next()?);
        let (major, minor) = words.next()?.split_once(':')?;
        let inode: u64 = words.next()?.parse().ok()?;
        let hex = |word| u64::from_str_radix(word, 16).ok();
        if (FileId { device: (hex(major)?, hex(minor)?), inode }) != file {
            return None;
        }
        let (start, end) = (hex(start)?, hex(end)?);
        let first = PageIndex(hex(offset)? / PAGE_SIZE);
        Some(Mapping { address_page: start / PAGE_SIZE, pages: end.checked_sub(start)? / PAGE_SIZE, first })
    }
}

/// Runs of touched pages, added in order.
#[derive(Debug, Default)]
struct Touched(Vec<PageRange>);

impl Touched {
    /// Adds what a piece of pagemap says, whose first entry is of page `first`.
    fn add(&mut self, first: PageIndex, entries: &[u8]) {
        let entries = entries
            .chunks_exact(ENTRY_BYTES)
            .map(|bytes| bytes.iter().rev().fold(0, |e, b| e << 8 | u64::from(*b)));
        for (page, entry) in (first.0..).zip(entries) {
            match self.0.last_mut() {
                _ if entry & PRESENT == 0 => {}
                // A page mapped twice counts once.
                Some(last) if page < last.end().0 => {}
                Some(last) if page == last.end().0 => last.count.0 += 1,
                _ => self.0.push(PageRange::new(page, 1)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of a process that maps something for sure: this one, its own program.
    #[test]
    fn of_a_mapped_file_some_pages_are_touched_and_of_another_none() {
        let program = std::env::current_exe().unwrap().metadata().unwrap();
        let runs = touched(std::process::id(), FileId::of(&program)).unwrap();
        assert!(runs.windows(2).all(|pair| pair[0].end() < pair[1].first), "{runs:?}");
        assert!(!runs.is_empty() && runs.iter().all(|run| run.end().0 <= program.len().div_ceil(PAGE_SIZE)));
        let other = crate::process::memfd("not mapped").unwrap().metadata().unwrap();
        let error = touched(std::process::id(), FileId::of(&other)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn a_line_of_maps_is_of_the_file_or_not() {
        let file = FileId { device: (0, 1), inode: 1045 };
        let line = "7f3c40000000-7f3c50000000 rw-p 00001000 00:01 1045    /memfd:guest-memory (deleted)";
        let mapping = Mapping { address_page: 0x7f3c40000, pages: 0x10000, first: PageIndex(1) };
        assert_eq!(Mapping::of(line, file), Some(mapping));
        assert_eq!(Mapping::of(line, FileId { inode: 1046, ..file }), None);
        assert_eq!(Mapping::of(line, FileId { device: (0, 2), ..file }), None);
        for broken in ["", "7f-", "zz-7f rw-p 0 00:01 1045", "7f-1 rw-p 0 00:01 1045", "1-2 rw-p 0 0001 1045"]
        {
            assert_eq!(Mapping::of(broken, file), None, "{broken}");
        }
    }

    #[test]
    fn entries_become_runs_across_pieces_and_twice_mapped_pages_count_once() {
        let piece =
            |entries: &[u64]| entries.iter().flat_map(|entry| entry.to_le_bytes()).collect::<Vec<u8>>();
        let (here, swapped, gone) = (1 << 63 | 7, 1 << 62, 1 << 61);
        let mut touched = Touched::default();
        touched.add(PageIndex(10), &piece(&[gone, here, swapped]));
        touched.add(PageIndex(13), &piece(&[here, gone, here]));
        touched.add(PageIndex(12), &piece(&[here, here, gone, here, here]));
        assert_eq!(touched.0, [PageRange::new(11, 3), PageRange::new(15, 2)]);
    }
}
