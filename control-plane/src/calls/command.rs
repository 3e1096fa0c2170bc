//! A command in the guest, and whose it is: its three streams, and how it ends.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use call_channel::port::Port;
use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::signal::Signal;
use qrexec::{Exit, GuestFrame, HostFrame};

use super::flow::{Heard, Input, Output, Wrote, READ_BYTES};
use super::message::Answer;
use crate::agent_link::AgentLink;
use crate::daemon::channel::Channel;
use crate::session::SessionError;

/// How long a command may take to end after a signal that should end it, before SIGKILL.
const TERM_LIMIT: Duration = Duration::from_secs(5);

/// Which of a command's streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Which {
    Stdin,
    Stdout,
    Stderr,
}

/// Who waits for a command.
#[derive(Debug)]
pub(super) enum Whose {
    /// The holder itself: what it is there for.
    Main,
    /// Somebody at the call socket.
    Caller(Channel),
    /// Nobody, or nobody any more.
    Nobody,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Command {
    stream: u32,
    pub(super) whose: Whose,
    stdin: Input,
    stdout: Output,
    stderr: Output,
    exit: Option<Exit>,
    /// When it gets SIGKILL, if it is still there.
    kill_at: Option<Instant>,
    /// Whether it was told that nobody reads what it writes.
    knows: bool,
    /// Whether it has said anything on stdout.
    pub(super) has_spoken: bool,
}

impl Command {
    pub(super) fn new(
        stream: u32,
        whose: Whose,
        [stdin, stdout, stderr]: [BorrowedFd<'_>; 3],
    ) -> std::io::Result<Command> {
        let ports =
            (Port::patient_input(stdin)?, Port::patient_output(stdout)?, Port::patient_output(stderr)?);
        Ok(Command {
            stdin: Input::new(Some(ports.0)),
            stdout: Output::new(Some(ports.1)),
            stderr: Output::new(Some(ports.2)),
            ..Command::nobodys(stream, whose)
        })
    }

    /// One with nothing to read, whose output nobody hears.
    pub(super) fn nobodys(stream: u32, whose: Whose) -> Command {
        Command {
            stream,
            whose,
            stdin: Input::new(None),
            stdout: Output::new(None),
            stderr: Output::new(None),
            exit: None,
            kill_at: None,
            knows: false,
            has_spoken: false,
        }
    }

    pub(super) fn is_main(&self) -> bool {
        matches!(self.whose, Whose::Main)
    }

    /// How it ended, once all that it wrote is with its reader.
    pub(super) fn ended(&self) -> Option<Exit> {
        self.exit.filter(|_| self.stdout.is_done() && self.stderr.is_done())
    }

    /// What to wait for. Of stdin nothing, when too much waits for the guest already.
    pub(super) fn interests(
        &self,
        hears_stdin: bool,
    ) -> impl Iterator<Item = (Which, BorrowedFd<'_>, PollFlags)> {
        let stdin = self.stdin.interest().filter(|_| hears_stdin && self.exit.is_none());
        let interests = [
            (Which::Stdin, stdin),
            (Which::Stdout, self.stdout.interest()),
            (Which::Stderr, self.stderr.interest()),
        ];
        interests.into_iter().filter_map(|(which, interest)| interest.map(|(fd, flags)| (which, fd, flags)))
    }

    /// The socket of its caller, whose end is the caller's.
    pub(super) fn caller(&self) -> Option<BorrowedFd<'_>> {
        match &self.whose {
            Whose::Caller(channel) => Some(channel.as_fd()),
            Whose::Main | Whose::Nobody => None,
        }
    }

    /// Takes a frame of its stream.
    pub(super) fn take(&mut self, frame: GuestFrame, link: &mut AgentLink) -> Result<(), SessionError> {
        match frame {
            // What comes after its last frame is nothing.
            _ if self.exit.is_some() => {}
            GuestFrame::Stdout { bytes, .. } => {
                self.has_spoken = true;
                let credit = self.stdout.receive(bytes)?;
                self.pay(Which::Stdout, credit, link)?;
                self.tell_if_unread(Which::Stdout, link)?;
            }
            GuestFrame::Stderr { bytes, .. } => {
                let credit = self.stderr.receive(bytes)?;
                self.pay(Which::Stderr, credit, link)?;
                self.tell_if_unread(Which::Stderr, link)?;
            }
            GuestFrame::StdoutEof { .. } if !self.is_main() => self.stdout.end(),
            GuestFrame::StderrEof { .. } if !self.is_main() => self.stderr.end(),
            GuestFrame::StdinCredit { bytes, .. } => self.stdin.credit(bytes)?,
            GuestFrame::StdinClosed { .. } => drop(self.stdin.close()),
            GuestFrame::Exited { exit, .. } => {
                self.exit = Some(exit);
                self.stdout.end();
                self.stderr.end();
            }
            _ => {}
        }
        Ok(())
    }

    /// Moves what a ready descriptor has, or takes. `Ok(false)`: nobody reads what the main command writes.
    pub(super) fn turn(
        &mut self,
        which: Which,
        flags: PollFlags,
        link: &mut AgentLink,
        polled_used: &mut bool,
    ) -> Result<bool, SessionError> {
        let output = match which {
            Which::Stdin => return self.read(link).map(|()| true),
            Which::Stdout => &mut self.stdout,
            Which::Stderr => &mut self.stderr,
        };
        match output.write(flags, polled_used) {
            Wrote::On(credit) => self.pay(which, credit, link).map(|()| true),
            Wrote::NoReader if self.is_main() => Ok(false),
            Wrote::Failed(error) if self.is_main() => Err(output_error(error)),
            Wrote::NoReader | Wrote::Failed(_) => self.lose_reader(which, link).map(|()| true),
        }
    }

    /// What it writes from here on is thrown away; if it writes more, it is told.
    fn lose_reader(&mut self, which: Which, link: &mut AgentLink) -> Result<(), SessionError> {
        let output = if which == Which::Stdout { &mut self.stdout } else { &mut self.stderr };
        let waited = !output.is_done();
        let credit = output.close();
        self.pay(which, credit, link)?;
        if waited {
            self.tell_if_unread(which, link)?;
        }
        Ok(())
    }

    /// As with a pipe, who writes what nobody reads gets SIGPIPE; and since it sees no error afterwards, SIGKILL if that does not end it.
    fn tell_if_unread(&mut self, which: Which, link: &mut AgentLink) -> Result<(), SessionError> {
        let output = if which == Which::Stdout { &self.stdout } else { &self.stderr };
        if output.has_reader() || self.knows || self.caller().is_none() {
            return Ok(());
        }
        self.knows = true;
        self.end_by(Signal::SIGPIPE, link)
    }

    fn end_by(&mut self, signal: Signal, link: &mut AgentLink) -> Result<(), SessionError> {
        self.kill_at.get_or_insert(Instant::now() + TERM_LIMIT);
        if self.exit.is_none() {
            link.queue(&HostFrame::Signal { stream: self.stream, signal: signal as u8 })?;
        }
        Ok(())
    }

    fn read(&mut self, link: &mut AgentLink) -> Result<(), SessionError> {
        let mut buffer = [0; READ_BYTES];
        match self.stdin.read(&mut buffer) {
            Heard::Nothing => {}
            Heard::Bytes(bytes) => link.queue_stdin(self.stream, bytes),
            Heard::End => link.queue(&HostFrame::StdinEof { stream: self.stream })?,
        }
        Ok(())
    }

    fn pay(&self, which: Which, credit: Option<u32>, link: &mut AgentLink) -> Result<(), SessionError> {
        let stream = self.stream;
        match (which, credit) {
            (Which::Stdout, Some(bytes)) => link.queue(&HostFrame::StdoutCredit { stream, bytes })?,
            (Which::Stderr, Some(bytes)) => link.queue(&HostFrame::StderrCredit { stream, bytes })?,
            _ => {}
        }
        Ok(())
    }

    /// Its caller has gone: it is told to end, and what it still writes is thrown away.
    pub(super) fn abandon(&mut self, link: &mut AgentLink) -> Result<(), SessionError> {
        self.whose = Whose::Nobody;
        self.end_by(Signal::SIGTERM, link)?;
        if self.stdin.close() {
            link.queue(&HostFrame::StdinEof { stream: self.stream })?;
        }
        let (stdout, stderr) = (self.stdout.close(), self.stderr.close());
        self.pay(Which::Stdout, stdout, link)?;
        self.pay(Which::Stderr, stderr, link)
    }

    /// When it has to be looked at again at the latest.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.kill_at
    }

    /// Kills it, if it was told to end long enough before `now`.
    pub(super) fn kill_if_due(&mut self, now: Instant, link: &mut AgentLink) -> Result<(), SessionError> {
        if self.kill_at.is_some_and(|kill_at| kill_at <= now) {
            self.kill_at = None;
            link.queue(&HostFrame::Signal { stream: self.stream, signal: Signal::SIGKILL as u8 })?;
        }
        Ok(())
    }

    /// Tells whoever waits, after their descriptors are closed.
    pub(super) fn answer(self, answer: &Answer) {
        let Command { whose, stdin, stdout, stderr, .. } = self;
        drop((stdin, stdout, stderr));
        if let Whose::Caller(channel) = whose {
            // One that has gone has no ears.
            let _ = channel.send(answer, &[]);
        }
    }
}

fn output_error(error: Errno) -> SessionError {
    SessionError::Io { step: "write the command's output", source: error.into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use qrexec::Decoder;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_command_whose_caller_has_gone_has_its_time_to_end_and_is_killed_then() {
        let (ours, mut agent) = UnixStream::pair().unwrap();
        agent.set_nonblocking(true).unwrap();
        ours.set_nonblocking(true).unwrap();
        let mut link = AgentLink::new(Box::new(ours));
        let mut decoder = Decoder::new();
        let mut hear = |link: &mut AgentLink| {
            link.flush().unwrap();
            let mut bytes = [0; 256];
            let count = agent.read(&mut bytes).unwrap_or(0);
            let (mut bytes, mut frames) = (&bytes[..count], Vec::new());
            while let Some(raw) = decoder.next(&mut bytes).unwrap() {
                frames.push(HostFrame::parse(raw).unwrap());
            }
            frames
        };
        let signal = |signal: Signal| HostFrame::Signal { stream: 7, signal: signal as u8 };
        let mut command = Command::nobodys(7, Whose::Nobody);
        let told = Instant::now();
        command.abandon(&mut link).unwrap();
        assert_eq!(hear(&mut link), [signal(Signal::SIGTERM)]);
        let due = command.deadline().unwrap();
        assert!(due >= told + TERM_LIMIT && due <= Instant::now() + TERM_LIMIT);
        command.kill_if_due(due - Duration::from_millis(1), &mut link).unwrap();
        assert_eq!(hear(&mut link), []);
        command.kill_if_due(due, &mut link).unwrap();
        assert_eq!((hear(&mut link), command.deadline()), (vec![signal(Signal::SIGKILL)], None));
        command.kill_if_due(due + TERM_LIMIT, &mut link).unwrap();
        assert_eq!(hear(&mut link), [], "once is enough");
    }
}
