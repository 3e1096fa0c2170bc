//! The channel to a guest's agent: the client's end of a vchan, carried over to a socket.
//!
//! Clones change hands between processes, and what changes hands is a descriptor. A vchan is memory and an event channel of one
//! process; so a thread of whoever holds the domain carries its bytes to and from one end of a socket pair, and the other end is what
//! everybody else knows.
//!
//! Invariants:
//! - the thread ends, and with it every mapping of the guest's pages, when the [`Channel`] is dropped, when either side hangs up, and
//!   when the guest breaks the ring: a domain with mapped pages cannot go;
//! - it never waits while holding bytes that the other side could take, and holds no more than [`pump::BUFFER_BYTES`] each way.

mod link;
mod pump;

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use crate::hypercalls::DomId;
use pump::Pump;

/// What the thread is told, one byte each; its end of the pair being closed means: end.
const LET_GO: u8 = b'L';
/// And what it answers.
const DONE: u8 = b'D';

/// A channel that waits for the guest's offer, or is connected.
pub struct Channel {
    control: Option<UnixStream>,
    connected: Arc<OnceLock<Instant>>,
    thread: Option<JoinHandle<()>>,
}

impl Channel {
    /// Opens the channel to a domain's agent; returns at once, with the other end of it.
    pub fn open(domid: DomId) -> io::Result<(UnixStream, Channel)> {
        let (theirs, ours) = UnixStream::pair()?;
        let (control, commands) = UnixStream::pair()?;
        let connected = Arc::new(OnceLock::new());
        let pump = Pump::new(domid, ours, commands, connected.clone())?;
        let thread = Builder::new().name("agent".to_owned()).spawn(move || pump.run())?;
        Ok((theirs, Channel { control: Some(control), connected, thread: Some(thread) }))
    }

    /// When the guest's offer was taken.
    pub fn connected_at(&self) -> Option<Instant> {
        self.connected.get().copied()
    }

    /// Delivers what is under way, hangs up, and waits until the guest holds nothing of the channel any more, so that it can be
    /// captured. The channel is of no use afterwards.
    pub fn let_go(&mut self, limit: Duration) -> io::Result<()> {
        let Some(control) = &mut self.control else { return Ok(()) };
        control.set_read_timeout(Some(limit))?;
        control.write_all(&[LET_GO])?;
        let mut answer = [0];
        match control.read(&mut answer) {
            Ok(1) if answer[0] == DONE => Ok(()),
            Ok(_) => Err(io::Error::new(io::ErrorKind::ConnectionReset, "the channel had broken before")),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(io::ErrorKind::TimedOut.into()),
            Err(error) => Err(error),
        }
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        drop(self.control.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
