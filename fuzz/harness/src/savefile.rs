//! Savefiles and their parts.

use std::fs::File;
use std::os::unix::fs::FileExt;

use engine::savefile::{
    peek, silent, ChunkTable, DeviceState, Header, ImageOutput, Manifest, PageMap, ReadBackend, Savefile,
    Section, SectionKind, Slot, HEADER_LEN, MAGIC,
};
use engine::units::{ByteCount, ByteOffset, PageCount, PageRange};

use crate::{files, sealed, take};

/// Images are decoded up to this many pages of data: equal pages are stored once, so a small file may describe a huge guest.
pub const OUTPUT_PAGES_MAX: u64 = 4096;

/// Any bytes as a file.
pub fn whole(data: &[u8]) {
    open(data);
}

/// A recipe for a file whose hashes are right.
pub fn sealed(data: &[u8]) {
    open(&sealed::seal(sealed::parse(data)));
}

/// A header from behind its version on, sealed; the file is as long as it says.
pub fn header(data: &[u8]) {
    let mut bytes = vec![0; HEADER_LEN];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..12].copy_from_slice(&1u32.to_le_bytes());
    let len = data.len().min(HEADER_LEN - 12);
    bytes[12..12 + len].copy_from_slice(&data[..len]);
    sealed::seal_root(&mut bytes);
    let file_len = u64::from_le_bytes(std::array::from_fn(|at| bytes[16 + at]));
    let Ok(header) = Header::parse(&bytes, ByteCount(file_len)) else { return };
    check_header(&header);
    assert_eq!(header.file_len().0, file_len);
    assert!(Header::parse(&bytes, ByteCount(file_len ^ 1)).is_err(), "another length passed");
}

/// A manifest section.
pub fn manifest(data: &[u8]) {
    let Ok(manifest) = Manifest::parse(data) else { return };
    assert!(manifest.working_set().all(|run| run.end() >= run.first));
    let bytes = manifest.to_bytes().expect("what was read can be written");
    assert_eq!(Manifest::parse(&bytes), Ok(manifest));
}

/// A device state section.
pub fn device_state(data: &[u8]) {
    let Ok(state) = DeviceState::parse(data) else { return };
    assert_eq!(state.to_bytes().as_deref(), Ok(data), "two forms of one device state");
}

/// The number of stored pages (u32), and a page map section.
pub fn page_map(mut data: &[u8]) {
    let slots = PageCount(u32::from_le_bytes(take(&mut data)).into());
    let Ok(map) = PageMap::parse(data, slots) else { return };
    assert_eq!(map.to_bytes(), data, "two forms of one page map");
    check_map(&map, slots);
}

/// Offset (u32) and length (u32) of the chunk data, and a chunk table section.
pub fn chunk_table(mut data: &[u8]) {
    let offset = ByteOffset(u32::from_le_bytes(take(&mut data)).into());
    let length = ByteCount(u32::from_le_bytes(take(&mut data)).into());
    let section = Section { kind: SectionKind::ChunkData, offset, length, hash: [0; 32] };
    let Ok(table) = ChunkTable::parse(data, &section) else { return };
    assert_eq!(table.to_bytes(), data, "two forms of one chunk table");
    check_table(&table, &section);
}

/// Opens, verifies and decodes a file.
fn open(bytes: &[u8]) {
    let file = files::with(bytes);
    let path = files::path(&file);
    let peeked = peek(&path, None);
    let savefile = match Savefile::from_file(file, &path, None) {
        Ok(savefile) => savefile,
        Err(err) => return assert!(err.is_bad_savefile(), "{err}"),
    };
    let peeked = peeked.expect("what opens can be peeked at");
    assert_eq!((peeked.root, &peeked.manifest), (savefile.root(), savefile.manifest()));
    assert_eq!(savefile.stored_bytes().0, bytes.len() as u64);
    check_header(savefile.header());
    check_table(savefile.chunk_table(), savefile.header().the(SectionKind::ChunkData).expect("it opened"));
    savefile.page_maps().iter().for_each(|map| check_map(map, savefile.chunk_table().slots()));

    let verified = savefile.verify(ReadBackend::Pread, &silent);
    if let Err(err) = &verified {
        assert!(err.is_bad_savefile(), "{err}");
    }
    let data_pages: u64 = savefile.page_maps().iter().map(|map| map.data_pages().0).sum();
    if data_pages > OUTPUT_PAGES_MAX {
        return;
    }
    let by_pread = decode(&savefile, ReadBackend::Pread);
    if verified.is_err() {
        return;
    }
    savefile.device_state().expect("what was verified can be read");
    let by_pread = by_pread.expect("what was verified decodes");
    let by_ring = decode(&savefile, ReadBackend::Ring).expect("what one reader decodes the other does");
    for (map, (one, other)) in savefile.page_maps().iter().zip(by_pread.iter().zip(&by_ring)) {
        for (pages, _) in map.data_runs() {
            assert!(read(one, pages) == read(other, pages), "readers differ in {pages} of {}", map.image());
        }
    }
}

/// Every image, decoded.
fn decode(savefile: &Savefile, backend: ReadBackend) -> Result<Vec<File>, engine::savefile::Error> {
    let maps = savefile.page_maps();
    let outputs: Vec<File> = maps.iter().map(|map| files::holes(map.pages().bytes().0)).collect();
    let decoded: Vec<ImageOutput> =
        maps.iter().zip(&outputs).map(|(map, file)| ImageOutput { id: map.image(), file }).collect();
    savefile.decode(&decoded, backend, &silent)?;
    Ok(outputs)
}

fn read(file: &File, pages: PageRange) -> Vec<u8> {
    let mut bytes = vec![0; pages.count.buffer_len()];
    file.read_exact_at(&mut bytes, pages.first.offset().0).expect("within the image");
    bytes
}

/// Sections tile the file.
fn check_header(header: &Header) {
    let mut end = HEADER_LEN as u64;
    for section in header.sections() {
        assert_eq!(section.offset.0, end);
        end += section.length.0;
    }
    assert_eq!(end, header.file_len().0);
    for kind in
        [SectionKind::Manifest, SectionKind::DeviceState, SectionKind::ChunkTable, SectionKind::ChunkData]
    {
        assert_eq!(header.of_kind(kind).count(), 1);
    }
}

/// Runs are sorted, disjoint, inside; their slots too.
fn check_map(map: &PageMap, slots: PageCount) {
    let mut end = 0;
    for run in map.runs() {
        assert!(run.pages.first.0 >= end && !run.pages.is_empty());
        end = run.pages.end().0;
    }
    assert!(end <= map.pages().0);
    for (pages, Slot(slot)) in map.data_runs() {
        assert!(slot + pages.count.0 <= slots.0);
    }
    assert!(map.data_pages().0 + map.zero_pages().0 <= map.pages().0);
}

/// Chunks tile the chunk data, and every slot is in one.
fn check_table(table: &ChunkTable, data: &Section) {
    let mut end = data.offset.0;
    for chunk in table.chunks() {
        assert_eq!(chunk.offset.0, end);
        assert!((1..=chunk.raw.0).contains(&chunk.stored.0) && chunk.raw <= table.chunk_pages().bytes());
        end += chunk.stored.0;
    }
    assert_eq!(end, data.offset.0 + data.length.0);
    if let Some(last) = table.slots().0.checked_sub(1) {
        assert_eq!(table.locate(Slot(last)).0 + 1, table.chunks().len());
    }
}
