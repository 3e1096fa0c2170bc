//! The call socket, and who came in by it and has said nothing yet.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::message::{Message, MessageError, MESSAGE_BYTES_MAX};
use crate::daemon::channel::{Channel, Listener};
use crate::error::{Error, Result};

/// A caller says at once what it wants.
pub const GREETING_LIMIT: Duration = Duration::from_secs(5);
/// Peers that have not said anything yet; more wait outside.
const GREETING_MAX: usize = 64;
/// While nobody can be let in, for want of descriptors.
const LISTEN_PAUSE: Duration = Duration::from_millis(100);

/// See the module. Dropping it takes the socket away.
pub(super) struct Reception {
    listener: Listener,
    path: PathBuf,
    /// Until then nobody is let in.
    closed_until: Option<Instant>,
    /// In the order in which they came, and until when they may say something.
    greeting: BTreeMap<u64, (Channel, Instant)>,
    arrivals: u64,
}

/// What somebody wants, and the descriptors with it.
pub(super) struct Wish {
    pub(super) whose: Channel,
    pub(super) message: std::result::Result<Message, MessageError>,
    pub(super) fds: Vec<OwnedFd>,
}

impl Reception {
    /// Listens at `path`, instead of whoever may have listened there: the caller holds the guest's name.
    pub(super) fn open(path: PathBuf) -> Result<Reception> {
        let listener = Listener::bind(&path).map_err(Error::io("listen at", &path))?;
        Ok(Reception { listener, path, closed_until: None, greeting: BTreeMap::new(), arrivals: 0 })
    }

    /// The listener, if somebody may come in now; else the moment from which on, if time is all that is missing.
    pub(super) fn door(&self) -> std::result::Result<BorrowedFd<'_>, Option<Instant>> {
        match self.closed_until.filter(|until| *until > Instant::now()) {
            Some(until) => Err(Some(until)),
            None if self.greeting.len() >= GREETING_MAX => Err(None),
            None => Ok(self.listener.as_fd()),
        }
    }

    /// Those who have said nothing yet.
    pub(super) fn greeting(&self) -> impl Iterator<Item = (u64, BorrowedFd<'_>, Instant)> {
        self.greeting.iter().map(|(number, (channel, until))| (*number, channel.as_fd(), *until))
    }

    pub(super) fn let_in(&mut self) {
        match self.listener.accept() {
            Ok(Some(channel)) => {
                self.greeting.insert(self.arrivals, (channel, Instant::now() + GREETING_LIMIT));
                self.arrivals += 1;
            }
            Ok(None) => {}
            Err(error) => {
                tracing::warn!("cannot let a caller in: {error}");
                self.closed_until = Some(Instant::now() + LISTEN_PAUSE);
            }
        }
    }

    /// Hears somebody. Who has hung up, or says what cannot be taken in, is gone.
    pub(super) fn hear(&mut self, number: u64) -> Option<Wish> {
        let (whose, until) = self.greeting.remove(&number)?;
        match whose.receive_bytes(MESSAGE_BYTES_MAX) {
            Ok(Some((bytes, fds))) => Some(Wish { whose, message: Message::parse(&bytes), fds }),
            Ok(None) => None,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.greeting.insert(number, (whose, until));
                None
            }
            Err(error) => {
                tracing::debug!("a caller cannot be heard: {error}");
                None
            }
        }
    }

    /// Shows those out who have had their time.
    pub(super) fn expire(&mut self) {
        if !self.greeting.is_empty() {
            let now = Instant::now();
            self.greeting.retain(|_, (_, until)| *until > now);
        }
    }
}

impl Drop for Reception {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}
