//! What is sent as it should be.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{symlink, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, UNIX_EPOCH};

use filecopy::*;
use proptest::collection::vec;
use proptest::prelude::*;

use crate::*;

#[test]
fn files_folders_and_links_come_as_they_were_with_their_times() {
    let (ours, theirs) = (memory(), memory());
    let root = ours.path().join("work");
    fs::create_dir_all(root.join("in/deep")).unwrap();
    let large: Vec<u8> = (0..300_000u32).flat_map(u32::to_le_bytes).collect();
    fs::write(root.join("in/large"), &large).unwrap();
    fs::write(root.join("empty"), b"").unwrap();
    fs::write(root.join(OsStr::from_bytes(b"not \xff text")), b"x").unwrap();
    symlink("../empty", root.join("in/link")).unwrap();
    fs::set_permissions(root.join("in/large"), Permissions::from_mode(0o750)).unwrap();
    fs::set_permissions(root.join("in"), Permissions::from_mode(0o555)).unwrap();
    let time = UNIX_EPOCH + Duration::new(1_500_000_000, 123_456_789);
    for path in ["in/large", "in/deep", "in", "."] {
        File::open(root.join(path)).unwrap().set_modified(time).unwrap();
    }

    let single = ours.path().join("single");
    fs::write(&single, b"alone").unwrap();
    // As a shell completes a folder's name.
    let folder = PathBuf::from(format!("{}/", root.display()));
    assert!(survey(std::slice::from_ref(&folder), false).unwrap().has_unsafe_names);
    transfer(&[folder, single], theirs.path()).unwrap();

    let copy = theirs.path().join("work");
    assert_eq!(fs::read(copy.join("in/large")).unwrap(), large);
    assert_eq!(fs::read(copy.join("empty")).unwrap(), b"");
    assert_eq!(fs::read(copy.join(OsStr::from_bytes(b"not \xff text"))).unwrap(), b"x");
    assert_eq!(fs::read_link(copy.join("in/link")).unwrap(), Path::new("../empty"));
    assert_eq!(fs::read(theirs.path().join("single")).unwrap(), b"alone");
    for path in ["in/large", "in/deep", "in", "."] {
        let (wanted, found) =
            (fs::metadata(root.join(path)).unwrap(), fs::metadata(copy.join(path)).unwrap());
        assert_eq!(found.modified().unwrap(), time, "{path}");
        assert_eq!(found.mode(), wanted.mode(), "{path}");
    }
    fs::set_permissions(root.join("in"), Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(copy.join("in"), Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn what_is_there_stays_and_the_sender_hears_its_name() {
    let (ours, theirs) = (memory(), memory());
    let path = ours.path().join("letter");
    fs::write(&path, b"new").unwrap();
    for kind in ["file", "link", "folder"] {
        let there = theirs.path().join("letter");
        match kind {
            "file" => fs::write(&there, b"old").unwrap(),
            "link" => symlink("/nowhere", &there).unwrap(),
            _ => fs::create_dir(&there).unwrap(),
        }
        let error = transfer(std::slice::from_ref(&path), theirs.path()).unwrap_err();
        assert!(matches!(&error, SendError::Exists(name) if name == "letter"), "{kind}: {error}");
        match kind {
            "file" => assert_eq!(fs::read(&there).unwrap(), b"old"),
            "link" => assert!(!Path::new("/nowhere").exists()),
            _ => {}
        }
        fs::remove_file(&there).or_else(|_| fs::remove_dir(&there)).unwrap();
    }
    // Nor may a folder come through a link, or in the place of a file.
    symlink(ours.path(), theirs.path().join("a")).unwrap();
    fs::write(theirs.path().join("b"), b"").unwrap();
    for name in ["a", "b"] {
        assert_eq!(error_of(&[entry(name.as_bytes(), FOLDER, b"")], theirs.path()).0, EEXIST);
    }
    assert_ne!(error_of(&[entry(b"a/x", FILE, b"x")], theirs.path()).0, 0);
    assert_eq!(names_in(ours.path()), ["letter"]);
}

#[test]
fn a_large_file_whose_receiver_gives_up_ends_with_its_word() {
    let (ours, theirs) = (memory(), memory());
    // Far more than pipes hold: the sender is still writing when it is refused.
    let path = ours.path().join("large");
    File::create(&path).unwrap().set_len(64 << 20).unwrap();
    fs::write(theirs.path().join("large"), b"").unwrap();
    assert!(matches!(transfer(&[path], theirs.path()), Err(SendError::Exists(_))));
}

#[test]
fn a_full_disk_is_told() {
    let (ours, theirs) = (memory(), memory());
    let mounted =
        Command::new("mount").args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"]).arg(theirs.path()).output();
    if !mounted.is_ok_and(|output| output.status.success()) {
        eprintln!("no right to mount a small disk: nothing was tested");
        return;
    }
    let path = ours.path().join("large");
    File::create(&path).unwrap().set_len(8 << 20).unwrap();
    let sent = transfer(&[path], theirs.path());
    let left = names_in(theirs.path());
    assert!(Command::new("umount").arg(theirs.path()).status().unwrap().success());
    match sent {
        Err(SendError::Refused { last_name, cause }) => {
            assert_eq!((last_name.as_str(), cause.raw_os_error()), ("large", Some(ENOSPC as i32)));
        }
        other => panic!("{other:?}"),
    }
    assert!(left.is_empty());
}

#[test]
fn what_cannot_be_sent_is_said_before_anything_is() {
    let ours = memory();
    let folder = ours.path().join("folder");
    fs::create_dir(&folder).unwrap();
    let why = |path: &Path| survey(&[path.to_owned()], false).unwrap_err();
    assert!(matches!(why(&ours.path().join("none")), WalkError::Read { .. }));
    assert!(matches!(why(Path::new("/")), WalkError::Name { .. }));
    assert!(matches!(why(Path::new("..")), WalkError::Name { .. }));
    symlink("/etc/passwd", folder.join("link")).unwrap();
    assert!(matches!(why(&folder), WalkError::Name { .. }));
    assert_eq!(
        survey(std::slice::from_ref(&folder), true).unwrap(),
        Survey::default(),
        "links can be left out"
    );
    fs::remove_file(folder.join("link")).unwrap();
    assert!(Command::new("mkfifo").arg(folder.join("fifo")).status().unwrap().success());
    assert!(matches!(why(&folder), WalkError::Kind(path) if path.ends_with("folder/fifo")));
}

#[test]
fn incoming_folders_are_the_sources_own_and_no_links() {
    let home = memory();
    Tree::incoming(home.path(), "work").unwrap();
    Tree::incoming(home.path(), "work").unwrap();
    let folder = home.path().join("QubesIncoming/work");
    assert_eq!(fs::metadata(&folder).unwrap().mode() & 0o7777, 0o700);
    for source in ["", ".", "..", "a/b", "/a", "a\nb"] {
        assert!(Tree::incoming(home.path(), source).is_err(), "{source:?}");
    }
    symlink("/tmp", home.path().join("QubesIncoming/sly")).unwrap();
    assert!(Tree::incoming(home.path(), "sly").is_err());
}

/// The whole of a call: what `qvm-copy-to-vm` and `qvm-move-to-vm` do, with a program in between that has the service.
#[test]
fn a_job_ends_as_its_call_does() {
    let ours = memory();
    let path = ours.path().join("x");
    fs::write(&path, b"x").unwrap();
    let job = |moves| {
        let paths = [path.clone()];
        Job { paths: &paths, moves, ignores_links: false, shows_progress: false }.run(|service| {
            assert_eq!(service, SERVICE);
            let mut command = Command::new("sh");
            command.args(["-c", "exit 126"]);
            command
        })
    };
    let error = job(true).unwrap_err();
    assert!(matches!(error, JobError::Denied) && error.status() == 126, "{error}");
    assert!(path.exists(), "only what has come is removed");
    let paths = [path.clone()];
    let none = Job { paths: &paths, moves: true, ignores_links: false, shows_progress: false }
        .run(|_| Command::new("/no/such/program"));
    assert_eq!(none.unwrap_err().status(), 125);
    let links_lost = Job { paths: &paths, moves: true, ignores_links: true, shows_progress: false }
        .run(|_| unreachable!("nothing is called"));
    assert!(matches!(links_lost, Err(JobError::LinksLost)));
}

/// Files by their paths below a folder.
fn contents(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => folders.push(path),
                false => {
                    let name = path.strip_prefix(folder).unwrap().to_owned();
                    found.insert(name, fs::read(path).unwrap());
                }
            }
        }
    }
    found
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn whatever_is_sent_comes(
        files in vec(("[a-c]{1,2}(/[a-c]{1,2}){0,3}/[x-z]{1,2}", vec(any::<u8>(), 0..200_000)), 0..12)
    ) {
        let (ours, theirs) = (memory(), memory());
        let root = ours.path().join("root");
        fs::create_dir(&root).unwrap();
        for (name, content) in &files {
            let path = root.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        transfer(&[root], theirs.path()).unwrap();
        prop_assert_eq!(contents(ours.path()), contents(theirs.path()));
    }
}
