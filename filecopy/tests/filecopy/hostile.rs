//! What is sent to do harm, by either side.

use std::fs;
use std::io::Read;
use std::os::unix::fs::{symlink, MetadataExt};
use std::thread;
use std::time::Duration;

use filecopy::*;

use crate::*;

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
