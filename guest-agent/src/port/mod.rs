//! The byte stream to the host: a virtio-serial port, on Xen a vchan, in tests a socket.
//!
//! Invariants: reads and writes never block. A port has no timers while a host is connected: all that can happen to it shows at its
//! slots of the agent's one poll.

mod stream;
mod vchan;
pub mod xenbus;

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use crate::failure::{Failure, Step};
use crate::sys::{self, PollSlot};
use stream::Stream;
use vchan::Vchan;

const PAGE_BYTES: usize = 4096;

/// Slots of poll that a port has.
pub const SLOTS: usize = 2;

/// An open port.
pub enum Port {
    /// A file.
    Stream(Stream),
    /// Pages shared with dom0.
    Vchan(Box<Vchan>),
}

/// Where the host is to be found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Site {
    /// Behind this virtio port.
    Virtio(PathBuf),
    /// In dom0.
    Xen,
}

/// What a read gave.
#[derive(Debug, PartialEq, Eq)]
pub enum Heard {
    /// So many bytes.
    Bytes(usize),
    /// None now.
    Nothing,
    /// The host is gone.
    Hangup,
}

/// Whether this guest is Xen's.
pub fn on_xen() -> bool {
    fs::read_to_string("/sys/hypervisor/type").is_ok_and(|kind| kind.trim_end() == "xen")
}

impl Site {
    /// Waits until the guest has what leads to its host.
    pub fn find() -> Self {
        if on_xen() {
            Self::Xen
        } else {
            Self::Virtio(Stream::find())
        }
    }
}

impl Port {
    /// Opens the port; the host learns of it. Only one process can have it open.
    pub fn open(site: &Site) -> Result<Self, Failure> {
        match site {
            Site::Virtio(device) => Stream::open(device).map(Self::Stream),
            Site::Xen => Vchan::open().map(Box::new).map(Self::Vchan).step(|| "offer the vchan"),
        }
    }

    /// Takes a connected, non-blocking socket over, whose end is the agent's end.
    pub fn over_socket(socket: OwnedFd) -> Self {
        Self::Stream(Stream::over_socket(socket))
    }

    /// Fills the buffer with what there is: so many bytes, and whether the host is still there. A virtio port gives no more than a page at
    /// a time, and a poll for each would cost as much again; after less than a page there was no more.
    pub fn fill(&mut self, buffer: &mut [u8]) -> (usize, bool) {
        let mut filled = 0;
        while filled < buffer.len() {
            let rest = &mut buffer[filled..];
            let heard = match self {
                Self::Stream(stream) => stream.read(rest),
                Self::Vchan(vchan) => vchan.read(rest),
            };
            match heard {
                Heard::Bytes(count) => filled += count,
                Heard::Nothing => break,
                Heard::Hangup => return (filled, false),
            }
            if filled % PAGE_BYTES != 0 {
                break;
            }
        }
        (filled, true)
    }

    /// Writes once.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Stream(stream) => stream.write(bytes),
            Self::Vchan(vchan) => vchan.write(bytes),
        }
    }

    /// Waits until a host is connected, or may be any moment. `false`: none will ever be.
    pub fn wait_for_host(&mut self) -> io::Result<bool> {
        match self {
            Self::Stream(stream) => stream.wait_for_host(),
            Self::Vchan(vchan) => vchan.wait_for_host().map(|()| true),
        }
    }

    /// Whether it hung up because this guest was suspended: every channel of its has ended then.
    pub fn was_suspended(&mut self) -> bool {
        match self {
            Self::Stream(_) => false,
            Self::Vchan(vchan) => vchan.was_suspended(),
        }
    }

    /// Slots of poll for it. `events`: whether reading and writing are waited for.
    pub fn slots(&self, events: i16) -> [PollSlot; SLOTS] {
        match self {
            Self::Stream(stream) => [stream.slot(events), sys::slot(None, 0)],
            Self::Vchan(vchan) => vchan.slots(),
        }
    }

    /// Whether what is waited for is there already, so that poll is not to wait. Legal just before it.
    pub fn is_ready(&self, events: i16) -> bool {
        match self {
            Self::Stream(_) => false,
            Self::Vchan(vchan) => vchan.is_ready(events),
        }
    }

    /// Whether to read now, from the port's slots after poll.
    pub fn is_heard(&mut self, slots: &[PollSlot], events: i16) -> bool {
        match self {
            Self::Stream(_) => {
                let heard = libc::POLLIN | libc::POLLHUP | libc::POLLERR;
                slots.first().is_some_and(|slot| slot.revents & heard != 0)
            }
            Self::Vchan(vchan) => vchan.is_heard(slots, events),
        }
    }
}
