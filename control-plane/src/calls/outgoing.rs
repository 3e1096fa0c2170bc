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
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use call_channel::port::Port;
use nix::poll::PollFlags;
use nix::sys::signal::{killpg, Signal};
use nix::unistd::Pid;
use qrexec::{Call, Exit, GuestFrame, HostFrame, ProtocolError, STREAMS_MAX};
use rustix::fs::OFlags;
use rustix::io::FdFlags;
use rustix::process::{waitid, PidfdFlags, WaitId, WaitIdOptions, WaitIdStatus};

use super::flow::{Heard, Input, Output, Wrote, READ_BYTES};
use super::rate::{Rate, Turn};
use super::{programs, verdict};
use crate::agent_link::AgentLink;
use crate::session::SessionError;
use crate::state::State;

/// Calls of one guest at a time.
pub const CALLS_OUT_MAX: usize = STREAMS_MAX;
/// How long a call's processes may take to end after SIGTERM, before SIGKILL.
const TERM_LIMIT: Duration = Duration::from_secs(5);
/// The same when we end ourselves: somebody waits for the guest to be gone.
const LAST_LIMIT: Duration = Duration::from_millis(500);

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
    refusals: verdict::Refusals,
    rate: Rate,
}

/// One of them.
struct CallOut {
    child: Child,
    ended: OwnedFd,
    /// Says what was decided; taken once it has.
    verdict: Option<OwnedFd>,
    stdin: Output,
    stdout: Input,
    stderr: Input,
    /// Whether its last frame has been sent: then only its processes are left to end.
    over: bool,
    exit: Option<Exit>,
    kill_at: Option<Instant>,
}

impl Outgoing {
    pub(super) fn of(state: &State, name: &str) -> Outgoing {
        Outgoing {
            caller: Some((state.clone(), name.to_owned())),
            calls: BTreeMap::new(),
            refusals: verdict::Refusals::none(),
            rate: Rate::new(),
        }
    }

    /// Refuses every call.
    pub(super) fn refused() -> Outgoing {
        Outgoing {
            caller: None,
            calls: BTreeMap::new(),
            refusals: verdict::Refusals::none(),
            rate: Rate::new(),
        }
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
            Some((state, name)) if self.calls.len() < CALLS_OUT_MAX => CallOut::start(state, name, call)
                .map_err(|error| self.refusals.log(&format!("cannot start a call of {name}: {error}")))
                .ok(),
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
        self.calls.values().filter_map(|call| call.kill_at).min()
    }

    /// Kills what was told to end long enough ago.
    pub(super) fn kill_those_due(&mut self) {
        let now = Instant::now();
        for call in self.calls.values_mut().filter(|call| call.kill_at.is_some_and(|at| at <= now)) {
            call.kill_at = None;
            call.signal(Signal::SIGKILL);
        }
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
            Part::End => call.look(),
            Part::Stdin => call.feed(stream, flags, link)?,
            Part::Stdout | Part::Stderr => call.pass_on(stream, part, link)?,
        }
        self.settle(stream, link)
    }

    /// Forgets a call of which nothing is left.
    fn settle(&mut self, stream: u32, link: &mut AgentLink) -> Result<(), SessionError> {
        let Some(call) = self.calls.get_mut(&stream) else { return Ok(()) };
        if call.finish(stream, &mut self.refusals, link)? {
            // Some of a group that was told to end may not heed it, and nobody counts them from here on.
            if call.kill_at.is_some() {
                call.signal(Signal::SIGKILL);
            }
            // Known to have ended.
            let _ = call.child.wait();
            self.calls.remove(&stream);
        }
        Ok(())
    }
}

impl CallOut {
    fn start(state: &State, name: &str, call: &Call) -> io::Result<CallOut> {
        let (verdict, tell) = io::pipe()?;
        let mut command = programs::command("qrexec-policy-exec", state);
        command.arg("--").args([name, &call.target.to_string(), &call.service.to_string()]);
        command.env(verdict::VARIABLE, tell.as_raw_fd().to_string());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.process_group(0);
        rustix::io::fcntl_setfd(&tell, FdFlags::empty())?;
        rustix::fs::fcntl_setfl(&verdict, OFlags::NONBLOCK)?;
        let mut child = command.spawn()?;
        drop(tell);
        let taken = take_streams(&mut child);
        let (stdin, stdout, stderr, ended) = match taken {
            Ok(taken) => taken,
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(error);
            }
        };
        Ok(CallOut {
            child,
            ended,
            verdict: Some(verdict.into()),
            stdin: Output::new(Some(stdin)),
            stdout: Input::new(Some(stdout)),
            stderr: Input::new(Some(stderr)),
            over: false,
            exit: None,
            kill_at: None,
        })
    }

    fn interests(&self, takes_output: bool) -> impl Iterator<Item = (Part, BorrowedFd<'_>, PollFlags)> {
        let decides = self.verdict.as_ref().map(|verdict| (verdict.as_fd(), PollFlags::POLLIN));
        let ended = Some((self.ended.as_fd(), PollFlags::POLLIN)).filter(|_| self.exit.is_none());
        let flows = self.verdict.is_none() && !self.over;
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
        refusals: &mut verdict::Refusals,
        link: &mut AgentLink,
    ) -> Result<(), SessionError> {
        let Some(verdict) = self.verdict.take() else { return Ok(()) };
        if verdict::hear(verdict, refusals) {
            link.queue(&HostFrame::CallAccepted { stream })?;
        } else {
            link.queue(&HostFrame::CallRefused { stream })?;
            self.over = true;
            self.end_soon();
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
        self.end_soon();
    }

    fn end_soon(&mut self) {
        self.signal(Signal::SIGTERM);
        self.kill_at.get_or_insert(Instant::now() + TERM_LIMIT);
    }

    /// Also after the first process has ended: others of its group may go on.
    fn signal(&self, signal: Signal) {
        if let Ok(group) = i32::try_from(self.child.id()) {
            let _ = killpg(Pid::from_raw(group), signal);
        }
    }

    /// Notes how its process has ended, and leaves it a zombie: so long its number is nobody else's.
    fn look(&mut self) {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        if let Ok(Some(status)) = waitid(WaitId::PidFd(self.ended.as_fd()), options) {
            self.exit = Some(exit_of(&status));
        }
    }

    /// Sends the last frame once all is over. Whether nothing is left of the call.
    fn finish(
        &mut self,
        stream: u32,
        refusals: &mut verdict::Refusals,
        link: &mut AgentLink,
    ) -> Result<bool, SessionError> {
        let Some(exit) = self.exit else { return Ok(false) };
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
        for signal in [Signal::SIGTERM, Signal::SIGKILL] {
            self.calls.values().for_each(|call| call.signal(signal));
            let deadline = Instant::now() + LAST_LIMIT;
            for call in self.calls.values_mut() {
                while call.exit.is_none() && Instant::now() < deadline {
                    std::thread::sleep(Duration::from_millis(2));
                    call.look();
                }
            }
        }
        // One that has become another user, or waits for a disk, is not ours to end: nor is its guest's end to wait for it.
        for call in self.calls.values_mut().filter(|call| call.exit.is_some()) {
            let _ = call.child.wait();
        }
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

type Streams = (Port, Port, Port, OwnedFd);

fn take_streams(child: &mut Child) -> io::Result<Streams> {
    let missing = || io::Error::other("a process without its pipes");
    let stdin: OwnedFd = child.stdin.take().ok_or_else(missing)?.into();
    let stdout: OwnedFd = child.stdout.take().ok_or_else(missing)?.into();
    let stderr: OwnedFd = child.stderr.take().ok_or_else(missing)?.into();
    let ended = rustix::process::pidfd_open(rustix::process::Pid::from_child(child), PidfdFlags::empty())?;
    Ok((Port::own(stdin)?, Port::own(stdout)?, Port::own(stderr)?, ended))
}

fn exit_of(status: &WaitIdStatus) -> Exit {
    let number = |number: Option<i32>| number.and_then(|number| u8::try_from(number).ok());
    match (number(status.exit_status()), number(status.terminating_signal())) {
        (Some(code), _) => Exit::Code(code),
        (None, Some(signal)) => Exit::Signal(signal),
        (None, None) => Exit::Code(qrexec::service::EXIT_PROBLEM),
    }
}
