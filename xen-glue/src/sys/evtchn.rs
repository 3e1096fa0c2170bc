<<<<<<< HEAD
//! Event channels: `/dev/xen/evtchn` (`include/uapi/xen/evtchn.h`).

use std::fs::File;
=======
//! An event channel of this machine's domain to another one: `/dev/xen/evtchn` (Linux's `include/uapi/xen/evtchn.h`).

use std::fs::{File, OpenOptions};
>>>>>>> vchan
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

use super::ioctl;
use crate::hypercalls::DomId;

const DEVICE: &str = "/dev/xen/evtchn";
<<<<<<< HEAD
const BIND_INTERDOMAIN: u64 = 0x84501;
const NOTIFY: u64 = 0x44504;

#[repr(C)]
struct BindInterdomain {
    domain: u32,
    port: u32,
}

#[repr(C)]
struct Notify {
    port: u32,
}

/// One event channel to another domain. Dropping it closes it.
pub struct EventChannel {
    device: File,
=======
const BIND_INTERDOMAIN: u64 = 0x8_4501;
const NOTIFY: u64 = 0x4_4504;

/// A bound event channel; dropping unbinds it.
#[derive(Debug)]
pub struct EventChannel {
    file: File,
>>>>>>> vchan
    port: u32,
}

impl EventChannel {
<<<<<<< HEAD
    /// Binds to a port that the domain has open for us.
    pub fn bind(domid: DomId, remote: u32) -> io::Result<EventChannel> {
        let options = libc::O_NONBLOCK | libc::O_CLOEXEC;
        let device = File::options().read(true).write(true).custom_flags(options).open(DEVICE)?;
        let mut argument = BindInterdomain { domain: domid.0.into(), port: remote };
        // SAFETY: the request reads the argument only, which outlives it.
        let port = unsafe { ioctl(device.as_fd(), BIND_INTERDOMAIN, &mut argument) }?;
        Ok(EventChannel { device, port: port as u32 })
    }

    /// Our port.
=======
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
>>>>>>> vchan
    pub fn port(&self) -> u32 {
        self.port
    }

<<<<<<< HEAD
    /// Tells the other side.
    pub fn notify(&self) -> io::Result<()> {
        let mut argument = Notify { port: self.port };
        // SAFETY: the request reads the argument only, which outlives it.
        unsafe { ioctl(self.device.as_fd(), NOTIFY, &mut argument) }?;
        Ok(())
    }

    /// Takes the events that have come, and lets further ones come. Never blocks.
    pub fn clear(&self) -> io::Result<()> {
        let mut port = [0; 4];
        match (&self.device).read(&mut port) {
            Ok(4) => (&self.device).write_all(&port),
            Ok(_) => Ok(()),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                Ok(())
            }
=======
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
>>>>>>> vchan
            Err(error) => Err(error),
        }
    }
}

impl AsFd for EventChannel {
    /// Readable when an event has come.
    fn as_fd(&self) -> BorrowedFd<'_> {
<<<<<<< HEAD
        self.device.as_fd()
=======
        self.file.as_fd()
>>>>>>> vchan
    }
}
