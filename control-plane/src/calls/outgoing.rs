//! Calls that programs in the guest make: each becomes a process of ours, `qrexec-policy-exec`, which asks the policy and then becomes what was
//! decided. The guest is hostile.
//!
//! Invariants:
//! - who calls is our own knowledge, the name under which we hold the guest; what the guest says is its target and service, checked by
//!   the frame's parsing;
//! - at most [`CALLS_OUT_MAX`] processes at a time, those whose call is over already among them; a call beyond is refused without one, and so is one that comes too
//!   soon ([`Rate`]);
//! - nothing flows before the call is accepted, and what flows keeps to the windows;
//! - a call's processes are one group, and end when the guest hangs up, and with us.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::BorrowedFd;
use std::time::Instant;

use nix::poll::PollFlags;
use qrexec::{Call, GuestFrame, HostFrame, ProtocolError, STREAMS_MAX};

use super::flow::{Heard, Input, Output, Wrote, READ_BYTES};
use super::process::{self, Errand, Process, Streams};
use super::rate::{Rate, Turn};
use super::verdict::{Refusals, Verdict};
use super::verdict_log::VerdictLog;
use crate::agent_link::AgentLink;
use crate::session::SessionError;
use crate::state::State;

/// Calls of one guest at a time, on whichever way.
pub const CALLS_OUT_MAX: usize = STREAMS_MAX;

/// What of a call can be ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Verdict,
    End,
    Stdin,
    Stdout,
    Stderr,
}

/// All calls of a guest. Dropping it ends them.
pub(super) struct Outgoing {
    /// Who calls. A guest without a name makes no calls.
    caller: Option<(State, String)>,
    calls: BTreeMap<u32, CallOut>,
    /// Those that go another way, which count as well.
    pub(super) elsewhere: usize,
    pub(super) refusals: Refusals,
    pub(super) verdicts: VerdictLog,
    rate: Rate,
}

/// One of them.
struct CallOut {
    process: Process,
    stdin: Output,
    stdout: Input,
    stderr: Input,
    /// Whether its last frame has been sent: then only its processes are left to end.
    over: bool,
}

impl Outgoing {
    pub(super) fn of(state: &State, name: &str) -> Outgoing {
        Outgoing::by(Some((state.clone(), name.to_owned())))
    }

    /// Refuses every call.
    pub(super) fn refused() -> Outgoing {
        Outgoing::by(None)
    }

    fn by(caller: Option<(State, String)>) -> Outgoing {
        let verdicts = VerdictLog::of(caller.as_ref().map_or("", |(_, name)| name));
        let (refusals, rate) = (Refusals::none(), Rate::new());
        Outgoing { caller, calls: BTreeMap::new(), elsewhere: 0, refusals, verdicts, rate }
    }

    /// Whether a call that goes another way comes too soon.
    pub(super) fn is_too_often(&mut self, name: &str) -> bool {
        is_too_often(&mut self.rate, name)
    }

    pub(super) fn count(&self) -> usize {
        self.calls.len()
    }

    /// Takes a frame of a call. Those of calls that are over may have been under way.
    pub(super) fn take(&mut self, frame: GuestFrame, link: &mut AgentLink) -> Result<(), SessionError> {
        if let GuestFrame::Call { stream, call } = frame {
            return self.begin(stream, &call, link);
        }
        match frame {
            GuestFrame::CallStdin { stream, bytes } => {
                let Some(call) = self.open(stream) else { return Ok(()) };
                if let Some(bytes) = call.stdin.receive(bytes)? {
                    link.queue(&HostFrame::CallStdinCredit { stream, bytes })?;
                }
            }
            GuestFrame::CallStdinEof { stream } => {
                if let Some(call) = self.open(stream) {
                    call.stdin.end();
                }
            }
            GuestFrame::CallStdoutCredit { stream, bytes } => {
                self.open(stream).map_or(Ok(()), |call| call.stdout.credit(bytes))?;
            }
            GuestFrame::CallStderrCredit { stream, bytes } => {
                self.open(stream).map_or(Ok(()), |call| call.stderr.credit(bytes))?;
            }
            GuestFrame::CallHangup { stream } => {
                if let Some(call) = self.open(stream) {
                    call.hang_up();
                    self.settle(stream, link)?;
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn open(&mut self, stream: u32) -> Option<&mut CallOut> {
        self.calls.get_mut(&stream).filter(|call| !call.over)
    }

    fn begin(&mut self, stream: u32, call: &Call, link: &mut AgentLink) -> Result<(), SessionError> {
        if self.calls.contains_key(&stream) {
            return Err(ProtocolError::Stream { frame: "Call", stream }.into());
        }
        let started = match &self.caller {
            Some((_, name)) if is_too_often(&mut self.rate, name) => None,
            Some((state, name)) if self.calls.len() + self.elsewhere < CALLS_OUT_MAX => {
                CallOut::start(state, name, call, self.verdicts.takes(Instant::now()))
                    .map_err(|error| self.refusals.log(&format!("cannot start a call of {name}: {error}")))
                    .ok()
            }
            _ => None,
        };
        match started {
            Some(call) => drop(self.calls.insert(stream, call)),
            None => link.queue(&HostFrame::CallRefused { stream })?,
        }
        Ok(())
    }

    /// What to wait for. Of services' output nothing, when too much waits for the guest already.
    pub(super) fn interests(
        &self,
        takes_output: bool,
    ) -> impl Iterator<Item = (u32, Part, BorrowedFd<'_>, PollFlags)> {
        self.calls.iter().flat_map(move |(stream, call)| {
            call.interests(takes_output).map(move |(part, fd, flags)| (*stream, part, fd, flags))
        })
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        self.calls.values().filter_map(|call| call.process.kill_at()).chain(self.verdicts.deadline()).min()
    }

    /// Kills what was told to end long enough ago, and tells what was not logged.
    pub(super) fn do_what_is_due(&mut self) {
        self.verdicts.tell_if_due(Instant::now());
        self.calls.values_mut().for_each(|call| call.process.kill_if_due());
    }

    /// Does what a ready descriptor is for.
    pub(super) fn turn(
        &mut self,
        stream: u32,
        part: Part,
        flags: PollFlags,
        link: &mut AgentLink,
    ) -> Result<(), SessionError> {
        let Some(call) = self.calls.get_mut(&stream) else { return Ok(()) };
        match part {
            Part::Verdict => call.hear_verdict(stream, &mut self.refusals, link)?,
            Part::End => call.process.look(),
            Part::Stdin => call.feed(stream, flags, link)?,
            Part::Stdout | Part::Stderr => call.pass_on(stream, part, link)?,
        }
        self.settle(stream, link)
    }

    /// Forgets a call of which nothing is left.
    fn settle(&mut self, stream: u32, link: &mut AgentLink) -> Result<(), SessionError> {
        let Some(call) = self.calls.get_mut(&stream) else { return Ok(()) };
        if call.finish(stream, &mut self.refusals, link)? {
            if let Some(call) = self.calls.remove(&stream) {
                call.process.forget();
            }
        }
        Ok(())
    }
}

impl CallOut {
    fn start(state: &State, name: &str, call: &Call, logged: bool) -> io::Result<CallOut> {
        let errand = Errand { state, name, target: &call.target, service: &call.service, logged };
        let (process, Streams { stdin, stdout, stderr }) = Process::start(&errand)?;
        Ok(CallOut {
            process,
            stdin: Output::new(Some(stdin)),
            stdout: Input::new(Some(stdout)),
            stderr: Input::new(Some(stderr)),
            over: false,
        })
    }

    fn interests(&self, takes_output: bool) -> impl Iterator<Item = (Part, BorrowedFd<'_>, PollFlags)> {
        let [decides, ended] = self.process.interests();
        let flows = self.process.is_decided() && !self.over;
        let output = |input: &'_ Input| flows && takes_output && !input.has_ended();
        let interests = [
            (Part::Verdict, decides),
            (Part::End, ended),
            (Part::Stdin, self.stdin.interest().filter(|_| flows)),
            (Part::Stdout, self.stdout.interest().filter(|_| output(&self.stdout))),
            (Part::Stderr, self.stderr.interest().filter(|_| output(&self.stderr))),
        ];
        interests.into_iter().filter_map(|(part, interest)| interest.map(|(fd, flags)| (part, fd, flags)))
    }

    fn hear_verdict(
        &mut self,
        stream: u32,
        refusals: &mut Refusals,
        link: &mut AgentLink,
    ) -> Result<(), SessionError> {
        match self.process.hear_verdict(refusals) {
            None => {}
            Some(Verdict::Refused) => {
                link.queue(&HostFrame::CallRefused { stream })?;
                self.over = true;
                self.process.end_soon();
            }
            Some(Verdict::Accepted) => link.queue(&HostFrame::CallAccepted { stream })?,
        }
        Ok(())
    }

    /// Writes what the guest has sent.
    fn feed(&mut self, stream: u32, flags: PollFlags, link: &mut AgentLink) -> Result<(), SessionError> {
        let credit = match self.stdin.write(flags, &mut false) {
            Wrote::On(credit) => credit,
            Wrote::NoReader | Wrote::Failed(_) => {
                link.queue(&HostFrame::CallStdinClosed { stream })?;
                self.stdin.close()
            }
        };
        if let Some(bytes) = credit {
            link.queue(&HostFrame::CallStdinCredit { stream, bytes })?;
        }
        Ok(())
    }

    /// Sends what the service has written.
    fn pass_on(&mut self, stream: u32, part: Part, link: &mut AgentLink) -> Result<(), SessionError> {
        let mut buffer = [0; READ_BYTES];
        let is_stdout = part == Part::Stdout;
        let input = if is_stdout { &mut self.stdout } else { &mut self.stderr };
        let frame = match input.read(&mut buffer) {
            Heard::Nothing => return Ok(()),
            Heard::Bytes(bytes) if is_stdout => HostFrame::CallStdout { stream, bytes: bytes.to_vec() },
            Heard::Bytes(bytes) => HostFrame::CallStderr { stream, bytes: bytes.to_vec() },
            Heard::End if is_stdout => HostFrame::CallStdoutEof { stream },
            Heard::End => HostFrame::CallStderrEof { stream },
        };
        Ok(link.queue(&frame)?)
    }

    /// The caller in the guest is gone: nobody hears what the service says from here on.
    fn hang_up(&mut self) {
        self.stdin.close();
        self.stdout.close();
        self.stderr.close();
        self.process.end_soon();
    }

    /// Sends the last frame once all is over. Whether nothing is left of the call.
    fn finish(
        &mut self,
        stream: u32,
        refusals: &mut Refusals,
        link: &mut AgentLink,
    ) -> Result<bool, SessionError> {
        let Some(exit) = self.process.exit() else { return Ok(false) };
        // What it has decided may be unread yet.
        self.hear_verdict(stream, refusals, link)?;
        if !self.over && self.stdout.has_ended() && self.stderr.has_ended() {
            link.queue(&HostFrame::CallExited { stream, exit })?;
            self.over = true;
        }
        Ok(self.over)
    }
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        let calls = std::mem::take(&mut self.calls);
        process::end_all(calls.into_values().map(|call| call.process).collect());
    }
}

/// Whether a call comes too soon, which is logged once.
fn is_too_often(rate: &mut Rate, name: &str) -> bool {
    let turn = rate.take(Instant::now());
    if turn == (Turn::TooOften { news: true }) {
        tracing::warn!("{name} calls too often: what is too much is refused");
    }
    turn != Turn::Taken
}
