//! An event channel between this domain and another one: `/dev/xen/evtchn`.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

use super::ioctl;

const DEVICE: &str = "/dev/xen/evtchn";
const BIND_INTERDOMAIN: u32 = 0x0008_4501;
const BIND_UNBOUND_PORT: u32 = 0x0004_4502;
const NOTIFY: u32 = 0x0004_4504;

/// One event channel; dropping closes it.
#[derive(Debug)]
pub struct EventChannel {
    file: File,
    port: u32,
}

impl EventChannel {
    /// A new one, to which this domain can bind.
    pub fn offer(peer: u16) -> io::Result<EventChannel> {
        let file = open()?;
        let mut remote = u32::from(peer);
        // SAFETY: the request reads one u32, `remote`.
        let port = unsafe { ioctl(&file, BIND_UNBOUND_PORT, &mut remote) }?;
        Ok(EventChannel { file, port })
    }

    /// Binds to a port that a domain has offered to this one.
    pub fn bind(peer: u16, remote_port: u32) -> io::Result<EventChannel> {
        let file = open()?;
        let mut remote = [u32::from(peer), remote_port];
        // SAFETY: the request reads two u32, domain and port, which `remote` is.
        let port = unsafe { ioctl(&file, BIND_INTERDOMAIN, remote.as_mut_ptr()) }?;
        Ok(EventChannel { file, port })
    }

    /// The port here.
    pub fn port(&self) -> u32 {
        self.port
    }

    /// Notifies the other domain.
    pub fn notify(&self) -> io::Result<()> {
        let mut port = self.port;
        // SAFETY: the request reads one u32, the port.
        unsafe { ioctl(&self.file, NOTIFY, &mut port) }.map(drop)
    }

    /// Takes the events that have come, and lets more come.
    pub fn take(&self) -> io::Result<()> {
        let mut ports = [0; 64];
        match (&self.file).read(&mut ports) {
            Ok(count) => (&self.file).write_all(ports.get(..count).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            Err(error) => Err(error),
        }
    }
}

impl AsFd for EventChannel {
    /// Readable when an event has come.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Reads of it don't block.
fn open() -> io::Result<File> {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(DEVICE)
}
