//! A file system of which nothing is ever read and whose one file takes all that is written or nothing: FUSE (linux/fuse.h), spoken by hand.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use nix::mount::{mount, umount2, MntFlags, MsFlags};

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const SETATTR: u32 = 4;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const INIT: u32 = 26;
const IN_HEADER: usize = 40;
const WRITE_IN: usize = 40;
const ENOSYS: i32 = 38;
const ENOSPC: i32 = 28;
/// What its file takes until its disk is full.
pub const SIZE: usize = 100_000;

/// Mounted until it is dropped.
pub struct Hanging {
    folder: tempfile::TempDir,
    /// What was written; nothing is taken any more while somebody has it.
    pub written: Arc<Mutex<Vec<u8>>>,
}

impl Hanging {
    /// `None` where nobody may mount it.
    pub fn mount() -> Option<Hanging> {
        let device = File::options().read(true).write(true).open("/dev/fuse").ok()?;
        let folder = tempfile::tempdir().unwrap();
        let data = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
        mount(Some("hanging"), folder.path(), Some("fuse"), MsFlags::empty(), Some(data.as_str())).ok()?;
        let written = Arc::new(Mutex::new(Vec::new()));
        let sink = written.clone();
        std::thread::spawn(move || serve(device, &sink));
        Some(Hanging { folder, written })
    }

    pub fn path(&self) -> PathBuf {
        self.folder.path().join("file")
    }
}

impl Drop for Hanging {
    fn drop(&mut self) {
        let _ = umount2(self.folder.path(), MntFlags::MNT_FORCE | MntFlags::MNT_DETACH);
    }
}

fn serve(mut device: File, written: &Mutex<Vec<u8>>) {
    let mut request = vec![0; 1 << 20];
    // An error is the end: it was unmounted.
    while let Ok(count) = device.read(&mut request) {
        let number = |at: usize| u32::from_ne_bytes(request[at..at + 4].try_into().unwrap());
        let (opcode, node) = (number(4), number(16));
        let answer = match opcode {
            READ | FORGET => continue,
            INIT => Ok([7u32, 31, 0, 0, 0, 65536, 1]
                .iter()
                .flat_map(|n| n.to_ne_bytes())
                .chain([0; 36])
                .collect()),
            LOOKUP => Ok([&2u64.to_ne_bytes()[..], &[0; 32], &attributes(2)].concat()),
            GETATTR | SETATTR => Ok([&[0; 16][..], &attributes(node)].concat()),
            // Without the kernel's cache, each write comes here.
            OPEN => Ok([0u32, 0, 1, 0].iter().flat_map(|n| n.to_ne_bytes()).collect()),
            WRITE => {
                let mut written = written.lock().unwrap();
                written.extend_from_slice(&request[IN_HEADER + WRITE_IN..count]);
                let size = number(IN_HEADER + 16);
                if written.len() > SIZE {
                    Err(ENOSPC)
                } else {
                    Ok([size, 0].iter().flat_map(|n| n.to_ne_bytes()).collect())
                }
            }
            _ => Err(ENOSYS),
        };
        let (error, body): (i32, Vec<u8>) =
            answer.map_or_else(|error: i32| (-error, Vec::new()), |body| (0, body));
        let length = u32::try_from(16 + body.len()).unwrap();
        let _ = device
            .write_all(&[&length.to_ne_bytes()[..], &error.to_ne_bytes(), &request[8..16], &body].concat());
    }
}

/// Of a folder, or of the file in it.
fn attributes(node: u32) -> Vec<u8> {
    let mode: u32 = if node == 1 { 0o40755 } else { 0o100644 };
    let mut attributes = vec![0; 88];
    attributes[0] = node as u8;
    attributes[8..16].copy_from_slice(&(SIZE as u64).to_ne_bytes());
    attributes[60..64].copy_from_slice(&mode.to_ne_bytes());
    attributes[64] = 1;
    attributes
}
