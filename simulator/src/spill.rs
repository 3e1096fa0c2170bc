//! Where a volume's pages go when it may hold no more in memory: an unlinked file, encrypted under a key that is nowhere
//! but in memory.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;

use engine::units::{PAGE_BYTES, PAGE_SIZE};

use crate::pages::{read_page, Page};

/// A spill.
pub struct Spill {
    file: File,
    key: [u8; 32],
    /// Page of the volume, and where in the file it is.
    pub places: BTreeMap<u64, u64>,
}

impl Spill {
    /// An empty one on the file system of `folder`.
    pub fn new(folder: &Path) -> io::Result<Spill> {
        let mut key = [0; 32];
        File::open("/dev/urandom")?.read_exact(&mut key)?;
        Ok(Spill { file: tempfile::tempfile_in(folder)?, key, places: BTreeMap::new() })
    }

    /// Stores a page.
    pub fn put(&mut self, place: u64, page: Page) -> io::Result<()> {
        let next = self.places.len() as u64;
        let at = *self.places.entry(place).or_insert(next);
        self.file.write_all_at(&self.crypt(at, page), at * PAGE_SIZE)
    }

    /// Reads a page back, if it is here.
    pub fn get(&self, place: u64) -> Option<io::Result<Page>> {
        let at = *self.places.get(&place)?;
        Some(read_page(&self.file, at).map(|page| self.crypt(at, page)))
    }

    fn crypt(&self, at: u64, mut page: Page) -> Page {
        let mut stream = vec![0; PAGE_BYTES];
        blake3::Hasher::new_keyed(&self.key).update(&at.to_le_bytes()).finalize_xof().fill(&mut stream);
        page.iter_mut().zip(stream).for_each(|(byte, key)| *byte ^= key);
        page
    }
}
