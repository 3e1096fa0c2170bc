//! Streams that are none, and guests that are not taken over.

mod stream_common;

use std::io::Cursor;

use engine::units::PageRange;
use proptest::prelude::*;
use xen_glue::device_state::DeviceState;
use xen_glue::layout::SPECIAL_FIRST;
use xen_glue::stream::config::GuestConfig;
use xen_glue::stream::export;
use xen_glue::stream::import::{fill, survey, ImportError};
use xen_glue::stream::libxc::{Domain, GuestKind};
use xen_glue::stream::pages::{PageEntry, PageKind};
use xen_glue::stream::reader::Item;
use xen_glue::stream::records::Record;
use xen_glue::stream::writer::StreamWriter;

use stream_common::*;

proptest! {
    #[test]
    fn a_damaged_stream_is_an_error_or_another_stream(at in any::<prop::sample::Index>(), byte in any::<u8>(), pv in any::<bool>()) {
        let mut bytes = if pv { PV } else { PVH }.to_vec();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        let _ = (read_all(&bytes), survey(&bytes[..]));
    }
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
        (|_, state| state.hvm_params.push((11, 1)), "HVM parameter 11 is not one"),
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
    for other in [3, 5] {
        let error = fill(&pages(other)[..], &guest, &tempfile::tempfile().unwrap()).unwrap_err();
        assert!(matches!(error, ImportError::Refused(why) if why.contains("changed")));
    }
}
