//! Pages of a simulated guest, and files full of them.
//!
//! Invariants: a page says whose it is (the boot or the clone that wrote it), of which image and which place in it; the
//! rest of it follows from these. So a page of another boot, at another place, or half of one is found out.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use engine::units::{ByteCount, PAGE_BYTES, PAGE_SIZE};
use nix::errno::Errno;
use nix::sys::memfd::{memfd_create, MemFdCreateFlag};
use nix::unistd::{lseek, Whence};

use crate::rng::{mix, Rng};

/// One page.
pub type Page = Vec<u8>;

const MAGIC: &[u8; 8] = b"DVSIMPG1";

/// The page at `index` of `image` as `writer` writes it.
pub fn page_of(writer: u64, image: &str, index: u64) -> Page {
    let mut page = Vec::with_capacity(PAGE_BYTES);
    page.extend_from_slice(MAGIC);
    page.extend_from_slice(&writer.to_le_bytes());
    page.extend_from_slice(&index.to_le_bytes());
    let image = image.bytes().fold(0, |hash, byte| mix(hash, byte.into()));
    let mut rng = Rng::new(mix(writer, mix(image, index)));
    // A quarter of it does not compress.
    while page.len() < PAGE_BYTES / 4 {
        page.extend_from_slice(&rng.number().to_le_bytes());
    }
    page.resize(PAGE_BYTES, rng.number() as u8);
    page
}

/// In words: whose page it is.
pub fn describe(page: &[u8]) -> String {
    let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| page[at + i]));
    match page {
        _ if page.len() < 24 => "no page".to_owned(),
        _ if is_zero(page) => "zeros".to_owned(),
        _ if &page[..8] == MAGIC => format!("a page of writer {:x} for place {:#x}", word(8), word(16)),
        _ => "bytes of nobody".to_owned(),
    }
}

/// Whether it is all zeros.
pub fn is_zero(page: &[u8]) -> bool {
    page.iter().all(|byte| *byte == 0)
}

/// An empty file in memory.
pub fn memfd(name: &str, size: ByteCount) -> io::Result<File> {
    let name = std::ffi::CString::new(name)?;
    let file = File::from(memfd_create(&name, MemFdCreateFlag::MFD_CLOEXEC)?);
    file.set_len(size.0)?;
    Ok(file)
}

/// Reads a page; past the end of the file there are zeros.
pub fn read_page(file: &File, index: u64) -> io::Result<Page> {
    let mut page = vec![0; PAGE_BYTES];
    let mut have = 0;
    while have < PAGE_BYTES {
        match file.read_at(&mut page[have..], index * PAGE_SIZE + have as u64)? {
            0 => break,
            count => have += count,
        }
    }
    Ok(page)
}

/// The pages of a file that are not all zeros, in order; holes are not read.
pub fn data_pages(file: &File) -> io::Result<Vec<(u64, Page)>> {
    let mut pages = Vec::new();
    let mut at = 0i64;
    loop {
        let begin = match lseek(file.as_raw_fd(), at, Whence::SeekData) {
            Ok(begin) => begin,
            Err(Errno::ENXIO) => return Ok(pages),
            Err(error) => return Err(error.into()),
        };
        let end = lseek(file.as_raw_fd(), begin, Whence::SeekHole)?;
        for index in begin as u64 / PAGE_SIZE..(end as u64).div_ceil(PAGE_SIZE) {
            let page = read_page(file, index)?;
            if !is_zero(&page) {
                pages.push((index, page));
            }
        }
        at = end;
    }
}

/// The hash of pages at their places.
pub fn hash_pages<'a>(pages: impl IntoIterator<Item = (u64, &'a [u8])>) -> String {
    let mut hasher = blake3::Hasher::new();
    for (index, page) in pages {
        hasher.update(&index.to_le_bytes());
        hasher.update(page);
    }
    hasher.finalize().to_hex().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_differs_by_writer_image_and_place_and_files_of_pages_are_read_back() {
        let page = page_of(1, "memory", 7);
        for other in [page_of(2, "memory", 7), page_of(1, "root", 7), page_of(1, "memory", 8)] {
            assert_ne!(page, other);
        }
        let file = memfd("dispvm-sim-test", ByteCount(64 << 12)).unwrap();
        file.write_all_at(&page, 7 << 12).unwrap();
        file.write_all_at(&[0; PAGE_BYTES], 9 << 12).unwrap();
        assert_eq!(data_pages(&file).unwrap(), [(7, page)]);
    }
}
