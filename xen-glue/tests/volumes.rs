//! Volumes on a real kernel. Ignored by default: needs root, loop and device-mapper with the targets crypt, snapshot and zero, and
//! nobody else who makes or removes `dispvm-…` devices meanwhile. `DISPVM_TEST_DIR` is where files are made.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use engine::host::{Base, CapturedDelta, VolumeSpec};
use engine::savefile::{Content, ImageId, PageMapBuilder, Run, Slot, VolumeInfo};
use engine::units::{ByteCount, PageCount, PageRange, PAGE_BYTES, PAGE_SIZE};
use rustix::fs::OFlags;
use xen_glue::hypercalls::Uuid;
use xen_glue::volumes::kernel::Kernel;
use xen_glue::volumes::{store, sweep, Disk, Volumes};

const MIB: u64 = 1 << 20;
const ROOT: u64 = 16 * MIB;

/// A folder with a base of 16 MiB, a volume that is kept, and the specs of both and an empty one.
struct Place {
    folder: tempfile::TempDir,
    specs: Vec<VolumeSpec>,
}

impl Place {
    fn new() -> Place {
        let parent = std::env::var_os("DISPVM_TEST_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
        let folder = tempfile::tempdir_in(parent).unwrap();
        let (base, kept) = (folder.path().join("root.img"), folder.path().join("private.img"));
        let pages: Vec<u8> = (0..ROOT / PAGE_SIZE).flat_map(|page| [page as u8 | 1; PAGE_BYTES]).collect();
        fs::write(&base, pages).unwrap();
        File::create(&kept).unwrap().set_len(MIB).unwrap();
        let spec = |name: &str, base, size| VolumeSpec { name: name.into(), base, size: ByteCount(size) };
        let specs = vec![
            spec("root", Base::Frozen(base), ROOT),
            spec("private", Base::Persistent(kept), MIB),
            spec("volatile", Base::Empty, 1024 * MIB),
        ];
        Place { folder, specs }
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn assemble(&self, tag: u8, deltas: Vec<(String, File)>) -> Volumes {
        Volumes::assemble(&Uuid([tag; 16]), &self.specs, deltas, self.path()).unwrap()
    }

    /// What a savefile makes of a delta, ready to be stacked.
    fn stacked(&self, delta: &CapturedDelta) -> (String, File) {
        let mut map =
            PageMapBuilder::new(ImageId::Volume(delta.volume.clone()), delta.size.whole_pages().unwrap(), 0);
        let mut slots = 0;
        for page in delta.changed.iter().flat_map(|run| run.pages()) {
            let mut bytes = [0; PAGE_BYTES];
            delta.raw.read_exact_at(&mut bytes, page.offset().0).unwrap();
            let data = bytes != [0; PAGE_BYTES];
            let content = if data { Content::Data(Slot(slots)) } else { Content::Zero };
            slots += u64::from(data);
            map.push(Run { pages: PageRange::new(page.0, 1), content });
        }
        let map = map.finish(PageCount(slots)).unwrap();
        let path = self.path().join(&delta.volume);
        let out = File::options().create(true).truncate(true).read(true).write(true).open(&path).unwrap();
        let volume =
            VolumeInfo { name: delta.volume.clone(), base: String::new(), virtual_bytes: delta.size.0 };
        store::write_store(&out, &volume, &map, &delta.raw).unwrap();
        (delta.volume.clone(), File::open(path).unwrap())
    }
}

fn open(kernel: &Kernel, disk: &Disk) -> File {
    kernel.open_device(disk.device, OFlags::RDWR).unwrap()
}

fn bytes_of(kernel: &Kernel, disk: &Disk, length: u64) -> Vec<u8> {
    let mut bytes = vec![0; length as usize];
    open(kernel, disk).read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

/// Loop devices in use and mapped devices of ours.
fn left(kernel: &Kernel) -> Vec<String> {
    let loops = fs::read_dir("/sys/block").unwrap().map(|entry| entry.unwrap());
    let used = loops.filter(|entry| entry.path().join("loop/backing_file").exists());
    let ours = |path: &Path| {
        fs::read_to_string(path).is_ok_and(|file| file.contains("root.img") || file.contains("deleted"))
    };
    let loops = used.filter(|entry| ours(&entry.path().join("loop/backing_file")));
    let mut left: Vec<String> = loops.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    left.extend(kernel.mapped().unwrap().into_iter().filter(|name| name.starts_with("dispvm-")));
    left
}

fn nothing_is_left(kernel: &Kernel) {
    // The kernel lets go of loop devices, and removes what it was asked to remove later, in its own time.
    let deadline = Instant::now() + Duration::from_secs(5);
    while !left(kernel).is_empty() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(left(kernel), Vec::<String>::new());
}

#[test]
#[ignore = "needs root and device-mapper"]
fn what_a_guest_writes_is_read_back_stacked_and_gone() {
    let place = Place::new();
    let kernel = Kernel::open().unwrap();
    let base = fs::read(place.path().join("root.img")).unwrap();
    let volumes = place.assemble(1, vec![]);
    let [root, private, volatile] = volumes.disks() else { panic!("{:?}", volumes.disks()) };
    assert_eq!(bytes_of(&kernel, root, ROOT), base);
    let mut expected = base.clone();
    expected[3 * PAGE_BYTES..][..PAGE_BYTES].fill(0xee);
    expected[5 * PAGE_BYTES..][..PAGE_BYTES].fill(0);
    expected[2000 * PAGE_BYTES + 512..][..512].fill(0xdd);
    for (page, from, count) in [(3, 0, PAGE_BYTES), (5, 0, PAGE_BYTES), (2000, 512, 512)] {
        let at = page * PAGE_BYTES + from;
        let device = open(&kernel, root);
        device.write_all_at(&expected[at..at + count], at as u64).unwrap();
        device.sync_all().unwrap();
    }
    // More pages than one table of exceptions has.
    let empty = open(&kernel, volatile);
    empty.write_all_at(&vec![7; 3 * MIB as usize], 512 * MIB).unwrap();
    empty.sync_all().unwrap();
    drop(empty);
    let kept = open(&kernel, private);
    kept.write_all_at(b"kept", PAGE_SIZE).unwrap();
    kept.sync_all().unwrap();
    drop(kept);
    assert_eq!(volumes.failed().unwrap(), None);
    let deltas = volumes.read_deltas().unwrap();
    nothing_is_left(&kernel);
    assert_eq!(fs::read(place.path().join("root.img")).unwrap(), base);
    assert_eq!(&fs::read(place.path().join("private.img")).unwrap()[PAGE_BYTES..][..4], b"kept");
    assert_eq!(deltas[0].changed, [PageRange::new(3, 1), PageRange::new(5, 1), PageRange::new(2000, 1)]);
    assert_eq!(deltas[1].changed, [PageRange::new(512 * MIB / PAGE_SIZE, 3 * MIB / PAGE_SIZE)]);

    let stacked = deltas.iter().map(|delta| place.stacked(delta)).collect();
    let volumes = place.assemble(2, stacked);
    assert_eq!(bytes_of(&kernel, &volumes.disks()[0], ROOT), expected);
    let device = open(&kernel, &volumes.disks()[0]);
    device.write_all_at(&[0; PAGE_BYTES], 3 * PAGE_SIZE).unwrap();
    device.sync_all().unwrap();
    drop(device);
    let again = volumes.read_deltas().unwrap();
    assert_eq!(again[0].changed, deltas[0].changed);
    let mut page = [1; PAGE_BYTES];
    again[0].raw.read_exact_at(&mut page, 3 * PAGE_SIZE).unwrap();
    assert_eq!(page, [0; PAGE_BYTES]);
    again[0].raw.read_exact_at(&mut page, 2000 * PAGE_SIZE).unwrap();
    assert_eq!(page[512..1024], [0xdd; 512]);
    nothing_is_left(&kernel);
}

#[test]
#[ignore = "needs root and device-mapper"]
fn nothing_that_is_written_lies_in_the_spill() {
    let place = Place::new();
    let kernel = Kernel::open().unwrap();
    let volumes = place.assemble(3, vec![]);
    let device = open(&kernel, &volumes.disks()[2]);
    device.write_all_at(&b"a secret of the guest's ".repeat(4096), 0).unwrap();
    device.sync_all().unwrap();
    let loops = fs::read_dir("/sys/block").unwrap().map(|entry| entry.unwrap().path());
    let deleted = |path: &PathBuf| {
        fs::read_to_string(path.join("loop/backing_file")).is_ok_and(|file| file.contains("deleted"))
    };
    let spill = loops.into_iter().find(deleted).unwrap();
    let number = fs::read_to_string(spill.join("dev")).unwrap();
    let (major, minor) = number.trim().split_once(':').unwrap();
    let spill =
        xen_glue::volumes::plan::Device { major: major.parse().unwrap(), minor: minor.parse().unwrap() };
    let spill = kernel.open_device(spill, OFlags::RDONLY).unwrap();
    let (mut batch, mut at, mut written) = (vec![0; MIB as usize], 0, 0);
    while let Ok(count @ 1..) = spill.read_at(&mut batch, at) {
        written += batch[..count].iter().filter(|byte| **byte != 0).count();
        assert!(!batch[..count].windows(8).any(|bytes| bytes == b"a secret"), "at {at:#x}");
        at += count as u64;
        if at > 64 * MIB {
            break;
        }
    }
    assert!(written > 4096 * 20, "the spill has only {written} bytes");
    drop((spill, device, volumes));
    nothing_is_left(&kernel);
}

#[test]
#[ignore = "needs root and device-mapper"]
fn dead_domains_are_swept_and_open_devices_go_later() {
    let place = Place::new();
    let kernel = Kernel::open().unwrap();
    let volumes = place.assemble(4, vec![]);
    let held = open(&kernel, &volumes.disks()[0]);
    volumes.close().unwrap();
    assert!(!left(&kernel).is_empty());
    drop(held);
    nothing_is_left(&kernel);
    let specs = [place.specs[0].clone(), place.specs[2].clone()];
    let volumes = Volumes::assemble(&Uuid([5; 16]), &specs, vec![], place.path()).unwrap();
    std::mem::forget(volumes);
    assert_eq!(sweep(&|uuid| *uuid == Uuid([5; 16])).unwrap(), 0);
    assert_eq!(sweep(&|_| false).unwrap(), 5);
    nothing_is_left(&kernel);
}

#[test]
#[ignore = "needs root and device-mapper"]
fn what_cannot_be_made_leaves_nothing() {
    let place = Place::new();
    let kernel = Kernel::open().unwrap();
    let garbage = place.path().join("garbage");
    fs::write(&garbage, [0xa5; 64 * PAGE_BYTES]).unwrap();
    let delta = vec![("root".to_owned(), File::open(garbage).unwrap())];
    let refused = Volumes::assemble(&Uuid([6; 16]), &place.specs, delta, place.path()).unwrap_err();
    assert!(refused.to_string().contains("volume root"), "{refused}");
    nothing_is_left(&kernel);
    let mut specs = place.specs.clone();
    specs[0].size = ByteCount(2 * ROOT);
    assert!(Volumes::assemble(&Uuid([6; 16]), &specs, vec![], place.path()).is_err());
    nothing_is_left(&kernel);
}
