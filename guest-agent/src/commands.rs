//! The commands that run, by stream.
//!
//! Invariants: at most [`STREAMS_MAX`] at a time. Frames for a stream that is no more are ignored: they were under way when it ended.

use std::io::IoSlice;
use std::os::fd::OwnedFd;
use std::time::Instant;

use qrexec::{Exec, GuestFrame, HostFrame, Op, ProtocolError, STREAMS_MAX};

use crate::command::{Command, NotStarted, SLOTS};
use crate::failure::Failure;
use crate::outbox::{Outbox, ROOM};
use crate::place::Place;
use crate::sys::PollSlot;

/// A table of commands.
#[derive(Default)]
pub struct Commands {
    running: Vec<Command>,
}

impl Commands {
    /// Does what a command's frame says; other frames are not for here.
    pub fn handle(
        &mut self,
        frame: HostFrame,
        place: &Place,
        outbox: &mut Outbox,
    ) -> Result<(), ProtocolError> {
        match frame {
            HostFrame::Exec { stream, exec } => return self.start(stream, *exec, place, None, outbox),
            HostFrame::StdinEof { stream } => self.find(stream).into_iter().for_each(Command::stdin_eof),
            HostFrame::StdoutCredit { stream, bytes } => {
                self.find(stream).map_or(Ok(()), |command| command.stdout_credit(bytes))?;
            }
            HostFrame::StderrCredit { stream, bytes } => {
                self.find(stream).map_or(Ok(()), |command| command.stderr_credit(bytes))?;
            }
            HostFrame::Signal { stream, signal } => {
                self.find(stream).into_iter().for_each(|command| command.signal(signal.into()));
            }
            _ => {}
        }
        Ok(())
    }

    /// Bytes for a command's stdin.
    pub fn stdin(
        &mut self,
        stream: u32,
        pieces: &[IoSlice<'_>],
        outbox: &mut Outbox,
    ) -> Result<(), ProtocolError> {
        self.find(stream).map_or(Ok(()), |command| command.stdin(pieces, outbox))
    }

    /// Starts a command; what keeps it from starting is told on its stream.
    pub fn start(
        &mut self,
        stream: u32,
        exec: Exec,
        place: &Place,
        keep: Option<&OwnedFd>,
        outbox: &mut Outbox,
    ) -> Result<(), ProtocolError> {
        self.start_by(stream, outbox, || Command::start(stream, exec, place, keep))
    }

    /// Starts a command by `start`; what keeps it from starting is told on its stream.
    pub fn start_by(
        &mut self,
        stream: u32,
        outbox: &mut Outbox,
        start: impl FnOnce() -> Result<Command, NotStarted>,
    ) -> Result<(), ProtocolError> {
        if self.find(stream).is_some() {
            return Err(ProtocolError::Malformed { frame: "Exec", what: "the stream is in use" });
        }
        let started = if self.running.len() < STREAMS_MAX {
            start()
        } else {
            Err(Failure::ours("start a process", libc::EAGAIN, "64 commands are running").into())
        };
        match started {
            Ok(command) => self.running.push(command),
            Err(NotStarted::Exit(exit)) => outbox.push(&GuestFrame::Exited { stream, exit }),
            Err(NotStarted::Failure(failure)) => {
                outbox.push(&GuestFrame::Failed { stream, failed: failure.into_frame(Some(Op::Exec)) })
            }
        }
        Ok(())
    }

    /// Whether the host waits for any.
    pub fn any(&self) -> bool {
        self.running.iter().any(|command| command.stream().is_some())
    }

    /// How many there are, those included that have only to be reaped.
    pub fn count(&self) -> usize {
        self.running.len()
    }

    /// Kills all of them; they stay until they are reaped.
    pub fn abandon(&mut self) {
        self.running.iter_mut().for_each(Command::abandon);
    }

    /// Takes over what has been abandoned elsewhere, to reap it.
    pub fn adopt(&mut self, others: &mut Self) {
        self.running.append(&mut others.running);
    }

    /// Appends what they wait for.
    pub fn watch(&self, slots: &mut Vec<PollSlot>, outbox: &Outbox) {
        let room = outbox.waiting() < ROOM;
        slots.extend(self.running.iter().flat_map(|command| command.slots(room)));
    }

    /// When they have to be looked at even if nothing happens.
    pub fn deadline(&self) -> Option<Instant> {
        self.running.iter().filter_map(Command::deadline).min()
    }

    /// Serves all, with the slots that [`watch`](Self::watch) appended, and takes the slots off the front of `ready`. Where the outbox is
    /// full before all had their turn, another is the first of the next.
    pub fn serve(&mut self, ready: &mut &[PollSlot], outbox: &mut Outbox) {
        self.running.retain_mut(|command| {
            let (slots, rest) = ready.split_at(SLOTS.min(ready.len()));
            *ready = rest;
            !command.serve(slots, outbox)
        });
        if outbox.waiting() >= ROOM && !self.running.is_empty() {
            self.running.rotate_left(1);
        }
    }

    fn find(&mut self, stream: u32) -> Option<&mut Command> {
        self.running.iter_mut().find(|command| command.stream() == Some(stream))
    }
}
