//! Streams written and read again, and real ones of Xen 4.17.

mod stream_common;

use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use engine::units::{ByteCount, PageRange, PAGE_BYTES};
use proptest::collection::vec;
use proptest::prelude::*;
use xen_glue::device_state::{DeviceState, TscInfo};
use xen_glue::hypercalls::{DomId, Hypercalls};
use xen_glue::life::{self, Ports};
use xen_glue::simulated::Machine;
use xen_glue::stream::export;
use xen_glue::stream::import::{fill, survey};
use xen_glue::stream::libxc::{Domain, GuestKind};
use xen_glue::stream::pages::{PageEntry, PageKind};
use xen_glue::stream::reader::{Item, StreamReader};
use xen_glue::stream::records::{Record, VcpuPart};
use xen_glue::stream::writer::StreamWriter;
use xen_glue::stream::xl_header::ConfigText;

use stream_common::*;

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

/// What a savefile made by an import goes through: restored, and, after its life as a template, captured and exported.
#[test]
fn an_imported_guest_is_restored_captured_and_exported_as_it_was() {
    let state = state(vec![PageRange::new(0, 16), PageRange::new(17, 700), PageRange::new(0xfc000, 9)]);
    let memory = image(725, |page| page % 3 == 0);
    let stream = export::write(Vec::new(), &config(725), &state, &memory).unwrap();
    let guest = survey(&stream[..]).unwrap();
    let imported = tempfile::tempfile().unwrap();
    fill(&stream[..], &guest, &imported).unwrap();

    let machine = Arc::new(Machine::new(ByteCount(64 << 20)));
    let xen: Arc<dyn Hypercalls> = machine.clone();
    let ports = Ports { store_domid: DomId(0), console_domid: DomId(0) };
    let parsed = DeviceState::parse(&guest.state.to_bytes()).unwrap();
    let shell = life::restore(&xen, guest.config.uuid, &parsed, &imported, ports).unwrap();
    machine.suspend(shell.domid());
    let mut captured = life::capture(xen.as_ref(), shell.domid(), 2, guest.memory_bytes()).unwrap();
    captured.state.hvm_params.sort_unstable_by_key(|param| {
        state.hvm_params.iter().position(|original| original == param) // a capture has an order of its own
    });
    captured.state.xen = state.xen;
    assert!(export::write(Vec::new(), &config(725), &captured.state, &captured.memory).unwrap() == stream);
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
