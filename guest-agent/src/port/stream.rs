//! A port that the kernel has made a file of: a virtio-serial port, and in tests a socket.
//!
//! Invariant: while no host is connected a virtio port is always "readable" and reads give 0, so it is never polled for reading then,
//! but asked again after growing pauses.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use super::Heard;
use crate::failure::{Failure, Step};
use crate::sys::{self, PollSlot};

/// The port's name, given on the hypervisor's command line.
const NAME: &str = "dispvm.agent";
const PORTS: &str = "/sys/class/virtio-ports";
/// The port's driver may be a module that is still being loaded.
const PORT_PAUSE: Duration = Duration::from_millis(20);
const HOST_PAUSE_MIN: Duration = Duration::from_millis(1);
const HOST_PAUSE_MAX: Duration = Duration::from_millis(50);

/// An open port.
pub struct Stream {
    file: File,
    hangup: Hangup,
}

/// What the host's going means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hangup {
    /// Another one may come: a virtio port.
    HostMayReturn,
    /// That was it: a socket.
    Final,
}

impl Stream {
    /// Waits until the guest's port exists and gives its device.
    pub fn find() -> PathBuf {
        loop {
            if let Some(device) = find_by_name(Path::new(PORTS)) {
                return device;
            }
            sleep(PORT_PAUSE);
        }
    }

    /// Opens a virtio port; the host learns of it. Only one process can have it open.
    pub fn open(device: &Path) -> Result<Self, Failure> {
        let options = libc::O_NONBLOCK | libc::O_CLOEXEC;
        let file = OpenOptions::new().read(true).write(true).custom_flags(options).open(device);
        let file = file.step(|| format!("open {}", device.display()))?;
        Ok(Self { file, hangup: Hangup::HostMayReturn })
    }

    /// Takes a connected, non-blocking socket over.
    pub fn over_socket(socket: OwnedFd) -> Self {
        Self { file: socket.into(), hangup: Hangup::Final }
    }

    /// Reads once.
    pub fn read(&self, buffer: &mut [u8]) -> Heard {
        match (&self.file).read(buffer) {
            Ok(0) => Heard::Hangup,
            Ok(count) => Heard::Bytes(count),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                Heard::Nothing
            }
            Err(_) => Heard::Hangup,
        }
    }

    /// Writes once.
    pub fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        (&self.file).write(bytes)
    }

    /// Waits until a host is connected. `false`: none will ever be.
    pub fn wait_for_host(&self) -> io::Result<bool> {
        if self.hangup == Hangup::Final {
            return Ok(false);
        }
        let mut pause = HOST_PAUSE_MIN;
        while !self.has_host()? {
            sleep(pause);
            pause = (pause * 2).min(HOST_PAUSE_MAX);
        }
        Ok(true)
    }

    /// A slot of poll for it.
    pub fn slot(&self, events: i16) -> PollSlot {
        sys::slot(Some(self.file.as_fd()), events)
    }

    fn has_host(&self) -> io::Result<bool> {
        let mut slots = [self.slot(libc::POLLOUT)];
        sys::poll(&mut slots, Some(0))?;
        Ok(slots[0].revents & libc::POLLHUP == 0)
    }
}

fn find_by_name(ports: &Path) -> Option<PathBuf> {
    for entry in fs::read_dir(ports).ok()?.flatten() {
        let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        let device = Path::new("/dev").join(entry.file_name());
        if name.trim_end() == NAME && device.exists() {
            return Some(device);
        }
    }
    None
}
