//! What the agent runs on its own, one command after the other: the prerun hook, and the rehearsal of a launch.
//!
//! Invariants: an errand is its own host: its commands get their frames through the codec and the table that the real host's get, so
//! a rehearsal walks the very path that a launch will walk. Output kept is bounded, whatever the commands write.

use std::collections::VecDeque;
use std::io::{self, IoSlice, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::sys::memfd::{memfd_create, MemFdCreateFlag};
use qrexec::{Decoder, Exec, Exit, GuestFrame, HostFrame, Op, ProtocolError};
use qrexec::{PRERUN_BYTES_MAX, TEXT_BYTES_MAX};

use crate::commands::Commands;
use crate::failure::{Failure, Step};
use crate::outbox::Outbox;
use crate::place::Place;
use crate::sys::PollSlot;

/// A rehearsal is a handful of small commands; a guest that takes longer is broken.
const WARM_MAX: Duration = Duration::from_secs(60);

/// A sequence of commands under way.
pub struct Errand {
    op: Op,
    acts: VecDeque<Act>,
    stream: u32,
    commands: Commands,
    outbox: Outbox,
    output: Vec<u8>,
    deadline: Option<Instant>,
}

struct Act {
    argv: Vec<Vec<u8>>,
    stdin: &'static [u8],
    status: u8,
    stdout: Option<&'static [u8]>,
    hook: Option<OwnedFd>,
}

/// A prerun hook that is still coming, piece by piece.
pub struct Hook {
    file: std::fs::File,
    length: usize,
}

impl Hook {
    /// An empty hook, in memory: no folder needs to be writable or executable, and nothing is left of it.
    pub fn new() -> Result<Self, Failure> {
        let file = memfd_create(c"prerun", MemFdCreateFlag::MFD_CLOEXEC).step(|| "make a file in memory")?;
        Ok(Self { file: file.into(), length: 0 })
    }

    /// Appends a piece.
    pub fn append(&mut self, piece: &[u8]) -> Result<(), Failure> {
        self.length += piece.len();
        if self.length > PRERUN_BYTES_MAX {
            return Err(Failure::ours("store the hook", libc::EFBIG, "a prerun hook has at most 16 MiB"));
        }
        self.file.write_all(piece).step(|| "store the hook")
    }

    /// The errand of running it.
    pub fn run(self) -> Result<Errand, Failure> {
        let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        nix::sys::stat::fchmod(self.file.as_raw_fd(), nix::sys::stat::Mode::from_bits_truncate(0o755))
            .step(|| "make the hook executable")?;
        // A file that someone may write can't be executed: reopen it for reading, close the other.
        let hook: OwnedFd = std::fs::File::open(&path).step(|| "reopen the hook")?.into();
        let argv = vec![format!("/proc/self/fd/{}", hook.as_raw_fd()).into_bytes()];
        let act = Act { argv, stdin: b"", status: 0, stdout: None, hook: Some(hook) };
        Ok(Errand::new(Op::Prerun, [act], None))
    }
}

impl Errand {
    /// The rehearsal: once everything that a launch may run.
    pub fn warm() -> Self {
        const TEXT: &[u8] = b"once through the pipes\n";
        let act = |argv: &[&str], stdin, status, stdout| Act {
            argv: argv.iter().map(|arg| arg.as_bytes().to_vec()).collect(),
            stdin,
            status,
            stdout,
            hook: None,
        };
        let acts = [
            act(&["true"], b"", 0, None),
            act(&["sh", "-c", "cat"], TEXT, 0, Some(TEXT)),
            act(&["id", "-un"], b"", 0, None),
            act(&["date"], b"", 0, None),
            act(&["sh", "-c", "exit 7"], b"", 7, None),
        ];
        Self::new(Op::Warm, acts, Some(Instant::now() + WARM_MAX))
    }

    fn new(op: Op, acts: impl IntoIterator<Item = Act>, deadline: Option<Instant>) -> Self {
        Self {
            op,
            acts: acts.into_iter().collect(),
            stream: 0,
            commands: Commands::default(),
            outbox: Outbox::default(),
            output: Vec::new(),
            deadline,
        }
    }

    /// The operation it belongs to.
    pub fn op(&self) -> Op {
        self.op
    }

    /// Starts the command at the head.
    pub fn start(&mut self, place: &Place) -> Result<(), Failure> {
        let Some(act) = self.acts.front() else { return Ok(()) };
        self.stream += 1;
        self.output.clear();
        let (stream, exec) = (self.stream, Exec::user(act.argv.clone()));
        let started = match &act.hook {
            Some(hook) => self.commands.start(stream, exec, place, Some(hook), &mut self.outbox),
            None => say(
                &mut self.commands,
                HostFrame::Exec { stream, exec: Box::new(exec) },
                place,
                &mut self.outbox,
            ),
        };
        let stdin = act.stdin;
        started
            .and_then(|()| self.commands.stdin(stream, &[IoSlice::new(stdin)], &mut self.outbox))
            .and_then(|()| say(&mut self.commands, HostFrame::StdinEof { stream }, place, &mut self.outbox))
            .map_err(broken)
    }

    /// Gives up: its commands are killed, and reaped among `others`.
    pub fn abandon(&mut self, others: &mut Commands) {
        self.commands.abandon();
        others.adopt(&mut self.commands);
    }

    /// Appends what it waits for.
    pub fn watch(&self, slots: &mut Vec<PollSlot>) {
        self.commands.watch(slots, &self.outbox);
    }

    /// When it has to be looked at even if nothing happens.
    pub fn deadline(&self) -> Option<Instant> {
        let now = (self.outbox.waiting() > 0).then(Instant::now);
        self.deadline.into_iter().chain(self.commands.deadline()).chain(now).min()
    }

    /// Goes on. `Some`: it is over.
    pub fn serve(&mut self, ready: &mut &[PollSlot], place: &Place) -> Option<Result<(), Failure>> {
        self.commands.serve(ready, &mut self.outbox);
        let heard = self.listen(place).and_then(|over| if over { self.next_act(place) } else { Ok(()) });
        match heard {
            Err(failure) => Some(Err(failure)),
            Ok(()) if self.acts.is_empty() => Some(Ok(())),
            Ok(()) if self.deadline.is_some_and(|deadline| Instant::now() >= deadline) => {
                Some(Err(Failure::ours(self.name(), libc::ETIMEDOUT, "not over within 60 s")))
            }
            Ok(()) => None,
        }
    }

    fn next_act(&mut self, place: &Place) -> Result<(), Failure> {
        self.acts.pop_front();
        self.start(place)
    }

    /// Hears what its command said. `true`: the command ended as it should.
    fn listen(&mut self, place: &Place) -> Result<bool, Failure> {
        let said = self.outbox.drain();
        let (mut decoder, mut input) = (Decoder::new(), &said[..]);
        let mut over = false;
        while let Some(raw) = decoder.next(&mut input).map_err(broken)? {
            match GuestFrame::parse(raw).map_err(broken)? {
                GuestFrame::Stdout { stream, bytes } => {
                    let credit = HostFrame::StdoutCredit { stream, bytes: bytes.len() as u32 };
                    self.commands.handle(credit, place, &mut self.outbox).map_err(broken)?;
                    self.keep(&bytes);
                }
                GuestFrame::Stderr { stream, bytes } => {
                    let credit = HostFrame::StderrCredit { stream, bytes: bytes.len() as u32 };
                    self.commands.handle(credit, place, &mut self.outbox).map_err(broken)?;
                    self.keep(&bytes);
                }
                GuestFrame::Exited { exit, .. } => {
                    self.judge(exit)?;
                    over = true;
                }
                GuestFrame::Failed { failed, .. } => {
                    let step = format!("{}: {}", self.name(), failed.step);
                    return Err(Failure::ours(step, failed.errno, failed.message));
                }
                _ => {}
            }
        }
        Ok(over)
    }

    /// Keeps the end of the output: that is where errors stand.
    fn keep(&mut self, bytes: &[u8]) {
        self.output.extend_from_slice(bytes);
        let excess = self.output.len().saturating_sub(TEXT_BYTES_MAX);
        self.output.drain(..excess);
    }

    fn judge(&self, exit: Exit) -> Result<(), Failure> {
        let Some(act) = self.acts.front() else { return Ok(()) };
        let as_expected =
            exit.status() == act.status && !matches!(exit, Exit::NotFound(_) | Exit::NotExecutable(_));
        if as_expected && act.stdout.is_none_or(|stdout| stdout == self.output) {
            return Ok(());
        }
        let output = String::from_utf8_lossy(&self.output);
        Err(Failure::ours(format!("{}, which ended with {exit:?}", self.name()), 0, output))
    }

    fn name(&self) -> String {
        match self.acts.front() {
            Some(Act { hook: None, argv, .. }) => {
                format!("run `{}`", String::from_utf8_lossy(&argv.join(&b' ')))
            }
            _ => "run the prerun hook".into(),
        }
    }
}

/// Says a frame to the commands as the host would: through the codec.
fn say(
    commands: &mut Commands,
    frame: HostFrame,
    place: &Place,
    outbox: &mut Outbox,
) -> Result<(), ProtocolError> {
    let (mut bytes, mut decoder) = (Vec::new(), Decoder::new());
    frame.encode(&mut bytes)?;
    let mut input = &bytes[..];
    while let Some(raw) = decoder.next(&mut input)? {
        commands.handle(HostFrame::parse(raw)?, place, outbox)?;
    }
    Ok(())
}

fn broken(error: ProtocolError) -> Failure {
    Failure::system("speak to a command", io::Error::other(error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys;

    fn run(errand: Result<Errand, Failure>) -> Result<(), Failure> {
        let (place, mut errand) = (Place::here(), errand?);
        errand.start(&place)?;
        loop {
            let mut slots = Vec::new();
            errand.watch(&mut slots);
            let left = errand.deadline().map(|deadline| deadline.saturating_duration_since(Instant::now()));
            sys::poll(&mut slots, left.map(|left| left.as_millis() as u32 + 1)).step(|| "poll")?;
            if let Some(result) = errand.serve(&mut &slots[..], &place) {
                return result;
            }
        }
    }

    fn hook(text: &[u8]) -> Result<Errand, Failure> {
        let mut hook = Hook::new()?;
        text.chunks(7).try_for_each(|piece| hook.append(piece))?;
        hook.run()
    }

    #[test]
    fn the_rehearsal_runs_here_too() {
        run(Ok(Errand::warm())).expect("all commands are there");
    }

    #[test]
    fn hooks_are_scripts_or_programs() {
        run(hook(b"#!/bin/sh\nexit 0\n")).expect("a script runs");
        run(hook(&std::fs::read("/bin/true").expect("there is one"))).expect("a program runs");
        let flood = b"#!/bin/sh\nhead -c 3000000 /dev/zero\n";
        run(hook(flood)).expect("much output is no problem");
    }

    #[test]
    fn a_failing_hook_says_what_it_said() {
        let failure =
            run(hook(b"#!/bin/sh\necho to stdout\necho to stderr >&2\nexit 3\n")).expect_err("fails");
        let failed = failure.into_frame(Some(Op::Prerun));
        assert_eq!(failed.step, "run the prerun hook, which ended with Code(3)");
        assert_eq!(failed.message, "to stdout\nto stderr\n");
        let failed = run(hook(b"no script at all")).expect_err("fails").into_frame(None);
        assert!(failed.step.contains("NotExecutable"), "{}", failed.step);
        let failed = run(hook(b"#!/no/such/shell\n")).expect_err("fails").into_frame(None);
        assert!(failed.step.contains("NotFound"), "{}", failed.step);
    }
}
