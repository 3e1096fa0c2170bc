//! What devices a domain's volumes are made of: names, tables and places, as values.
//!
//! | layer | name | target | over |
//! |---|---|---|---|
//! | top | `dispvm-UUID-root` | `snapshot`, writable | delta or origin, COW |
//! | COW | `dispvm-UUID-root-cow` | `crypt` | its part of the domain's spill |
//! | delta | `dispvm-UUID-root-delta` | `snapshot`, read-only | origin, the delta's store |
//! | origin | `dispvm-UUID-volatile-zero`, or a loop device | `zero` | nothing |
//!
//! Invariants:
//! - a COW has room for every chunk of its volume and for the tables of them all, so a snapshot never overflows: what can
//!   be full is the disk below;
//! - the parts of a spill are disjoint, and each has a key of its own, so equal sectors never meet under one key.

use std::fmt;
use std::io::Write;

use engine::host::VolumeSpec;
use engine::savefile::is_volume_name;
use engine::units::{ByteCount, PAGE_SIZE};

use super::store;
use super::wipe;
use crate::hypercalls::Uuid;

/// Bytes in a sector of the block layer.
const SECTOR: u64 = 512;
/// The chunk of every snapshot, in sectors: a page.
const CHUNK_SECTORS: u64 = PAGE_SIZE / SECTOR;
/// Parts of a spill begin at a multiple of this, so that none shares a block of the file system with another.
const SPILL_ALIGN: u64 = 1 << 20;
/// The largest volume: what page numbers of a savefile reach.
const VOLUME_BYTES_MAX: u64 = 4 << 40;
/// How many disks there can be as xvda to xvdp (docs/man/xen-vbd-interface.7): sixteen minors each of major 202.
const DISKS_MAX: usize = 16;
const XVD_MAJOR: u32 = 202;
const PREFIX: &str = "dispvm-";

/// Bytes of a dm-crypt key for `aes-xts-plain64`: two AES keys of 256 bits.
pub const KEY_BYTES: usize = 64;

/// A block device of dom0's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    /// Its driver.
    pub major: u32,
    /// Which of them.
    pub minor: u32,
}

impl fmt::Display for Device {
    /// As tables of device-mapper have it: decimal.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// What a volume is made of besides its top.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layer {
    /// What the guest sees.
    Top,
    /// Where it writes.
    Cow,
    /// What a savefile changed of the base.
    Delta,
    /// A base that is empty.
    Zero,
}

impl Layer {
    /// All, in an order in which they can be removed.
    pub const ALL: [Layer; 4] = [Layer::Top, Layer::Cow, Layer::Delta, Layer::Zero];

    fn suffix(self) -> &'static str {
        match self {
            Layer::Top => "",
            Layer::Cow => "-cow",
            Layer::Delta => "-delta",
            Layer::Zero => "-zero",
        }
    }
}

/// The name of a device, which is its uuid in device-mapper, too.
pub fn name(tag: &Uuid, volume: &str, layer: Layer) -> String {
    format!("{PREFIX}{tag}-{volume}{}", layer.suffix())
}

/// Whose device it is, if it is one of ours.
pub fn owner(name: &str) -> Option<Uuid> {
    let (uuid, volume) = name.strip_prefix(PREFIX)?.split_at_checked(36)?;
    volume.strip_prefix('-').filter(|volume| !volume.is_empty())?;
    let groups: Vec<&str> = uuid.split('-').collect();
    if !groups.iter().map(|group| group.len()).eq([8, 4, 4, 4, 12]) {
        return None;
    }
    let digits = groups.concat().into_bytes();
    let mut bytes = [0; 16];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        let value = |digit: &u8| match digit {
            b'0'..=b'9' => Some(digit - b'0'),
            b'a'..=b'f' => Some(digit - b'a' + 10),
            _ => None,
        };
        *byte = pair.iter().try_fold(0, |sum, digit| Some(sum << 4 | value(digit)?))?;
    }
    Some(Uuid(bytes))
}

/// A device's table: one target over its whole length.
#[derive(Debug, PartialEq, Eq)]
pub struct Table {
    /// The kind of target.
    pub target: &'static str,
    /// Its length.
    pub sectors: u64,
    /// What it is told. Wiped when dropped: it may have a key.
    pub parameters: Vec<u8>,
    /// Whether the device is read-only.
    pub read_only: bool,
}

impl Table {
    /// Reads as zero.
    pub fn zero(size: ByteCount) -> Table {
        Table { target: "zero", sectors: size.0 / SECTOR, parameters: Vec::new(), read_only: true }
    }

    /// `origin`, and over it what was written, in `cow`.
    pub fn snapshot(origin: Device, cow: Device, size: ByteCount, read_only: bool) -> Table {
        let parameters = format!("{origin} {cow} P {CHUNK_SECTORS}").into_bytes();
        Table { target: "snapshot", sectors: size.0 / SECTOR, parameters, read_only }
    }

    /// A part of `below`, encrypted.
    pub fn crypt(key: &[u8; KEY_BYTES], below: Device, part: Part) -> Table {
        // Enough for all of it: a vector that grows would leave a copy of the key behind.
        let mut parameters = Vec::with_capacity(2 * KEY_BYTES + 128);
        let mut put = |text: fmt::Arguments<'_>| {
            // Writing to a vector does not fail.
            let _ = parameters.write_fmt(text);
        };
        put(format_args!("aes-xts-plain64 "));
        for byte in key {
            put(format_args!("{byte:02x}"));
        }
        put(format_args!(" 0 {below} {}", part.offset / SECTOR));
        Table { target: "crypt", sectors: part.size / SECTOR, parameters, read_only: false }
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        wipe(&mut self.parameters);
    }
}

/// A part of a spill, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Where it begins.
    pub offset: u64,
    /// How long it is.
    pub size: u64,
}

/// One volume, planned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Planned {
    /// What was asked for.
    pub spec: VolumeSpec,
    /// Its place as a virtual device: 51712 for xvda, 51728 for xvdb.
    pub vdev: u32,
    /// Which of the deltas is its own.
    pub delta: Option<usize>,
    /// Its part of the spill; none for a volume that is kept.
    pub spill: Option<Part>,
}

/// Plans volumes in their order, and the length of the spill. Error: the volume and what is wrong.
pub fn plan(specs: &[VolumeSpec], deltas: &[&str]) -> Result<(Vec<Planned>, ByteCount), (String, String)> {
    let wrong = |spec: &VolumeSpec, why: &str| (spec.name.clone(), why.to_owned());
    let mut planned = Vec::with_capacity(specs.len().min(DISKS_MAX));
    let mut spilled = 0u64;
    for (index, spec) in specs.iter().enumerate() {
        let same = |layer: &Layer| {
            specs.iter().filter(|other| other.name == spec.name.clone() + layer.suffix()).count()
        };
        if !is_volume_name(&spec.name) || Layer::ALL.iter().map(same).sum::<usize>() != 1 {
            return Err(wrong(spec, "its name is another's, or none a volume can have"));
        }
        if spec.size.0 == 0 || spec.size.0 > VOLUME_BYTES_MAX || spec.size.whole_pages().is_none() {
            return Err(wrong(spec, "its size is no whole number of pages between 4 KiB and 4 TiB"));
        }
        if index >= DISKS_MAX {
            return Err(wrong(spec, "a domain has no room for more than 16 volumes"));
        }
        let delta = deltas.iter().position(|name| *name == spec.name);
        let persistent = spec.base.is_persistent();
        if persistent && delta.is_some() {
            return Err(wrong(spec, "it is kept, and a savefile's changes cannot lie on it"));
        }
        let spill = (!persistent).then(|| {
            let part = Part { offset: spilled, size: store::bytes_max(spec.size).0 };
            spilled = (part.offset + part.size).next_multiple_of(SPILL_ALIGN);
            part
        });
        let vdev = XVD_MAJOR << 8 | (index as u32) << 4;
        planned.push(Planned { spec: spec.clone(), vdev, delta, spill });
    }
    let unknown = deltas.iter().find(|name| !specs.iter().any(|spec| spec.name == **name));
    match unknown {
        Some(name) => {
            Err(((*name).to_owned(), "the savefile has changes of it, and there is no such volume".into()))
        }
        None => Ok((planned, ByteCount(spilled))),
    }
}

/// A virtual device's name in the guest: "xvda".
pub fn vdev_name(vdev: u32) -> String {
    let letter = char::from(b'a'.saturating_add((vdev >> 4 & 0xf) as u8));
    format!("xvd{letter}")
}

#[cfg(test)]
mod tests {
    use engine::host::Base;
    use proptest::prelude::*;

    use super::*;

    fn spec(name: &str, base: Base, pages: u64) -> VolumeSpec {
        VolumeSpec { name: name.into(), base, size: ByteCount(pages * PAGE_SIZE) }
    }

    fn text(table: &Table) -> String {
        String::from_utf8(table.parameters.clone()).unwrap()
    }

    #[test]
    fn tables_say_what_device_mapper_reads() {
        let (loop3, dm4) = (Device { major: 7, minor: 3 }, Device { major: 253, minor: 4 });
        let size = ByteCount(1 << 20);
        assert_eq!(text(&Table::snapshot(loop3, dm4, size, true)), "7:3 253:4 P 8");
        let crypt = Table::crypt(&[0xa5; KEY_BYTES], loop3, Part { offset: 1 << 20, size: 1 << 21 });
        assert_eq!(text(&crypt), format!("aes-xts-plain64 {} 0 7:3 2048", "a5".repeat(64)));
        assert_eq!(crypt.sectors, 4096);
        assert_eq!(Table::zero(size).sectors, 2048);
    }

    #[test]
    fn disks_stand_in_the_order_of_the_specs() {
        let specs = [
            spec("root", Base::Frozen("/r".into()), 10),
            spec("private", Base::Persistent("/p".into()), 10),
            spec("volatile", Base::Empty, 1000),
        ];
        let (planned, _) = plan(&specs, &["volatile", "root"]).unwrap();
        assert_eq!(planned.iter().map(|volume| volume.vdev).collect::<Vec<_>>(), [51712, 51728, 51744]);
        assert_eq!(planned.iter().map(|volume| volume.delta).collect::<Vec<_>>(), [Some(1), None, Some(0)]);
        assert_eq!(planned[1].spill, None);
        assert_eq!(vdev_name(51744), "xvdc");
    }

    #[test]
    fn impossible_volumes_are_refused() {
        let fine = spec("root", Base::Empty, 1);
        for (specs, deltas) in [
            (vec![fine.clone(), fine.clone()], vec![]),
            (vec![fine.clone(), spec("root-cow", Base::Empty, 1)], vec![]),
            (vec![spec("../x", Base::Empty, 1)], vec![]),
            (vec![spec("a", Base::Empty, 0)], vec![]),
            (vec![VolumeSpec { size: ByteCount(4097), ..fine.clone() }], vec![]),
            (vec![spec("a", Base::Empty, u64::MAX >> 12)], vec![]),
            (vec![fine.clone()], vec!["private"]),
            (vec![spec("a", Base::Persistent("/p".into()), 1)], vec!["a"]),
            ((0..17).map(|n| spec(&format!("v{n}"), Base::Empty, 1)).collect(), vec![]),
        ] {
            assert!(plan(&specs, &deltas).is_err(), "{specs:?}");
        }
    }

    proptest! {
        #[test]
        fn parts_of_a_spill_never_meet(sizes in proptest::collection::vec(1u64..1 << 22, 1..16)) {
            let specs: Vec<VolumeSpec> =
                sizes.iter().enumerate().map(|(n, pages)| spec(&format!("v{n}"), Base::Empty, *pages)).collect();
            let (planned, total) = plan(&specs, &[]).unwrap();
            let mut end = 0;
            for part in planned.iter().filter_map(|volume| volume.spill) {
                prop_assert!(part.offset >= end && part.offset % SPILL_ALIGN == 0);
                end = part.offset + part.size;
            }
            prop_assert!(total.0 >= end);
        }

        #[test]
        fn names_tell_their_owner(bytes in any::<[u8; 16]>(), volume in "[a-z][a-z-]{0,20}") {
            for layer in Layer::ALL {
                prop_assert_eq!(owner(&name(&Uuid(bytes), &volume, layer)), Some(Uuid(bytes)));
            }
        }

        #[test]
        fn other_names_are_nobodys(name in "(dispvm-)?[0-9a-f-]{0,50}.?") {
            if let Some(uuid) = owner(&name) {
                let start = format!("dispvm-{uuid}-");
                prop_assert!(name.starts_with(&start));
            }
        }
    }
}
