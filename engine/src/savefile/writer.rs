//! Writes a savefile.
//!
//! Invariants:
//! - the images do not change while they are read: the guest is stopped. Nothing in the file depends on it for soundness (what
//!   is hashed is what is stored), only for being one instant of the guest;
//! - the same input gives the same file, byte for byte;
//! - the final name has the old file until the new one is whole and on the disk; on any error nothing is left behind.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::mpsc::{sync_channel, Receiver};
use std::{io, thread};

use rayon::prelude::*;

use super::aside::Aside;
use super::chunk::{Chunk, ChunkTable, Encoded, Encoder, CHUNK_PAGES};
use super::device_state::DeviceState;
use super::error::Error;
use super::header::{Header, RootHash, Section, SectionKind, HEADER_LEN, SECTIONS_MAX};
use super::manifest::Manifest;
use super::page_map::{is_volume_name, ImageId};
use super::plan::{plan_chunks, plan_store, Scanned, Source, StorePlan};
use super::progress::{watched, Meter, OnProgress, Step};
use super::twins::find_twins;
use crate::image::scan::{scan, Scope};
use crate::units::{ByteCount, ByteOffset, PageCount, PageRange, IMAGE_PAGES_MAX};

/// Chunks encoded between two meetings of the threads: 32 MiB raw, so that at most some tens of MiB wait to be written.
const BATCH_CHUNKS: usize = 32;
/// Batches that may wait for the disk.
const BATCHES_WAITING: usize = 2;
/// Written bytes after which the disk is made to begin, so that the last sync finds little to do.
const SYNC_EVERY: ByteCount = ByteCount(64 << 20);

/// The section table has room for so many page maps beside the four other sections.
const IMAGES_MAX: usize = SECTIONS_MAX - 4;

/// An image to be stored.
#[derive(Clone, Debug)]
pub struct ImageInput<'a> {
    /// Which image.
    pub id: ImageId,
    /// The image, raw, from offset 0 on: a plain file, a memfd. Its read position is moved.
    pub file: &'a File,
    /// Its size, a whole number of pages; of a volume's delta the volume's size.
    pub size: ByteCount,
    /// Which of its pages count.
    pub scope: Scope,
}

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// The file's root hash, to be pinned.
    pub root: RootHash,
    /// Length of the file.
    pub stored_bytes: ByteCount,
    /// Pages of all images within their scope.
    pub pages: PageCount,
    /// Of these, zero pages.
    pub zero_pages: PageCount,
    /// Of the others, different ones: what the chunks hold.
    pub unique_pages: PageCount,
    /// Number of chunks.
    pub chunks: usize,
}

/// Writes a savefile to `path`: aside, to the disk, renamed. Read-only (0444) when it has its name. The pages of memory in
/// the manifest's working set are stored first, in its order.
///
/// Errors: [`Error::Unwritable`] when the input breaks a limit or rule of the format, [`Error::Io`] with step and place.
pub fn write(
    path: &Path,
    manifest: &Manifest,
    device_state: &DeviceState,
    images: &[ImageInput],
    progress: OnProgress,
) -> Result<Written, Error> {
    let unwritable = |what| Error::Unwritable { path: path.to_owned(), what };
    check_images(images).map_err(unwritable)?;
    let working_set: Vec<PageRange> = manifest.working_set().collect();
    let manifest = manifest.to_bytes().map_err(unwritable)?;
    let device_state = device_state.to_bytes().map_err(unwritable)?;

    let plan = plan_images(path, images, &working_set, progress)?;
    let mut sections = vec![(SectionKind::Manifest, manifest), (SectionKind::DeviceState, device_state)];
    sections.extend(plan.maps.iter().map(|map| (SectionKind::PageMap, map.to_bytes())));

    let aside = Aside::create(path)?;
    let tables: u64 = sections.iter().map(|(_, bytes)| bytes.len() as u64).sum();
    let data_at = ByteOffset(HEADER_LEN as u64 + tables + ChunkTable::section_len(plan.slots).0);
    let meter = Meter::new(Step::Encode, plan.slots.bytes());
    let chunks = watched(&meter, progress, || write_chunks(&aside, data_at, images, &plan, &meter))?;
    let data_len = ByteCount(chunks.iter().map(|chunk| chunk.stored.0).sum());
    let chunk_count = chunks.len();
    let table = ChunkTable::new(plan.slots, plan.first_slots.0.div_ceil(CHUNK_PAGES.0) as u32, chunks);
    sections.push((SectionKind::ChunkTable, table.to_bytes()));

    let header = write_head(&aside, &sections, data_len)?;
    aside.commit()?;
    Ok(summary(&header, &plan, chunk_count))
}

fn check_images(images: &[ImageInput]) -> Result<(), String> {
    if images.is_empty() {
        return Err("there is no image to store".into());
    }
    if images.len() > IMAGES_MAX {
        return Err(format!("there are {} images, at most {IMAGES_MAX} are allowed", images.len()));
    }
    for (index, image) in images.iter().enumerate() {
        let id = &image.id;
        match image.size.whole_pages() {
            None => return Err(format!("{id} has {} bytes, no whole number of pages", image.size)),
            Some(pages) if pages.0 > IMAGE_PAGES_MAX => {
                return Err(format!("{id} has {pages} pages, at most {IMAGE_PAGES_MAX} are allowed"));
            }
            Some(_) => {}
        }
        if images[..index].iter().any(|other| other.id == *id) {
            return Err(format!("{id} is given twice"));
        }
        match id {
            ImageId::Memory if image.scope != Scope::Whole => {
                return Err("memory is stored whole or not at all".into())
            }
            ImageId::Volume(name) if !is_volume_name(name) => {
                return Err(format!("{name:?} is no name for a volume"))
            }
            _ => {}
        }
    }
    Ok(())
}

/// Looks at every page, finds equal ones, decides what goes where.
fn plan_images(
    path: &Path,
    images: &[ImageInput],
    working_set: &[PageRange],
    progress: OnProgress,
) -> Result<StorePlan, Error> {
    let total = images.iter().map(|image| image.scope_pages().bytes().0).sum();
    let meter = Meter::new(Step::Scan, ByteCount(total));
    let scanned = watched(&meter, progress, || scan_images(path, images, working_set, &meter))?;
    let data_pages: u64 = scanned.iter().map(|image| image.scan.data_pages().0).sum();
    if data_pages > IMAGE_PAGES_MAX {
        let what = format!("all images have {data_pages} data pages, at most {IMAGE_PAGES_MAX} are allowed");
        return Err(Error::Unwritable { path: path.to_owned(), what });
    }
    let files: Vec<&File> = images.iter().map(|image| image.file).collect();
    let twins = find_twins(&scanned, &files).map_err(Error::io("compare equal pages to write", path))?;
    plan_store(&scanned, &twins)
        .map_err(|fault| Error::Unwritable { path: path.to_owned(), what: fault.to_string() })
}

fn scan_images(
    path: &Path,
    images: &[ImageInput],
    working_set: &[PageRange],
    meter: &Meter,
) -> Result<Vec<Scanned>, Error> {
    let scan_one = |image: &ImageInput| {
        let pages = image.size.pages_covering();
        let scan = scan(image.file, pages, &image.scope, &|count| meter.add(count.bytes()))
            .map_err(Error::io(format!("scan {} to write", image.id), path))?;
        let first = if image.id == ImageId::Memory { working_set.to_vec() } else { Vec::new() };
        Ok(Scanned { id: image.id.clone(), pages, scan, first })
    };
    images.iter().map(scan_one).collect()
}

/// Encodes on all processors, writes in order, a batch or two behind.
fn write_chunks(
    aside: &Aside,
    data_at: ByteOffset,
    images: &[ImageInput],
    plan: &StorePlan,
    meter: &Meter,
) -> Result<Vec<Chunk>, Error> {
    let jobs = plan_chunks(&plan.sources);
    thread::scope(|scope| {
        let (to_disk, batches) = sync_channel(BATCHES_WAITING);
        let disk = scope.spawn(move || write_batches(aside, data_at, batches));
        let encoded = jobs.chunks(BATCH_CHUNKS).try_for_each(|batch| {
            let batch = encode_batch(aside.path(), batch, images, meter)?;
            // The disk's thread hangs up only on an error, which is its answer below.
            let _ = to_disk.send(batch);
            Ok(())
        });
        drop(to_disk);
        let chunks = disk
            .join()
            .unwrap_or_else(|_| Err(Error::io("finish writing", aside.path())(io::ErrorKind::Other.into())));
        encoded.and(chunks)
    })
}

fn encode_batch(
    path: &Path,
    batch: &[Vec<Source>],
    images: &[ImageInput],
    meter: &Meter,
) -> Result<Vec<Encoded>, Error> {
    let new_worker = || (Encoder::new(), vec![0; CHUNK_PAGES.buffer_len()]);
    let encode = |(encoder, raw): &mut (io::Result<Encoder>, Vec<u8>), sources: &Vec<Source>| {
        let encoder = match encoder {
            Ok(encoder) => encoder,
            Err(err) => {
                return Err(Error::io("set up the compressor for", path)(io::Error::other(err.to_string())))
            }
        };
        let raw = gather(path, sources, images, raw)?;
        let encoded = encoder.encode(raw);
        meter.add(encoded.raw);
        Ok(encoded)
    };
    batch.par_iter().with_max_len(1).map_init(new_worker, encode).collect()
}

/// Reads a chunk's pages into one buffer.
fn gather<'a>(
    path: &Path,
    sources: &[Source],
    images: &[ImageInput],
    raw: &'a mut [u8],
) -> Result<&'a [u8], Error> {
    let mut len = 0;
    for source in sources {
        let bytes = &mut raw[len..len + source.pages.count.buffer_len()];
        let image = &images[source.image];
        image.file.read_exact_at(bytes, source.pages.first.offset().0).map_err(|err| {
            Error::io(format!("read pages {} of {} to write", source.pages, image.id), path)(err)
        })?;
        len += bytes.len();
    }
    Ok(&raw[..len])
}

fn write_batches(
    aside: &Aside,
    data_at: ByteOffset,
    batches: Receiver<Vec<Encoded>>,
) -> Result<Vec<Chunk>, Error> {
    let path = aside.path();
    let mut chunks = Vec::new();
    let mut offset = data_at;
    let mut unsynced = 0;
    for encoded in batches.into_iter().flatten() {
        let stored = ByteCount(encoded.bytes.len() as u64);
        aside.file().write_all_at(&encoded.bytes, offset.0).map_err(|err| {
            Error::io(format!("write chunk {} at offset {offset} of", chunks.len()), path)(err)
        })?;
        chunks.push(Chunk { offset, stored, raw: encoded.raw, codec: encoded.codec, hash: encoded.hash });
        offset.0 += stored.0;
        unsynced += stored.0;
        if unsynced >= SYNC_EVERY.0 {
            aside.file().sync_data().map_err(Error::io("write to the disk", path))?;
            unsynced = 0;
        }
    }
    Ok(chunks)
}

/// Writes header and tables in front of the chunks.
fn write_head(
    aside: &Aside,
    sections: &[(SectionKind, Vec<u8>)],
    data_len: ByteCount,
) -> Result<Header, Error> {
    let path = aside.path();
    let mut table: Vec<Section> = sections
        .iter()
        .map(|(kind, bytes)| Section {
            kind: *kind,
            offset: ByteOffset(0),
            length: ByteCount(bytes.len() as u64),
            hash: *blake3::hash(bytes).as_bytes(),
        })
        .collect();
    table.push(Section {
        kind: SectionKind::ChunkData,
        offset: ByteOffset(0),
        length: data_len,
        hash: [0; 32],
    });
    let (header, head) = Header::seal(table)
        .map_err(|fault| Error::Unwritable { path: path.to_owned(), what: fault.to_string() })?;
    aside.file().write_all_at(&head, 0).map_err(Error::io("write the header of", path))?;
    for (section, (kind, bytes)) in header.sections().iter().zip(sections) {
        let step = format!("write the {} at offset {} of", kind.name(), section.offset);
        aside.file().write_all_at(bytes, section.offset.0).map_err(Error::io(step, path))?;
    }
    Ok(header)
}

fn summary(header: &Header, plan: &StorePlan, chunks: usize) -> Written {
    let zero: u64 = plan.maps.iter().map(|map| map.zero_pages().0).sum();
    let data: u64 = plan.maps.iter().map(|map| map.data_pages().0).sum();
    Written {
        root: header.root(),
        stored_bytes: header.file_len(),
        pages: PageCount(zero + data),
        zero_pages: PageCount(zero),
        unique_pages: plan.slots,
        chunks,
    }
}

impl ImageInput<'_> {
    fn scope_pages(&self) -> PageCount {
        match &self.scope {
            Scope::Whole => self.size.pages_covering(),
            Scope::Runs(runs) => PageCount(runs.iter().map(|run| run.count.0).sum()),
        }
    }
}
