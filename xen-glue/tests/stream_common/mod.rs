//! What tests of streams have in common.
#![allow(dead_code)] // Each test uses some of it.

use std::fs::File;
use std::os::unix::fs::FileExt;

use engine::units::{ByteCount, PageRange, PAGE_BYTES};
use xen_glue::device_state::{DeviceState, TscInfo};
use xen_glue::hypercalls::Uuid;
use xen_glue::layout::{Layout, SPECIAL_FIRST};
use xen_glue::stream::config::{DiskConfig, GuestConfig, NicConfig};
use xen_glue::stream::import::survey;
use xen_glue::stream::reader::{Item, StreamReader};
use xen_glue::stream::xl_header::ConfigText;
use xen_glue::stream::StreamError;

/// `xl save` of a PVH guest with two vCPUs on Debian's Xen 4.17, all but two pages taken out.
pub const PVH: &[u8] = include_bytes!("../fixtures/xl-4.17-pvh.stream");
/// The same of a PV guest.
pub const PV: &[u8] = include_bytes!("../fixtures/xl-4.17-pv.stream");

/// Items, and a byte of each page.
pub type Items = Vec<(Item, Option<u8>)>;
pub type Page = [u8; PAGE_BYTES];

pub fn filled(byte: u8) -> Box<Page> {
    Box::new([byte; PAGE_BYTES])
}

pub fn read_all(bytes: &[u8]) -> Result<(ConfigText, Items), StreamError> {
    let mut stream = StreamReader::new(bytes)?;
    let mut items = Vec::new();
    while let Some(item) = stream.next_item()? {
        let page = matches!(&item, Item::Page(entry) if entry.kind.has_data()).then(|| stream.page()[77]);
        items.push((item, page));
    }
    Ok((stream.config().clone(), items))
}

pub fn state(layout: Vec<PageRange>) -> DeviceState {
    DeviceState {
        xen: (4, 17),
        vcpus: 2,
        layout: Layout::new(layout).unwrap(),
        tsc: TscInfo { mode: 1, khz: 2_600_000, nsec: 5, incarnation: 2 },
        hvm_context: vec![7; 64 + 512], // the size that a simulated Xen has for two vCPUs
        hvm_params: vec![(1, SPECIAL_FIRST + 4), (17, SPECIAL_FIRST + 7), (12, (SPECIAL_FIRST + 6) << 12)],
        cpuid_policy: vec![1; 48],
        msr_policy: vec![2; 32],
    }
}

pub fn config(pages: u64) -> GuestConfig {
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
pub fn image(pages: u64, is_zero: impl Fn(u64) -> bool) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(pages << 12).unwrap();
    for page in (0..pages).filter(|page| !is_zero(*page)) {
        file.write_all_at(&[(page % 255 + 1) as u8; PAGE_BYTES], page << 12).unwrap();
    }
    file
}

pub fn bytes_of(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

pub fn refusal(bytes: &[u8]) -> String {
    survey(bytes).expect_err("it should be refused").to_string()
}
