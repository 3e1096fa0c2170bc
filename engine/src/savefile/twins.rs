//! Finds equal pages.
//!
//! Invariants of the answer `twins` (one entry per data page, by ordinal):
//! - `twins[n] <= n`, and `twins[twins[n]] == twins[n]`: a set of equal pages is named by its first;
//! - `twins[n] != n` only after both pages were read and every byte compared. Fingerprints only suggest;
//! - the work is linear: a page is compared with the first of its fingerprint's pages and no other, so a guest that makes
//!   fingerprints collide gains nothing but less sharing.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rayon::prelude::*;

use super::plan::{ordinal_bases, Ordinal, Scanned};
use crate::units::{PageIndex, PAGE_BYTES};

/// Compares the pages that fingerprints suggest; `files` are the images' files.
pub(crate) fn find_twins(images: &[Scanned], files: &[&File]) -> io::Result<Vec<Ordinal>> {
    let mut by_print: Vec<(u64, Ordinal)> =
        images.iter().flat_map(|image| image.scan.prints.iter().copied()).zip(0..).collect();
    by_print.par_sort_unstable();
    let suggested: Vec<(Ordinal, Ordinal)> =
        by_print.chunk_by(|a, b| a.0 == b.0).flat_map(pairs_with_first).collect();
    let pages = PageReader::new(images, files);
    let confirmed = suggested.par_iter().map_init(PageBuffers::new, |buffers, &(first, other)| {
        let equal = pages.are_equal(first, other, buffers)?;
        Ok(equal.then_some((first, other)))
    });
    let mut twins: Vec<Ordinal> = (0..by_print.len() as Ordinal).collect();
    for (first, other) in confirmed.collect::<io::Result<Vec<_>>>()?.into_iter().flatten() {
        twins[other as usize] = first;
    }
    Ok(twins)
}

/// Each page of one fingerprint with the first of them.
fn pairs_with_first(set: &[(u64, Ordinal)]) -> impl Iterator<Item = (Ordinal, Ordinal)> + '_ {
    let first = set.first().map(|(_, first)| *first);
    set.iter().skip(1).filter_map(move |(_, other)| Some((first?, *other)))
}

/// Two pages; the first one stays from comparison to comparison.
struct PageBuffers {
    first_is: Option<Ordinal>,
    first: Vec<u8>,
    other: Vec<u8>,
}

impl PageBuffers {
    fn new() -> PageBuffers {
        PageBuffers { first_is: None, first: vec![0; PAGE_BYTES], other: vec![0; PAGE_BYTES] }
    }
}

/// Reads data pages by ordinal.
struct PageReader<'a> {
    files: &'a [&'a File],
    bases: Vec<Ordinal>,
    /// Per image, the ordinal of each data run's first page within the image, and that page.
    runs: Vec<Vec<(Ordinal, PageIndex)>>,
}

impl PageReader<'_> {
    fn new<'a>(images: &[Scanned], files: &'a [&'a File]) -> PageReader<'a> {
        let runs = images
            .iter()
            .map(|image| {
                let mut ordinal = 0;
                let runs = image.scan.data.iter().map(|run| {
                    let start = (ordinal, run.first);
                    ordinal += run.count.0 as Ordinal;
                    start
                });
                runs.collect()
            })
            .collect();
        PageReader { files, bases: ordinal_bases(images), runs }
    }

    fn are_equal(&self, first: Ordinal, other: Ordinal, buffers: &mut PageBuffers) -> io::Result<bool> {
        if buffers.first_is != Some(first) {
            buffers.first_is = None;
            self.read(first, &mut buffers.first)?;
            buffers.first_is = Some(first);
        }
        self.read(other, &mut buffers.other)?;
        Ok(buffers.first == buffers.other)
    }

    fn read(&self, ordinal: Ordinal, page: &mut [u8]) -> io::Result<()> {
        // The last image that begins at or before the ordinal; images without data pages share their base with the next one.
        let image = self.bases.partition_point(|&base| base <= ordinal).saturating_sub(1);
        let within = ordinal - self.bases[image];
        let runs = &self.runs[image];
        let run = runs.partition_point(|&(start, _)| start <= within).saturating_sub(1);
        let (start, first) = runs[run];
        self.files[image].read_exact_at(page, PageIndex(first.0 + u64::from(within - start)).offset().0)
    }
}
