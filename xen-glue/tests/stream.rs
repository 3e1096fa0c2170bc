//! Streams written and read again, real ones of Xen 4.17, and hostile ones.

use std::fs::File;
use std::io::Cursor;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::process::Command;

use engine::units::{ByteCount, PageRange, PAGE_BYTES};
use proptest::collection::vec;
use proptest::prelude::*;
use xen_glue::device_state::{DeviceState, TscInfo};
use xen_glue::hypercalls::Uuid;
use xen_glue::layout::{Layout, SPECIAL_FIRST};
use xen_glue::stream::config::{DiskConfig, GuestConfig, NicConfig};
use xen_glue::stream::import::{fill, survey, ImportError};
use xen_glue::stream::libxc::{Domain, GuestKind, Record, VcpuPart};
use xen_glue::stream::pages::{PageEntry, PageKind};
use xen_glue::stream::reader::{Item, StreamReader};
use xen_glue::stream::writer::StreamWriter;
use xen_glue::stream::xl_header::ConfigText;
use xen_glue::stream::{export, StreamError};

/// `xl save` of a PVH guest with two vCPUs on Debian's Xen 4.17, all but two pages taken out.
const PVH: &[u8] = include_bytes!("fixtures/xl-4.17-pvh.stream");
/// The same of a PV guest.
const PV: &[u8] = include_bytes!("fixtures/xl-4.17-pv.stream");

type Page = [u8; PAGE_BYTES];

fn filled(byte: u8) -> Box<Page> {
    Box::new([byte; PAGE_BYTES])
}

fn read_all(bytes: &[u8]) -> Result<(ConfigText, Vec<(Item, Option<u8>)>), StreamError> {
    let mut stream = StreamReader::new(bytes)?;
    let mut items = Vec::new();
    while let Some(item) = stream.next_item()? {
        let page = matches!(&item, Item::Page(entry) if entry.kind.has_data()).then(|| stream.page()[77]);
        items.push((item, page));
    }
    Ok((stream.config().clone(), items))
}

fn rewrite(bytes: &[u8]) -> Vec<u8> {
    let mut stream = StreamReader::new(bytes).unwrap();
    let Some(Item::Domain(domain)) = stream.next_item().unwrap() else { panic!("no domain") };
    let mut writer = StreamWriter::new(Vec::new(), stream.config(), &domain).unwrap();
    while let Some(item) = stream.next_item().unwrap() {
        match item {
            Item::Record(record) => writer.record(&record).unwrap(),
            Item::Page(entry) => writer.page(entry, stream.page()).unwrap(),
            Item::DomainEnd => {}
            other => panic!("{other:?}"),
        }
    }
    writer.end().unwrap()
}

fn state(layout: Vec<PageRange>) -> DeviceState {
    DeviceState {
        xen: (4, 17),
        vcpus: 2,
        layout: Layout::new(layout).unwrap(),
        tsc: TscInfo { mode: 1, khz: 2_600_000, nsec: 5, incarnation: 2 },
        hvm_context: vec![7; 33],
        hvm_params: vec![(1, SPECIAL_FIRST + 4), (17, SPECIAL_FIRST + 7), (12, (SPECIAL_FIRST + 6) << 12)],
        cpuid_policy: vec![1; 48],
        msr_policy: vec![2; 32],
    }
}

fn config(pages: u64) -> GuestConfig {
    let disk = |vdev: &str, writable| DiskConfig {
        path: format!("/disks/{vdev}.img"),
        vdev: vdev.into(),
        format: "raw".into(),
        writable,
    };
    GuestConfig {
        name: "g".into(),
        uuid: Uuid([7; 16]),
        kind: "pvh".into(),
        memory_max: ByteCount(pages << 12),
        memory_target: ByteCount(pages << 12),
        vcpus: 2,
        kernel: Some("/boot/vmlinuz".into()),
        ramdisk: Some("/boot/initrd".into()),
        cmdline: "console=hvc0".into(),
        disks: vec![disk("xvda", true), disk("xvdb", false)],
        nics: vec![NicConfig { devid: 0, mac: None, bridge: Some("xenbr0".into()), script: None }],
    }
}

/// A memory image in which page `n` is zero or has bytes of its own.
fn image(pages: u64, is_zero: impl Fn(u64) -> bool) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(pages << 12).unwrap();
    for page in (0..pages).filter(|page| !is_zero(*page)) {
        file.write_all_at(&[(page % 255 + 1) as u8; PAGE_BYTES], page << 12).unwrap();
    }
    file
}

fn bytes_of(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn records(kind: GuestKind) -> BoxedStrategy<Record> {
    let tsc = any::<(u32, u32, u64, u32)>()
        .prop_map(|(mode, khz, nsec, incarnation)| Record::Tsc(TscInfo { mode, khz, nsec, incarnation }));
    if kind == GuestKind::Hvm {
        let context = vec(any::<u8>(), 1..50).prop_map(Record::HvmContext);
        let params = vec(any::<(u64, u64)>(), 0..5).prop_map(Record::HvmParams);
        return prop_oneof![tsc, context, params].boxed();
    }
    let part =
        prop::sample::select(vec![VcpuPart::Basic, VcpuPart::Extended, VcpuPart::Xsave, VcpuPart::Msrs]);
    let vcpu = (part, any::<u32>(), vec(any::<u8>(), 0..50)).prop_map(|(part, vcpu, state)| Record::PvVcpu {
        part,
        vcpu,
        state,
    });
    let shared = any::<u8>().prop_map(|byte| Record::SharedInfo(vec![byte; PAGE_BYTES]));
    let p2m = (any::<u32>(), 0u32..4000).prop_map(|(first, more)| {
        let last = first.saturating_add(more);
        Record::PvP2mFrames { first, last, frames: vec![9; (last / 512 - first / 512 + 1) as usize] }
    });
    prop_oneof![tsc, vcpu, shared, p2m].boxed()
}

fn entries(kind: GuestKind) -> impl Strategy<Value = PageEntry> {
    use PageKind::*;
    let mut kinds = vec![Normal, Broken, Alloc, None];
    if kind == GuestKind::Pv {
        kinds.extend([1, 2, 3, 4].into_iter().flat_map(|level| [Table(level, false), Table(level, true)]));
    }
    (0..1u64 << 52, prop::sample::select(kinds)).prop_map(|(pfn, kind)| PageEntry { pfn, kind })
}

/// A record, or a page.
type Part = Result<Record, (PageEntry, u8)>;

fn parts(kind: GuestKind) -> impl Strategy<Value = Vec<Part>> {
    let page = (entries(kind), any::<u8>());
    vec(prop_oneof![page.prop_map(Err), records(kind).prop_map(Ok)], 0..20)
}

fn streams() -> impl Strategy<Value = (Domain, Vec<Part>)> {
    (prop::sample::select(vec![GuestKind::Pv, GuestKind::Hvm]), 2u32..4, any::<(u32, u32)>()).prop_flat_map(
        |(kind, version, xen)| {
            parts(kind).prop_map(move |mut parts| {
                let mut head = vec![];
                if kind == GuestKind::Pv {
                    head.push(Ok(Record::PvInfo { width: 8, levels: 4 }));
                }
                if version == 3 {
                    head.push(Ok(Record::CpuidPolicy(vec![3; 24])));
                    head.push(Ok(Record::MsrPolicy(vec![4; 16])));
                    head.push(Ok(Record::StaticDataEnd));
                }
                parts.splice(0..0, head);
                parts.push(Err((PageEntry { pfn: 5, kind: PageKind::Normal }, 6)));
                (Domain { version, kind, xen }, parts)
            })
        },
    )
}

proptest! {
    #[test]
    fn what_is_written_is_read((domain, parts) in streams(), text in "[ -~]{0,200}", json in any::<bool>()) {
        let config = if json { ConfigText::Json(text) } else { ConfigText::Cfg(text) };
        let mut writer = StreamWriter::new(Vec::new(), &config, &domain).unwrap();
        let mut wanted = vec![(Item::Domain(domain), None)];
        for part in parts {
            match part {
                Ok(record) => {
                    writer.record(&record).unwrap();
                    wanted.push((Item::Record(record), None));
                }
                Err((entry, byte)) => {
                    writer.page(entry, &filled(byte)).unwrap();
                    wanted.push((Item::Page(entry), entry.kind.has_data().then_some(byte)));
                }
            }
        }
        wanted.push((Item::DomainEnd, None));
        let bytes = writer.end().unwrap();
        prop_assert_eq!(read_all(&bytes).unwrap(), (config, wanted));
    }

    #[test]
    fn a_damaged_stream_is_an_error_or_another_stream(at in any::<prop::sample::Index>(), byte in any::<u8>(), pv in any::<bool>()) {
        let mut bytes = if pv { PV } else { PVH }.to_vec();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        let _ = (read_all(&bytes), survey(&bytes[..]));
    }

    /// Holes anywhere, zero pages anywhere: through a stream the same state and the same image come back.
    #[test]
    fn a_guest_goes_through_a_stream(gaps in vec((1u64..300, 1u64..40), 1..5), zeros in any::<u64>(), high in any::<bool>()) {
        let mut next = 0;
        let mut runs: Vec<PageRange> = gaps.into_iter().map(|(gap, count)| {
            let run = PageRange::new(next + gap - 1, count);
            next = run.end().0 + 1;
            run
        }).collect();
        if high {
            runs.push(PageRange::new(0x100000, 3));
        }
        let state = state(runs);
        let pages = state.layout.pages().0;
        let memory = image(pages, |page| zeros >> (page % 64) & 1 == 1);
        let config = config(pages);
        let bytes = export::write(Vec::new(), &config, &state, &memory).unwrap();
        let guest = survey(&bytes[..]).unwrap();
        prop_assert_eq!(&guest.state, &state);
        prop_assert_eq!(&guest.config, &config);
        let back = tempfile::tempfile().unwrap();
        let done = fill(&bytes[..], &guest, &back).unwrap();
        prop_assert_eq!(done.data_pages + done.zero_pages, pages);
        prop_assert_eq!(back.metadata().unwrap().len() % (1 << 20), 0);
        prop_assert!(back.metadata().unwrap().blocks() * 512 <= done.data_pages << 12, "zero pages are holes");
        let (old, new) = (bytes_of(&memory), bytes_of(&back));
        prop_assert!(new[..old.len()] == old && new[old.len()..].iter().all(|byte| *byte == 0));
    }
}

#[test]
fn real_streams_are_read_and_written_to_the_byte() {
    for stream in [PVH, PV] {
        assert!(rewrite(stream) == stream);
    }
    let guest = survey(PVH).unwrap();
    assert_eq!((guest.config.vcpus, guest.state.vcpus, guest.state.xen), (2, 2, (4, 17)));
    assert_eq!(guest.state.cpuid_policy.len(), 48 * 24);
    assert_eq!(guest.state.layout.runs(), [PageRange::new(0, 1)]);
    assert!(guest.state.hvm_params.contains(&(1, 0xfeffc)));
    assert!(refusal(PV).contains("PV guest"), "{}", refusal(PV));
    let (_, items) = read_all(PV).unwrap();
    let vcpus =
        |item: &&(Item, _)| matches!(item.0, Item::Record(Record::PvVcpu { part: VcpuPart::Basic, .. }));
    assert_eq!(items.iter().filter(vcpus).count(), 2);
}

fn refusal(bytes: &[u8]) -> String {
    survey(bytes).expect_err("it should be refused").to_string()
}

/// An HVM guest's emulator comes behind the libxc stream.
#[test]
fn a_guest_with_an_emulator_is_read_and_refused() {
    let mut bytes = PVH.to_vec();
    bytes.truncate(bytes.len() - 8);
    let record = |kind: u32, body: &[u8]| {
        let mut record = [kind.to_le_bytes(), (body.len() as u32).to_le_bytes()].concat();
        record.extend(body);
        record.resize(record.len().next_multiple_of(8), 0);
        record
    };
    bytes.extend(record(2, b"\x02\0\0\0\0\0\0\0physmap/f000/size\x001000\0"));
    bytes.extend(record(3, &[&[2, 0, 0, 0, 1, 0, 0, 0], &[5; 70_001][..]].concat()));
    bytes.extend(record(0x8000_0009, b"later"));
    bytes.extend(record(0, &[]));
    let (_, items) = read_all(&bytes).unwrap();
    let tail: Vec<Item> = items.into_iter().rev().take(3).map(|(item, _)| item).collect();
    assert_eq!(tail[0], Item::Skipped { kind: 0x8000_0009, length: 5 });
    assert_eq!(tail[1], Item::Emulator { kind: 3, id: 2, index: 1, length: 70_001 });
    assert_eq!(tail[2], Item::Emulator { kind: 2, id: 2, index: 0, length: 23 });
    assert!(refusal(&bytes).contains("emulator"));
    let hvm = String::from_utf8_lossy(PVH).find("\"pvh\"").unwrap();
    let mut bytes = PVH.to_vec();
    bytes[hvm..hvm + 5].copy_from_slice(b"\"hvm\"");
    assert!(refusal(&bytes).contains("HVM guest"));
}

#[test]
fn a_stream_cut_anywhere_is_an_error() {
    for stream in [PVH, PV] {
        for end in 0..stream.len() {
            assert!(read_all(&stream[..end]).is_err(), "cut at {end}");
        }
    }
}

/// Where the libxc stream begins, and its records from there on: (where, type).
fn places(stream: &[u8]) -> (usize, Vec<(usize, u32)>) {
    let word = |at: usize| u32::from_le_bytes(stream[at..at + 4].try_into().unwrap());
    let image = 48 + word(44) as usize + 16 + 8;
    let (mut at, mut records) = (image + 40, Vec::new());
    loop {
        records.push((at, word(at)));
        if word(at) == 0 {
            return (image, records);
        }
        at += 8 + (word(at + 4) as usize).next_multiple_of(8);
    }
}

/// What is written over a stream, where, and what is said about it.
#[test]
fn hostile_streams_are_refused_where_they_are_wrong() {
    let (image, records) = places(PVH);
    let at = |kind: u32| records.iter().find(|record| record.1 == kind).unwrap().0;
    let libxl = image - 24;
    let cases: &[(usize, &[u8], &str)] = &[
        (0, b"Y", "xl header at byte 0x0: it is none"),
        (32, &[1, 2, 3, 4], "big-endian"),
        (36, &[7], "unknown mandatory flags 0x4"),
        (36, &[1], "before Xen 4.6"),
        (44, &[0xff; 4], "at most 4 MiB"),
        (44, &[3, 0, 0, 0], "at most 4 MiB"),
        (48, &[0xff; 4], "configuration at byte 0x30"),
        (48, &[0; 4], "within the optional data"),
        (52, &[0xff], "its text is not understood"),
        (libxl, b"X", "libxl header"),
        (libxl + 11, &[3], "version 3"),
        (libxl + 15, &[1], "big-endian"),
        (libxl + 15, &[2], "before Xen 4.6"),
        (libxl + 15, &[4], "flags 0x4"),
        (libxl + 16, &[9], "libxl record 1 (unknown)"),
        (libxl + 20, &[8], "LIBXC_CONTEXT"),
        (image, &[0], "libxc image header"),
        (image + 15, &[4], "version 4"),
        (image + 17, &[1], "big-endian"),
        (image + 20, &[1], "reserved"),
        (image + 24, &[3], "guest type is 0x3"),
        (image + 28, &[13], "page shift is 0xd"),
        (image + 30, &[1], "reserved"),
        (image + 15, &[2], "version 2 does not have it"),
        (at(0x11), &[0x13], "libxc record 1 (unknown)"),
        (at(0x11) + 7, &[0x10], "at most 128 MiB"),
        (at(0x11) + 4, &[1], "no whole number of entries"),
        (at(0x10), &[0x0d], "STATIC_DATA_END has not come yet"),
        (at(0x10) + 4, &[8], "it should have none"),
        (at(0x01), &[0x02], "only a PV guest has it"),
        (at(0x01) + 4, &[8, 0, 0, 0], "no room for a frame"),
        (at(0x01) + 8, &[0; 4], "no room for the frames"),
        (at(0x01) + 8, &[0xff; 4], "no room for the frames"),
        (at(0x01) + 12, &[1], "reserved"),
        (at(0x01) + 16 + 6, &[0x10], "reserved"),
        (at(0x01) + 16 + 7, &[0x50], "page type is 0x5"),
        (at(0x01) + 16 + 7, &[0xf0], "more or fewer than their pages"),
        (at(0x08) + 28, &[1], "reserved"),
        (at(0x08), &[0x0b], "deprecated"),
        (at(0x08), &[0x0f], "secondary"),
        (at(0x0a) + 8, &[0xff; 4], "more or fewer parameters"),
    ];
    for (place, bytes, said) in cases {
        let mut stream = PVH.to_vec();
        stream[*place..place + bytes.len()].copy_from_slice(bytes);
        let error = read_all(&stream).expect_err(said).to_string();
        assert!(error.contains(said), "at {place:#x}: {error:?}, not {said:?}");
    }
}

/// A record of 128 MiB in a stream of some kilobytes: the stream's end comes before the memory is asked for.
#[test]
fn a_length_allocates_nothing() {
    let (_, records) = places(PVH);
    for kind in [0x01, 0x09] {
        let at = records.iter().find(|record| record.1 == kind).unwrap().0;
        let mut stream = PVH[..at + 16].to_vec();
        stream[at + 4..at + 8].copy_from_slice(&(128u32 << 20).to_le_bytes());
        stream[at + 8..at + 12].copy_from_slice(&((128u32 << 20) / 8 - 1).to_le_bytes());
        assert!(read_all(&stream).unwrap_err().to_string().contains("ends in the middle"));
    }
}

#[test]
fn guests_that_cannot_be_taken_over_are_refused_by_name() {
    type Change = fn(&mut GuestConfig, &mut DeviceState);
    let cases: &[(Change, &str)] = &[
        (|config, _| config.vcpus = 0, "0 vCPUs"),
        (|config, _| config.kind = "vm".into(), "unknown type"),
        (|_, state| state.hvm_params[0].1 = 0x1000, "xenstore page is frame 0x1000"),
        (|_, state| state.hvm_params.push((17, SPECIAL_FIRST)), "no console page, or two"),
        (|_, state| state.hvm_params.resize(65, (3, 3)), "65 HVM parameters"),
    ];
    for (change, said) in cases {
        let (mut config, mut state) = (config(4), state(vec![PageRange::new(0, 4)]));
        change(&mut config, &mut state);
        let bytes = export::write(Vec::new(), &config, &state, &image(4, |_| false)).unwrap();
        assert!(refusal(&bytes).contains(said), "{}", refusal(&bytes));
    }
    // As a Xen before 4.14 saved it.
    let (domain, policy) = (Domain { version: 2, kind: GuestKind::Hvm, xen: (4, 13) }, state(vec![]));
    let mut writer = StreamWriter::new(Vec::new(), &config(4).to_text(), &domain).unwrap();
    writer.page(PageEntry { pfn: 0, kind: PageKind::Normal }, &filled(1)).unwrap();
    for record in [Record::Tsc(policy.tsc), Record::HvmContext(vec![1]), Record::HvmParams(policy.hvm_params)]
    {
        writer.record(&record).unwrap();
    }
    assert!(refusal(&writer.end().unwrap()).contains("before 4.14"));
}

/// A page sent twice is the later one, and a page sent and then given up stays.
#[test]
fn a_page_sent_again_replaces_the_earlier_one() {
    let state = state(vec![PageRange::new(0, 2)]);
    let domain = Domain { version: 3, kind: GuestKind::Hvm, xen: (4, 17) };
    let mut writer = StreamWriter::new(Vec::new(), &config(2).to_text(), &domain).unwrap();
    for record in [Record::CpuidPolicy(vec![0; 24]), Record::MsrPolicy(vec![0; 16]), Record::StaticDataEnd] {
        writer.record(&record).unwrap();
    }
    let normal = |pfn| PageEntry { pfn, kind: PageKind::Normal };
    for (entry, byte) in [(normal(1), 9), (normal(0), 8), (normal(1), 0), (normal(0), 7)] {
        writer.page(entry, &filled(byte)).unwrap();
    }
    writer.page(PageEntry { pfn: 0, kind: PageKind::None }, &filled(0)).unwrap();
    for record in [Record::Tsc(state.tsc), Record::HvmContext(vec![1]), Record::HvmParams(state.hvm_params)] {
        writer.record(&record).unwrap();
    }
    let bytes = writer.end().unwrap();
    let guest = survey(Cursor::new(&bytes)).unwrap();
    let image = tempfile::tempfile().unwrap();
    fill(&bytes[..], &guest, &image).unwrap();
    let bytes = bytes_of(&image);
    assert_eq!((bytes[0], bytes[4096], bytes.len()), (7, 0, 1 << 20));
}

#[test]
fn a_file_that_changes_meanwhile_is_told() {
    let pages = |count| {
        let state = state(vec![PageRange::new(0, count)]);
        export::write(Vec::new(), &config(count), &state, &image(count, |_| false)).unwrap()
    };
    let guest = survey(&pages(4)[..]).unwrap();
    let error = fill(&pages(5)[..], &guest, &tempfile::tempfile().unwrap()).unwrap_err();
    assert!(matches!(error, ImportError::Refused(why) if why.contains("changed")));
}

/// Xen's own judge, where its Python modules are: XEN_UTILS, or where the project's Xen host is made.
#[test]
fn verify_stream_v2_accepts_what_is_written() {
    let made = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/xen-host/root/usr/lib/xen-4.17");
    let utils = std::env::var_os("XEN_UTILS").map_or_else(|| PathBuf::from(made), PathBuf::from);
    let program = utils.join("bin/verify-stream-v2");
    if !program.exists() {
        return eprintln!("not judged: there is no {}", program.display());
    }
    let state = state(vec![PageRange::new(0, 16), PageRange::new(17, 2000), PageRange::new(0x100000, 3)]);
    let ours = export::write(Vec::new(), &config(2019), &state, &image(2019, |page| page % 3 == 0)).unwrap();
    for stream in [ours, rewrite(PVH), rewrite(PV)] {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().write_all_at(&stream, 0).unwrap();
        let mut python = Command::new("python3");
        python.env("PYTHONPATH", utils.join("lib/python")).arg(&program).args(["-v", "-f", "xl", "-i"]);
        let output = python.arg(file.path()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}
