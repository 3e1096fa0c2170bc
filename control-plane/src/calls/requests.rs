//! What callers at the call socket want, and what they get.

use std::os::fd::{AsFd, OwnedFd};

use qrexec::service::CommandLine;
use qrexec::{Exec, HostFrame, CALL_STREAM, STREAMS_MAX};

use super::command::{Command, Whose};
use super::exchange::{Ended, Hub};
use super::message::{Answer, Control, Message, Status, CALL_FDS};
use super::reception::Wish;
use super::service;
use crate::agent_link::AgentLink;
use crate::daemon::channel::Channel;
use crate::output::error_text;
use crate::session::Attended;

/// Commands of callers at a time: what the agent takes, but for the main one.
pub const CALLS_MAX: usize = STREAMS_MAX - 1;

impl Hub {
    /// Does what somebody at the call socket wants.
    pub(super) fn grant(&mut self, wish: Wish, link: &mut AgentLink, domain: &mut dyn Attended) -> Ended<()> {
        let Wish { whose, message, fds } = wish;
        let answer = match message {
            Ok(Message::Control(control)) => self.control(control, link, domain)?,
            Ok(Message::Start(exec)) => match self.room() {
                Ok(stream) => {
                    link.queue(&HostFrame::Exec { stream, exec })?;
                    link.queue(&HostFrame::StdinEof { stream })?;
                    self.commands.insert(stream, Command::nobodys(stream, Whose::Nobody));
                    Answer::Done
                }
                Err(reason) => Answer::Refused { reason },
            },
            Ok(Message::Call(exec)) => match three(fds).and_then(|fds| Ok((fds, self.room()?))) {
                Ok((fds, stream)) => return self.begin(whose, stream, exec, &fds, link),
                Err(reason) => Answer::Refused { reason },
            },
            Ok(Message::Line(line)) => match self.room() {
                Ok(stream) => return self.begin_line(whose, stream, line, fds, link),
                Err(reason) => Answer::Refused { reason },
            },
            Err(error) => Answer::Refused { reason: error.to_string() },
        };
        // One that has gone has no ears.
        let _ = whose.send(&answer, &[]);
        Ok(())
    }

    /// Starts a caller's command, over a channel of its own if it can have one.
    fn begin_line(
        &mut self,
        caller: Channel,
        stream: u32,
        line: CommandLine,
        fds: Vec<OwnedFd>,
        link: &mut AgentLink,
    ) -> Ended<()> {
        if self.wire.takes(&line) {
            self.wire.begin(caller, line);
            return Ok(());
        }
        let started = three(fds).and_then(|fds| {
            let exec = service::line(&line).map_err(|error| error_text(&error))?;
            Ok((fds, Box::new(exec)))
        });
        match started {
            Ok((fds, exec)) => self.begin(caller, stream, exec, &fds, link),
            Err(reason) => {
                let _ = caller.send(&Answer::Refused { reason }, &[]);
                Ok(())
            }
        }
    }

    /// The stream of one more command, or why there is none.
    fn room(&mut self) -> std::result::Result<u32, String> {
        let framed = self.commands.values().filter(|command| !command.is_main()).count();
        let others = framed + self.wire.counts().0;
        if self.shutting_down {
            return Err("it is shutting down".to_owned());
        }
        if others >= CALLS_MAX || self.last_stream >= CALL_STREAM - 1 {
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
    ) -> Ended<()> {
        match Command::new(stream, Whose::Caller(caller), fds.each_ref().map(AsFd::as_fd)) {
            Ok(command) => {
                link.queue(&HostFrame::Exec { stream, exec })?;
                self.commands.insert(stream, command);
            }
            Err(error) => tracing::warn!("cannot use a caller's streams: {error}"),
        }
        Ok(())
    }

    fn control(
        &mut self,
        control: Control,
        link: &mut AgentLink,
        domain: &mut dyn Attended,
    ) -> Ended<Answer> {
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
            commands: self.commands.len() + self.wire.counts().0,
            calls_out: self.outgoing.count() + self.wire.counts().1,
        }
    }
}

fn three(fds: Vec<OwnedFd>) -> std::result::Result<[OwnedFd; CALL_FDS], String> {
    fds.try_into().map_err(|_| "a call comes with stdin, stdout and stderr".to_owned())
}
