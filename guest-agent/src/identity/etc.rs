//! The files in /etc that carry the guest's names.
//!
//! They are overwritten in place, not written aside and renamed: nobody else runs, so nobody can see a half, and a clone's disk
//! outlives no crash. It also goes through bind mounts and symlinks, which a rename would replace.
//!
//! In a frozen guest even that goes without the kernel: each file is mapped, and its page made dirty, before the capture, so that
//! the clone's change is a copy of some bytes. (Writing three files costs an emulated clone 20–30 ms: a file system's code, run for
//! the first time.) A file's length stays for that: what is shorter is filled up with newlines, which every reader of these files
//! skips; what is longer is written the usual way.

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::net::Ipv4Addr;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use memmap2::MmapMut;

use crate::failure::{Failure, Step};
use crate::sys;

/// More than any hosts file that is read this way is worth.
const FILE_BYTES_MAX: u64 = 64 << 10;
/// The address that Debian gives to a machine's own name.
const OWN_ADDRESS: &str = "127.0.1.1";

/// As long as a clone's name gets.
const USUAL_HOSTNAME: &str = "disp0000";
/// One name server's line at its longest.
const USUAL_RESOLV_CONF_BYTES: usize = "nameserver 255.255.255.255\n".len();
/// 32 digits and a newline.
const MACHINE_ID_BYTES: usize = 33;

/// The files, open.
pub struct Etc {
    hostname: Overwritten,
    machine_id: Overwritten,
    hosts: Overwritten,
    resolv_conf: Overwritten,
}

/// A file that is overwritten as a whole.
struct Overwritten {
    path: PathBuf,
    file: File,
    content: Vec<u8>,
    map: Option<MmapMut>,
}

impl Etc {
    /// Opens the files, and makes those that are missing.
    pub fn open(etc: &Path) -> Result<Self, Failure> {
        Ok(Self {
            hostname: Overwritten::open(etc.join("hostname"))?,
            machine_id: Overwritten::open(etc.join("machine-id"))?,
            hosts: Overwritten::open(etc.join("hosts"))?,
            resolv_conf: Overwritten::open(etc.join("resolv.conf"))?,
        })
    }

    /// Makes ready for changes that need no system call. Legal once everything else is frozen; what is there stays.
    pub fn poise(&mut self) -> Result<(), Failure> {
        let hosts = hosts_with(&self.hosts.content, USUAL_HOSTNAME).len();
        self.hostname.poise(USUAL_HOSTNAME.len() + 1)?;
        self.machine_id.poise(MACHINE_ID_BYTES)?;
        self.hosts.poise(hosts)?;
        self.resolv_conf.poise(USUAL_RESOLV_CONF_BYTES)
    }

    /// Writes hostname, machine-id, and the machine's own line in hosts.
    pub fn write_names(&mut self, hostname: &str, machine_id: &str) -> Result<(), Failure> {
        self.hostname.write(format!("{hostname}\n").into_bytes())?;
        self.machine_id.write(format!("{machine_id}\n").into_bytes())?;
        let hosts = hosts_with(&self.hosts.content, hostname);
        self.hosts.write(hosts)
    }

    /// Writes the name servers.
    pub fn write_resolv_conf(&mut self, servers: &[Ipv4Addr]) -> Result<(), Failure> {
        let lines: String = servers.iter().map(|server| format!("nameserver {server}\n")).collect();
        self.resolv_conf.write(lines.into_bytes())
    }

    /// Writes what is there already.
    pub fn rewrite(&mut self) -> Result<(), Failure> {
        for file in [&mut self.hostname, &mut self.machine_id, &mut self.hosts, &mut self.resolv_conf] {
            let content = std::mem::take(&mut file.content);
            file.write(content)?;
        }
        Ok(())
    }
}

impl Overwritten {
    fn open(path: PathBuf) -> Result<Self, Failure> {
        let file = open_or_replace(&path).step(|| format!("open {}", path.display()))?;
        let mut content = Vec::new();
        (&file).take(FILE_BYTES_MAX).read_to_end(&mut content).step(|| format!("read {}", path.display()))?;
        Ok(Self { path, file, content, map: None })
    }

    /// Maps the file, at least `length` long, and makes its page dirty.
    fn poise(&mut self, length: usize) -> Result<(), Failure> {
        let mut content = std::mem::take(&mut self.content);
        content.resize(content.len().max(length), b'\n');
        self.write(content)?;
        if self.content.is_empty() {
            return Ok(());
        }
        let mut map =
            sys::map_file(&self.file, self.content.len()).step(|| format!("map {}", self.path.display()))?;
        map.copy_from_slice(&self.content);
        self.map = Some(map);
        Ok(())
    }

    fn write(&mut self, mut content: Vec<u8>) -> Result<(), Failure> {
        if let Some(map) = self.map.as_mut().filter(|map| content.len() <= map.len()) {
            content.resize(map.len(), b'\n');
            map.copy_from_slice(&content);
            self.content = content;
            return Ok(());
        }
        let step = || format!("write {}", self.path.display());
        self.file.write_all_at(&content, 0).step(step)?;
        if content.len() < self.content.len() {
            self.file.set_len(content.len() as u64).step(step)?;
        }
        self.content = content;
        Ok(())
    }
}

/// Opens a file; a symlink to nowhere (resolv.conf of a resolver that isn't up) is replaced by a file.
fn open_or_replace(path: &Path) -> std::io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    match options.open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && path.is_symlink() => {
            fs::remove_file(path)?;
            options.open(path)
        }
        opened => opened,
    }
}

/// The hosts file with `hostname` as the machine's own name.
fn hosts_with(hosts: &[u8], hostname: &str) -> Vec<u8> {
    let own = |line: &[u8]| {
        line.strip_prefix(OWN_ADDRESS.as_bytes())
            .is_some_and(|rest| rest.first().is_none_or(u8::is_ascii_whitespace))
    };
    let mut out = Vec::with_capacity(hosts.len() + hostname.len() + OWN_ADDRESS.len() + 2);
    for line in hosts.split_inclusive(|byte| *byte == b'\n').filter(|line| !own(line)) {
        out.extend_from_slice(line);
    }
    while out.ends_with(b"\n\n") {
        out.pop();
    }
    if out.last().is_some_and(|byte| *byte != b'\n') {
        out.push(b'\n');
    }
    out.extend_from_slice(format!("{OWN_ADDRESS}\t{hostname}\n").as_bytes());
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(folder: &Path, name: &str) -> String {
        fs::read_to_string(folder.join(name)).expect("readable")
    }

    #[test]
    fn files_are_overwritten_whole_also_by_shorter_content() {
        let folder = tempfile::tempdir().expect("tempdir");
        let etc = folder.path();
        fs::write(etc.join("hostname"), "a-much-longer-name\n").expect("write");
        fs::write(etc.join("hosts"), "127.0.0.1 localhost\n127.0.1.1 old\n127.0.1.10 other\n::1 ip6")
            .expect("write");
        std::os::unix::fs::symlink("/run/nowhere/at-all", etc.join("resolv.conf")).expect("symlink");
        let mut open = Etc::open(etc).expect("opens");
        open.rewrite().expect("rewrites");
        for (name, id) in [("disp1234", "11"), ("disp7", "22")] {
            open.write_names(name, id).expect("writes");
            assert_eq!(read(etc, "hostname"), format!("{name}\n"));
            assert_eq!(read(etc, "machine-id"), format!("{id}\n"));
            let expected = format!("127.0.0.1 localhost\n127.0.1.10 other\n::1 ip6\n127.0.1.1\t{name}\n");
            assert_eq!(read(etc, "hosts"), expected);
        }
        open.write_resolv_conf(&[Ipv4Addr::new(10, 0, 2, 3)]).expect("writes");
        assert_eq!(read(etc, "resolv.conf"), "nameserver 10.0.2.3\n");
        open.write_resolv_conf(&[]).expect("writes");
        assert_eq!(read(etc, "resolv.conf"), "");
    }

    #[test]
    fn poised_files_change_without_changing_their_length() {
        let folder = tempfile::tempdir().expect("tempdir");
        let etc = folder.path();
        fs::write(etc.join("hostname"), "dvm\n").expect("write");
        fs::write(etc.join("hosts"), "127.0.0.1 localhost\n127.0.1.1 dvm\n").expect("write");
        let mut open = Etc::open(etc).expect("opens");
        open.poise().expect("poises");
        assert_eq!(read(etc, "hostname"), "dvm\n\n\n\n\n\n");
        let id = "0123456789abcdef0123456789abcdef";
        for name in ["disp1234", "disp7", "disp1234"] {
            open.write_names(name, id).expect("writes");
            assert_eq!(read(etc, "hostname").trim_end(), name);
            assert_eq!(read(etc, "hostname").len(), 9);
            assert_eq!(read(etc, "machine-id"), format!("{id}\n"));
            assert_eq!(read(etc, "hosts").trim_end(), format!("127.0.0.1 localhost\n127.0.1.1\t{name}"));
        }
        open.write_names("a-name-longer-than-usual", id).expect("writes");
        assert_eq!(read(etc, "hostname"), "a-name-longer-than-usual\n");
    }
}
