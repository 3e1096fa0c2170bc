//! Device-mapper's control device (`include/uapi/linux/dm-ioctl.h`).
//!
//! Every request is one buffer: `struct dm_ioctl` (312 bytes), then what it is about. The kernel writes its answer into the
//! same buffer, never more than `data_size` says it has.

use std::fs::File;
use std::io;
use std::mem::size_of;
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use crate::volumes::plan::{Device, Table};

/// The interface version asked for: 4.0.0, which every kernel of today serves.
const VERSION: [u32; 3] = [4, 0, 0];
const NAME_BYTES: usize = 128;
const UUID_BYTES: usize = 129;
/// Lists grow with the number of devices; one that does not fit is asked for again with more room.
const LIST_BYTES_MIN: usize = 16 << 10;
const LIST_BYTES_MAX: usize = 4 << 20;

const READONLY: u32 = 1 << 0;
const SUSPEND: u32 = 1 << 1;
const BUFFER_FULL: u32 = 1 << 8;
const SECURE_DATA: u32 = 1 << 15;
const DEFERRED_REMOVE: u32 = 1 << 17;

/// The udev flags that a cookie carries in its upper half: no rules of device-mapper's, of subsystems', of disks' or of
/// others' are to look at the device, and nobody waits for udev to have done so (libdevmapper.h, DM_UDEV_DISABLE_*).
const COOKIE: u32 = (0x1 | 0x2 | 0x4 | 0x8 | 0x20) << 16;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct DmIoctl {
    version: [u32; 3],
    data_size: u32,
    data_start: u32,
    target_count: u32,
    open_count: i32,
    flags: u32,
    event_nr: u32,
    padding: u32,
    dev: u64,
    name: [u8; NAME_BYTES],
    uuid: [u8; UUID_BYTES],
    data: [u8; 7],
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct DmTargetSpec {
    sector_start: u64,
    length: u64,
    status: i32,
    next: u32,
    target_type: [u8; 16],
}

const HEAD: usize = size_of::<DmIoctl>();
const _: () = assert!(HEAD == 312 && size_of::<DmTargetSpec>() == 40);

/// What is asked.
#[derive(Clone, Copy)]
enum Command {
    Version = 0,
    ListDevices = 2,
    Create = 3,
    Remove = 4,
    Suspend = 6,
    Load = 9,
    Status = 12,
    ListVersions = 13,
}

/// The control device, open.
#[derive(Debug)]
pub struct Control {
    file: File,
}

impl Control {
    /// From `/dev/mapper/control`, opened for reading and writing.
    pub fn new(file: File) -> Control {
        Control { file }
    }

    /// The version of the kernel's interface.
    pub fn version(&self) -> io::Result<[u32; 3]> {
        Ok(self.ask(Command::Version, "", &Request::default())?.0.version)
    }

    /// The kinds of target there are: "snapshot", "crypt".
    pub fn targets(&self) -> io::Result<Vec<String>> {
        let answer = self.ask_list(Command::ListVersions, "")?;
        // struct dm_target_versions: next, version[3], name.
        Ok(entries(&answer, 0, 16).into_iter().map(|(_, name)| name).collect())
    }

    /// Makes a device without a table. EBUSY: there is one of that name or uuid.
    pub fn create(&self, name: &str) -> io::Result<Device> {
        let request = Request { uuid: name, ..Request::default() };
        Ok(device(self.ask(Command::Create, name, &request)?.0.dev))
    }

    /// Gives a device its table, which [`Control::resume`] puts into force. A table may carry a key: the kernel wipes its
    /// copy, this function its own.
    pub fn load(&self, name: &str, table: &Table) -> io::Result<()> {
        let length = (size_of::<DmTargetSpec>() + table.parameters.len() + 1).next_multiple_of(8);
        let mut spec = DmTargetSpec::new_zeroed();
        spec.length = table.sectors;
        spec.next = length as u32;
        put_text(&mut spec.target_type, table.target)?;
        let mut data = Vec::with_capacity(length);
        data.extend_from_slice(spec.as_bytes());
        data.extend_from_slice(&table.parameters);
        data.resize(length, 0);
        let flags = SECURE_DATA | if table.read_only { READONLY } else { 0 };
        let request = Request { targets: 1, flags, data: &data, ..Request::default() };
        let answer = self.ask(Command::Load, name, &request);
        crate::volumes::wipe(&mut data);
        answer.map(drop)
    }

    /// Puts the loaded table into force.
    pub fn resume(&self, name: &str) -> io::Result<()> {
        let request = Request { cookie: COOKIE, ..Request::default() };
        self.ask(Command::Suspend, name, &request).map(drop)
    }

    /// Takes the table out of force until [`Control::resume`], after all requests on their way are done.
    pub fn suspend(&self, name: &str) -> io::Result<()> {
        let request = Request { flags: SUSPEND, ..Request::default() };
        self.ask(Command::Suspend, name, &request).map(drop)
    }

    /// Removes a device. EBUSY: somebody has it open. `deferred`: as soon as nobody has. ENXIO: there is none.
    pub fn remove(&self, name: &str, deferred: bool) -> io::Result<()> {
        let flags = if deferred { DEFERRED_REMOVE } else { 0 };
        let request = Request { cookie: COOKIE, flags, ..Request::default() };
        self.ask(Command::Remove, name, &request).map(drop)
    }

    /// All devices there are, by name.
    pub fn list(&self) -> io::Result<Vec<(String, Device)>> {
        let answer = self.ask_list(Command::ListDevices, "")?;
        // struct dm_name_list: dev, next, name. A single entry without device: there is none.
        let number = |entry: &[u8]| entry.first_chunk().map_or(0, |dev| u64::from_ne_bytes(*dev));
        let listed = entries(&answer, 8, 12).into_iter().map(|(entry, name)| (name, number(entry)));
        Ok(listed.filter(|(_, dev)| *dev != 0).map(|(name, dev)| (name, device(dev))).collect())
    }

    /// What the target of a device says of itself: "Invalid" or "16/2048 16" of a snapshot.
    pub fn status(&self, name: &str) -> io::Result<String> {
        let answer = self.ask_list(Command::Status, name)?;
        Ok(text(answer.get(size_of::<DmTargetSpec>()..).unwrap_or_default()))
    }

    fn ask_list(&self, command: Command, name: &str) -> io::Result<Vec<u8>> {
        let mut room = LIST_BYTES_MIN;
        loop {
            let request = Request { room, ..Request::default() };
            let (head, answer) = self.ask(command, name, &request)?;
            if head.flags & BUFFER_FULL == 0 {
                let start = (head.data_start as usize).saturating_sub(HEAD);
                return Ok(answer.get(start..).unwrap_or_default().to_vec());
            }
            if room >= LIST_BYTES_MAX {
                return Err(io::ErrorKind::FileTooLarge.into());
            }
            room *= 4;
        }
    }

    fn ask(&self, command: Command, name: &str, request: &Request<'_>) -> io::Result<(DmIoctl, Vec<u8>)> {
        let mut head = DmIoctl::new_zeroed();
        let length = HEAD + request.data.len() + request.room;
        head.version = VERSION;
        head.data_size = length as u32;
        head.data_start = HEAD as u32;
        head.target_count = request.targets;
        head.flags = request.flags;
        head.event_nr = request.cookie;
        put_text(&mut head.name, name)?;
        put_text(&mut head.uuid, request.uuid)?;
        let mut buffer = Vec::with_capacity(length);
        buffer.extend_from_slice(head.as_bytes());
        buffer.extend_from_slice(request.data);
        buffer.resize(length, 0);
        // _IOWR(0xfd, command, struct dm_ioctl)
        let number = 3 << 30 | (HEAD as u64) << 16 | 0xfd << 8 | command as u64;
        // SAFETY: the kernel reads and writes `data_size` bytes from the pointer on, which is `buffer`'s length, and keeps no
        // pointer; the buffer is plain bytes, which any value is valid for.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), number as _, buffer.as_mut_ptr()) };
        let result = Errno::result(result);
        let head = DmIoctl::read_from_prefix(&buffer).map(|(head, _)| head).ok();
        // Only a list has an answer beyond the head; a table may have a key there.
        let answer = if request.room > 0 { buffer.split_off(HEAD) } else { Vec::new() };
        if request.flags & SECURE_DATA != 0 {
            crate::volumes::wipe(&mut buffer);
        }
        result?;
        Ok((head.ok_or(io::ErrorKind::InvalidData)?, answer))
    }
}

/// What differs between requests; all else is zero.
#[derive(Default)]
struct Request<'a> {
    uuid: &'a str,
    flags: u32,
    cookie: u32,
    targets: u32,
    data: &'a [u8],
    /// Bytes for the answer.
    room: usize,
}

/// The entries of a list: the u32 at `next_at` says how far the next one is, 0 after the last; the name is at `name_at`.
fn entries(mut list: &[u8], next_at: usize, name_at: usize) -> Vec<(&[u8], String)> {
    let mut found = Vec::new();
    while let Some(name) = list.get(name_at..) {
        found.push((list, text(name)));
        let next =
            list.get(next_at..).and_then(<[u8]>::first_chunk).map_or(0, |next| u32::from_ne_bytes(*next));
        match list.get(next as usize..) {
            Some(rest) if next > 0 => list = rest,
            _ => break,
        }
    }
    found
}

fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(bytes.get(..end).unwrap_or_default()).into_owned()
}

fn put_text(field: &mut [u8], text: &str) -> io::Result<()> {
    // A NUL has to follow.
    let fits = text.len() < field.len() && !text.contains('\0');
    let room = field.get_mut(..text.len()).filter(|_| fits).ok_or(io::ErrorKind::InvalidInput)?;
    room.copy_from_slice(text.as_bytes());
    Ok(())
}

/// `huge_encode_dev` of the kernel's (linux/kdev_t.h), read.
fn device(dev: u64) -> Device {
    Device { major: (dev >> 8 & 0xfff) as u32, minor: (dev & 0xff | dev >> 12 & 0xf_ff00) as u32 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_are_taken_apart() {
        assert_eq!(device(0xfd03), Device { major: 253, minor: 3 });
        assert_eq!(device(0x10_fd03), Device { major: 253, minor: 0x103 });
    }

    #[test]
    fn lists_end_where_they_say_or_where_the_bytes_do() {
        let mut list = vec![0; 64];
        list[0] = 9;
        list[8] = 32;
        list[12..15].copy_from_slice(b"one");
        list[32] = 8;
        list[44..47].copy_from_slice(b"two");
        let names = |list: &[u8]| entries(list, 8, 12).into_iter().map(|(_, name)| name).collect::<Vec<_>>();
        assert_eq!(names(&list), ["one", "two"]);
        list[40] = 200;
        assert_eq!(names(&list), ["one", "two"]);
        assert_eq!(names(&list[..10]), Vec::<String>::new());
    }

    #[test]
    fn names_that_do_not_fit_are_refused() {
        assert!(put_text(&mut [0; 4], "abc").is_ok());
        assert!(put_text(&mut [0; 4], "abcd").is_err());
        assert!(put_text(&mut [0; 4], "a\0").is_err());
    }
}
