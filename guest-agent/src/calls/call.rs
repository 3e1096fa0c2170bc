//! One program in the guest that calls, or wants to.
//!
//! Invariants:
//! - The agent's own pipes carry the call's bytes, and the program gets their other ends: no descriptor of the program's is ever read,
//!   written or waited for, but for the socket.
//! - The program's hanging up is told once. Then the call is kept for the host's last frame of it alone, so that what the host counts is
//!   counted here too.

use std::io::IoSlice;
use std::os::fd::{AsFd, OwnedFd};

use qrexec::{kind, Call as Wanted, GuestFrame, HostFrame, ProtocolError};

use super::message::{self, Answer};
use super::Other;
use crate::failure::Failure;
use crate::flow::{pipe_from, pipe_to, News, Sink, Source};
use crate::outbox::{Outbox, Taken};
use crate::sys::{self, PollSlot};

/// Slots of poll that each call has: the program's socket, stdin, stdout, stderr.
pub const SLOTS: usize = 4;

/// A call, from the program's connecting on.
pub struct Call {
    client: Option<OwnedFd>,
    /// As long as the host knows of it.
    stream: Option<u32>,
    state: State,
}

const NOT_NOW: ProtocolError = ProtocolError::Malformed { frame: "Call…", what: "not now" };

enum State {
    /// The program has not said what it wants.
    Silent,
    /// The host decides.
    Asked,
    /// Bytes flow.
    Accepted(Flow),
    /// The service has ended; what it wrote still goes to the program, and then this status.
    Ended(Flow, u8),
    /// The program has been told all, or is gone.
    Over,
}

struct Flow {
    stdin: Source,
    stdout: Sink,
    stderr: Sink,
}

impl Call {
    /// A program has connected.
    pub fn new(client: OwnedFd) -> Self {
        Self { client: Some(client), stream: None, state: State::Silent }
    }

    /// Whether it has said nothing yet.
    pub fn is_silent(&self) -> bool {
        matches!(self.state, State::Silent)
    }

    /// Whether neither program nor host will hear of it again.
    pub fn is_over(&self) -> bool {
        self.client.is_none() && self.stream.is_none()
    }

    /// The stream, as long as the host knows of the call.
    pub fn stream(&self) -> Option<u32> {
        self.stream
    }

    /// Hears what the program wants, if it has said so, and asks the host, or has the `other` way take it. `true`: the stream is used.
    pub fn ask(&mut self, stream: u32, outbox: &mut Outbox, other: &mut dyn Other) -> bool {
        let Some(client) = &self.client else { return false };
        let said = match message::hear(client) {
            Ok(None) => return false,
            Ok(Some(said)) => said,
            Err(_) => {
                self.hang_up(outbox);
                return false;
            }
        };
        match Wanted::decode(&said) {
            Ok(call) if other.takes_calls() => {
                self.state = State::Over;
                self.client.take().into_iter().for_each(|client| other.begin(client, &call));
                false
            }
            Ok(call) => {
                outbox.push(&GuestFrame::Call { stream, call });
                (self.stream, self.state) = (Some(stream), State::Asked);
                true
            }
            Err(error) => {
                self.dismiss(&Answer::Problem(error.to_string()));
                false
            }
        }
    }

    /// What the host says of it.
    pub fn handle(&mut self, frame: HostFrame, outbox: &mut Outbox) -> Result<(), ProtocolError> {
        match (frame, &mut self.state) {
            (HostFrame::CallRefused { .. }, State::Asked) => {
                self.stream = None;
                self.dismiss(&Answer::Refused);
            }
            (HostFrame::CallExited { exit, .. }, State::Asked) => {
                self.stream = None;
                self.dismiss(&Answer::Exited(exit.status()));
            }
            (HostFrame::CallRefused { .. } | HostFrame::CallExited { .. }, State::Over) => self.stream = None,
            (_, State::Over) => {} // Under way when the program hung up.
            (HostFrame::CallAccepted { .. }, State::Asked) => self.accept(outbox),
            (HostFrame::CallExited { exit, .. }, State::Accepted(_)) => {
                self.stream = None;
                self.end(exit.status());
            }
            (frame, State::Accepted(flow)) => {
                flow.handle(frame)?;
            }
            _ => return Err(NOT_NOW),
        }
        Ok(())
    }

    /// Bytes that the service has written.
    pub fn output(
        &mut self,
        kind: u16,
        pieces: &[IoSlice<'_>],
        outbox: &mut Outbox,
    ) -> Result<(), ProtocolError> {
        match (&mut self.state, self.stream) {
            (State::Over, _) => Ok(()), // Under way when the program hung up.
            (State::Accepted(flow), Some(stream)) => flow.output(kind, pieces, stream, outbox),
            _ => Err(NOT_NOW),
        }
    }

    /// The program is gone, or is to be: the host gets to know.
    pub fn hang_up(&mut self, outbox: &mut Outbox) {
        let was_there = self.client.take().is_some();
        self.state = State::Over;
        if let Some(stream) = self.stream.filter(|_| was_there) {
            outbox.push(&GuestFrame::CallHangup { stream });
        }
    }

    /// The last the program hears. It is not the agent's concern whether it does.
    pub fn dismiss(&mut self, answer: &Answer) {
        self.state = State::Over;
        if let Some(client) = self.client.take() {
            message::hear_no_more(&client);
            let _ = answer.send(client, &[]);
        }
    }

    /// What it waits for.
    pub fn slots(&self, room: bool) -> [PollSlot; SLOTS] {
        let none = || sys::slot(None, 0);
        // Before it is asked, there must be room for what it asks. A hang-up needs none.
        let client = self.client.as_ref().filter(|_| room || !self.is_silent());
        let client = sys::slot(client.map(AsFd::as_fd), libc::POLLIN);
        match &self.state {
            State::Accepted(flow) => [client, flow.stdin.slot(room), flow.stdout.slot(), flow.stderr.slot()],
            State::Ended(flow, _) => [client, none(), flow.stdout.slot(), flow.stderr.slot()],
            _ => [client, none(), none(), none()],
        }
    }

    /// Does what it can do. `true`: it has used `stream`, which is the next.
    pub fn serve(
        &mut self,
        ready: &[PollSlot],
        stream: u32,
        outbox: &mut Outbox,
        other: &mut dyn Other,
    ) -> bool {
        let events = |at: usize| ready.get(at).map_or(0, |slot| slot.revents);
        if events(0) != 0 && self.is_silent() {
            return self.ask(stream, outbox, other);
        }
        if let (State::Accepted(flow), Some(stream)) = (&mut self.state, self.stream) {
            flow.pump(stream, [events(1), events(2), events(3)], outbox);
        }
        if let State::Ended(flow, status) = &mut self.state {
            flow.drain([events(2), events(3)]);
            let status = *status;
            self.end(status);
        }
        // A program that has asked has nothing more to say: whatever it is, it ends the call.
        if events(0) != 0 && self.client.is_some() {
            self.hang_up(outbox);
        }
        false
    }

    fn accept(&mut self, outbox: &mut Outbox) {
        let Some(client) = &self.client else { return };
        match Flow::new(client) {
            Ok(flow) => self.state = State::Accepted(flow),
            Err(failure) => {
                let stream = self.stream.unwrap_or_default();
                outbox.push(&GuestFrame::CallHangup { stream });
                self.dismiss(&Answer::Problem(failure.to_string()));
            }
        }
    }

    /// Tells the status once all output is in the pipes.
    fn end(&mut self, status: u8) {
        let (State::Accepted(mut flow) | State::Ended(mut flow, _)) =
            std::mem::replace(&mut self.state, State::Over)
        else {
            return;
        };
        flow.end();
        if flow.is_drained() {
            self.dismiss(&Answer::Exited(status));
        } else {
            self.state = State::Ended(flow, status);
        }
    }
}

impl Flow {
    /// Gives the program its ends of the pipes.
    fn new(client: &OwnedFd) -> Result<Self, Failure> {
        let (stdin_theirs, stdin) = pipe_from()?;
        let (stdout_theirs, stdout) = pipe_to()?;
        let (stderr_theirs, stderr) = pipe_to()?;
        let theirs = [stdin_theirs.as_fd(), stdout_theirs.as_fd(), stderr_theirs.as_fd()];
        Answer::Accepted
            .send(client, &theirs)
            .map_err(|error| Failure::system("answer the caller", error))?;
        Ok(Self {
            stdin: Source::new(stdin, kind::CALL_STDIN),
            stdout: Sink::new(stdout),
            stderr: Sink::new(stderr),
        })
    }

    fn output(
        &mut self,
        kind: u16,
        pieces: &[IoSlice<'_>],
        stream: u32,
        outbox: &mut Outbox,
    ) -> Result<(), ProtocolError> {
        match kind {
            kind::CALL_STDOUT => {
                let news = self.stdout.receive("CallStdout", pieces)?;
                credit_stdout(stream, news, outbox);
            }
            _ => {
                let news = self.stderr.receive("CallStderr", pieces)?;
                credit_stderr(stream, news, outbox);
            }
        }
        Ok(())
    }

    fn handle(&mut self, frame: HostFrame) -> Result<(), ProtocolError> {
        match frame {
            HostFrame::CallStdoutEof { .. } => self.stdout.end(),
            HostFrame::CallStderrEof { .. } => self.stderr.end(),
            HostFrame::CallStdinCredit { bytes, .. } => self.stdin.credit(bytes)?,
            HostFrame::CallStdinClosed { .. } => drop(self.stdin.close()),
            _ => return Err(ProtocolError::Malformed { frame: "Call…", what: "the call is accepted" }),
        }
        Ok(())
    }

    fn pump(&mut self, stream: u32, events: [i16; 3], outbox: &mut Outbox) {
        let [stdin, stdout, stderr] = events;
        if stdin != 0 && self.stdin.pump(stream, outbox) == Taken::Eof {
            outbox.push(&GuestFrame::CallStdinEof { stream });
        }
        if stdout != 0 {
            credit_stdout(stream, self.stdout.drain(stdout), outbox);
        }
        if stderr != 0 {
            credit_stderr(stream, self.stderr.drain(stderr), outbox);
        }
    }

    /// Without telling: the host knows nothing of it any more.
    fn drain(&mut self, events: [i16; 2]) {
        for (sink, events) in [&mut self.stdout, &mut self.stderr].into_iter().zip(events) {
            if events != 0 {
                sink.drain(events);
            }
        }
    }

    fn end(&mut self) {
        self.stdin.close();
        self.stdout.end();
        self.stderr.end();
    }

    fn is_drained(&self) -> bool {
        self.stdout.is_closed() && self.stderr.is_closed()
    }
}

/// Of a pipe that the program has closed nothing is told: what still comes is dropped, and credited.
fn credit_stdout(stream: u32, news: News, outbox: &mut Outbox) {
    if let Some(bytes) = news.credit {
        outbox.push(&GuestFrame::CallStdoutCredit { stream, bytes });
    }
}

fn credit_stderr(stream: u32, news: News, outbox: &mut Outbox) {
    if let Some(bytes) = news.credit {
        outbox.push(&GuestFrame::CallStderrCredit { stream, bytes });
    }
}
