//! Admission, finding, eviction.

mod common;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::PathBuf;
use std::sync::atomic::Ordering;

use common::{content, Guest, StackRaw};
use engine::image::hot::HotImage;
use engine::savefile::{self, Error, ReadBackend, RootHash};
use engine::units::PageRange;

struct Sample {
    guest: Guest,
    path: PathBuf,
    root: RootHash,
    hot: PathBuf,
    folder: tempfile::TempDir,
}

impl Sample {
    fn new() -> Sample {
        let folder = tempfile::tempdir().unwrap();
        let (guest, path) = (Guest::small(), folder.path().join("guest.save"));
        let root = guest.write(&path).unwrap().root;
        Sample { guest, path, root, hot: folder.path().join("hot"), folder }
    }

    fn admit(&self, stack: &StackRaw) -> Result<HotImage, Error> {
        HotImage::admit(&self.path, &self.root, &self.hot, stack, ReadBackend::Ring, &savefile::silent)
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.hot).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}

#[test]
fn an_admitted_set_is_what_was_captured_and_nobody_writes_to_it() {
    let sample = Sample::new();
    assert!(HotImage::find(&sample.hot, &sample.root).unwrap().is_none());
    let image = sample.admit(&StackRaw::default()).unwrap();
    assert!(content(&image.files.memory) == sample.guest.memory_bytes());
    assert_eq!(content(&image.files.device_state), b"registers");
    assert_eq!((image.device_state_kind.as_str(), image.device_state_version), ("test", 3));
    assert_eq!(image.manifest, sample.guest.manifest());
    let [(volume, delta)] = &image.files.deltas[..] else { panic!("one delta") };
    assert_eq!(volume, "root");
    assert!(content(delta) == sample.guest.delta_bytes());
    for entry in fs::read_dir(&image.dir).unwrap() {
        let metadata = entry.unwrap().metadata().unwrap();
        assert_eq!(metadata.permissions().mode() & 0o777, 0o444);
    }
    assert_eq!(fs::metadata(&image.dir).unwrap().permissions().mode() & 0o777, 0o700);
    assert_eq!(HotImage::list(&sample.hot).unwrap(), [sample.root]);
}

#[test]
fn the_working_set_comes_with_the_files_in_order_and_within_memory() {
    let mut sample = Sample::new();
    assert!(sample.admit(&StackRaw::default()).unwrap().files.working_set.is_empty());
    sample.guest.working_set = vec![(12, 9), (1, 3), (3, 1), (7, 0), (1 << 40, 7), (u64::MAX, u64::MAX)];
    sample.root = sample.guest.write(&sample.path).unwrap().root;
    let image = sample.admit(&StackRaw::default()).unwrap();
    assert_eq!(image.files.working_set, [PageRange::new(1, 3), PageRange::new(12, 4)]);
    assert_eq!(image.manifest, sample.guest.manifest());
    assert!(content(&image.files.memory) == sample.guest.memory_bytes());
}

#[test]
fn it_is_made_once_however_many_ask() {
    let sample = Sample::new();
    let stack = StackRaw::default();
    let admit = || sample.admit(&stack).unwrap().files.memory.metadata().unwrap().ino();
    let inodes: Vec<u64> = std::thread::scope(|scope| {
        let asking: Vec<_> = (0..8).map(|_| scope.spawn(admit)).collect();
        asking.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(inodes.iter().all(|inode| *inode == inodes[0]));
    assert_eq!(stack.calls.load(Ordering::Relaxed), 1);
}

#[test]
fn eviction_takes_the_names_and_leaves_the_open_files() {
    let sample = Sample::new();
    let image = sample.admit(&StackRaw::default()).unwrap();
    assert!(HotImage::evict(&sample.hot, &sample.root).unwrap());
    assert!(!HotImage::evict(&sample.hot, &sample.root).unwrap());
    assert!(HotImage::find(&sample.hot, &sample.root).unwrap().is_none());
    assert!(content(&image.files.memory) == sample.guest.memory_bytes());
    assert_eq!(sample.names(), [".lock"]);
}

#[test]
fn gc_keeps_what_it_is_told_to() {
    let mut sample = Sample::new();
    sample.admit(&StackRaw::default()).unwrap();
    let first = sample.root;
    sample.guest.memory[0] = common::Page::Fill(9);
    sample.root = sample.guest.write(&sample.path).unwrap().root;
    sample.admit(&StackRaw::default()).unwrap();
    assert_eq!(HotImage::evict_all_but(&sample.hot, &[sample.root]).unwrap(), 1);
    assert!(HotImage::find(&sample.hot, &first).unwrap().is_none());
    assert!(HotImage::find(&sample.hot, &sample.root).unwrap().is_some());
}

#[test]
fn what_a_killed_admission_or_another_boot_left_is_swept_by_the_next() {
    let sample = Sample::new();
    let other_boot = sample.hot.join(format!("{}-00000000-0000-0000-0000-000000000000", sample.root));
    let aside = sample.hot.join(".aside");
    for left in [&other_boot, &aside] {
        fs::create_dir_all(left).unwrap();
        fs::write(left.join("memory.img"), b"half").unwrap();
    }
    assert!(HotImage::find(&sample.hot, &sample.root).unwrap().is_none());
    sample.admit(&StackRaw::default()).unwrap();
    assert!(!other_boot.exists() && !aside.exists());
    assert_eq!(sample.names().len(), 2);
}

#[test]
fn a_failed_stacking_leaves_nothing_and_says_which_volume() {
    let sample = Sample::new();
    let err = sample.admit(&StackRaw { fails: true, ..StackRaw::default() }).unwrap_err();
    assert!(err.to_string().contains("stack volume root"), "{err}");
    assert_eq!(sample.names(), [".lock"]);
    sample.admit(&StackRaw::default()).expect("the next one succeeds");
}

#[test]
fn a_replaced_or_damaged_savefile_is_not_admitted_and_the_admitted_set_serves_on() {
    let sample = Sample::new();
    sample.admit(&StackRaw::default()).unwrap();
    let mut bytes = fs::read(&sample.path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::remove_file(&sample.path).unwrap();
    fs::write(&sample.path, &bytes).unwrap();

    assert!(
        content(&sample.admit(&StackRaw::default()).unwrap().files.memory) == sample.guest.memory_bytes()
    );
    HotImage::evict(&sample.hot, &sample.root).unwrap();
    let err = sample.admit(&StackRaw::default()).unwrap_err();
    assert!(err.is_bad_savefile(), "{err}");
    assert_eq!(sample.names(), [".lock"]);

    let mut other = Guest::small();
    other.memory[0] = common::Page::Fill(77);
    other.write(&sample.path).unwrap();
    assert!(matches!(sample.admit(&StackRaw::default()), Err(Error::NotThePinned { .. })));
    assert!(sample.folder.path().exists());
}

#[test]
fn a_set_that_somebody_cut_short_is_an_error_and_can_be_evicted() {
    let sample = Sample::new();
    let dir = sample.admit(&StackRaw::default()).unwrap().dir;
    fs::remove_file(dir.join("memory.img")).unwrap();
    fs::write(dir.join("memory.img"), b"short").unwrap();
    assert!(matches!(HotImage::find(&sample.hot, &sample.root), Err(Error::Mismatch { .. })));
    HotImage::evict(&sample.hot, &sample.root).unwrap();
    sample.admit(&StackRaw::default()).unwrap();
}
