//! The host's side of the agent's channel: frames out, frames in, each wait bounded.
//!
//! A launch sends `Identify`, `Exec` and `Thaw` in one write: the agent takes them in order, and the guest is spared two
//! trips of a round each. The answers are read as they come.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use engine::agent::{Agent, AgentError, AgentFacts};
use engine::build::BOOT_LIMIT;
use engine::host::AgentPipe;
use engine::identity::{self, Identity};
use engine::units::ByteCount;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use qrexec::{Decoder, Exec, Failed, GuestFrame, HostFrame, Op};

/// A launch's main command has this stream; those of callers have later ones.
pub const COMMAND_STREAM: u32 = 1;

/// How long the agent may take for each answer. What the guests of a machine take is the machine's to say
/// ([`crate::machine::Machine::agent_limits`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// At most so long for a boot, whatever the step allows.
    pub boot: Duration,
    /// For a prerun hook.
    pub prerun: Duration,
    /// For each of settle, warm and freeze.
    pub settle: Duration,
    /// For an identity.
    pub identify: Duration,
    /// For the command of a rehearsal.
    pub rehearsal: Duration,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            boot: BOOT_LIMIT,
            // A hook may download and unpack things.
            prerun: Duration::from_secs(600),
            // Settling writes back and drops caches; under emulation, with gigabytes of them, that takes seconds.
            settle: Duration::from_secs(120),
            // Three orders of magnitude above the usual.
            identify: Duration::from_secs(30),
            // As long as a command of no length may take in a guest that is emulated on a busy machine.
            rehearsal: Duration::from_secs(60),
        }
    }
}

/// What the rehearsal of a launch runs: a shell and, through its pipes, a program.
const REHEARSAL: [&str; 3] = ["sh", "-c", "cat; date"];

/// Frames that may come before an answer: a whole window of each stream in the smallest pieces a program writes is less.
const OTHERS_MAX: usize = 4096;
/// And so many bytes: a window of 256 KiB for either output.
const OTHERS_BYTES_MAX: usize = 512 << 10;

/// A channel to one agent.
pub struct AgentLink {
    pipe: Box<dyn AgentPipe>,
    decoder: Decoder,
    inbox: VecDeque<GuestFrame>,
    out: Vec<u8>,
    command: Option<Exec>,
    limits: Limits,
    hostname: Option<String>,
    closed: bool,
}

impl AgentLink {
    /// Over a fresh channel.
    pub fn new(pipe: Box<dyn AgentPipe>) -> AgentLink {
        AgentLink {
            pipe,
            decoder: Decoder::new(),
            inbox: VecDeque::new(),
            out: Vec::with_capacity(4096),
            command: None,
            limits: Limits::default(),
            hostname: None,
            closed: false,
        }
    }

    /// The same, with other limits than the usual.
    pub fn limited(self, limits: Limits) -> AgentLink {
        AgentLink { limits, ..self }
    }

    /// Over a fresh channel, with the command to start as soon as the clone is somebody.
    pub fn with_command(pipe: Box<dyn AgentPipe>, command: Exec) -> AgentLink {
        AgentLink { command: Some(command), ..AgentLink::new(pipe) }
    }

    /// Has the guest named `hostname`, not after its number.
    pub fn named(self, hostname: String) -> AgentLink {
        AgentLink { hostname: Some(hostname), ..self }
    }

    /// Queues a frame. [`AgentLink::flush`] sends it.
    pub fn queue(&mut self, frame: &HostFrame) -> Result<(), AgentError> {
        frame.encode(&mut self.out).map_err(|error| broken("send to the agent", error))
    }

    /// Queues bytes for a command's stdin.
    pub fn queue_stdin(&mut self, stream: u32, bytes: &[u8]) {
        HostFrame::encode_stdin(&mut self.out, stream, bytes);
    }

    /// Bytes that wait to be sent.
    pub fn backlog(&self) -> usize {
        self.out.len()
    }

    /// Whether the guest's end of the channel has gone, as it does when the guest goes down.
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// Whether frames have been read that were not taken yet.
    pub fn has_frames(&self) -> bool {
        !self.inbox.is_empty()
    }

    /// Whether something waits to be sent.
    pub fn wants_to_send(&self) -> bool {
        !self.out.is_empty()
    }

    /// Sends what the channel takes now.
    pub fn flush(&mut self) -> Result<(), AgentError> {
        let mut sent = 0;
        while sent < self.out.len() {
            match self.pipe.write(&self.out[sent..]) {
                Ok(0) => return Err(broken("send to the agent", "closed")),
                Ok(count) => sent += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    self.closed = true;
                    return Err(broken("send to the agent", error));
                }
            }
        }
        self.out.drain(..sent);
        Ok(())
    }

    /// The next frame that has arrived, reading what there is; `None` when more has to be waited for.
    pub fn next_frame(&mut self) -> Result<Option<GuestFrame>, AgentError> {
        if let Some(frame) = self.inbox.pop_front() {
            return Ok(Some(frame));
        }
        let step = "listen to the agent";
        let mut buffer = [0u8; 64 << 10];
        match self.pipe.read(&mut buffer) {
            Ok(0) => return Err(self.gone(step)),
            Ok(count) => {
                let mut input = &buffer[..count];
                while let Some(raw) = self.decoder.next(&mut input).map_err(|error| broken(step, error))? {
                    self.inbox.push_back(GuestFrame::parse(raw).map_err(|error| broken(step, error))?);
                }
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Err(self.gone(step)),
            Err(error) => return Err(broken(step, error)),
        }
        Ok(self.inbox.pop_front())
    }

    fn gone(&mut self, step: &'static str) -> AgentError {
        self.closed = true;
        broken(step, "the guest has gone")
    }

    /// Whether the agent has said nothing that was not taken notice of, not even a part of it.
    pub fn is_quiet(&self) -> bool {
        let mut fds = [PollFd::new(self.pipe.as_fd(), PollFlags::POLLIN)];
        let silent = poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready == 0);
        silent && self.inbox.is_empty() && self.decoder.at_boundary()
    }

    /// Sends `frame` and waits until the agent says it is done.
    fn ask(
        &mut self,
        step: &'static str,
        frame: &HostFrame,
        op: Op,
        limit: Duration,
    ) -> Result<(), AgentError> {
        self.queue(frame)?;
        self.wait_done(step, op, limit)
    }

    /// Waits for the answer to `op`, sending what is queued. Frames of the command that come before it are kept.
    fn wait_done(&mut self, step: &'static str, op: Op, limit: Duration) -> Result<(), AgentError> {
        let deadline = Instant::now() + limit;
        let (mut others, mut bytes) = (VecDeque::new(), 0);
        loop {
            match self.wait_frame(step, deadline, limit)? {
                GuestFrame::Done(done) if done == op => {
                    while let Some(frame) = others.pop_back() {
                        self.inbox.push_front(frame);
                    }
                    return Ok(());
                }
                GuestFrame::Failed { stream: 0, failed } => return Err(failure(step, &failed)),
                // Nobody is it yet who could call: a prerun hook, or a program of the session.
                GuestFrame::Call { stream, .. } if op != Op::Identify => {
                    self.queue(&HostFrame::CallRefused { stream })?;
                }
                frame if others.len() < OTHERS_MAX && bytes <= OTHERS_BYTES_MAX => {
                    if let GuestFrame::Stdout { bytes: more, .. } | GuestFrame::Stderr { bytes: more, .. } =
                        &frame
                    {
                        bytes += more.len();
                    }
                    others.push_back(frame);
                }
                _ => return Err(broken(step, "it sends without end and does not answer")),
            }
        }
    }

    fn wait_frame(
        &mut self,
        step: &'static str,
        deadline: Instant,
        limit: Duration,
    ) -> Result<GuestFrame, AgentError> {
        loop {
            self.flush()?;
            if let Some(frame) = self.next_frame()? {
                return Ok(frame);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(AgentError::Silent { step, limit });
            }
            let interest =
                if self.out.is_empty() { PollFlags::POLLIN } else { PollFlags::POLLIN | PollFlags::POLLOUT };
            let timeout = PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(self.pipe.as_fd(), interest)], timeout) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(error) => return Err(broken(step, error)),
            }
        }
    }
}

impl AsFd for AgentLink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }
}

impl Agent for AgentLink {
    fn ready(&mut self, limit: Duration) -> Result<AgentFacts, AgentError> {
        let step = "wait for the guest to be up";
        let limit = limit.min(self.limits.boot);
        let deadline = Instant::now() + limit;
        loop {
            match self.wait_frame(step, deadline, limit)? {
                GuestFrame::Hello(hello) if hello.protocol != qrexec::PROTOCOL => {
                    let reason = format!(
                        "it speaks protocol {}, not {}: install this version's agent in the template, then build again",
                        hello.protocol,
                        qrexec::PROTOCOL
                    );
                    return Err(AgentError::Broken { step, reason });
                }
                GuestFrame::Hello(hello) if !hello.session => {
                    let message = "the user's session did not come up".to_owned();
                    return Err(AgentError::Failed { step, message });
                }
                GuestFrame::Hello(hello) => return Ok(AgentFacts { version: hello.agent_version }),
                GuestFrame::Failed { failed, .. } => return Err(failure(step, &failed)),
                _ => {}
            }
        }
    }

    fn prerun(&mut self, program: &[u8]) -> Result<(), AgentError> {
        HostFrame::encode_prerun(&mut self.out, program);
        self.wait_done("run the prerun hook", Op::Prerun, self.limits.prerun)
    }

    fn settle(&mut self) -> Result<ByteCount, AgentError> {
        self.ask("settle the guest", &HostFrame::Settle, Op::Settle, self.limits.settle)?;
        let free = self.inbox.iter().find_map(|frame| match frame {
            GuestFrame::FreeMemory(bytes) => Some(ByteCount(*bytes)),
            _ => None,
        });
        self.inbox.clear();
        Ok(free.unwrap_or(ByteCount::ZERO))
    }

    fn warm(&mut self) -> Result<(), AgentError> {
        self.ask("run once what a launch runs", &HostFrame::Warm, Op::Warm, self.limits.settle)
    }

    fn freeze(&mut self) -> Result<(), AgentError> {
        self.ask("freeze the guest's programs", &HostFrame::Freeze, Op::Freeze, self.limits.settle)
    }

    fn identify(&mut self, identity: &Identity) -> Result<(), AgentError> {
        let hostname = self.hostname.take().unwrap_or_else(|| identity.number.to_string());
        self.queue(&HostFrame::Identify(Box::new(identity_frame(identity, hostname))))?;
        if let Some(exec) = self.command.take() {
            self.queue(&HostFrame::Exec { stream: COMMAND_STREAM, exec: Box::new(exec) })?;
        }
        self.queue(&HostFrame::Thaw)?;
        self.wait_done("give the clone its identity", Op::Identify, self.limits.identify)
    }

    fn thaw(&mut self) -> Result<(), AgentError> {
        // Sent along with the identity; that it happened is read with the command's own frames.
        Ok(())
    }

    fn rehearse(&mut self, identity: &Identity) -> Result<(), AgentError> {
        let step = "run a command in the clone";
        self.command = Some(Exec::user(REHEARSAL));
        self.identify(identity)?;
        self.queue(&HostFrame::StdinEof { stream: COMMAND_STREAM })?;
        let deadline = Instant::now() + self.limits.rehearsal;
        let (mut exited, mut thawed) = (false, false);
        while !(exited && thawed) {
            match self.wait_frame(step, deadline, self.limits.rehearsal)? {
                GuestFrame::Exited { exit, .. } if exit.status() == 0 => exited = true,
                GuestFrame::Exited { exit, .. } => {
                    let message = format!("{REHEARSAL:?} ended with status {}", exit.status());
                    return Err(AgentError::Failed { step, message });
                }
                GuestFrame::Failed { failed, .. } => return Err(failure(step, &failed)),
                GuestFrame::Done(Op::Thaw) => thawed = true,
                _ => {}
            }
        }
        Ok(())
    }
}

fn identity_frame(identity: &Identity, hostname: String) -> qrexec::Identity {
    qrexec::Identity {
        hostname,
        machine_id: identity.machine_id,
        entropy: identity.entropy,
        realtime_ns: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64,
        mac: identity.number.mac(),
        network: Some(qrexec::Network {
            address: identity.number.address(),
            prefix_len: identity::NETWORK.1,
            gateway: Some(identity::GATEWAY),
            dns: vec![identity::NAME_SERVER],
        }),
    }
}

fn failure(step: &'static str, failed: &Failed) -> AgentError {
    AgentError::Failed { step, message: format!("{}: {}", failed.step, failed.message) }
}

fn broken(step: &'static str, reason: impl ToString) -> AgentError {
    AgentError::Broken { step, reason: reason.to_string() }
}
