//! Calls by Qubes' own protocol, each over a vchan of its own: what the holder of a guest does of it, which is qrexec-daemon's part.
//!
//! A call's bytes never come by here. Who carries them, the caller's process or that of a service, serves a vchan to the guest and says where its
//! pages are; the holder puts that into xenstore and has the agent connect. What it talks to the agent about is on one channel, which a thread
//! joins to a socket.
//!
//! Invariants: the guest is hostile.
//! - What it says is bounded by the messages' parsing, what it can have us start by [`CALLS_OUT_MAX`], and what waits for it by [`BACKLOG_MAX`]:
//!   beyond that it is not heard. What is refused is not logged at its speed.
//! - A port that is none of a call's is nothing. What the agent says of one ends that call at most.
//! - A channel that breaks the protocol is given up; calls that have a vchan go on, and later ones go by the frames of our own agent, as those
//!   do of guests that offer no such channel. So do callers' commands once xenstore has failed to tell the guest of one.
//! - No node outlives its call, nor the guest: what a killed holder leaves goes with the domain's.
//!
//! | module | what is in it |
//! |---|---|
//! | [`control`] | messages with the agent (pure) |
//! | [`ports`] | which ports are free (pure) |
//! | `calls` | the calls that are under way |
//! | `xen` | the guest's domain |
//!
//! [`CALLS_OUT_MAX`]: super::outgoing::CALLS_OUT_MAX
//! [`BACKLOG_MAX`]: super::exchange::BACKLOG_MAX

mod calls;
pub mod control;
pub mod ports;
mod xen;

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::poll::PollFlags;
use qrexec::service::CommandLine;
use qrexec::stock::WireError;
use vchan::link::Offer;

use super::exchange::BACKLOG_MAX;
use super::outgoing::Outgoing;
use crate::daemon::channel::Channel;
use crate::state::State;
use calls::Calls;
use control::{Control, Heard};

/// The channel is opened so long after the guest runs freely: a launch of one short command is over by then, and pays nothing.
const SETTLE: Duration = Duration::from_millis(250);
/// One that has hung up, as that of an agent that is started again, is looked for once more after so long.
const AGAIN: Duration = Duration::from_secs(5);
/// It doubles up to this with each channel that did not last so long: a guest may end as many as it likes.
const AGAIN_MAX: Duration = Duration::from_secs(300);

/// A guest with a channel for each call, as its host reaches it.
pub trait Vchans: Send {
    /// The domain's number, to which pages are granted.
    fn domain(&self) -> u16;
    /// Begins to look for the agent's control channel: a socket that does not block and is joined to it once it is there, and what joins
    /// them until it is dropped.
    fn control(&mut self) -> io::Result<(UnixStream, Box<dyn Send>)>;
    /// Tells the guest of a vchan that is served at a port of ours.
    fn publish(&mut self, port: u32, offer: Offer) -> io::Result<()>;
    /// Takes that back.
    fn withdraw(&mut self, port: u32) -> io::Result<()>;
}

/// Finds the guest when it is wanted; `None`: it is of a host without vchans.
pub type Finder = Box<dyn FnOnce() -> io::Result<Option<Box<dyn Vchans>>> + Send>;

/// See the module.
pub(super) struct Wire {
    finder: Option<Finder>,
    guest: Option<Box<dyn Vchans>>,
    channel: Option<Joined>,
    opens: Option<Instant>,
    again: Duration,
    calls: Calls,
}

/// The control channel.
struct Joined {
    stream: UnixStream,
    control: Control,
    since: Instant,
    _keep: Box<dyn Send>,
}

/// What can be ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Control,
    Call(u64, calls::Part),
}

/// What the hub has to do then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wants {
    Nothing,
    /// To ask the agent that it offers its control channel.
    Offer,
}

impl Wire {
    /// For the guest that `finder` finds, held as `caller`.
    pub(super) fn new(finder: Option<Finder>, caller: (State, String)) -> Wire {
        Wire { finder, guest: None, channel: None, opens: None, again: AGAIN, calls: Calls::of(Some(caller)) }
    }

    /// None at all.
    pub(super) fn none() -> Wire {
        Wire { finder: None, guest: None, channel: None, opens: None, again: AGAIN, calls: Calls::of(None) }
    }

    /// The guest runs freely now.
    pub(super) fn thawed(&mut self) {
        if self.finder.is_some() {
            self.opens = Some(Instant::now() + SETTLE);
        }
    }

    /// The agent cannot offer its channel. Told once, whatever the guest repeats.
    pub(super) fn not_offered(&mut self, why: &str) {
        if self.channel.take_if(|joined| !joined.control.is_agreed()).is_some() {
            tracing::info!("the guest's calls have no channels of their own: {why}");
        }
    }

    /// Commands of callers, and calls of the guest's own.
    pub(super) fn counts(&self) -> (usize, usize) {
        self.calls.counts()
    }

    /// Opens the channel if it is time, and ends what has had its time.
    pub(super) fn settle(&mut self) -> Wants {
        self.calls.kill_those_due();
        self.with_guest(|calls, guest, _| calls.expire(guest));
        if self.opens.is_none_or(|opens| opens > Instant::now()) {
            return Wants::Nothing;
        }
        self.opens = None;
        match self.open() {
            Ok(true) => Wants::Offer,
            Ok(false) => Wants::Nothing,
            Err(error) => {
                tracing::warn!("calls have no channels of their own: {error}");
                if self.guest.is_some() {
                    self.open_later();
                }
                Wants::Nothing
            }
        }
    }

    fn open(&mut self) -> io::Result<bool> {
        if let Some(finder) = self.finder.take() {
            self.guest = finder()?;
        }
        let Some(guest) = &mut self.guest else { return Ok(false) };
        let (stream, keep) = guest.control()?;
        self.channel = Some(Joined { stream, control: Control::new(), since: Instant::now(), _keep: keep });
        Ok(true)
    }

    /// Whether a caller's command can have a channel of its own now.
    pub(super) fn takes(&self, line: &CommandLine) -> bool {
        let agreed = self.channel.as_ref().is_some_and(|joined| joined.control.is_agreed());
        agreed && self.guest.is_some() && self.calls.has_port() && Control::takes(line.to_bytes().len())
    }

    /// Takes a caller's command.
    pub(super) fn begin(&mut self, caller: Channel, line: CommandLine) {
        self.with_guest(|calls, guest, _| calls.begin(caller, line, guest.domain()));
    }

    pub(super) fn interests(&self) -> Vec<(Part, BorrowedFd<'_>, PollFlags)> {
        let mut interests: Vec<_> = self
            .calls
            .interests()
            .map(|(number, part, fd, flags)| (Part::Call(number, part), fd, flags))
            .collect();
        if let Some(Joined { stream, control, .. }) = &self.channel {
            let waiting = control.unsent().len();
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::POLLIN, waiting <= BACKLOG_MAX);
            flags.set(PollFlags::POLLOUT, waiting > 0);
            interests.push((Part::Control, stream.as_fd(), flags));
        }
        interests
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        self.opens.into_iter().chain(self.calls.deadline()).min()
    }

    /// Does what a ready descriptor is for. Calls of the guest's that go the `other` way count as well.
    pub(super) fn turn(&mut self, part: Part, other: &mut Outgoing) {
        match part {
            Part::Control => self.hear(other),
            Part::Call(number, part) => self.with_guest(|calls, guest, control| {
                calls.turn(number, part, guest, control, &mut other.refusals);
            }),
        }
        self.flush();
    }

    fn with_guest(&mut self, run: impl FnOnce(&mut Calls, &mut dyn Vchans, Option<&mut Control>)) {
        if let Some(guest) = &mut self.guest {
            run(&mut self.calls, &mut **guest, self.channel.as_mut().map(|joined| &mut joined.control));
        }
    }

    /// Takes what the agent has said, one piece: others have their turn then.
    fn hear(&mut self, other: &mut Outgoing) {
        let (Some(guest), Some(joined)) = (&mut self.guest, &mut self.channel) else { return };
        if joined.control.unsent().len() > BACKLOG_MAX {
            return;
        }
        let mut buffer = [0; 16 << 10];
        let input = match joined.stream.read(&mut buffer) {
            Ok(0) => return self.lose(),
            Ok(count) => buffer.get(..count).unwrap_or_default(),
            Err(error) if is_passing(&error) => return,
            Err(_) => return self.lose(),
        };
        if let Err(error) = take(&mut self.calls, &mut **guest, &mut joined.control, input, other) {
            self.give_up(&error);
        }
    }

    fn flush(&mut self) {
        let Some(Joined { stream, control, .. }) = &mut self.channel else { return };
        while !control.unsent().is_empty() {
            match stream.write(control.unsent()) {
                Ok(count @ 1..) => control.sent(count),
                Err(error) if is_passing(&error) => return,
                Ok(_) | Err(_) => return self.lose(),
            }
        }
    }

    /// The agent has hung up. Another may be started in its place.
    fn lose(&mut self) {
        if self.channel.take().is_some_and(|joined| joined.since.elapsed() >= AGAIN_MAX) {
            self.again = AGAIN;
        }
        self.calls.lose_agent();
        self.open_later();
    }

    fn open_later(&mut self) {
        self.opens = Some(Instant::now() + self.again);
        self.again = (self.again * 2).min(AGAIN_MAX);
    }

    fn give_up(&mut self, error: &WireError) {
        tracing::warn!("the guest's calls have no channels of their own any more: {error}");
        self.channel = None;
        self.calls.lose_agent();
    }
}

fn take(
    calls: &mut Calls,
    guest: &mut dyn Vchans,
    control: &mut Control,
    mut input: &[u8],
    other: &mut Outgoing,
) -> Result<(), WireError> {
    while let Some(heard) = control.hear(&mut input)? {
        match heard {
            Heard::Agreed(version) => {
                calls.renew_agent();
                tracing::debug!("each call has a channel now ({version:?})");
            }
            Heard::Nonsense(request) => {
                other.refusals.log("a call was refused whose names cannot be");
                control.refuse(request)?;
            }
            Heard::Asked(asked) => {
                if let Err(request) = calls.ask(asked, guest.domain(), other) {
                    control.refuse(request)?;
                }
            }
            Heard::Terminated(port) => calls.terminated(port),
        }
    }
    Ok(())
}

fn is_passing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.with_guest(|calls, guest, _| calls.withdraw_all(guest));
    }
}
