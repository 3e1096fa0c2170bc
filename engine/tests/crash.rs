//! A writer or an admission that is killed, or runs out of disk, harms nothing: the old savefile stays, what is left is swept.
//!
//! The bug these are for: a savefile written in place, or a temporary file that nobody dares to remove because its writer might
//! still live. The killed ones are this test binary again, running one of the ignored tests below.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::thread::sleep;
use std::time::Duration;

use common::{Guest, StackRaw};
use engine::image::hot::HotImage;
use engine::savefile::{self, Error, ReadBackend, Savefile};
use engine::units::PAGE_SIZE;
use nix::sys::resource::{setrlimit, Resource};
use nix::sys::signal::{SigSet, Signal};

const FOLDER: &str = "ENGINE_TEST_FOLDER";
const ROUNDS: u64 = 12;

fn savefile_in(folder: &Path) -> PathBuf {
    folder.join("guest.save")
}

fn folder_of_child() -> PathBuf {
    std::env::var_os(FOLDER).expect("started by its test").into()
}

fn child(test: &str, folder: &Path) -> Command {
    let mut command = common::child(test);
    command.env(FOLDER, folder);
    command
}

fn names(folder: &Path) -> Vec<String> {
    fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

fn verify(path: &Path) -> Result<(), Error> {
    Savefile::open(path, None)?.verify(ReadBackend::Pread, &savefile::silent)
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

#[test]
#[ignore = "a child of the test below"]
fn child_writes_again_and_again() {
    let path = savefile_in(&folder_of_child());
    loop {
        Guest::incompressible(600).write(&path).unwrap();
    }
}

#[test]
fn a_writer_killed_at_any_instant_leaves_a_whole_savefile_and_at_most_a_file_that_is_swept() {
    let folder = tempfile::tempdir().unwrap();
    let path = savefile_in(folder.path());
    Guest::small().write(&path).unwrap();
    for round in 0..ROUNDS {
        let writer = Killed(child("child_writes_again_and_again", folder.path()).spawn().unwrap());
        sleep(Duration::from_millis(20 + round * 17));
        savefile::sweep(folder.path()).unwrap();
        drop(writer);
        verify(&path).expect("the savefile is whole");
        assert!(names(folder.path()).len() <= 2, "{:?}", names(folder.path()));
        savefile::sweep(folder.path()).unwrap();
        assert_eq!(names(folder.path()), ["guest.save"]);
    }
}

#[test]
#[ignore = "a child of the test below"]
fn child_writes_and_would_notice_a_sweep() {
    let path = savefile_in(&folder_of_child());
    for _ in 0..30 {
        Guest::incompressible(100).write(&path).unwrap();
    }
}

#[test]
fn a_living_writer_is_not_swept() {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = child("child_writes_and_would_notice_a_sweep", folder.path()).spawn().unwrap();
    let status = loop {
        savefile::sweep(folder.path()).unwrap();
        if let Some(status) = writer.try_wait().unwrap() {
            break status;
        }
    };
    assert!(status.success(), "the writer's file was swept while it wrote");
    verify(&savefile_in(folder.path())).unwrap();
}

#[test]
#[ignore = "a child of the test below"]
fn child_admits_and_evicts() {
    let folder = folder_of_child();
    let path = savefile_in(&folder);
    let root = savefile::peek(&path, None).unwrap().root;
    loop {
        let hot = folder.join("hot");
        HotImage::admit(&path, &root, &hot, &StackRaw::default(), ReadBackend::Ring, &savefile::silent)
            .unwrap();
        HotImage::evict(&hot, &root).unwrap();
    }
}

#[test]
fn an_admission_killed_at_any_instant_leaves_a_whole_hot_image_or_none() {
    let folder = tempfile::tempdir().unwrap();
    let (path, hot) = (savefile_in(folder.path()), folder.path().join("hot"));
    let guest = Guest::incompressible(2000);
    let root = guest.write(&path).unwrap().root;
    for round in 0..ROUNDS {
        let admission = Killed(child("child_admits_and_evicts", folder.path()).spawn().unwrap());
        sleep(Duration::from_millis(20 + round * 13));
        drop(admission);
        let found = HotImage::find(&hot, &root).unwrap();
        assert!(found.is_none_or(|image| common::content(&image.files.memory) == guest.memory_bytes()));
        let stack = StackRaw::default();
        let image =
            HotImage::admit(&path, &root, &hot, &stack, ReadBackend::Ring, &savefile::silent).unwrap();
        assert!(common::content(&image.files.memory) == guest.memory_bytes());
        assert_eq!(names(&hot).len(), 2, "the lock and the set: {:?}", names(&hot));
    }
}

/// Pages of a guest whose savefile is longer than its memory: nothing of it compresses.
const PAGES_TOO_MANY: u64 = 500;

fn write_more_than_fits(folder: &Path) {
    let path = savefile_in(folder);
    let err = Guest::incompressible(PAGES_TOO_MANY).write(&path).unwrap_err();
    assert!(err.is_disk_full(), "{err}");
    verify(&path).expect("the old savefile is whole");
    assert_eq!(names(folder), ["guest.save"]);
}

#[test]
#[ignore = "a child of the test below"]
fn child_may_not_write_long_files() {
    // Blocked, the signal for a file too large is an error of the write instead.
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGXFSZ);
    signals.thread_block().unwrap();
    let limit = PAGES_TOO_MANY * PAGE_SIZE;
    setrlimit(Resource::RLIMIT_FSIZE, limit, limit).unwrap();
    write_more_than_fits(&folder_of_child());
}

#[test]
fn a_file_size_limit_leaves_the_old_savefile_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    Guest::small().write(&savefile_in(folder.path())).unwrap();
    assert!(child("child_may_not_write_long_files", folder.path()).status().unwrap().success());
}

#[test]
#[ignore = "a child of the test below"]
fn child_fills_its_file_system() {
    let folder = folder_of_child();
    let path = savefile_in(&folder);
    let root = Guest::small().write(&path).unwrap().root;
    write_more_than_fits(&folder);

    // A savefile that fits, whose hot image does not.
    let mut zeros = Guest::small();
    zeros.memory = (0..600).map(|page| common::Page::Fill(1 + (page % 250) as u8)).collect();
    let large = folder.join("large.save");
    let large_root = zeros.write(&large).unwrap().root;
    let (hot, stack) = (folder.join("hot"), StackRaw::default());
    let admit =
        |path: &Path, root| HotImage::admit(path, root, &hot, &stack, ReadBackend::Ring, &savefile::silent);
    admit(&path, &root).expect("the small one fits");
    let err = admit(&large, &large_root).unwrap_err();
    assert!(err.is_disk_full(), "{err}");
    assert!(HotImage::find(&hot, &large_root).unwrap().is_none());
    assert!(HotImage::find(&hot, &root).unwrap().is_some(), "the other hot image is not disturbed");
    assert_eq!(names(&hot).len(), 2, "{:?}", names(&hot));
}

#[test]
fn a_full_disk_leaves_the_old_savefile_and_the_other_hot_images() {
    let folder = tempfile::tempdir().unwrap();
    let mount = "mount -t tmpfs -o size=1M none \"$ENGINE_TEST_FOLDER\" || exit 77; exec \"$@\"";
    let inner = child("child_fills_its_file_system", folder.path());
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh"]).arg(inner.get_program());
    let status = command.args(inner.get_args()).env(FOLDER, folder.path()).status();
    match status.map(|status| status.code()) {
        Ok(Some(0)) => {}
        Ok(Some(101)) => panic!("the child's test failed"),
        other => eprintln!("skipped: no file system of its own to fill here: {other:?}"),
    }
}
