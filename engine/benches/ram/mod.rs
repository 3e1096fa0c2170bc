//! A file that looks like the memory of an idle guest: runs of page cache (programs, libraries, text) of 1 to 64 pages in no
//! order, a sixth of them there twice, and three quarters of nothing.

#![allow(dead_code)] // each bench uses its part

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use engine::savefile::{HostIdentity, Manifest, SCHEMA};
use engine::units::{ByteCount, PAGE_SIZE};

const SOURCES: [&str; 4] = ["/usr/bin", "/usr/lib/x86_64-linux-gnu", "/usr/share", "/usr/lib/python3"];
const FILE_MAX: u64 = 8 << 20;

/// xorshift: the image is the same for the same files.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit.max(1)
    }
}

/// Makes the image at `path`: `size` long, a quarter of it data.
pub fn make(path: &Path, size: ByteCount) -> io::Result<File> {
    let image = File::options().read(true).write(true).create(true).truncate(true).open(path)?;
    image.set_len(size.0)?;
    let mut files = SOURCES.iter().flat_map(|folder| files_below(Path::new(folder))).collect::<Vec<_>>();
    files.sort();
    let mut dice = Dice(42);
    let mut left = size.0 / 4;
    let mut before: Option<Vec<u8>> = None;
    while left > 0 && !files.is_empty() {
        let again = before.take().filter(|_| dice.below(6) == 0);
        let bytes = match again {
            Some(bytes) => bytes,
            None => piece_of(&files[dice.below(files.len() as u64) as usize], &mut dice)?,
        };
        let place = dice.below(size.0 / PAGE_SIZE - 64) * PAGE_SIZE;
        image.write_all_at(&bytes, place)?;
        left = left.saturating_sub(bytes.len().next_multiple_of(PAGE_SIZE as usize) as u64);
        before = Some(bytes);
    }
    image.sync_all()?;
    Ok(image)
}

fn piece_of(path: &Path, dice: &mut Dice) -> io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let pages = file.metadata()?.len().div_ceil(PAGE_SIZE);
    let count = 1 + dice.below(64);
    file.seek(SeekFrom::Start(dice.below(pages.saturating_sub(count) + 1) * PAGE_SIZE))?;
    let mut bytes = Vec::new();
    file.take(count * PAGE_SIZE).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn files_below(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    entries
        .flatten()
        .flat_map(|entry| match entry.file_type() {
            Ok(kind) if kind.is_dir() => files_below(&entry.path()),
            Ok(kind) if kind.is_file() => {
                let len = entry.metadata().map_or(0, |metadata| metadata.len());
                (PAGE_SIZE..FILE_MAX).contains(&len).then(|| entry.path()).into_iter().collect()
            }
            _ => Vec::new(),
        })
        .collect()
}

/// A manifest that says nothing but the size.
pub fn manifest(size: ByteCount) -> Manifest {
    let text = String::new;
    let host =
        HostIdentity { kind: text(), version: text(), machine: text(), cpu_model: text(), accel: text() };
    Manifest {
        schema: SCHEMA,
        template: text(),
        template_generation: 1,
        template_root: text(),
        dvm: text(),
        generation: 1,
        kernel_hash: text(),
        initrd_hash: text(),
        host,
        memory_bytes: size.0,
        vcpus: 1,
        volumes: Vec::new(),
        settings_hash: text(),
        agent_version: text(),
        created: 0,
        working_set: Vec::new(),
    }
}
