//! A domain's frames filled from a memory image.
//!
//! Where the image has a hole the frame is made zero, unless it is known to be: then it is not even mapped. It needs nothing
//! but the domain, so it can run on a thread beside whatever else a launch does.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::panic::resume_unwind;
use std::sync::mpsc::{sync_channel, Receiver, SyncSender};
use std::sync::Mutex;
use std::thread;

use engine::image::scan::{data_extents, is_zero};
use engine::units::{PageCount, PageIndex, PageRange, PAGE_BYTES};

use super::{LifeError, Shell};
use crate::hypercalls::Mapping;
use crate::layout::Layout;

/// Frames mapped at once: 16 MiB. The kernel holds the process's map lock for as long as it maps them.
const BATCH: u64 = 4096;

/// Frames, and what goes into them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    frames: PageRange,
    /// Where in the image it begins; `None` for a hole.
    image: Option<PageIndex>,
}

/// Makes the shell's frames what the image says.
///
/// The frames stay mapped until [`Shell::unmap`]: to unmap them takes as long as to fill them, and is not needed for the
/// guest to run. The image is read, not mapped: a file that shrinks is an error then and no SIGBUS, and it takes less than
/// half the time of a copy from a mapping, whose every page has to be faulted in.
///
/// Errors: the image is shorter than the frames, or cannot be read, or a frame cannot be mapped.
pub fn fill(shell: &Shell, image: &File) -> Result<(), LifeError> {
    let pages = check_size(shell, image)?;
    let batches = batches(shell, image, pages)?;
    // While some batches are read the next ones are mapped: the kernel maps one at a time, whoever asks for it.
    let (mapped, to_read) = sync_channel(1);
    let to_read = Mutex::new(Some(to_read));
    thread::scope(|scope| {
        let readers: Vec<_> =
            (0..readers()).map(|_| scope.spawn(|| read_all(shell, image, &to_read))).collect();
        let mapping = map(shell, &batches, mapped);
        let reading =
            readers.into_iter().map(|reader| reader.join().unwrap_or_else(|panic| resume_unwind(panic)));
        reading.fold(mapping, Result::and)
    })
}

/// How many threads read. Past four a CPU more adds nothing: memory is not faster.
fn readers() -> usize {
    thread::available_parallelism().map_or(1, |cpus| cpus.get().min(4))
}

/// A batch and its frames, mapped.
type Mapped<'a> = (&'a [Piece], Box<dyn Mapping>);

/// Maps one batch after the other and hands it on, until nobody takes them any more.
fn map<'a>(
    shell: &Shell,
    batches: &'a [Vec<Piece>],
    mapped: SyncSender<Mapped<'a>>,
) -> Result<(), LifeError> {
    for batch in batches {
        let gfns: Vec<u64> = batch.iter().flat_map(|piece| piece.frames.pages()).map(|gfn| gfn.0).collect();
        let frames =
            shell.xen().map(shell.domid(), &gfns).map_err(LifeError::call("map its frames to fill them"))?;
        if mapped.send((batch, frames)).is_err() {
            break;
        }
    }
    Ok(())
}

/// Reads one batch after the other, until there are no more. An error ends it for all: it takes the batches away.
fn read_all(
    shell: &Shell,
    image: &File,
    batches: &Mutex<Option<Receiver<Mapped<'_>>>>,
) -> Result<(), LifeError> {
    let batches = || batches.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let next = || batches().as_ref().and_then(|batches| batches.recv().ok());
    while let Some(batch) = next() {
        if let Err(error) = read(shell, image, batch) {
            batches().take();
            return Err(error);
        }
    }
    Ok(())
}

/// Reads a batch into its frames.
fn read(shell: &Shell, image: &File, (batch, frames): Mapped<'_>) -> Result<(), LifeError> {
    let mut to = 0;
    for piece in batch {
        let length = piece.frames.count.buffer_len();
        match piece.image {
            Some(from) => frames
                .read_from(to, image, from.offset().0, length)
                .map_err(LifeError::io("read the memory image", shell.domid()))?,
            None => frames.zero(to, length),
        }
        to += length;
    }
    shell.keep_mapped(frames);
    Ok(())
}

/// The same, one page at a time: slow, and obviously right.
pub fn fill_slowly(shell: &Shell, image: &File) -> Result<(), LifeError> {
    check_size(shell, image)?;
    let io = |step| LifeError::io(step, shell.domid());
    let mut page = [0; PAGE_BYTES];
    let frames = shell.layout().runs().iter().flat_map(|run| run.pages());
    for (at, gfn) in frames.enumerate() {
        image
            .read_exact_at(&mut page, PageIndex(at as u64).offset().0)
            .map_err(io("read the memory image"))?;
        if is_zero(&page) && shell.fresh_is_zero() {
            continue;
        }
        let frame =
            shell.xen().map(shell.domid(), &[gfn.0]).map_err(LifeError::call("map a frame to fill it"))?;
        frame.copy_from(0, &page);
    }
    Ok(())
}

/// The size of the image as the layout has it; no longer than the file.
fn check_size(shell: &Shell, image: &File) -> Result<PageCount, LifeError> {
    let found = image.metadata().map_err(LifeError::io("look at the memory image", shell.domid()))?.len();
    let needed = shell.layout().pages();
    if found < needed.bytes().0 {
        return Err(LifeError::ImageSize { found: engine::units::ByteCount(found), needed: needed.bytes() });
    }
    Ok(needed)
}

/// What is to be done, in batches of at most [`BATCH`] frames.
fn batches(shell: &Shell, image: &File, pages: PageCount) -> Result<Vec<Vec<Piece>>, LifeError> {
    let look = LifeError::io("look for data in the memory image", shell.domid());
    let data = data_extents(image, pages).map_err(look)?;
    let mut pieces = pieces(shell.layout(), &data);
    if shell.fresh_is_zero() {
        pieces.retain(|piece| piece.image.is_some());
    }
    Ok(batched(&pieces))
}

/// All frames of the layout as pieces that are either data or a hole; `data` is where the image has data.
fn pieces(layout: &Layout, data: &[PageRange]) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut data = data.iter().copied().peekable();
    let mut image_first = 0;
    for run in layout.runs() {
        let here = PageRange::new(image_first, run.count.0);
        let mut push = |first: u64, end: u64, is_data: bool| {
            if first < end {
                let frames = PageRange::new(run.first.0 + (first - image_first), end - first);
                pieces.push(Piece { frames, image: is_data.then_some(PageIndex(first)) });
            }
        };
        let mut next = image_first;
        while let Some(extent) = data.peek() {
            if let Some(part) = extent.intersection(here) {
                push(next, part.first.0, false);
                push(part.first.0, part.end().0, true);
                next = part.end().0;
            }
            if extent.end() > here.end() {
                break;
            }
            data.next();
        }
        push(next, here.end().0, false);
        image_first = here.end().0;
    }
    pieces
}

/// Pieces cut and put together so that each batch but the last has exactly [`BATCH`] frames.
fn batched(pieces: &[Piece]) -> Vec<Vec<Piece>> {
    let mut batches = Vec::new();
    let (mut batch, mut room) = (Vec::new(), BATCH);
    for piece in pieces {
        let mut left = *piece;
        while left.frames.count.0 > 0 {
            let count = left.frames.count.0.min(room);
            batch.push(Piece { frames: PageRange::new(left.frames.first.0, count), ..left });
            left.image = left.image.map(|image| PageIndex(image.0 + count));
            left.frames = PageRange::new(left.frames.first.0 + count, left.frames.count.0 - count);
            room -= count;
            if room == 0 {
                batches.push(std::mem::take(&mut batch));
                room = BATCH;
            }
        }
    }
    if !batch.is_empty() {
        batches.push(batch);
    }
    batches
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn runs(parts: &[(u64, u64)]) -> Vec<PageRange> {
        let mut next = 0;
        let run = |(gap, count): &(u64, u64)| {
            let run = PageRange::new(next + gap, *count);
            next = run.end().0;
            run
        };
        parts.iter().map(run).collect()
    }

    proptest! {
        /// Each frame once and in order, with the page that the image has at its place or as a hole.
        #[test]
        fn every_page_goes_to_its_frame(
            frames in proptest::collection::vec((0u64..50, 1u64..6000), 1..6),
            data in proptest::collection::vec((0u64..3000, 1u64..6000), 0..8),
        ) {
            let layout = Layout::new(runs(&frames)).unwrap();
            let image = PageRange::new(0, layout.pages().0);
            let data: Vec<PageRange> = runs(&data).iter().filter_map(|run| run.intersection(image)).collect();
            let gfns = super::super::shell::frames_of(layout.runs());
            let expected: Vec<(u64, Option<u64>)> = (0..)
                .zip(gfns)
                .map(|(page, gfn)| (gfn, data.iter().any(|run| run.first.0 <= page && page < run.end().0).then_some(page)))
                .collect();
            let batches = batched(&pieces(&layout, &data));
            let all = batches.iter().rev().skip(1).all(|batch| {
                batch.iter().map(|piece| piece.frames.count.0).sum::<u64>() == BATCH
            });
            prop_assert!(all);
            let found: Vec<(u64, Option<u64>)> = batches
                .iter()
                .flatten()
                .flat_map(|piece| {
                    (0..).zip(piece.frames.pages()).map(|(at, gfn)| (gfn.0, piece.image.map(|image| image.0 + at)))
                })
                .collect();
            prop_assert_eq!(found, expected);
        }
    }
}
