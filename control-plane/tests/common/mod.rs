//! A guest of the tests: an agent that is played by hand, and a domain that is a socket, held by an [`Exchange`] on a thread.

// Each file of tests uses a part of it.
#![allow(dead_code)]

use std::collections::VecDeque;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use control_plane::agent_link::AgentLink;
use control_plane::calls::wire::Finder;
use control_plane::calls::Exchange;
use control_plane::qube::{Class, Dvm, Qube, Template};
use control_plane::session::{Attended, Ending, SessionError, Signals};
use control_plane::state::State;
use engine::host::HostError;
use engine::timeline::Timeline;
use qrexec::{Decoder, GuestFrame, HostFrame};

/// The longest that anything here may take.
pub const LIMIT: Duration = Duration::from_secs(20);
pub const NAME: &str = "disp7";

/// A program of this package, which cargo builds beside its tests.
pub fn program(name: &str) -> PathBuf {
    let own = std::env::current_exe().unwrap();
    own.ancestors().nth(2).unwrap().join(name)
}

/// Writes the records of some qubes: a template, three DVM templates, and two AppVMs, one with a default_dispvm of its own.
pub fn qubes(state: &State) {
    let template = Template {
        generation: 1,
        root_hash: "0".into(),
        root_bytes: 1 << 30,
        kernel_hash: "0".into(),
        initrd_hash: "0".into(),
        cmdline: "quiet".into(),
    };
    Qube { name: "debian-12".into(), label: "black".into(), class: Class::TemplateVM(template) }
        .save(state)
        .unwrap();
    for name in ["debian-dvm", "whonix-ws-dvm", "work", "anon-whonix", "vault"] {
        let class = app(name.ends_with("-dvm"));
        Qube { name: name.into(), label: "red".into(), class }.save(state).unwrap();
    }
    let default_dispvm = |name: &str| format!("[properties]\ndefault_dispvm = \"{name}\"\n");
    fs::write(state.system_settings(), default_dispvm("debian-dvm")).unwrap();
    for name in ["anon-whonix", "whonix-ws-dvm"] {
        fs::write(state.qube(name).join("settings.toml"), default_dispvm("whonix-ws-dvm")).unwrap();
    }
}

/// An AppVM on debian-12.
pub fn app(template_for_dispvms: bool) -> Class {
    Class::AppVM(Dvm {
        template: "debian-12".into(),
        template_for_dispvms,
        memory_mib: 1024,
        vcpus: 2,
        net: "none".into(),
        private_mib: 2048,
        private_generation: 1,
        private_id: "x".into(),
        volatile_mib: 1024,
        spares: None,
        savefile: None,
    })
}

/// The agent, as the test plays it.
pub struct Agent {
    pub stream: UnixStream,
    decoder: Decoder,
    frames: VecDeque<HostFrame>,
}

impl Agent {
    /// The next frame that is neither credit nor the end of dom0's stderr, which nothing comes of.
    pub fn hear(&mut self) -> HostFrame {
        loop {
            match self.hear_any() {
                HostFrame::StdoutCredit { .. }
                | HostFrame::StderrCredit { .. }
                | HostFrame::CallStdinCredit { .. }
                | HostFrame::CallStderrEof { .. } => {}
                frame => return frame,
            }
        }
    }

    pub fn hear_any(&mut self) -> HostFrame {
        let mut buffer = [0; 4096];
        loop {
            if let Some(frame) = self.frames.pop_front() {
                return frame;
            }
            let count = match self.stream.read(&mut buffer) {
                // The holder's thread waits for SIGCHLD, which then comes here too, and a read with a limit is not begun anew.
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                count => count.expect("a frame from the holder"),
            };
            assert!(count > 0, "the holder has gone");
            let mut input = &buffer[..count];
            while let Some(raw) = self.decoder.next(&mut input).unwrap() {
                self.frames.push_back(HostFrame::parse(raw).unwrap());
            }
        }
    }

    pub fn say(&mut self, frame: &GuestFrame) {
        let mut out = Vec::new();
        frame.encode(&mut out);
        // A holder that has had enough has hung up.
        let _ = self.stream.write_all(&out);
    }

    /// The stream of the next command.
    pub fn take_exec(&mut self) -> u32 {
        match self.hear() {
            HostFrame::Exec { stream, .. } => stream,
            other => panic!("{other:?}"),
        }
    }
}

/// A domain whose events are bytes: `o` has it off.
struct Bytes {
    events: UnixStream,
    pauses: bool,
}

impl Attended for Bytes {
    fn events(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }

    fn attend(&mut self) -> Result<(), HostError> {
        let (step, mut byte) = ("serve", [0]);
        match self.events.read(&mut byte) {
            Ok(1) if byte == *b"o" => Err(HostError::PoweredOff { step }),
            _ => Err(HostError::Gone { step, detail: String::new() }),
        }
    }

    fn pause(&mut self) -> Result<(), HostError> {
        match self.pauses {
            true => Ok(()),
            false => Err(HostError::Refused { step: "pause", reason: "not this one".to_owned() }),
        }
    }

    fn unpause(&mut self) -> Result<(), HostError> {
        Ok(())
    }
}

/// A guest that is held.
pub struct Guest {
    pub folder: tempfile::TempDir,
    pub state: State,
    pub agent: Agent,
    pub domain: UnixStream,
    holder: JoinHandle<Result<Ending, SessionError>>,
}

impl Guest {
    pub fn start(pauses: bool) -> Guest {
        Guest::start_as(NAME, pauses)
    }

    pub fn start_as(name: &'static str, pauses: bool) -> Guest {
        Guest::start_with(name, pauses, None)
    }

    /// One with a channel for each call.
    pub fn start_with(name: &'static str, pauses: bool, channels: Option<Finder>) -> Guest {
        let folder = tempfile::tempdir().unwrap();
        let state = State::open(folder.path()).unwrap();
        qubes(&state);
        Guest::start_in(state, folder, name, pauses, channels)
    }

    /// Another guest of the same state folder.
    pub fn start_beside(&self, name: &'static str) -> Guest {
        Guest::start_in(self.state.clone(), tempfile::tempdir().unwrap(), name, true, None)
    }

    fn start_in(
        state: State,
        folder: tempfile::TempDir,
        name: &'static str,
        pauses: bool,
        channels: Option<Finder>,
    ) -> Guest {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (domain, events) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        ours.set_read_timeout(Some(LIMIT)).unwrap();
        ours.set_write_timeout(Some(LIMIT)).unwrap();
        let its_state = state.clone();
        let (told, bound) = std::sync::mpsc::channel();
        let holder = std::thread::spawn(move || {
            let mut signals = Signals::block().unwrap();
            let exchange = Exchange::new(&its_state, name, AgentLink::new(Box::new(theirs))).unwrap();
            let mut exchange = exchange.with_channels(&its_state, name, channels);
            told.send(()).unwrap();
            let mut timeline = Timeline::since(Instant::now());
            exchange.run(&mut Bytes { events, pauses }, None, &mut signals, &mut timeline)
        });
        bound.recv_timeout(LIMIT).unwrap();
        let agent = Agent { stream: ours, decoder: Decoder::new(), frames: VecDeque::new() };
        Guest { folder, state, agent, domain, holder }
    }

    /// Has the guest switch itself off, unless the holder has ended by itself; how it ended.
    pub fn end(self) -> Result<Ending, SessionError> {
        let _ = (&self.domain).write_all(b"o");
        self.holder.join().unwrap()
    }

    /// How the holder ended by itself.
    pub fn ended(self) -> Result<Ending, SessionError> {
        self.holder.join().unwrap()
    }
}
