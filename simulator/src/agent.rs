//! The simulated guest's agent: real frames over its end of a socket pair, on a thread of its own, for as long as there is a
//! host at the other end.
//!
//! It is as strict as an agent can be: what the host asks out of order, or for the wrong kind of guest, is noted as against the
//! rules ([`crate::context::Context::violation`]), and so is a clone that is somebody another one was already.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use engine::host::BootPurpose;
use qrexec::{Decoder, Exec, Failed, GuestFrame, Hello, HostFrame, Identity, Op};

use control_plane::clones::number_of;

use crate::command::Command;
use crate::guest::Life;
use crate::plan::{Fault, StepKind};
use crate::vm::{State, Vm};

/// A clone's clock may be set to no older time than this.
const CLOCK_MAX_S: u64 = 60;

/// The agent's name among the process's threads.
pub const THREAD: &str = "sim-agent";

/// Why it does not go on.
enum End {
    /// The host or the guest is gone.
    Over,
    /// It never says anything again.
    Silent,
}

/// The agent.
pub struct Agent {
    vm: Arc<Vm>,
    socket: UnixStream,
    decoder: Decoder,
    commands: BTreeMap<u32, Command>,
    hook: Vec<u8>,
    out: Vec<u8>,
    /// Whether the last identity was not taken on. What the host has sent along with it is refused, then.
    unidentified: bool,
}

impl Agent {
    /// Over its end of the channel.
    pub fn new(vm: Arc<Vm>, socket: UnixStream) -> Agent {
        Agent {
            vm,
            socket,
            decoder: Decoder::new(),
            commands: BTreeMap::new(),
            hook: Vec::new(),
            out: Vec::new(),
            unidentified: false,
        }
    }

    /// Serves until the host or the guest is gone.
    pub fn run(mut self) {
        let Err(end) = self.serve() else { return };
        if let End::Silent = end {
            let mut buffer = [0; 4096];
            while self.socket.read(&mut buffer).is_ok_and(|count| count > 0) {}
        }
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    fn serve(&mut self) -> Result<(), End> {
        let booted = matches!(self.state()?.guest.life(), Life::Booted(_));
        if booted {
            self.hello()?;
        }
        let mut buffer = vec![0; 64 << 10];
        loop {
            let count = self.socket.read(&mut buffer).map_err(|_| End::Over)?;
            if count == 0 {
                return Err(End::Over);
            }
            let mut input = &buffer[..count];
            loop {
                let parsed =
                    self.decoder.next(&mut input).and_then(|raw| raw.map(HostFrame::parse).transpose());
                match parsed {
                    Ok(Some(frame)) => self.handle(frame)?,
                    Ok(None) => break,
                    Err(error) => {
                        self.vm.context.violation(&format!("the host breaks the protocol: {error}"));
                        return Err(End::Over);
                    }
                }
            }
            self.go_on()?;
        }
    }

    /// The guest's state once its CPUs run.
    fn state(&self) -> Result<std::sync::MutexGuard<'_, State>, End> {
        self.vm.when(|_| true).ok_or(End::Over)
    }

    fn hello(&mut self) -> Result<(), End> {
        let frozen = self.state()?.guest.frozen;
        let fault = self.vm.context.steps.at(StepKind::Agent, "agent.hello");
        let protocol = if fault == Some(Fault::Violation) { 99 } else { qrexec::PROTOCOL };
        let hello = Hello {
            protocol,
            agent_version: "simulated".to_owned(),
            kernel: "simulated".to_owned(),
            session: fault != Some(Fault::Failed),
            frozen,
        };
        if self.suffer(fault.filter(|fault| !matches!(fault, Fault::Violation | Fault::Failed)), 0, None)? {
            GuestFrame::Hello(hello).encode(&mut self.out);
        }
        self.flush()
    }

    /// Does what a fault says. Whether the step is still taken.
    fn suffer(&mut self, fault: Option<Fault>, stream: u32, op: Option<Op>) -> Result<bool, End> {
        match fault {
            None => Ok(true),
            Some(Fault::Silent) => Err(End::Silent),
            Some(Fault::Garbage) => {
                self.out.extend_from_slice(&[0xff; 64]);
                self.flush()?;
                Err(End::Silent)
            }
            Some(Fault::Violation) => {
                // More than any window: the credit of a stream nobody opened, and output that was never asked for.
                GuestFrame::StdinCredit { stream: 1, bytes: u32::MAX }.encode(&mut self.out);
                for _ in 0..6 {
                    GuestFrame::Stdout { stream: 1, bytes: vec![b'v'; 64 << 10] }.encode(&mut self.out);
                }
                Ok(true)
            }
            Some(Fault::Failed) => {
                self.fail(stream, op, "the plan says so");
                Ok(false)
            }
            Some(_) => Err(End::Over),
        }
    }

    fn handle(&mut self, frame: HostFrame) -> Result<(), End> {
        let (name, op, stream) = match &frame {
            HostFrame::Prerun(piece) if !piece.is_empty() => {
                self.hook.extend_from_slice(piece);
                return Ok(());
            }
            HostFrame::Prerun(_) => ("agent.prerun", Op::Prerun, 0),
            HostFrame::Settle => ("agent.settle", Op::Settle, 0),
            HostFrame::Warm => ("agent.warm", Op::Warm, 0),
            HostFrame::Freeze => ("agent.freeze", Op::Freeze, 0),
            HostFrame::Identify(_) => ("agent.identify", Op::Identify, 0),
            HostFrame::Thaw => ("agent.thaw", Op::Thaw, 0),
            HostFrame::Shutdown => ("agent.shutdown", Op::Shutdown, 0),
            HostFrame::Exec { stream, .. } => ("agent.exec", Op::Exec, *stream),
            _ => return self.handle_data(frame),
        };
        drop(self.state()?);
        let fault = self.vm.context.steps.at(StepKind::Agent, name);
        let refuses = self.unidentified && matches!(op, Op::Exec | Op::Thaw);
        self.unidentified |= op == Op::Identify;
        if !self.suffer(fault, stream, Some(op))? {
            return self.flush();
        }
        if refuses {
            self.fail(stream, Some(op), "the clone could not become somebody");
            return self.flush();
        }
        let done = match frame {
            HostFrame::Exec { stream, exec } => return self.exec(stream, &exec),
            HostFrame::Prerun(_) => self.prerun(),
            HostFrame::Settle => self.settle(),
            HostFrame::Warm => self.rehearse(),
            HostFrame::Freeze => self.freeze(),
            HostFrame::Identify(identity) => self.identify(&identity),
            HostFrame::Thaw => self.thaw(),
            HostFrame::Shutdown => self.shut_down(),
            _ => Ok(()),
        };
        match done {
            Ok(()) => GuestFrame::Done(op).encode(&mut self.out),
            Err(message) => self.fail(0, Some(op), &message),
        }
        self.flush()
    }

    /// Frames of commands, and pings. Only those a command waits for are steps: others may come or not, by how fast it ends.
    fn handle_data(&mut self, frame: HostFrame) -> Result<(), End> {
        drop(self.state()?);
        let Agent { vm, commands, out, .. } = self;
        let reader = match &frame {
            HostFrame::Stdin { stream, .. } => {
                commands.get(stream).filter(|it| it.reads()).map(|_| "agent.stdin")
            }
            HostFrame::StdinEof { stream } => {
                commands.get(stream).filter(|it| it.reads()).map(|_| "agent.stdin-eof")
            }
            HostFrame::Ping(_) => Some("agent.ping"),
            _ => None,
        };
        let result = match &frame {
            HostFrame::Stdin { stream, bytes } => {
                commands.get_mut(stream).map_or(Ok(()), |command| command.stdin(bytes, vm, out))
            }
            HostFrame::StdinEof { stream } => {
                commands.get_mut(stream).into_iter().for_each(Command::stdin_eof);
                Ok(())
            }
            HostFrame::StdoutCredit { stream, bytes } => {
                commands.get_mut(stream).map_or(Ok(()), |command| command.credit(*bytes))
            }
            HostFrame::Ping(number) => {
                GuestFrame::Pong(*number).encode(out);
                Ok(())
            }
            _ => Ok(()),
        };
        if let Err(error) = result {
            self.vm.context.violation(&format!("the host breaks a window: {error}"));
        }
        if let Some(name) = reader {
            let fault = self.vm.context.steps.at(StepKind::Agent, name);
            let stream = if name == "agent.ping" { 0 } else { crate::agent::stream_of(&frame) };
            self.suffer(fault, stream, Some(Op::Exec))?;
        }
        self.flush()
    }

    fn exec(&mut self, stream: u32, exec: &Exec) -> Result<(), End> {
        if self.state()?.guest.identity.is_none() {
            self.vm.context.violation("a command was to run in a guest that is nobody yet");
            self.fail(stream, Some(Op::Exec), "the guest is nobody yet");
            return self.flush();
        }
        match Command::start(stream, exec, &self.vm) {
            Ok(command) => drop(self.commands.insert(stream, command)),
            Err(exit) => GuestFrame::Exited { stream, exit }.encode(&mut self.out),
        }
        Ok(())
    }

    /// Lets commands go on, and end.
    fn go_on(&mut self) -> Result<(), End> {
        drop(self.state()?);
        let streams: Vec<u32> = self.commands.keys().copied().collect();
        for stream in streams {
            let Some(command) = self.commands.get_mut(&stream) else { continue };
            if !command.go_on(&self.vm, &mut self.out) {
                continue;
            }
            self.flush()?;
            let fault = self.vm.context.steps.at(StepKind::Agent, "agent.exited");
            if self.suffer(fault, stream, Some(Op::Exec))? {
                self.commands[&stream].end(&mut self.out);
            }
            self.commands.remove(&stream);
        }
        self.flush()
    }

    fn prerun(&mut self) -> Result<(), String> {
        let hook = std::mem::take(&mut self.hook);
        self.for_capture("a hook", |state| state.guest.run_hook(&hook).map_err(|error| error.to_string()))
    }

    fn settle(&mut self) -> Result<(), String> {
        let free = self.for_capture("settle", |state| Ok(state.guest.free_bytes()))?;
        GuestFrame::FreeMemory(free.0).encode(&mut self.out);
        Ok(())
    }

    /// Legal while programs run, before a capture and in a spare.
    fn rehearse(&mut self) -> Result<(), String> {
        let mut state = self.state().map_err(|_| "gone")?;
        self.must(!state.guest.frozen, "warm: the guest is frozen")?;
        state.guest.warmed = true;
        Ok(())
    }

    fn freeze(&mut self) -> Result<(), String> {
        let mut state = self.state().map_err(|_| "gone")?;
        self.must(!state.guest.frozen, "freeze: the guest is frozen already")?;
        self.must(state.guest.warmed, "freeze: the guest is not warm")?;
        state.guest.frozen = true;
        Ok(())
    }

    /// A spare may be identified again, as the same one: it rests frozen in between.
    fn identify(&mut self, identity: &Identity) -> Result<(), String> {
        let mut state = self.state().map_err(|_| "gone")?;
        self.must(!state.guest.is_for_capture(), "identify: a guest that is to be captured must be nobody")?;
        self.must(state.guest.life() != Life::Restored || state.guest.frozen, "identify: its programs run")?;
        self.must(self.commands.is_empty(), "identify: a command runs")?;
        let number = number_of(&identity.hostname).map(|number| number.get());
        self.must(
            number.is_none_or(|number| number == self.vm.slot),
            "identify: the name is not that of the slot",
        )?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        self.must(
            now.abs_diff(identity.realtime_ns / 1_000_000_000) < CLOCK_MAX_S,
            "identify: the clock is old",
        )?;
        self.must(
            identity.network.is_some() && identity.mac[..2] == [0, 0x16],
            "identify: no address or MAC",
        )?;
        let new = (identity.hostname.clone(), identity.machine_id);
        self.must(
            state.guest.identity.as_ref().is_none_or(|old| *old == new),
            "identify: it was another before",
        )?;
        let noted = self.vm.context.use_identity(&identity.machine_id_hex(), &identity.entropy);
        noted.map_err(|error| error.to_string())?;
        state.guest.identity = Some(new);
        drop(state);
        self.unidentified = false;
        Ok(())
    }

    fn thaw(&mut self) -> Result<(), String> {
        let mut state = self.state().map_err(|_| "gone")?;
        self.must(state.guest.identity.is_some(), "thaw: the clone is nobody yet")?;
        state.guest.frozen = false;
        state.guest.write_as_clone().map_err(|error| error.to_string())
    }

    /// The host is told by the domain, once this agent has said that it is at it.
    fn shut_down(&mut self) -> Result<(), String> {
        self.state().map_err(|_| "gone")?.off = true;
        self.vm.ring();
        Ok(())
    }

    /// Does what is only done before a capture, to a guest whose programs run.
    fn for_capture<T>(
        &self,
        what: &str,
        run: impl FnOnce(&mut State) -> Result<T, String>,
    ) -> Result<T, String> {
        let mut state = self.state().map_err(|_| "gone")?;
        let life = state.guest.life();
        self.must(life == Life::Booted(BootPurpose::Capture), &format!("{what}: in a clone"))?;
        self.must(!state.guest.frozen, &format!("{what}: the guest is frozen"))?;
        run(&mut state)
    }

    /// A rule: broken, it is noted and the host is told.
    fn must(&self, holds: bool, what: &str) -> Result<(), String> {
        if holds {
            return Ok(());
        }
        self.vm.context.violation(what);
        Err(what.to_owned())
    }

    fn fail(&mut self, stream: u32, op: Option<Op>, message: &str) {
        let failed = Failed { op, step: "simulate".to_owned(), errno: 5, message: message.to_owned() };
        GuestFrame::Failed { stream, failed }.encode(&mut self.out);
    }

    fn flush(&mut self) -> Result<(), End> {
        let out = std::mem::take(&mut self.out);
        self.socket.write_all(&out).map_err(|_| End::Over)
    }
}

fn stream_of(frame: &HostFrame) -> u32 {
    match frame {
        HostFrame::Stdin { stream, .. } | HostFrame::StdinEof { stream } => *stream,
        _ => 0,
    }
}
