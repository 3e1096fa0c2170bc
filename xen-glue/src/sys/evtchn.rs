//! An event channel of this machine's domain to another one: `/dev/xen/evtchn` (Linux's `include/uapi/xen/evtchn.h`).

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

use super::ioctl;
use crate::hypercalls::DomId;

const DEVICE: &str = "/dev/xen/evtchn";
const BIND_INTERDOMAIN: u64 = 0x8_4501;
const NOTIFY: u64 = 0x4_4504;

/// A bound event channel; dropping unbinds it.
#[derive(Debug)]
pub struct EventChannel {
    file: File,
    port: u32,
}

impl EventChannel {
    /// Binds to a port that a domain has offered to this one.
    pub fn bind(domid: DomId, remote_port: u32) -> io::Result<EventChannel> {
        let options = libc::O_NONBLOCK | libc::O_CLOEXEC;
        let file = OpenOptions::new().read(true).write(true).custom_flags(options).open(DEVICE)?;
        let mut remote = [u32::from(domid.0), remote_port];
        // SAFETY: the request reads two u32, domain and port, which `remote` is.
        let port = unsafe { ioctl(file.as_fd(), BIND_INTERDOMAIN, remote.as_mut_ptr()) }?;
        Ok(EventChannel { file, port: port as u32 })
    }

    /// The port here.
    pub fn port(&self) -> u32 {
        self.port
    }

    /// Notifies the other domain.
    pub fn notify(&self) -> io::Result<()> {
        let mut port = self.port;
        // SAFETY: the request reads one u32, the port.
        unsafe { ioctl(self.file.as_fd(), NOTIFY, &mut port) }?;
        Ok(())
    }

    /// Takes the events that have come and lets more come.
    pub fn take(&self) -> io::Result<()> {
        let mut ports = [0; 64];
        match (&self.file).read(&mut ports) {
            Ok(count) => (&self.file).write_all(&ports[..count]),
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
