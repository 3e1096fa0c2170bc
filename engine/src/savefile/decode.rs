//! Reads chunks, verifies them, decodes them, puts their pages where the plan says.
//!
//! Invariants:
//! - a chunk's hash is checked before one byte of it reaches the decoder;
//! - both backends run the same plan through the same decoder into the same places: they differ in how stored bytes
//!   get into a buffer, and in nothing else;
//! - after the first error no new chunk is begun, and that error is the answer.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::Mutex;

use rayon::prelude::*;

use super::chunk::{Chunk, Decoder};
use super::error::{Error, Fault};
use super::page_map::{ImageId, PageMap};
use super::plan::{plan_decode, plan_verify, ChunkJob};
use super::progress::{watched, Meter, OnProgress, Step};
use super::reader::Savefile;
use crate::ring::{Buffer, ReadRing};
use crate::units::{ByteCount, PageCount};

/// How stored bytes are read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReadBackend {
    /// io_uring with registered buffers and a deep queue; where that is forbidden, [`ReadBackend::Pread`].
    #[default]
    Ring,
    /// One `pread` per chunk, on the thread that decodes it.
    Pread,
}

/// Where an image is decoded to.
#[derive(Clone, Copy, Debug)]
pub struct ImageOutput<'a> {
    /// Which image.
    pub id: &'a ImageId,
    /// A file as long as the image, of holes only.
    pub file: &'a File,
}

/// Chunks on their way: enough to keep a disk's queue full and every thread busy, at most 24 MiB at this engine's chunk size.
const BUFFERS: usize = 24;

pub(super) fn verify_chunks(
    savefile: &Savefile,
    backend: ReadBackend,
    progress: OnProgress,
) -> Result<(), Error> {
    let table = savefile.chunk_table();
    let meter = Meter::new(Step::Verify, table.slots().bytes());
    let jobs = plan_verify(table);
    let count = |_: &ChunkJob, raw: &[u8]| {
        meter.add(ByteCount(raw.len() as u64));
        Ok(())
    };
    watched(&meter, progress, || run(savefile, &jobs, backend, &count))
}

pub(super) fn decode_images(
    savefile: &Savefile,
    outputs: &[ImageOutput],
    backend: ReadBackend,
    progress: OnProgress,
) -> Result<(), Error> {
    let maps = outputs.iter().map(|output| map_for(savefile, output)).collect::<Result<Vec<_>, Error>>()?;
    let total = PageCount(maps.iter().map(|map| map.data_pages().0).sum());
    let meter = Meter::new(Step::Decode, total.bytes());
    let jobs = plan_decode(&maps, savefile.chunk_table());
    let place = |job: &ChunkJob, raw: &[u8]| {
        meter.add(place(savefile, job, raw, outputs)?.bytes());
        Ok(())
    };
    watched(&meter, progress, || run(savefile, &jobs, backend, &place))
}

fn map_for<'a>(savefile: &'a Savefile, output: &ImageOutput) -> Result<&'a PageMap, Error> {
    let map = savefile.page_map(output.id)?;
    let metadata = output.file.metadata();
    let len =
        metadata.map_err(Error::io(format!("look at the file for {} of", output.id), savefile.path()))?.len();
    if len != map.pages().bytes().0 {
        let what =
            format!("{} has {} bytes, the file to decode it to has {len}", output.id, map.pages().bytes());
        return Err(savefile.mismatch(what));
    }
    Ok(map)
}

fn place(
    savefile: &Savefile,
    job: &ChunkJob,
    raw: &[u8],
    outputs: &[ImageOutput],
) -> Result<PageCount, Error> {
    let mut placed = PageCount::ZERO;
    for place in &job.places {
        let (from, count) = (place.from.buffer_len(), place.pages.count.buffer_len());
        let output = &outputs[place.image];
        let failed = |err| {
            Error::io(format!("write pages {} of {} decoded from", place.pages, output.id), savefile.path())(
                err,
            )
        };
        let bytes = raw.get(from..from + count).ok_or_else(|| failed(io::ErrorKind::UnexpectedEof.into()))?;
        output.file.write_all_at(bytes, place.pages.first.offset().0).map_err(failed)?;
        placed.0 += place.pages.count.0;
    }
    Ok(placed)
}

/// What is done with a chunk's pages.
type Sink<'a> = &'a (dyn Fn(&ChunkJob, &[u8]) -> Result<(), Error> + Sync);

fn run(savefile: &Savefile, jobs: &[ChunkJob], backend: ReadBackend, sink: Sink) -> Result<(), Error> {
    // `watched` runs this on a thread of its own: whoever waits for the ring must not be one of the threads that decode.
    if backend == ReadBackend::Ring && !jobs.is_empty() {
        match ReadRing::new(savefile.file(), BUFFERS.min(jobs.len()), largest_stored(savefile)) {
            Ok((ring, buffers)) => return run_ring(savefile, jobs, ring, buffers, sink),
            Err(err) => tracing::debug!(%err, "io_uring is not to be had, reading by pread"),
        }
    }
    run_pread(savefile, jobs, sink)
}

/// The longest chunk as it is stored. The chunk table bounds it by the file's length and by the largest chunk allowed.
fn largest_stored(savefile: &Savefile) -> usize {
    savefile.chunk_table().chunks().iter().map(|chunk| chunk.stored.0 as usize).max().unwrap_or(0)
}

fn run_pread(savefile: &Savefile, jobs: &[ChunkJob], sink: Sink) -> Result<(), Error> {
    let len = largest_stored(savefile);
    let new_worker = || (new_decoder(savefile), vec![0; len]);
    jobs.par_iter().try_for_each_init(new_worker, |(decoder, buffer), job| {
        let decoder = decoder.as_mut().map_err(|err| setup_failed(savefile, err))?;
        let chunk = &savefile.chunk_table().chunks()[job.chunk];
        let stored = &mut buffer[..chunk.stored.0 as usize];
        savefile.file().read_exact_at(stored, chunk.offset.0).map_err(read_failed(savefile, job, chunk))?;
        let raw =
            decoder.decode(job.chunk, chunk, stored).map_err(|fault: Fault| fault.at(savefile.path()))?;
        sink(job, raw)
    })
}

/// The calling thread keeps the ring full; rayon's threads decode what has arrived and give the buffers back.
fn run_ring(
    savefile: &Savefile,
    jobs: &[ChunkJob],
    mut ring: ReadRing,
    mut free: Vec<Buffer>,
    sink: Sink,
) -> Result<(), Error> {
    let work = RingWork {
        savefile,
        sink,
        decoders: Mutex::new(Vec::new()),
        failed: AtomicBool::new(false),
        error: Mutex::new(None),
    };
    let (give_back, given_back): (Sender<Buffer>, Receiver<Buffer>) = channel();
    let mut decoding = 0;
    let mut waiting = jobs.iter().enumerate();
    rayon::in_place_scope(|scope| loop {
        while let Ok(buffer) = given_back.try_recv() {
            free.push(buffer);
            decoding -= 1;
        }
        while !work.failed.load(Ordering::Relaxed) && !free.is_empty() {
            let (Some((tag, job)), Some(buffer)) = (waiting.next(), free.pop()) else { break };
            let chunk = &savefile.chunk_table().chunks()[job.chunk];
            if let Err(err) = ring.submit(buffer, tag, chunk.offset, chunk.stored.0 as usize) {
                work.fail(read_failed(savefile, job, chunk)(err));
            }
        }
        if ring.in_flight() == 0 && decoding == 0 {
            break;
        }
        if ring.in_flight() == 0 {
            let Ok(buffer) = given_back.recv() else { break };
            free.push(buffer);
            decoding -= 1;
            continue;
        }
        match ring.wait() {
            Ok((tag, buffer, outcome)) => {
                decoding += 1;
                let (work, lent, job) = (&work, Lent::new(buffer, &give_back), &jobs[tag]);
                scope.spawn(move |_| work.decode(job, lent.bytes(), outcome));
            }
            Err(err) => {
                work.fail(Error::io("wait for the ring that reads", savefile.path())(err));
                break;
            }
        }
    });
    work.into_result()
}

/// A buffer that goes back when it is dropped, also by a panic: the reading thread waits for every one of them.
struct Lent {
    buffer: Option<Buffer>,
    give_back: Sender<Buffer>,
}

impl Lent {
    fn new(buffer: Buffer, give_back: &Sender<Buffer>) -> Lent {
        Lent { buffer: Some(buffer), give_back: give_back.clone() }
    }

    fn bytes(&self) -> &[u8] {
        self.buffer.as_ref().map_or(&[], Buffer::bytes)
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(buffer) = self.buffer.take() {
            let _ = self.give_back.send(buffer); // the receiver outlives the scope
        }
    }
}

/// What the decoding threads share.
struct RingWork<'a> {
    savefile: &'a Savefile,
    sink: Sink<'a>,
    /// Decoders not in use; there are never more than threads.
    decoders: Mutex<Vec<Decoder>>,
    failed: AtomicBool,
    error: Mutex<Option<Error>>,
}

impl RingWork<'_> {
    fn decode(&self, job: &ChunkJob, buffer: &[u8], outcome: io::Result<()>) {
        if self.failed.load(Ordering::Relaxed) {
            return;
        }
        if let Err(err) = self.try_decode(job, buffer, outcome) {
            self.fail(err);
        }
    }

    fn try_decode(&self, job: &ChunkJob, buffer: &[u8], outcome: io::Result<()>) -> Result<(), Error> {
        let chunk = &self.savefile.chunk_table().chunks()[job.chunk];
        outcome.map_err(read_failed(self.savefile, job, chunk))?;
        let stored = &buffer[..chunk.stored.0 as usize];
        let idle = lock(&self.decoders).pop();
        let mut decoder = match idle {
            Some(decoder) => decoder,
            None => new_decoder(self.savefile).map_err(|err| setup_failed(self.savefile, &err))?,
        };
        let raw = decoder.decode(job.chunk, chunk, stored).map_err(|fault| fault.at(self.savefile.path()))?;
        (self.sink)(job, raw)?;
        lock(&self.decoders).push(decoder);
        Ok(())
    }

    fn fail(&self, err: Error) {
        lock(&self.error).get_or_insert(err);
        self.failed.store(true, Ordering::Relaxed);
    }

    fn into_result(self) -> Result<(), Error> {
        match self.error.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
            Some(err) => Err(err),
            None => Ok(()),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn new_decoder(savefile: &Savefile) -> io::Result<Decoder> {
    Decoder::new(savefile.chunk_table().chunk_pages())
}

fn setup_failed(savefile: &Savefile, err: &io::Error) -> Error {
    Error::io("set up the decompressor for", savefile.path())(io::Error::other(err.to_string()))
}

fn read_failed<'a>(
    savefile: &'a Savefile,
    job: &ChunkJob,
    chunk: &Chunk,
) -> impl FnOnce(io::Error) -> Error + 'a {
    let (index, offset) = (job.chunk, chunk.offset);
    move |err| Error::io(format!("read chunk {index} at offset {offset} of"), savefile.path())(err)
}
