//! What others ask of `dispvmd`. A daemon that is not there, or does not answer in time, is no error: all works without.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use engine::host::HostError;
use engine::identity::CloneNumber;

use super::channel::Channel;
use super::protocol::{Answer, Hello, LifelineSays, Spare, Status};
pub use super::starter::start;
use crate::session::Attended;
use crate::state::State;

/// A daemon answers within a millisecond. One that is stopped, or whose machine is out of breath, is not waited for.
const ANSWER_LIMIT: Duration = Duration::from_millis(500);
/// Who asks for the status can wait.
const STATUS_LIMIT: Duration = Duration::from_secs(10);
/// Ending a clone is killing a process, which takes some milliseconds; but its keeper may be at a spill, whose steps have 20 s each.
const END_LIMIT: Duration = Duration::from_secs(30);
/// Until its spares are gone.
const LET_GO_LIMIT: Duration = Duration::from_secs(10);

/// What the daemon has for a launcher.
pub enum Found {
    /// A clone that waits for its owner.
    Spare(HandedOut),
    /// No spare.
    None {
        /// Whether the daemon has the savefile rebuilt.
        rebuilding: bool,
    },
    /// No daemon.
    NoDaemon,
}

/// A clone that was handed out. It lives as long as the lifeline.
pub struct HandedOut {
    /// What it is.
    pub spare: Spare,
    /// The number in its name.
    pub number: CloneNumber,
    /// The channel to its agent.
    pub agent: UnixStream,
    /// What holds it.
    pub lifeline: Lifeline,
}

/// Asks for a clone of `dvm`, made under `settings`; without one, for the rebuild of its savefile, if that does not serve.
pub fn spare(state: &State, dvm: &str, settings: String, rebuild: bool) -> Found {
    match ask(state, &Hello::Spare { dvm: dvm.to_owned(), settings, rebuild }, ANSWER_LIMIT) {
        Ok((Answer::Spare(spare), fds)) => {
            let number = CloneNumber::new(spare.number);
            match (number, <[_; 2]>::try_from(fds)) {
                (Some(number), Ok([agent, lifeline])) => Found::Spare(HandedOut {
                    spare,
                    number,
                    agent: agent.into(),
                    lifeline: Lifeline(lifeline.into()),
                }),
                _ => Found::NoDaemon,
            }
        }
        Ok((Answer::None { rebuilding }, _)) => Found::None { rebuilding },
        Ok(_) => Found::NoDaemon,
        Err(error) => {
            if !is_nobody(&error) {
                tracing::debug!("dispvmd: {error}");
            }
            Found::NoDaemon
        }
    }
}

/// How all stands; `None` without a daemon. Errors: there is one, and it does not answer.
pub fn status(state: &State) -> io::Result<Option<Status>> {
    match ask(state, &Hello::Status, STATUS_LIMIT) {
        Ok((Answer::Status(status), _)) => Ok(Some(status)),
        Ok(_) => Err(io::ErrorKind::InvalidData.into()),
        Err(error) if is_nobody(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Has the daemon, if there is one, end its spares of `dvm`, and make no more for a while.
pub fn let_go(state: &State, dvm: &str) {
    let _ = ask(state, &Hello::LetGo { dvm: dvm.to_owned() }, LET_GO_LIMIT);
}

/// Tells the daemon, if there is one, that a record has changed.
pub fn changed(state: &State) {
    let _ = ask(state, &Hello::Changed, ANSWER_LIMIT);
}

/// Whether an error only says that no daemon is there.
pub(super) fn is_nobody(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
}

fn ask(state: &State, hello: &Hello, limit: Duration) -> io::Result<(Answer, Vec<std::os::fd::OwnedFd>)> {
    let daemon = Channel::connect(&state.daemon_socket())?;
    daemon.send(hello, &[])?;
    daemon.receive_within(limit)?.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

/// What holds a clone that was handed out: when it ends, so does the clone.
pub struct Lifeline(Channel);

impl Lifeline {
    /// Lets the clone go, and waits until it is gone.
    pub fn end(self) -> io::Result<()> {
        self.0.shut_down_sending()?;
        loop {
            match self.0.receive_within::<LifelineSays>(END_LIMIT) {
                Ok(Some((LifelineSays::Gone, _)) | None) => return Ok(()),
                Ok(Some((LifelineSays::Failed { .. }, _))) => {}
                // It ends it all the same, only later; what the command has come to is not lost for that.
                Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                    tracing::warn!("the clone's keeper has not ended it within {} s", END_LIMIT.as_secs());
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        }
    }
}

impl Attended for Lifeline {
    fn events(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    fn attend(&mut self) -> Result<(), HostError> {
        let step = "keep the clone";
        match self.0.receive::<LifelineSays>() {
            Ok(Some((LifelineSays::Failed { reason }, _))) => {
                Err(HostError::Hypervisor { step, message: reason })
            }
            Ok(Some((LifelineSays::Gone, _))) => Err(HostError::Gone { step, detail: String::new() }),
            Ok(None) => Err(HostError::Gone { step, detail: ": its keeper was killed".to_owned() }),
            Err(source) => Err(HostError::Io { step, source }),
        }
    }

    fn pause(&mut self) -> Result<(), HostError> {
        Err(not_ours("pause the disposable"))
    }

    fn unpause(&mut self) -> Result<(), HostError> {
        Err(not_ours("unpause the disposable"))
    }
}

/// What a keeper's clone cannot be asked for by way of its lifeline.
fn not_ours(step: &'static str) -> HostError {
    HostError::Refused { step, reason: "it was made as a spare, and its keeper does not do that".to_owned() }
}
