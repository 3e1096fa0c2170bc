//! The holder's loop: agent, domain, signals, the main command's caller, the call socket and everybody who came in by it, and calls of the
//! guest's own.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use engine::host::HostError;
use engine::timeline::Timeline;
use nix::poll::PollFlags;
use qrexec::{Failed, GuestFrame, HostFrame, Op, CALL_STREAM};

use super::command::{Command, Which, Whose};
use super::message::Answer;
use super::outgoing::{Outgoing, Part};
use super::reception::Reception;
use super::watch::Watch;
use super::wire::{self, Finder, Wants, Wire};
use crate::agent_link::{AgentLink, COMMAND_STREAM};
use crate::error::Result;
use crate::output::error_text;
use crate::session::{Attended, Caller, Ending, SessionError, Signals};
use crate::state::State;

/// No more of anybody's input is read while so much waits to be sent: what comes behind it would wait as well.
const INPUT_BACKLOG: usize = 256 << 10;
/// A guest that does not listen is not listened to either, once so much waits for it: each of its frames may cost us an answer.
pub const BACKLOG_MAX: usize = 1 << 20;
/// Frames taken from the agent before others have their turn.
const FRAMES_A_TURN: usize = 256;
/// How long a domain may take to tell that it has ended once its agent's channel has closed.
const END_LIMIT: Duration = Duration::from_secs(10);

pub(super) type Ended<T> = std::result::Result<T, SessionError>;

/// A running guest and all calls into it and out of it.
pub struct Exchange {
    link: AgentLink,
    hub: Hub,
}

impl Exchange {
    /// For the guest `name`, which takes calls from now on, at its call socket, and makes them under that name. Whoever calls this
    /// holds the name.
    pub fn new(state: &State, name: &str, link: AgentLink) -> Result<Exchange> {
        let reception = Reception::open(state.call_socket(name))?;
        Ok(Exchange { link, hub: Hub::new(Some(reception), Outgoing::of(state, name)) })
    }

    /// The same, with a channel for each call where the guest that `finder` finds has them.
    pub fn with_channels(mut self, state: &State, name: &str, finder: Option<Finder>) -> Exchange {
        self.hub.wire = Wire::new(finder, (state.clone(), name.to_owned()));
        self
    }

    /// The same, but a socket that cannot be had is no reason to give up a guest that runs: it takes no calls then.
    pub fn or_without_calls(state: &State, name: &str, link: AgentLink) -> Exchange {
        let reception = Reception::open(state.call_socket(name))
            .map_err(|error| tracing::warn!("{name} takes no calls: {}", error_text(&error)));
        Exchange { link, hub: Hub::new(reception.ok(), Outgoing::of(state, name)) }
    }

    /// Carries the streams of all commands until the main one ends, or the guest. With a main caller, its command has been sent to the
    /// agent already, on [`COMMAND_STREAM`]; without one, it goes on until the guest switches itself off or a signal comes.
    pub fn run(
        &mut self,
        domain: &mut dyn Attended,
        main: Option<Caller<'_>>,
        signals: &mut Signals,
        timeline: &mut Timeline,
    ) -> Ended<Ending> {
        self.hub.run(&mut self.link, domain, main.as_ref(), signals, timeline)
    }
}

/// What there is beside the agent's channel.
pub(crate) struct Hub {
    reception: Option<Reception>,
    pub(super) outgoing: Outgoing,
    pub(super) wire: Wire,
    pub(super) commands: BTreeMap<u32, Command>,
    pub(super) last_stream: u32,
    thawed: bool,
    pub(super) paused: bool,
    pub(super) shutting_down: bool,
}

/// What can be ready.
#[derive(Debug, Clone, Copy)]
enum Source {
    Signals,
    Domain,
    Agent,
    Door,
    Greeting(u64),
    Caller(u32),
    Stream(u32, Which),
    Outgoing(u32, Part),
    Wire(wire::Part),
}

impl Hub {
    /// For a guest that neither takes calls nor makes any.
    pub(crate) fn alone() -> Hub {
        Hub::new(None, Outgoing::refused())
    }

    fn new(reception: Option<Reception>, outgoing: Outgoing) -> Hub {
        Hub {
            reception,
            outgoing,
            wire: Wire::none(),
            commands: BTreeMap::new(),
            last_stream: COMMAND_STREAM,
            thawed: false,
            paused: false,
            shutting_down: false,
        }
    }

    /// See [`Exchange::run`].
    pub(crate) fn run(
        &mut self,
        link: &mut AgentLink,
        domain: &mut dyn Attended,
        main: Option<&Caller<'_>>,
        signals: &mut Signals,
        timeline: &mut Timeline,
    ) -> Ended<Ending> {
        if let Some(caller) = main {
            let fds = [caller.stdin, caller.stdout, caller.stderr];
            let command = Command::new(COMMAND_STREAM, Whose::Main, fds);
            self.commands.insert(COMMAND_STREAM, command.map_err(io_error("use the caller's streams"))?);
        }
        match self.carry(link, domain, signals, timeline) {
            Err(SessionError::Host(HostError::PoweredOff { .. })) => Ok(Ending::PoweredOff),
            // The agent's channel may close before the host tells that the guest has switched itself off.
            Err(SessionError::Agent(error)) if link.is_closed() && (self.shutting_down || main.is_none()) => {
                await_off(domain, signals)?.ok_or(SessionError::Agent(error))
            }
            ended => ended,
        }
    }

    fn carry(
        &mut self,
        link: &mut AgentLink,
        domain: &mut dyn Attended,
        signals: &mut Signals,
        timeline: &mut Timeline,
    ) -> Ended<Ending> {
        loop {
            self.hear(link, timeline)?;
            if let Some(ending) = self.settle(link)? {
                return Ok(ending);
            }
            link.flush()?;
            let mut polled_used = false;
            for (source, flags) in self.wait(link, &*domain, signals)? {
                match source {
                    Source::Signals => {
                        if let Some(signal) = signals.pending() {
                            return Ok(Ending::Signal(signal));
                        }
                    }
                    Source::Domain => domain.attend()?,
                    Source::Agent => {}
                    Source::Door => self.reception.iter_mut().for_each(Reception::let_in),
                    Source::Greeting(number) => {
                        if let Some(wish) =
                            self.reception.as_mut().and_then(|reception| reception.hear(number))
                        {
                            self.grant(wish, link, domain)?;
                        }
                    }
                    // A caller has nothing more to say: what comes is its end.
                    Source::Caller(stream) => self.abandon(stream, link)?,
                    Source::Stream(stream, which) => {
                        let Some(command) = self.commands.get_mut(&stream) else { continue };
                        if !command.turn(which, flags, link, &mut polled_used)? {
                            return Ok(Ending::HungUp);
                        }
                    }
                    Source::Outgoing(stream, part) => self.outgoing.turn(stream, part, flags, link)?,
                    Source::Wire(part) => self.wire.turn(part, &mut self.outgoing),
                }
            }
        }
    }

    /// Takes what the agent has said, but not without end.
    fn hear(&mut self, link: &mut AgentLink, timeline: &mut Timeline) -> Ended<()> {
        for _ in 0..FRAMES_A_TURN {
            if link.backlog() > BACKLOG_MAX {
                return Ok(());
            }
            let Some(frame) = link.next_frame()? else { return Ok(()) };
            match stream_of(&frame) {
                0 => self.take_control(&frame, timeline)?,
                CALL_STREAM.. => {
                    self.outgoing.elsewhere = self.wire.counts().1;
                    self.outgoing.take(frame, link)?;
                }
                stream => self.take(stream, frame, link, timeline)?,
            }
        }
        Ok(())
    }

    fn take(
        &mut self,
        stream: u32,
        frame: GuestFrame,
        link: &mut AgentLink,
        timeline: &mut Timeline,
    ) -> Ended<()> {
        let Some(command) = self.commands.get_mut(&stream) else { return Ok(()) };
        match &frame {
            GuestFrame::Failed { failed, .. } if command.is_main() => {
                return Err(SessionError::NotStarted(failed_text(failed)));
            }
            GuestFrame::Failed { failed, .. } => {
                let reason = failed_text(failed);
                if let Some(command) = self.commands.remove(&stream) {
                    command.answer(&Answer::NotStarted { reason });
                }
                return Ok(());
            }
            GuestFrame::Stdout { .. } if command.is_main() && !command.has_spoken => {
                timeline.mark("first_byte");
            }
            GuestFrame::Exited { .. } if command.is_main() => timeline.mark("exited"),
            _ => {}
        }
        command.take(frame, link)
    }

    fn take_control(&mut self, frame: &GuestFrame, timeline: &mut Timeline) -> Ended<()> {
        match frame {
            GuestFrame::Done(Op::Thaw) if !self.thawed => {
                self.thawed = true;
                self.wire.thawed();
                timeline.mark("thawed");
            }
            GuestFrame::Failed { failed, .. } if failed.op == Some(Op::Shutdown) => self.stay_up(failed),
            GuestFrame::Failed { failed, .. } if failed.op == Some(Op::ServeCalls) => {
                self.wire.not_offered(&failed_text(failed));
            }
            GuestFrame::Failed { failed, .. } => return Err(SessionError::NotStarted(failed_text(failed))),
            _ => {}
        }
        Ok(())
    }

    /// The guest does not shut down. Told once for each time that it was asked, lest a guest fill the log.
    fn stay_up(&mut self, failed: &Failed) {
        if std::mem::take(&mut self.shutting_down) {
            tracing::warn!("the guest does not shut down: {}", failed_text(failed));
        }
    }

    /// Answers those whose command has ended, and ends what has had its time.
    fn settle(&mut self, link: &mut AgentLink) -> Ended<Option<Ending>> {
        let ended = |(stream, command): (&u32, &Command)| command.ended().map(|exit| (*stream, exit));
        let ended: Vec<_> = self.commands.iter().filter_map(ended).collect();
        for (stream, exit) in ended {
            let Some(command) = self.commands.remove(&stream) else { continue };
            if command.is_main() {
                return Ok(Some(Ending::Exited(exit)));
            }
            command.answer(&Answer::Exited(exit));
        }
        let now = Instant::now();
        for command in self.commands.values_mut() {
            command.kill_if_due(now, link)?;
        }
        self.outgoing.do_what_is_due();
        if self.wire.settle() == Wants::Offer {
            link.queue(&HostFrame::ServeCalls)?;
        }
        self.reception.iter_mut().for_each(Reception::expire);
        Ok(None)
    }

    fn abandon(&mut self, stream: u32, link: &mut AgentLink) -> Ended<()> {
        self.commands.get_mut(&stream).map_or(Ok(()), |command| command.abandon(link))
    }

    fn wait(
        &self,
        link: &AgentLink,
        domain: &dyn Attended,
        signals: &Signals,
    ) -> Ended<Vec<(Source, PollFlags)>> {
        let mut watch = Watch::new();
        watch.add(Source::Signals, signals.as_fd(), PollFlags::POLLIN);
        watch.add(Source::Domain, domain.events(), PollFlags::POLLIN);
        let hears = link.backlog() <= BACKLOG_MAX;
        let mut agent = PollFlags::empty();
        agent.set(PollFlags::POLLIN, hears);
        agent.set(PollFlags::POLLOUT, link.wants_to_send());
        watch.add(Source::Agent, link.as_fd(), agent);
        if hears && link.has_frames() {
            watch.until(Instant::now());
        }
        if let Some(reception) = &self.reception {
            match reception.door() {
                Ok(listener) => watch.add(Source::Door, listener, PollFlags::POLLIN),
                Err(opens) => opens.into_iter().for_each(|opens| watch.until(opens)),
            }
            for (number, channel, until) in reception.greeting() {
                watch.add(Source::Greeting(number), channel, PollFlags::POLLIN);
                watch.until(until);
            }
        }
        let takes_input = link.backlog() < INPUT_BACKLOG;
        for (stream, command) in &self.commands {
            if let Some(caller) = command.caller() {
                watch.add(Source::Caller(*stream), caller, PollFlags::POLLIN);
            }
            for (which, fd, flags) in command.interests(takes_input) {
                watch.add(Source::Stream(*stream, which), fd, flags);
            }
            command.deadline().into_iter().for_each(|deadline| watch.until(deadline));
        }
        for (stream, part, fd, flags) in self.outgoing.interests(takes_input) {
            watch.add(Source::Outgoing(stream, part), fd, flags);
        }
        self.outgoing.deadline().into_iter().for_each(|deadline| watch.until(deadline));
        for (part, fd, flags) in self.wire.interests() {
            watch.add(Source::Wire(part), fd, flags);
        }
        self.wire.deadline().into_iter().for_each(|deadline| watch.until(deadline));
        watch.wait().map_err(|error| io_error("wait")(error.into()))
    }
}

/// Waits for the domain to say how it ended: `Some` when the guest has switched itself off, or a signal came.
fn await_off(domain: &mut dyn Attended, signals: &mut Signals) -> Ended<Option<Ending>> {
    let deadline = Instant::now() + END_LIMIT;
    while Instant::now() < deadline {
        let mut watch = Watch::new();
        watch.add(Source::Signals, signals.as_fd(), PollFlags::POLLIN);
        watch.add(Source::Domain, domain.events(), PollFlags::POLLIN);
        watch.until(deadline);
        for (source, _) in watch.wait().map_err(|error| io_error("wait")(error.into()))? {
            match (source, signals.pending()) {
                (_, Some(signal)) => return Ok(Some(Ending::Signal(signal))),
                (Source::Domain, None) => match domain.attend() {
                    Ok(()) => {}
                    Err(HostError::PoweredOff { .. }) => return Ok(Some(Ending::PoweredOff)),
                    Err(error) => return Err(error.into()),
                },
                _ => {}
            }
        }
    }
    Ok(None)
}

/// The stream of a frame, 0 for control.
fn stream_of(frame: &GuestFrame) -> u32 {
    use GuestFrame::*;
    match frame {
        Hello(_) | Done(_) | Pong(_) | FreeMemory(_) => 0,
        Failed { stream, .. }
        | Stdout { stream, .. }
        | Stderr { stream, .. }
        | StdoutEof { stream }
        | StderrEof { stream }
        | StdinCredit { stream, .. }
        | StdinClosed { stream }
        | Exited { stream, .. }
        | Call { stream, .. }
        | CallStdin { stream, .. }
        | CallStdinEof { stream }
        | CallStdoutCredit { stream, .. }
        | CallStderrCredit { stream, .. }
        | CallHangup { stream } => *stream,
    }
}

fn failed_text(failed: &Failed) -> String {
    format!("{}: {}", failed.step, failed.message)
}

fn io_error(step: &'static str) -> impl FnOnce(io::Error) -> SessionError {
    move |source| SessionError::Io { step, source }
}
