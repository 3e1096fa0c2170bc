//! Raw images of an import or export: where their data is, and a volume's delta laid over its base.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use engine::savefile::PageMap;
use engine::units::{ByteOffset, PageIndex, PageRange, PAGE_SIZE};
use nix::libc;
use rustix::fs::{fallocate, seek, FallocateFlags, SeekFrom};
use rustix::io::Errno;

use crate::error::{Error, Result};

/// Copied in pieces of so many pages.
const PIECE_PAGES: u64 = 256;

/// A file without a name on the file system of `folder`: it is gone with this process.
pub fn unnamed(folder: &Path) -> Result<File> {
    let mut options = File::options();
    options.read(true).write(true).custom_flags(libc::O_TMPFILE).mode(0o600);
    options.open(folder).map_err(Error::io("make a file in", folder))
}

/// The pages of a file of `size` bytes, a whole number of pages, that are no holes; sorted and disjoint.
pub fn data_runs(file: &File, size: u64) -> io::Result<Vec<PageRange>> {
    let mut runs: Vec<PageRange> = Vec::new();
    let mut at = 0;
    while at < size {
        let data = match seek(file, SeekFrom::Data(at)) {
            Err(Errno::NXIO) => break,
            found => found?.min(size),
        };
        let hole = seek(file, SeekFrom::Hole(data))?.min(size);
        // A file system's blocks may be smaller than a page: a page with any data is data.
        let end = PageIndex::holding(ByteOffset(hole.next_multiple_of(PAGE_SIZE)));
        let first =
            PageIndex::holding(ByteOffset(data)).max(runs.last().map_or(PageIndex(0), |run| run.end()));
        if first < end {
            runs.push(PageRange::new(first.0, end.0 - first.0));
        }
        at = hole;
    }
    Ok(runs)
}

/// Writes a delta, decoded to `delta`, over what is on `volume`. Its zero pages become holes.
pub fn lay_over(map: &PageMap, delta: &File, volume: &File) -> io::Result<()> {
    let mut piece = vec![0; (PIECE_PAGES * PAGE_SIZE) as usize];
    for (run, _) in map.data_runs() {
        let mut at = run.first.0;
        while at < run.end().0 {
            let bytes = &mut piece[..((run.end().0 - at).min(PIECE_PAGES) * PAGE_SIZE) as usize];
            delta.read_exact_at(bytes, PageIndex(at).offset().0)?;
            volume.write_all_at(bytes, PageIndex(at).offset().0)?;
            at += PIECE_PAGES;
        }
    }
    for run in map.zero_runs() {
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(volume, hole, run.first.offset().0, run.count.bytes().0)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::savefile::{Content, ImageId, PageMapBuilder, Run, Slot};
    use engine::units::PageCount;

    #[test]
    fn data_is_found_in_whole_pages() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(64 << 12).unwrap();
        for page in [0, 5, 6, 63] {
            file.write_all_at(&[1], (page << 12) + 9).unwrap();
        }
        let runs = data_runs(&file, 64 << 12).unwrap();
        assert_eq!(runs, [PageRange::new(0, 1), PageRange::new(5, 2), PageRange::new(63, 1)]);
        let empty = tempfile::tempfile().unwrap();
        empty.set_len(1 << 20).unwrap();
        assert_eq!(data_runs(&empty, 1 << 20).unwrap(), []);
    }

    #[test]
    fn a_delta_is_laid_over_its_base() {
        let (delta, volume) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        volume.write_all_at(&vec![7; 400 << 12], 0).unwrap();
        delta.write_all_at(&vec![9; 400 << 12], 0).unwrap();
        let mut map = PageMapBuilder::new(ImageId::Volume("root".into()), PageCount(400), 2);
        map.push(Run { pages: PageRange::new(2, 300), content: Content::Data(Slot(0)) });
        map.push(Run { pages: PageRange::new(350, 2), content: Content::Zero });
        lay_over(&map.finish(PageCount(300)).unwrap(), &delta, &volume).unwrap();
        let byte = |page: u64| {
            let mut byte = [0];
            volume.read_exact_at(&mut byte, (page << 12) + 4095).unwrap();
            byte[0]
        };
        assert_eq!([1, 2, 301, 302, 349, 350, 351, 352].map(byte), [7, 9, 9, 7, 7, 0, 0, 7]);
        assert_eq!(volume.metadata().unwrap().len(), 400 << 12);
    }
}
