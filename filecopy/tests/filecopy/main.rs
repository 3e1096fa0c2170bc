//! Senders and receivers on both ends of real pipes, and archives that no honest sender makes.

mod honest;
mod hostile;

use std::fs;
use std::io::pipe;
use std::path::{Path, PathBuf};
use std::thread;

use filecopy::*;

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
