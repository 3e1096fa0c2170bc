//! Launches whose savefile is not in the page cache: with its working set read ahead, without, and warm beside them.
//!
//! Only the hot image's files are taken out of the page cache (all of them, before each cold launch): the programs and their
//! libraries stay in it, as on a machine that has run something else for a while. "Without" is the same hot image with an
//! index whose manifest has no working set.
//!
//! `--full` adds its lines to benches/results/; `--short` is CI's guard, as of `launch-bench`.

use std::fs::{self, File, Permissions};
use std::io::{IoSliceMut, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use benches::clock::first_byte;
use benches::guests::{Bench, Subject, DEBIAN, TEST};
use benches::run::Options;
use benches::stats::{median, percentile};
use benches::table::Row;
use nix::fcntl::{posix_fadvise, PosixFadviseAdvice};
use rustix::io::ReadWriteFlags;
use serde_json::{json, Value};

const ABOUT: &str = "Measures launches from a cold page cache: 40 of each kind, or six.";

/// A cold launch with its working set read ahead takes at most this part of one without.
const MARK: f64 = 0.8;
/// How often the page cache is asked to let go.
const COOL_TRIES: usize = 50;
/// Bytes in a page.
const PAGE: u64 = 4096;

fn main() -> ExitCode {
    let options = Options::parse(ABOUT);
    let launches = options.launches(40, 6);
    let bench = Bench::open();
    let subjects = [("test guest", &TEST), ("Debian guest", &DEBIAN)];
    for (_, subject) in subjects {
        bench.prepare(subject);
        if !Hot::of(&bench, subject).cool() {
            println!("skipped: nothing can be taken out of the page cache of this file system");
            return ExitCode::SUCCESS;
        }
    }
    options.run("cold-cache", launches, || {
        subjects.iter().flat_map(|(name, subject)| measure(&bench, name, subject, launches)).collect()
    })
}

fn measure(bench: &Bench, name: &str, subject: &Subject, launches: usize) -> Vec<Row> {
    let hot = Hot::of(bench, subject);
    let launch = || first_byte(&mut bench.ours(subject, &["echo", "x"]));
    let (mut with, mut without, mut warm) = (Vec::new(), Vec::new(), Vec::new());
    let mut all_read = Vec::new();
    for _ in 0..launches {
        hot.read_ahead(true);
        assert!(hot.cool(), "the hot image stays in the page cache: does a clone use it?");
        with.push(launch());
        hot.read_ahead(false);
        assert!(hot.cool(), "the hot image stays in the page cache: does a clone use it?");
        without.push(launch());
        hot.read_ahead(true);
        assert!(hot.cool(), "the hot image stays in the page cache: does a clone use it?");
        all_read.push(hot.read_all());
        warm.push(launch());
    }
    let (p50, p95) = (median(&with), percentile(&with, 95.0));
    vec![
        Row::report(format!("{name}: working set"), hot.bytes() as f64 / f64::from(1 << 20), "MiB"),
        Row::report(format!("{name}: all data of the hot image"), hot.data_mib(), "MiB"),
        Row::report(format!("{name}: reading all of it from the disk, p50"), median(&all_read), "ms"),
        Row::report(format!("{name}: cold, with the working set, p50"), p50, "ms"),
        Row::report(format!("{name}: cold, with the working set, p95"), p95, "ms"),
        Row::report(format!("{name}: cold, without, p50"), median(&without), "ms"),
        Row::report(format!("{name}: cold, without, p95"), percentile(&without, 95.0), "ms"),
        Row::report(format!("{name}: warm, p50"), median(&warm), "ms"),
        Row::ratio(format!("{name}: cold, with : without"), p50 / median(&without), MARK),
        Row::report(format!("{name}: cold, with : warm"), p50 / median(&warm), "x"),
    ]
}

/// A hot image whose index is changed and, at the end, changed back.
struct Hot {
    folder: PathBuf,
    index: Vec<u8>,
    without: Vec<u8>,
    /// `[first page, pages]`.
    runs: Vec<(u64, u64)>,
}

impl Hot {
    fn of(bench: &Bench, subject: &Subject) -> Hot {
        let folder = bench.hot(subject);
        let index = fs::read(folder.join("hot.json")).expect("the index");
        let mut said: Value = serde_json::from_slice(&index).expect("JSON");
        let runs: Vec<(u64, u64)> =
            serde_json::from_value(said["manifest"]["working_set"].clone()).unwrap_or_default();
        assert!(!runs.is_empty(), "{} has no working set: `dispvm-savefile build` it anew", subject.dvm);
        said["manifest"]["working_set"] = json!([]);
        Hot { index, without: said.to_string().into_bytes(), runs, folder }
    }

    fn bytes(&self) -> u64 {
        self.runs.iter().map(|(_, pages)| pages * PAGE).sum()
    }

    /// What is not a hole.
    fn data_mib(&self) -> f64 {
        use std::os::unix::fs::MetadataExt;
        let blocks: u64 = self.files().iter().map(|file| file.metadata().expect("metadata").blocks()).sum();
        (blocks * 512) as f64 / f64::from(1 << 20)
    }

    fn files(&self) -> Vec<File> {
        let entries = fs::read_dir(&self.folder).expect("the hot image").flatten();
        entries.map(|entry| File::open(entry.path()).expect("a file of the hot image")).collect()
    }

    /// Whether a launch finds a working set in it.
    fn read_ahead(&self, wanted: bool) {
        replace(&self.folder.join("hot.json"), if wanted { &self.index } else { &self.without });
    }

    /// Takes its files out of the page cache; says whether they are gone from it. What another processor has just touched stays for a
    /// moment (in its own list of pages to be sorted in), so it is tried some times.
    fn cool(&self) -> bool {
        (0..COOL_TRIES).any(|_| {
            self.try_to_cool() || {
                std::thread::sleep(Duration::from_millis(10));
                false
            }
        })
    }

    fn try_to_cool(&self) -> bool {
        for file in self.files() {
            // What is not on the disk yet cannot be dropped.
            file.sync_all().expect("it can be synced");
            posix_fadvise(file.as_raw_fd(), 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).expect("advice");
        }
        let memory = File::open(self.folder.join("memory.img")).expect("memory");
        let (first, pages) = self.runs[self.runs.len() - 1];
        let mut byte = [0u8];
        let place = (first + pages - 1) * PAGE;
        let read =
            rustix::io::preadv2(&memory, &mut [IoSliceMut::new(&mut byte)], place, ReadWriteFlags::NOWAIT);
        read.is_err()
    }

    /// Reads all its data, from start to end, as `cat` would; in ms.
    fn read_all(&self) -> f64 {
        let start = Instant::now();
        let mut buffer = vec![0u8; 1 << 20];
        for file in self.files() {
            let mut file = DataOf { file, at: 0 };
            while file.read(&mut buffer).expect("it can be read") > 0 {}
        }
        start.elapsed().as_secs_f64() * 1e3
    }
}

impl Drop for Hot {
    fn drop(&mut self) {
        self.read_ahead(true);
    }
}

/// A file without its holes.
struct DataOf {
    file: File,
    at: i64,
}

impl Read for DataOf {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        use nix::unistd::{lseek, Whence};
        use std::os::unix::fs::FileExt;
        let fd = self.file.as_raw_fd();
        let Ok(data) = lseek(fd, self.at, Whence::SeekData) else { return Ok(0) };
        let hole = lseek(fd, data, Whence::SeekHole)?;
        let most = buffer.len().min((hole - data) as usize);
        let read = self.file.read_at(&mut buffer[..most], data as u64)?;
        self.at = data + read as i64;
        Ok(read)
    }
}

/// Replaces a read-only file by another one of that name.
fn replace(path: &Path, bytes: &[u8]) {
    let aside = path.with_extension("aside");
    let _ = fs::remove_file(&aside);
    fs::write(&aside, bytes).expect("the hot image's folder can be written by its owner");
    fs::set_permissions(&aside, Permissions::from_mode(0o444)).expect("permissions");
    fs::rename(&aside, path).expect("a new index");
}
