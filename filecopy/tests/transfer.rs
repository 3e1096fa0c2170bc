//! Senders and receivers on both ends of real pipes, and archives that no honest sender makes.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::io::{pipe, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{symlink, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, UNIX_EPOCH};

use filecopy::*;
use proptest::collection::vec;
use proptest::prelude::*;

const FILE: u32 = 0o100644;
const FOLDER: u32 = 0o040755;
const LINK: u32 = 0o120777;
/// errno(3) of Linux.
const ENOENT: u32 = 2;
const EEXIST: u32 = 17;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;
const ENAMETOOLONG: u32 = 36;
const ENOLINK: u32 = 67;
const EILSEQ: u32 = 84;
const EREMOTEIO: u32 = 121;
const EDQUOT: u32 = 122;

/// A folder in memory: what is received is written to the disk in the end, which may be busy.
fn memory() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap()
}

/// Sends and receives at once.
fn transfer(paths: &[PathBuf], into: &Path) -> Result<(), SendError> {
    let (there, to) = pipe().unwrap();
    let (from, back) = pipe().unwrap();
    let tree = Tree::open(into).unwrap();
    let receiver = thread::spawn(move || receive(there, back, &tree, Characters::Any, &Limits::default()));
    let sent = send(paths, false, to, from, &mut |_| {});
    assert_eq!(sent.is_ok(), receiver.join().unwrap().is_ok());
    sent
}

/// One entry of an archive.
fn entry(name: &[u8], mode: u32, content: &[u8]) -> Vec<u8> {
    let header = Header {
        name_bytes: name.len() as u32 + 1,
        mode,
        content_bytes: content.len() as u64,
        modified: (1_600_000_000, 7),
        ..Header::default()
    };
    [&header.encode()[..], name, b"\0", content].concat()
}

/// What the receiver answers to these bytes.
fn answer(bytes: &[u8], into: &Path, limits: &Limits) -> Reply {
    let mut answer = Vec::new();
    let tree = Tree::open(into).unwrap();
    let result = receive(bytes, &mut answer, &tree, Characters::Displayable, limits);
    let reply = Reply::read(&mut &answer[..]).unwrap().expect("an answer whatever comes");
    let told = result.map_or_else(|error| error.cause.raw_os_error() as u32, |_| 0);
    assert_eq!(reply.error, told);
    reply
}

fn error_of(entries: &[Vec<u8>], into: &Path) -> (u32, String) {
    let bytes = [entries.concat(), Header::default().encode().to_vec()].concat();
    let reply = answer(&bytes, into, &Limits::default());
    (reply.error, String::from_utf8(reply.last_name.unwrap_or_default()).unwrap())
}

fn names_in(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

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
fn no_name_leads_out() {
    let theirs = memory();
    let into = theirs.path().join("into");
    fs::create_dir(&into).unwrap();
    for name in ["../x", "a/../../x", "/tmp/x", "..", ".", "a//x", "a/", "a\0b", "\u{202e}x", "\x1b[2J", ""] {
        // An empty name with its NUL is no end of the transfer.
        assert_eq!(error_of(&[entry(name.as_bytes(), FILE, b"x")], &into).0, EILSEQ, "{name:?}");
        assert_eq!(error_of(&[entry(name.as_bytes(), FOLDER, b"")], &into).0, EILSEQ, "{name:?}");
        assert_eq!(error_of(&[entry(name.as_bytes(), LINK, b"x")], &into).0, EILSEQ, "{name:?}");
    }
    let too_long = Header { name_bytes: u32::MAX, mode: FILE, ..Header::default() };
    assert_eq!(error_of(&[too_long.encode().to_vec()], &into), (ENAMETOOLONG, String::new()));
    assert_eq!(error_of(&[entry(&[b'a'; 300], FILE, b"")], &into).0, ENAMETOOLONG);
    assert_eq!(error_of(&[entry(b"no/such", FILE, b"")], &into).0, ENOENT);
    assert_eq!(names_in(theirs.path()), ["into"]);
    assert!(names_in(&into).is_empty());
}

#[test]
fn no_link_leads_out() {
    let theirs = memory();
    let folder = entry(b"a", FOLDER, b"");
    for target in ["/etc/passwd", "..", "../b", "x/../../..", "", "./x"] {
        let link = entry(b"a/link", LINK, target.as_bytes());
        assert_eq!(error_of(&[folder.clone(), link], theirs.path()), (ENOLINK, "a/link".into()), "{target}");
    }
    assert_eq!(error_of(&[entry(b"top", LINK, b"x")], theirs.path()).0, ENOLINK);
    let mut endless =
        Header { name_bytes: 7, mode: LINK, content_bytes: u64::MAX, ..Header::default() }.encode().to_vec();
    endless.extend(b"a/link\0");
    assert_eq!(error_of(&[folder.clone(), endless], theirs.path()).0, ENAMETOOLONG);
    // A link that may be is none to write through.
    let through =
        [folder, entry(b"a/link", LINK, b"b"), entry(b"a/b", FOLDER, b""), entry(b"a/link/x", FILE, b"x")];
    let (error, name) = error_of(&through, theirs.path());
    assert!(error != 0 && name == "a/link/x", "{error} {name}");
    assert!(names_in(&theirs.path().join("a/b")).is_empty());
}

#[test]
fn only_files_folders_and_links_come_and_none_with_rights_of_its_own() {
    let theirs = memory();
    for mode in [0, 0o010644, 0o020644, 0o060644, 0o140644, 0o170000, u32::MAX] {
        assert_eq!(error_of(&[entry(b"x", mode, b"")], theirs.path()).0, EINVAL, "{mode:o}");
    }
    let bad_time = Header { name_bytes: 2, mode: FILE, modified: (0, 1_000_000_000), ..Header::default() };
    assert_eq!(error_of(&[[&bad_time.encode()[..], b"x\0"].concat()], theirs.path()).0, EINVAL);
    assert_eq!(error_of(&[entry(b"folder", FOLDER, b"content")], theirs.path()).0, EINVAL);
    assert_eq!(error_of(&[entry(b"tool", 0o107755, b"#!")], theirs.path()).0, 0);
    assert_eq!(fs::metadata(theirs.path().join("tool")).unwrap().mode(), 0o100755);
}

#[test]
fn what_ends_too_early_leaves_no_file() {
    let theirs = memory();
    let whole = [entry(b"file", FILE, &[7; 100_000]), Header::default().encode().to_vec()].concat();
    for end in [0, 1, 31, 32, 35, 37, 50_000, 100_036] {
        assert_eq!(answer(&whole[..end], theirs.path(), &Limits::default()).error, EREMOTEIO, "{end}");
        assert!(names_in(theirs.path()).is_empty(), "{end}");
    }
    // The file was whole, the transfer was not.
    assert_eq!(answer(&whole[..whole.len() - 1], theirs.path(), &Limits::default()).error, EREMOTEIO);
}

#[test]
fn there_are_limits() {
    let theirs = memory();
    let archive =
        |names: &[&[u8]]| names.iter().flat_map(|name| entry(name, FILE, b"four")).collect::<Vec<_>>();
    let limits = Limits { entries: 2, bytes: 100 };
    assert_eq!(answer(&archive(&[b"a", b"b", b"c"]), theirs.path(), &limits).error, EDQUOT);
    assert_eq!(names_in(theirs.path()), ["a", "b"]);
    let limits = Limits { entries: 10, bytes: 7 };
    let reply = answer(&archive(&[b"d", b"e"]), theirs.path(), &limits);
    assert_eq!((reply.error, reply.last_name.as_deref()), (EDQUOT, Some(&b"e"[..])));
    assert_eq!(names_in(theirs.path()), ["a", "b", "d"]);
    let mut huge =
        Header { name_bytes: 2, mode: FILE, content_bytes: u64::MAX, ..Header::default() }.encode().to_vec();
    huge.extend(b"x\0");
    assert_eq!(answer(&huge, theirs.path(), &Limits::default()).error, EDQUOT);
}

/// Whoever puts a link in the place of the folder that is just being filled gets no file where it leads.
#[test]
fn a_folder_that_becomes_a_link_meanwhile_is_not_followed() {
    let theirs = memory();
    let (into, outside) = (theirs.path().join("into"), theirs.path().join("outside"));
    fs::create_dir(&into).unwrap();
    fs::create_dir(&outside).unwrap();
    let swapping = thread::spawn({
        let (into, outside) = (into.clone(), outside.clone());
        move || {
            let folder = into.join("a");
            for round in 0..300 {
                let _ = fs::rename(&folder, into.join(format!("aside-{round}")));
                let _ = symlink(&outside, &folder);
                thread::sleep(Duration::from_micros(50));
                let _ = fs::remove_file(&folder);
                thread::sleep(Duration::from_micros(50));
            }
        }
    });
    while !swapping.is_finished() {
        let files = (0..20).map(|at| entry(format!("a/{at}").as_bytes(), FILE, b"secret"));
        let entries: Vec<_> = std::iter::once(entry(b"a", FOLDER, b"")).chain(files).collect();
        error_of(&entries, &into);
    }
    swapping.join().unwrap();
    assert!(names_in(&outside).is_empty());
    assert!(!names_in(&into).is_empty());
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
fn a_hostile_answer_is_not_shown_as_it_is() {
    let ours = memory();
    let path = ours.path().join("x");
    fs::write(&path, b"x").unwrap();
    let reply = |error, crc32, name: &[u8]| Reply { error, crc32, last_name: Some(name.to_vec()) }.encode();
    let said = |answer: &[u8]| {
        send(std::slice::from_ref(&path), false, std::io::sink(), answer, &mut |_| {})
            .unwrap_err()
            .to_string()
    };
    assert!(said(&reply(EEXIST, 0, b"\x1b[31m\n")).contains("named \\x1b[31m\\n already"));
    assert!(said(&reply(u32::MAX, 0, b"x")).starts_with("the target could not take x"));
    assert!(said(&reply(0, 1, b"x")).contains("checksums"));
    assert!(said(b"short").contains("without an answer"));
    let endless = std::io::repeat(0xff);
    let error = send(std::slice::from_ref(&path), false, std::io::sink(), endless.take(1 << 30), &mut |_| {})
        .unwrap_err();
    assert!(error.to_string().len() < 80_000);
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
