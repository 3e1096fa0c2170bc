//! What others ask of `dispvmd`. A daemon that is not there, or does not answer in time, is no error: all works without.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use engine::host::HostError;
use engine::identity::CloneNumber;

use super::channel::Channel;
use super::protocol::{Answer, Hello, LifelineHears, LifelineSays, Spare, Status};
pub use super::starter::{hold_spare, start, Held};
use crate::session::Attended;
use crate::state::State;

/// A daemon answers within a millisecond. One that is stopped, or whose machine is out of breath, is not waited for.
const ANSWER_LIMIT: Duration = Duration::from_millis(500);
/// Who asks for the status can wait.
const STATUS_LIMIT: Duration = Duration::from_secs(10);
/// Ending a clone is killing a process, which takes some milliseconds; but its keeper may be at a spill, whose steps have 20 s each.
const END_LIMIT: Duration = Duration::from_secs(30);
/// Stopping a clone's CPUs is as quick as its hypervisor answers; its keeper may be at a spill, as above.
const POWER_LIMIT: Duration = Duration::from_secs(25);
/// The [`super::protocol::PROTOCOL`] from which on a keeper listens to its clone's owner.
const LISTENS_SINCE: u32 = 2;
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
            let (number, listens) = (CloneNumber::new(spare.number), spare.protocol >= LISTENS_SINCE);
            match (number, <[_; 2]>::try_from(fds)) {
                (Some(number), Ok([agent, lifeline])) => Found::Spare(HandedOut {
                    spare,
                    number,
                    agent: agent.into(),
                    lifeline: Lifeline { channel: lifeline.into(), listens },
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
pub struct Lifeline {
    channel: Channel,
    /// Whether the keeper does what it is asked on it.
    listens: bool,
}

impl Lifeline {
    /// Lets the clone go, and waits until it is gone.
    pub fn end(self) -> io::Result<()> {
        self.channel.shut_down_sending()?;
        loop {
            match self.channel.receive_within::<LifelineSays>(END_LIMIT) {
                Ok(Some((LifelineSays::Gone, _)) | None) => return Ok(()),
                Ok(Some(_)) => {}
                // It ends it all the same, only later; what the command has come to is not lost for that.
                Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                    tracing::warn!("the clone's keeper has not ended it within {} s", END_LIMIT.as_secs());
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Has the keeper do something to the clone, and waits until it says `done`.
    fn ask(&self, step: &'static str, what: LifelineHears, done: &LifelineSays) -> Result<(), HostError> {
        let refused = |reason: &str| HostError::Refused { step, reason: reason.to_owned() };
        if !self.listens {
            return Err(refused("it was made as a spare by an older dispvmd"));
        }
        let io = |source| HostError::Io { step, source };
        self.channel.send(&what, &[]).map_err(io)?;
        loop {
            match self.channel.receive_within::<LifelineSays>(POWER_LIMIT).map_err(io)? {
                Some((says, _)) if says == *done => return Ok(()),
                Some((LifelineSays::Refused { reason }, _)) => return Err(refused(&reason)),
                // What an earlier request has come to, for which nobody waited any longer.
                Some((LifelineSays::Paused | LifelineSays::Running, _)) => {}
                over => return Err(end_of(step, over.map(|(says, _)| says))),
            }
        }
    }
}

impl Attended for Lifeline {
    fn events(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }

    fn attend(&mut self) -> Result<(), HostError> {
        let step = "keep the clone";
        match self.channel.receive::<LifelineSays>() {
            Ok(Some((LifelineSays::Paused | LifelineSays::Running | LifelineSays::Refused { .. }, _))) => {
                Ok(())
            }
            Ok(over) => Err(end_of(step, over.map(|(says, _)| says))),
            Err(source) => Err(HostError::Io { step, source }),
        }
    }

    fn pause(&mut self) -> Result<(), HostError> {
        self.ask("pause the disposable", LifelineHears::Pause, &LifelineSays::Paused)
    }

    fn unpause(&mut self) -> Result<(), HostError> {
        self.ask("unpause the disposable", LifelineHears::Unpause, &LifelineSays::Running)
    }
}

/// The error that the clone's end is, by what its keeper said last.
fn end_of(step: &'static str, says: Option<LifelineSays>) -> HostError {
    match says {
        Some(LifelineSays::Failed { reason }) => HostError::Hypervisor { step, message: reason },
        Some(_) => HostError::Gone { step, detail: String::new() },
        None => HostError::Gone { step, detail: ": its keeper was killed".to_owned() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lifeline(listens: bool) -> (Lifeline, Channel) {
        let (channel, keeper) = Channel::pair().unwrap();
        (Lifeline { channel, listens }, keeper)
    }

    #[test]
    fn a_keepers_late_answer_is_not_taken_for_that_to_the_next_request() {
        let (mut lifeline, keeper) = lifeline(true);
        for says in [LifelineSays::Running, LifelineSays::Paused] {
            keeper.send(&says, &[]).unwrap();
        }
        lifeline.pause().unwrap();
        assert_eq!(keeper.receive::<LifelineHears>().unwrap().unwrap().0, LifelineHears::Pause);
        keeper.send(&LifelineSays::Paused, &[]).unwrap();
        lifeline.attend().unwrap();
        keeper.send(&LifelineSays::Refused { reason: "no".into() }, &[]).unwrap();
        assert!(matches!(lifeline.unpause(), Err(HostError::Refused { .. })));
        drop(keeper);
        assert!(matches!(lifeline.attend(), Err(HostError::Gone { .. })));
    }

    #[test]
    fn an_older_keeper_is_asked_nothing_on_the_lifeline() {
        let (mut lifeline, keeper) = lifeline(false);
        assert!(matches!(lifeline.pause(), Err(HostError::Refused { .. })));
        drop(lifeline);
        assert!(keeper.receive::<LifelineHears>().unwrap().is_none());
    }
}
