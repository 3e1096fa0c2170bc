//! The little of qcow2 (version 3, QEMU's docs/interop/qcow2.txt) that overlays and deltas need.
//!
//! Invariants:
//! - Clusters are one guest page (4 KiB): a delta then holds exactly the pages of its page map, and a clone that
//!   writes 4 KiB copies nothing from the base.
//! - Files made here carry no backing file name: QEMU is told the chain by node, so no path in a file is ever followed.
//! - What is read back was written by a QEMU whose guest may be hostile: every offset is checked before it is used, and no
//!   more is made of its tables and its data than the file holds, so that neither can be named again and again.
//!
//! Layout of a file made here, in clusters: header · refcount table · L1 table · refcount blocks · L2 tables · data.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};

use engine::image::scan::is_zero;
use engine::savefile::{Content, PageMap};
use engine::units::{ByteCount, PageCount, PageIndex, PageRange, PAGE_SIZE};

const CLUSTER_BITS: u32 = 12;
const CLUSTER: u64 = 1 << CLUSTER_BITS;
/// Entries of 8 bytes in one table cluster.
const ENTRIES: u64 = CLUSTER / 8;
/// Refcounts of 16 bits in one refcount block.
const REFCOUNTS: u64 = CLUSTER / 2;
/// Header of version 3 without additional fields; an end-of-extensions marker of 8 zero bytes follows.
const HEADER_BYTES: u32 = 104;
/// "Exactly one reference": set in every table entry written here.
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// The largest volume: 16 TiB would need an L1 table of 64 MiB, the most QEMU takes is 32 MiB.
pub const VOLUME_BYTES_MAX: u64 = 4 << 40;

const _: () = assert!(CLUSTER == PAGE_SIZE);

/// How far beyond its end QEMU may try to put clusters into a full overlay: all requests of a queue (256 of 1 MiB) at
/// once.
const OVERSHOOT_MAX: u64 = 256 << 20;

/// Writes an empty overlay of a volume of `size` bytes into `file`, which must be empty and will grow.
pub fn write_empty(file: &File, size: ByteCount) -> io::Result<()> {
    let layout = Layout::plan(size.0, &[], Reserve::Nothing)?;
    write_image(file, size, &layout, &[], |_, _| Ok(()))
}

/// The same, with room for `data_max` bytes, for a file that cannot grow.
///
/// All tables it will ever need stand in it already, as holes: when the file is full, QEMU must still be able to write
/// its tables back, or it puts no other overlay on top.
pub fn write_empty_limited(file: &File, size: ByteCount, data_max: ByteCount) -> io::Result<()> {
    write_image(file, size, &limited(size, data_max)?, &[], |_, _| Ok(()))
}

/// The bytes such a file has before its data, and those it has in all.
pub fn limited_bytes(size: ByteCount, data_max: ByteCount) -> io::Result<(ByteCount, ByteCount)> {
    limited(size, data_max)
        .map(|layout| (ByteCount(layout.data * CLUSTER), ByteCount(layout.total * CLUSTER)))
}

fn limited(size: ByteCount, data_max: ByteCount) -> io::Result<Layout> {
    Layout::plan(size.0, &[], Reserve::Clusters(data_max.0.div_ceil(CLUSTER)))
}

/// Writes a delta: the pages of `map`, whose data stands in `raw` at the volume's own offsets, into the empty `file`.
pub fn write_delta(file: &File, size: ByteCount, map: &PageMap, raw: &File) -> io::Result<()> {
    let runs: Vec<Run> = map
        .runs()
        .iter()
        .map(|run| Run {
            first: run.pages.first.0,
            pages: run.pages.count.0,
            data: matches!(run.content, Content::Data(_)),
        })
        .collect();
    let layout = Layout::plan(size.0, &runs, Reserve::Nothing)?;
    write_image(file, size, &layout, &runs, |from, to| {
        copy_range(raw, from.first * CLUSTER, file, to, from.pages * CLUSTER).map(drop)
    })
}

/// Pages `first .. first + pages` of the volume, all data or all zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    first: u64,
    pages: u64,
    data: bool,
}

/// What an image is to have room for beside its runs.
#[derive(Debug, Clone, Copy)]
enum Reserve {
    /// Nothing: it is read only, or can grow.
    Nothing,
    /// So many clusters of data, anywhere in the volume.
    Clusters(u64),
}

/// Where everything of an image goes, in clusters.
struct Layout {
    l1_entries: u64,
    refcount_table: u64,
    refcount_table_clusters: u64,
    l1: u64,
    refcount_blocks: u64,
    refcount_block_count: u64,
    l2: u64,
    /// Indices into the L1 table which have an L2 table, ascending.
    l2_used: Vec<u64>,
    data: u64,
    /// The clusters in use.
    used: u64,
    /// The file's length: with those in reserve.
    total: u64,
}

impl Layout {
    fn plan(size: u64, runs: &[Run], reserve: Reserve) -> io::Result<Layout> {
        if size == 0 || size > VOLUME_BYTES_MAX || !size.is_multiple_of(PAGE_SIZE) {
            return Err(invalid(format!("a volume of {size} bytes")));
        }
        let volume_pages = size / CLUSTER;
        let l1_entries = volume_pages.div_ceil(ENTRIES);
        let mut l2_used: Vec<u64> = Vec::new();
        let mut data_pages = 0u64;
        for run in runs {
            let end = run.first.checked_add(run.pages).filter(|end| *end <= volume_pages);
            let end =
                end.ok_or_else(|| invalid(format!("pages {}+{} beyond the volume", run.first, run.pages)))?;
            if run.pages == 0 {
                continue;
            }
            let already = l2_used.last().map_or(0, |last| last + 1);
            l2_used.extend((run.first / ENTRIES).max(already)..=(end - 1) / ENTRIES);
            data_pages += if run.data { run.pages } else { 0 };
        }
        let (mut reserved, mut overshoot) = (0, 0);
        if let Reserve::Clusters(clusters) = reserve {
            l2_used = (0..l1_entries).collect();
            (reserved, overshoot) = (clusters, OVERSHOOT_MAX / CLUSTER);
        }
        let l1_clusters = l1_entries.div_ceil(ENTRIES);
        let fixed = 1 + l1_clusters + l2_used.len() as u64 + data_pages;
        let (refcount_table_clusters, refcount_block_count) = refcount_clusters(fixed + reserved + overshoot);
        let l1 = 1 + refcount_table_clusters;
        let refcount_blocks = l1 + l1_clusters;
        let l2 = refcount_blocks + refcount_block_count;
        let data = l2 + l2_used.len() as u64;
        Ok(Layout {
            l1_entries,
            refcount_table: 1,
            refcount_table_clusters,
            l1,
            refcount_blocks,
            refcount_block_count,
            l2,
            l2_used,
            data,
            used: data + data_pages,
            total: data + data_pages + reserved,
        })
    }
}

/// Clusters of the refcount table and number of refcount blocks for a file of `other` clusters beside them.
fn refcount_clusters(other: u64) -> (u64, u64) {
    let (mut table, mut blocks) = (1, 1);
    loop {
        let needed_blocks = (other + table + blocks).div_ceil(REFCOUNTS);
        let needed_table = needed_blocks.div_ceil(ENTRIES);
        if (needed_table, needed_blocks) == (table, blocks) {
            return (table, blocks);
        }
        (table, blocks) = (needed_table.max(table), needed_blocks.max(blocks));
    }
}

fn write_image(
    file: &File,
    size: ByteCount,
    layout: &Layout,
    runs: &[Run],
    mut copy: impl FnMut(&Run, u64) -> io::Result<()>,
) -> io::Result<()> {
    file.set_len(layout.total * CLUSTER)?;
    file.write_all_at(&header(size.0, layout), 0)?;

    let blocks = (0..layout.refcount_block_count).map(|i| (layout.refcount_blocks + i) * CLUSTER);
    file.write_all_at(&be64(blocks), layout.refcount_table * CLUSTER)?;
    let ones: Vec<u8> = std::iter::repeat_n([0u8, 1], layout.used as usize).flatten().collect();
    file.write_all_at(&ones, layout.refcount_blocks * CLUSTER)?;

    let mut l1 = vec![0u64; layout.l1_entries as usize];
    for (nth, index) in layout.l2_used.iter().enumerate() {
        l1[*index as usize] = ((layout.l2 + nth as u64) * CLUSTER) | COPIED;
    }
    file.write_all_at(&be64(l1.into_iter()), layout.l1 * CLUSTER)?;

    let mut data = layout.data;
    for run in runs {
        let first_data = data;
        write_l2_entries(file, layout, run, first_data)?;
        if run.data {
            copy(run, first_data * CLUSTER)?;
            data += run.pages;
        }
    }
    Ok(())
}

/// The L2 entries of one run, table by table.
fn write_l2_entries(file: &File, layout: &Layout, run: &Run, first_data: u64) -> io::Result<()> {
    let mut page = run.first;
    let end = run.first + run.pages;
    while page < end {
        let stop = end.min((page / ENTRIES + 1) * ENTRIES);
        let nth = layout
            .l2_used
            .binary_search(&(page / ENTRIES))
            .map_err(|_| invalid(format!("page {page} has no table")))? as u64;
        let entries = (page..stop).map(|p| match run.data {
            true => ((first_data + p - run.first) * CLUSTER) | COPIED,
            false => ZERO,
        });
        file.write_all_at(&be64(entries), (layout.l2 + nth) * CLUSTER + (page % ENTRIES) * 8)?;
        page = stop;
    }
    Ok(())
}

fn header(size: u64, layout: &Layout) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_BYTES as usize + 8);
    bytes.extend(b"QFI\xfb");
    bytes.extend(3u32.to_be_bytes());
    bytes.extend(0u64.to_be_bytes()); // no backing file name
    bytes.extend(0u32.to_be_bytes());
    bytes.extend(CLUSTER_BITS.to_be_bytes());
    bytes.extend(size.to_be_bytes());
    bytes.extend(0u32.to_be_bytes()); // not encrypted
    bytes.extend((layout.l1_entries as u32).to_be_bytes());
    bytes.extend((layout.l1 * CLUSTER).to_be_bytes());
    bytes.extend((layout.refcount_table * CLUSTER).to_be_bytes());
    bytes.extend((layout.refcount_table_clusters as u32).to_be_bytes());
    bytes.extend(0u32.to_be_bytes()); // no snapshots
    bytes.extend(0u64.to_be_bytes());
    bytes.extend([0u8; 24]); // no incompatible, compatible or autoclear features
    bytes.extend(4u32.to_be_bytes()); // refcounts of 1 << 4 bits
    bytes.extend(HEADER_BYTES.to_be_bytes());
    bytes.extend([0u8; 8]); // end of header extensions
    bytes
}

/// Reads back which pages of an overlay were written, and copies the data ones into `raw` at their own offsets.
/// `file` must have been made by [`write_empty`]; `raw` must be empty and becomes a sparse file of the volume's size.
pub fn read_changes(file: &File, size: ByteCount, raw: &File) -> io::Result<Vec<PageRange>> {
    let file_metadata = file.metadata()?;
    let file_bytes = file_metadata.len();
    let mut head = [0u8; HEADER_BYTES as usize];
    read_at(file, &mut head, 0, file_bytes)?;
    if &head[..4] != b"QFI\xfb" || be32_at(&head, 4) != 3 || be32_at(&head, 20) != CLUSTER_BITS {
        return Err(invalid("not a qcow2 overlay of this engine".to_owned()));
    }
    if be64_at(&head, 24) != size.0 {
        return Err(invalid(format!("made for {} bytes, not {}", be64_at(&head, 24), size.0)));
    }
    raw.set_len(size.0)?;
    let volume_pages = size.0 / CLUSTER;
    let l1_entries = volume_pages.div_ceil(ENTRIES);
    let l1_offset = be64_at(&head, 40);
    let mut l1 = vec![0u8; (l1_entries * 8) as usize];
    read_at(file, &mut l1, l1_offset, file_bytes)?;

    // What the file really holds is used once. Otherwise a few clusters could ask for a volume's size of copies.
    let held = (file_metadata.blocks() * 512).min(file_bytes) / CLUSTER;
    let mut left = held;
    let mut use_clusters = |count: u64| {
        left = left.checked_sub(count).ok_or_else(|| {
            invalid(format!("it holds {held} clusters, and uses some of them more than once"))
        })?;
        Ok::<(), io::Error>(())
    };
    let mut changes = Changes::default();
    let mut l2 = vec![0u8; CLUSTER as usize];
    for (index, entry) in l1.chunks_exact(8).map(|bytes| be64_at(bytes, 0)).enumerate() {
        if entry & OFFSET_MASK == 0 {
            continue;
        }
        read_at(file, &mut l2, entry & OFFSET_MASK, file_bytes)?;
        if is_zero(&l2) {
            continue;
        }
        use_clusters(1)?;
        let first = index as u64 * ENTRIES;
        for (nth, entry) in l2.chunks_exact(8).map(|bytes| be64_at(bytes, 0)).enumerate() {
            let page = first + nth as u64;
            let offset = entry & OFFSET_MASK;
            if entry & COMPRESSED != 0 || (entry != 0 && page >= volume_pages) {
                return Err(invalid(format!("entry {entry:#x} for page {page}")));
            }
            if entry & ZERO != 0 {
                changes.zero(page);
            } else if offset != 0 {
                if !offset.is_multiple_of(CLUSTER) || offset > file_bytes.saturating_sub(CLUSTER) {
                    return Err(invalid(format!("page {page} at {offset:#x}, beyond the file")));
                }
                changes.data(page, offset, |run| use_clusters(run.copy(file, raw)?))?;
            }
        }
    }
    changes.finish(|run| use_clusters(run.copy(file, raw)?))
}

/// A run of data pages which is contiguous on both sides.
#[derive(Debug, Clone, Copy)]
struct Contiguous {
    page: u64,
    pages: u64,
    offset: u64,
}

impl Contiguous {
    /// Copies the run to its place in the volume; answers how many clusters were not zero.
    fn copy(&self, file: &File, raw: &File) -> io::Result<u64> {
        copy_range(file, self.offset, raw, self.page * CLUSTER, self.pages * CLUSTER)
    }
}

/// Collects changed pages into ranges, and data pages into the longest contiguous copies.
#[derive(Default)]
struct Changes {
    ranges: Vec<PageRange>,
    pending: Option<Contiguous>,
}

impl Changes {
    fn zero(&mut self, page: u64) {
        self.touch(page);
    }

    fn data(
        &mut self,
        page: u64,
        offset: u64,
        copy: impl FnOnce(Contiguous) -> io::Result<()>,
    ) -> io::Result<()> {
        self.touch(page);
        match &mut self.pending {
            Some(run) if run.page + run.pages == page && run.offset + run.pages * CLUSTER == offset => {
                run.pages += 1
            }
            pending => {
                if let Some(run) = pending.replace(Contiguous { page, pages: 1, offset }) {
                    copy(run)?;
                }
            }
        }
        Ok(())
    }

    fn touch(&mut self, page: u64) {
        match self.ranges.last_mut() {
            Some(range) if range.end() == PageIndex(page) => range.count = PageCount(range.count.0 + 1),
            _ => self.ranges.push(PageRange::new(page, 1)),
        }
    }

    fn finish(mut self, copy: impl FnOnce(Contiguous) -> io::Result<()>) -> io::Result<Vec<PageRange>> {
        if let Some(run) = self.pending.take() {
            copy(run)?;
        }
        Ok(self.ranges)
    }
}

/// Copies whole clusters through a bounded buffer; answers how many were not zero. Zeros are left out: `to` is empty there, and holes of a long sparse file must
/// not become memory.
fn copy_range(
    from: &File,
    mut from_offset: u64,
    to: &File,
    mut to_offset: u64,
    bytes: u64,
) -> io::Result<u64> {
    const BUFFER: u64 = 1 << 20;
    let mut buffer = vec![0u8; bytes.min(BUFFER) as usize];
    let (mut left, mut written) = (bytes, 0);
    while left > 0 {
        let part = &mut buffer[..left.min(BUFFER) as usize];
        from.read_exact_at(part, from_offset)?;
        written += write_without_zeros(to, part, to_offset)?;
        let count = part.len() as u64;
        (from_offset, to_offset, left) = (from_offset + count, to_offset + count, left - count);
    }
    Ok(written)
}

fn write_without_zeros(to: &File, clusters: &[u8], offset: u64) -> io::Result<u64> {
    let (mut offset, mut written) = (offset, 0);
    let mut rest = clusters;
    while !rest.is_empty() {
        let mut alike = rest.chunks(CLUSTER as usize);
        let zero = alike.next().is_none_or(is_zero);
        let count = 1 + alike.take_while(|cluster| is_zero(cluster) == zero).count();
        let (run, left) = rest.split_at(rest.len().min(count * CLUSTER as usize));
        if !zero {
            to.write_all_at(run, offset)?;
            written += run.len() as u64 / CLUSTER;
        }
        (rest, offset) = (left, offset + run.len() as u64);
    }
    Ok(written)
}

fn read_at(file: &File, buffer: &mut [u8], offset: u64, file_bytes: u64) -> io::Result<()> {
    match offset.checked_add(buffer.len() as u64) {
        Some(end) if end <= file_bytes => file.read_exact_at(buffer, offset),
        _ => Err(invalid(format!("{} bytes at {offset:#x}, beyond the file", buffer.len()))),
    }
}

fn be64(values: impl Iterator<Item = u64>) -> Vec<u8> {
    values.flat_map(u64::to_be_bytes).collect()
}

fn be64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(std::array::from_fn(|i| bytes[at + i]))
}

fn be32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(std::array::from_fn(|i| bytes[at + i]))
}

fn invalid(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("qcow2: {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::savefile::{ImageId, PageMapBuilder, Run as MapRun, Slot};
    use proptest::prelude::*;

    /// Runs of pages (gap before, length, data) as a page map, and the raw file they describe.
    fn map_and_raw(pages: u64, shape: &[(u64, u64, bool)]) -> (PageMap, File) {
        let mut builder = PageMapBuilder::new(ImageId::Volume("root".into()), PageCount(pages), shape.len());
        let raw = tempfile::tempfile().unwrap();
        raw.set_len(pages * CLUSTER).unwrap();
        let (mut page, mut slot) = (0, 0);
        for (gap, count, data) in shape {
            page += gap;
            let count = (*count).min(pages.saturating_sub(page));
            if count == 0 {
                break;
            }
            let content = if *data { Content::Data(Slot(slot)) } else { Content::Zero };
            builder.push(MapRun { pages: PageRange::new(page, count), content });
            if *data {
                slot += count;
                for page in page..page + count {
                    raw.write_all_at(&vec![(page % 251) as u8 + 1; CLUSTER as usize], page * CLUSTER)
                        .unwrap();
                }
            }
            page += count;
        }
        (builder.finish(PageCount(slot)).unwrap(), raw)
    }

    fn ranges(map: &PageMap) -> Vec<PageRange> {
        let mut merged: Vec<PageRange> = Vec::new();
        for run in map.runs() {
            match merged.last_mut() {
                Some(last) if last.end() == run.pages.first => last.count.0 += run.pages.count.0,
                _ => merged.push(run.pages),
            }
        }
        merged
    }

    proptest! {
        /// What is written as a delta is read back as the same changes and the same bytes.
        #[test]
        fn a_delta_comes_back(
            pages in 1u64..3000,
            shape in prop::collection::vec((0u64..700, 1u64..300, any::<bool>()), 0..12),
        ) {
            let (map, raw) = map_and_raw(pages, &shape);
            let (file, back) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
            write_delta(&file, ByteCount(pages * CLUSTER), &map, &raw).unwrap();
            let changed = read_changes(&file, ByteCount(pages * CLUSTER), &back).unwrap();
            prop_assert_eq!(changed, ranges(&map));
            let bytes = |file: &File| {
                let mut bytes = vec![0u8; (pages * CLUSTER) as usize];
                file.read_exact_at(&mut bytes, 0).unwrap();
                bytes
            };
            prop_assert!(bytes(&back) == bytes(&raw));
        }

        /// A file that somebody has scribbled on is an error or other bytes, never a panic and never a read beyond it.
        #[test]
        fn damaged_files_do_no_harm(at in 0usize..40_000, bit in 0u8..8) {
            let (map, raw) = map_and_raw(600, &[(3, 5, true), (500, 20, true)]);
            let file = tempfile::tempfile().unwrap();
            write_delta(&file, ByteCount(600 * CLUSTER), &map, &raw).unwrap();
            let at = at as u64 % file.metadata().unwrap().len();
            let mut byte = [0u8];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ (1 << bit)], at).unwrap();
            let _ = read_changes(&file, ByteCount(600 * CLUSTER), &tempfile::tempfile().unwrap());
        }
    }

    /// Found by the fuzz target `qcow2`: one table, or one cluster of data, named for the whole volume.
    #[test]
    fn a_file_that_names_its_clusters_again_and_again_is_refused() {
        let (size, file) = (ByteCount(16 * ENTRIES * CLUSTER), tempfile::tempfile().unwrap());
        write_empty(&file, size).unwrap();
        let (l1, l2, data) = (2 * CLUSTER, 4 * CLUSTER, 5 * CLUSTER);
        file.set_len(1000 * CLUSTER).unwrap();
        file.write_all_at(b"data", data).unwrap();
        let tables = |count| file.write_all_at(&be64(std::iter::repeat_n(l2 | COPIED, count)), l1).unwrap();
        let clusters =
            |count| file.write_all_at(&be64(std::iter::repeat_n(data | COPIED, count)), l2).unwrap();
        let read = || read_changes(&file, size, &tempfile::tempfile().unwrap());
        tables(1);
        clusters(1);
        assert_eq!(read().unwrap(), [PageRange::new(0, 1)]);
        clusters(100);
        assert!(read().unwrap_err().to_string().contains("more than once"));
        clusters(1);
        tables(16);
        assert!(read().unwrap_err().to_string().contains("more than once"));
    }

    #[test]
    fn holes_that_an_overlay_names_as_data_take_no_memory() {
        let (size, file, raw) =
            (ByteCount(ENTRIES * CLUSTER), tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        write_empty(&file, size).unwrap();
        file.set_len((5 + ENTRIES) * CLUSTER).unwrap();
        file.write_all_at(&be64([(4 * CLUSTER) | COPIED].into_iter()), 2 * CLUSTER).unwrap();
        file.write_all_at(&be64((0..ENTRIES).map(|page| ((5 + page) * CLUSTER) | COPIED)), 4 * CLUSTER)
            .unwrap();
        file.write_all_at(b"data", (5 + 300) * CLUSTER).unwrap();
        assert_eq!(read_changes(&file, size, &raw).unwrap(), [PageRange::new(0, ENTRIES)]);
        let mut found = [0; 4];
        raw.read_exact_at(&mut found, 300 * CLUSTER).unwrap();
        assert_eq!(&found, b"data");
        assert!(
            raw.metadata().unwrap().blocks() * 512 <= 4 * CLUSTER,
            "a page, and what the file system needs for it"
        );
    }

    #[test]
    fn volumes_outside_the_limits_are_refused() {
        for size in [0, CLUSTER + 1, VOLUME_BYTES_MAX + CLUSTER] {
            assert!(write_empty(&tempfile::tempfile().unwrap(), ByteCount(size)).is_err(), "{size}");
        }
    }

    #[test]
    fn a_limited_overlay_is_empty_and_has_its_room() {
        let (size, room) = (ByteCount(100 << 20), ByteCount(16 << 20));
        let (file, back) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        write_empty_limited(&file, size, room).unwrap();
        assert_eq!(read_changes(&file, size, &back).unwrap(), []);
        let (tables, all) = limited_bytes(size, room).unwrap();
        assert_eq!(all.0 - tables.0, room.0);
        assert_eq!(file.metadata().unwrap().len(), all.0);
        qemu_img_finds_no_fault(&file);
    }

    /// QEMU's own checker, where it is installed.
    fn qemu_img_finds_no_fault(file: &File) {
        use std::os::fd::AsRawFd;
        let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
        match std::process::Command::new("qemu-img").args(["check", "-f", "qcow2", &path]).output() {
            Ok(output) => {
                let said = String::from_utf8_lossy(&output.stdout).into_owned();
                assert!(output.status.success() && said.contains("No errors"), "{said}");
            }
            Err(error) => eprintln!("skipped, no qemu-img: {error}"),
        }
    }

    #[test]
    fn qemu_img_agrees() {
        let file = tempfile::tempfile().unwrap();
        let (map, raw) = map_and_raw(5000, &[(7, 40, true), (0, 9, false), (2000, 600, true)]);
        write_delta(&file, ByteCount(5000 * CLUSTER), &map, &raw).unwrap();
        qemu_img_finds_no_fault(&file);
    }
}
