//! The holder's loop: agent, domain, signals, the main command's caller, the call socket and everybody who came in by it.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use engine::host::HostError;
use engine::timeline::Timeline;
use nix::poll::PollFlags;
use qrexec::{Exec, Failed, GuestFrame, HostFrame, Op, STREAMS_MAX};

use super::command::{Command, Which, Whose};
use super::message::{Answer, Control, Message, Status, CALL_FDS, MESSAGE_BYTES_MAX};
use super::watch::Watch;
use crate::agent_link::{AgentLink, COMMAND_STREAM};
use crate::daemon::channel::{Channel, Listener};
use crate::error::{Error, Result};
use crate::output::error_text;
use crate::session::{Attended, Caller, Ending, SessionError, Signals};
use crate::state::State;

/// Commands of callers at a time: what the agent takes, but for the main one.
pub const CALLS_MAX: usize = STREAMS_MAX - 1;
/// A caller says at once what it wants.
pub const GREETING_LIMIT: Duration = Duration::from_secs(5);
/// Peers that have not said anything yet; more wait outside.
const GREETING_MAX: usize = 64;
/// While nobody can be let in, for want of descriptors.
const LISTEN_PAUSE: Duration = Duration::from_millis(100);
/// No more of anybody's stdin is read while so much waits to be sent: what comes behind it would wait as well.
const STDIN_BACKLOG: usize = 256 << 10;
/// A guest that does not listen is not listened to either, once so much waits for it: each of its frames may cost us an answer.
pub const BACKLOG_MAX: usize = 1 << 20;
/// Frames taken from the agent before others have their turn.
const FRAMES_A_TURN: usize = 256;
/// Streams of calls out of a guest have the bit above.
const STREAM_MAX: u32 = (1 << 31) - 1;
/// How long a domain may take to tell that it has ended once its agent's channel has closed.
const END_LIMIT: Duration = Duration::from_secs(10);

/// A running guest and all calls into it.
pub struct Exchange {
    link: AgentLink,
    hub: Hub,
}

impl Exchange {
    /// For the guest `name`, which takes calls from now on, at its call socket. Whoever calls this holds the name.
    pub fn new(state: &State, name: &str, link: AgentLink) -> Result<Exchange> {
        let socket = Socket::bind(state.call_socket(name))?;
        Ok(Exchange { link, hub: Hub { socket: Some(socket), ..Hub::new() } })
    }

    /// As [`Exchange::new`], but a socket that cannot be had is no reason to give up a guest that runs: it takes no calls then.
    pub fn or_alone(state: &State, name: &str, link: AgentLink) -> Exchange {
        let socket = Socket::bind(state.call_socket(name))
            .map_err(|error| tracing::warn!("{name} takes no calls: {}", error_text(&error)))
            .ok();
        Exchange { link, hub: Hub { socket, ..Hub::new() } }
    }

    /// Carries the streams of all commands until the main one ends, or the guest. With a main caller, its command has been sent to the
    /// agent already, on [`COMMAND_STREAM`]; without one, it goes on until the guest switches itself off or a signal comes.
    pub fn run(
        &mut self,
        domain: &mut dyn Attended,
        main: Option<Caller<'_>>,
        signals: &mut Signals,
        timeline: &mut Timeline,
    ) -> std::result::Result<Ending, SessionError> {
        self.hub.run(&mut self.link, domain, main.as_ref(), signals, timeline)
    }
}

/// The call socket while it is listened at.
struct Socket {
    listener: Listener,
    path: PathBuf,
    /// Until then nobody is let in.
    closed_until: Option<Instant>,
}

impl Socket {
    fn bind(path: PathBuf) -> Result<Socket> {
        let listener = Listener::bind(&path).map_err(Error::io("listen at", &path))?;
        Ok(Socket { listener, path, closed_until: None })
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// What there is beside the agent's channel.
pub(crate) struct Hub {
    socket: Option<Socket>,
    /// Who came in and has said nothing, by their order, and until when they may.
    greeting: BTreeMap<u64, (Channel, Instant)>,
    arrivals: u64,
    commands: BTreeMap<u32, Command>,
    last_stream: u32,
    thawed: bool,
    paused: bool,
    shutting_down: bool,
}

/// What can be ready.
#[derive(Debug, Clone, Copy)]
enum Source {
    Signals,
    Domain,
    Agent,
    Listener,
    Greeting(u64),
    Caller(u32),
    Stream(u32, Which),
}

impl Hub {
    pub(crate) fn new() -> Hub {
        Hub {
            socket: None,
            greeting: BTreeMap::new(),
            arrivals: 0,
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
    ) -> std::result::Result<Ending, SessionError> {
        if let Some(caller) = main {
            let command =
                Command::new(COMMAND_STREAM, Whose::Main, [caller.stdin, caller.stdout, caller.stderr]);
            self.commands.insert(COMMAND_STREAM, command.map_err(io_error("use the caller's streams"))?);
        }
        match self.carry(link, domain, signals, timeline) {
            Err(SessionError::Host(HostError::PoweredOff { .. })) => Ok(Ending::PoweredOff),
            // The agent's channel may close before the host tells that the guest has switched itself off.
            Err(SessionError::Agent(error)) if self.shutting_down || main.is_none() => {
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
    ) -> std::result::Result<Ending, SessionError> {
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
                    Source::Listener => self.let_in(),
                    Source::Greeting(number) => self.greet(number, link, domain)?,
                    // A caller has nothing more to say: what comes is its end.
                    Source::Caller(stream) => self.abandon(stream, link)?,
                    Source::Stream(stream, which) => {
                        let Some(command) = self.commands.get_mut(&stream) else { continue };
                        if command.turn(which, flags, link, &mut polled_used)? {
                            continue;
                        }
                        if command.is_main() {
                            return Ok(Ending::HungUp);
                        }
                        self.abandon(stream, link)?;
                    }
                }
            }
        }
    }

    /// Takes what the agent has said, but not without end.
    fn hear(
        &mut self,
        link: &mut AgentLink,
        timeline: &mut Timeline,
    ) -> std::result::Result<(), SessionError> {
        for _ in 0..FRAMES_A_TURN {
            if link.backlog() > BACKLOG_MAX {
                return Ok(());
            }
            let Some(frame) = link.next_frame()? else { return Ok(()) };
            self.take(frame, link, timeline)?;
        }
        Ok(())
    }

    fn take(
        &mut self,
        frame: GuestFrame,
        link: &mut AgentLink,
        timeline: &mut Timeline,
    ) -> std::result::Result<(), SessionError> {
        let Some(stream) = stream_of(&frame) else { return self.take_control(&frame, timeline) };
        let Some(command) = self.commands.get_mut(&stream) else { return Ok(()) };
        match &frame {
            GuestFrame::Failed { failed, .. } if command.is_main() => {
                return Err(SessionError::NotStarted(failed_text(failed)));
            }
            GuestFrame::Failed { failed, .. } => {
                let reason = failed_text(failed);
                self.commands.remove(&stream).into_iter().for_each(|command| {
                    command.answer(&Answer::NotStarted { reason: reason.clone() });
                });
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

    fn take_control(
        &mut self,
        frame: &GuestFrame,
        timeline: &mut Timeline,
    ) -> std::result::Result<(), SessionError> {
        match frame {
            GuestFrame::Done(Op::Thaw) if !self.thawed => {
                self.thawed = true;
                timeline.mark("thawed");
            }
            GuestFrame::Failed { failed, .. } if failed.op == Some(Op::Shutdown) => {
                self.shutting_down = false;
                tracing::warn!("the guest does not shut down: {}", failed_text(failed));
            }
            GuestFrame::Failed { failed, .. } => return Err(SessionError::NotStarted(failed_text(failed))),
            _ => {}
        }
        Ok(())
    }

    /// Answers those whose command has ended, and ends what has had its time.
    fn settle(&mut self, link: &mut AgentLink) -> std::result::Result<Option<Ending>, SessionError> {
        let ended: Vec<u32> =
            self.commands.iter().filter_map(|(stream, command)| command.ended().map(|_| *stream)).collect();
        for stream in ended {
            let Some(command) = self.commands.remove(&stream) else { continue };
            let Some(exit) = command.ended() else { continue };
            if command.is_main() {
                return Ok(Some(Ending::Exited(exit)));
            }
            command.answer(&Answer::Exited(exit));
        }
        for command in self.commands.values_mut() {
            command.kill_if_due(link)?;
        }
        if !self.greeting.is_empty() {
            let now = Instant::now();
            self.greeting.retain(|_, (_, until)| *until > now);
        }
        Ok(None)
    }

    fn wait(
        &self,
        link: &AgentLink,
        domain: &dyn Attended,
        signals: &Signals,
    ) -> std::result::Result<Vec<(Source, PollFlags)>, SessionError> {
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
        if let Some(Socket { listener, closed_until, .. }) = &self.socket {
            match closed_until.filter(|until| *until > Instant::now()) {
                Some(until) => watch.until(until),
                None if self.greeting.len() < GREETING_MAX => {
                    watch.add(Source::Listener, listener.as_fd(), PollFlags::POLLIN);
                }
                None => {}
            }
        }
        for (number, (channel, until)) in &self.greeting {
            watch.add(Source::Greeting(*number), channel.as_fd(), PollFlags::POLLIN);
            watch.until(*until);
        }
        for (stream, command) in &self.commands {
            watch.add_if(Source::Caller(*stream), command.caller().map(|caller| (caller, PollFlags::POLLIN)));
            for (which, fd, flags) in command.interests(link.backlog() < STDIN_BACKLOG) {
                watch.add(Source::Stream(*stream, which), fd, flags);
            }
            command.deadline().into_iter().for_each(|deadline| watch.until(deadline));
        }
        watch.wait().map_err(|error| io_error("wait")(error.into()))
    }

    fn let_in(&mut self) {
        let Some(socket) = &mut self.socket else { return };
        match socket.listener.accept() {
            Ok(Some(channel)) => {
                self.greeting.insert(self.arrivals, (channel, Instant::now() + GREETING_LIMIT));
                self.arrivals += 1;
            }
            Ok(None) => {}
            Err(error) => {
                tracing::warn!("cannot let a caller in: {error}");
                socket.closed_until = Some(Instant::now() + LISTEN_PAUSE);
            }
        }
    }

    /// Hears what somebody wants. Who says anything else is shown out.
    fn greet(
        &mut self,
        number: u64,
        link: &mut AgentLink,
        domain: &mut dyn Attended,
    ) -> std::result::Result<(), SessionError> {
        let Some((channel, until)) = self.greeting.remove(&number) else { return Ok(()) };
        let (bytes, fds) = match channel.receive_bytes(MESSAGE_BYTES_MAX) {
            Ok(Some(received)) => received,
            Ok(None) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.greeting.insert(number, (channel, until));
                return Ok(());
            }
            Err(error) => {
                tracing::debug!("a caller cannot be heard: {error}");
                return Ok(());
            }
        };
        let answered = match Message::parse(&bytes) {
            Ok(Message::Control(control)) => self.control(control, link, domain)?,
            Ok(Message::Start(exec)) => match self.room() {
                Ok(stream) => {
                    link.queue(&HostFrame::Exec { stream, exec })?;
                    link.queue(&HostFrame::StdinEof { stream })?;
                    self.commands.insert(stream, Command::nobodys(stream, Whose::Nobody { kill_at: None }));
                    Answer::Done
                }
                Err(reason) => Answer::Refused { reason },
            },
            Ok(Message::Call(exec)) => match self.room().and_then(|stream| Ok((stream, three(fds)?))) {
                Ok((stream, fds)) => return self.begin(channel, stream, exec, &fds, link),
                Err(reason) => Answer::Refused { reason },
            },
            Err(error) => Answer::Refused { reason: error.to_string() },
        };
        // One that has gone has no ears.
        let _ = channel.send(&answered, &[]);
        Ok(())
    }

    /// The stream of one more command, or why there is none.
    fn room(&mut self) -> std::result::Result<u32, String> {
        let others = self.commands.values().filter(|command| !command.is_main()).count();
        if self.shutting_down {
            return Err("it is shutting down".to_owned());
        }
        if others >= CALLS_MAX || self.last_stream >= STREAM_MAX {
            return Err(format!("{others} commands of callers run in it already"));
        }
        self.last_stream += 1;
        Ok(self.last_stream)
    }

    /// Starts a caller's command.
    fn begin(
        &mut self,
        caller: Channel,
        stream: u32,
        exec: Box<Exec>,
        fds: &[OwnedFd; CALL_FDS],
        link: &mut AgentLink,
    ) -> std::result::Result<(), SessionError> {
        match Command::new(stream, Whose::Caller(caller), fds.each_ref().map(AsFd::as_fd)) {
            Ok(command) => {
                link.queue(&HostFrame::Exec { stream, exec })?;
                self.commands.insert(stream, command);
            }
            Err(error) => tracing::warn!("cannot use a caller's streams: {error}"),
        }
        Ok(())
    }

    fn abandon(&mut self, stream: u32, link: &mut AgentLink) -> std::result::Result<(), SessionError> {
        self.commands.get_mut(&stream).map_or(Ok(()), |command| command.abandon(link))
    }

    fn control(
        &mut self,
        control: Control,
        link: &mut AgentLink,
        domain: &mut dyn Attended,
    ) -> std::result::Result<Answer, SessionError> {
        let done = match control {
            Control::Status => return Ok(Answer::Status(self.status())),
            Control::Shutdown if self.paused => {
                let reason = "it is paused, and must run to shut down".to_owned();
                return Ok(Answer::Refused { reason });
            }
            Control::Shutdown => {
                if !std::mem::replace(&mut self.shutting_down, true) {
                    link.queue(&HostFrame::Shutdown)?;
                }
                Ok(())
            }
            Control::Pause => domain.pause().map(|()| self.paused = true),
            Control::Unpause => domain.unpause().map(|()| self.paused = false),
        };
        Ok(match done {
            Ok(()) => Answer::Done,
            Err(error) => Answer::Refused { reason: error.to_string() },
        })
    }

    fn status(&self) -> Status {
        Status {
            paused: self.paused,
            shutting_down: self.shutting_down,
            commands: self.commands.len(),
            calls_out: 0,
        }
    }
}

fn three(fds: Vec<OwnedFd>) -> std::result::Result<[OwnedFd; CALL_FDS], String> {
    fds.try_into().map_err(|_| "a call comes with stdin, stdout and stderr".to_owned())
}

/// Waits for the domain to say how it ended: `Some` when the guest has switched itself off, or a signal came.
fn await_off(
    domain: &mut dyn Attended,
    signals: &mut Signals,
) -> std::result::Result<Option<Ending>, SessionError> {
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

/// The stream of a command's frame.
fn stream_of(frame: &GuestFrame) -> Option<u32> {
    match frame {
        GuestFrame::Stdout { stream, .. }
        | GuestFrame::Stderr { stream, .. }
        | GuestFrame::StdoutEof { stream }
        | GuestFrame::StderrEof { stream }
        | GuestFrame::StdinCredit { stream, .. }
        | GuestFrame::StdinClosed { stream }
        | GuestFrame::Exited { stream, .. } => Some(*stream),
        GuestFrame::Failed { stream, .. } => Some(*stream).filter(|stream| *stream != 0),
        GuestFrame::Hello(_) | GuestFrame::Done(_) | GuestFrame::Pong(_) | GuestFrame::FreeMemory(_) => None,
    }
}

fn failed_text(failed: &Failed) -> String {
    format!("{}: {}", failed.step, failed.message)
}

fn io_error(step: &'static str) -> impl FnOnce(io::Error) -> SessionError {
    move |source| SessionError::Io { step, source }
}
