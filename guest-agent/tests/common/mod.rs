//! A host for the agent under test: the other end of a socket pair.

#![allow(dead_code)]

pub mod guest;

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;
use std::time::Duration;

use guest_agent::agent::Agent;
use guest_agent::calls::Calls;
use guest_agent::failure::Failure;
use guest_agent::place::Place;
use guest_agent::port::Port;
use qrexec::{Decoder, Exec, Exit, GuestFrame, HostFrame};

/// Long enough for a loaded machine; a test that waits so long has failed.
const PATIENCE: Duration = Duration::from_secs(30);

/// The host's side of a connection to an agent in a thread of its own.
pub struct Host {
    pub socket: UnixStream,
    decoder: Decoder,
    heard: VecDeque<GuestFrame>,
    agent: Option<JoinHandle<()>>,
}

/// What a command gave.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Output {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub exit: Option<Exit>,
}

impl Host {
    /// Starts an agent and takes its greeting.
    pub fn connect() -> Self {
        Self::connect_to(Place::here(), Calls::default())
    }

    /// Starts an agent that runs commands there and takes these calls.
    pub fn connect_to(place: Place, calls: Calls) -> Self {
        let (socket, theirs) = UnixStream::pair().expect("socketpair");
        theirs.set_nonblocking(true).expect("nonblocking");
        socket.set_read_timeout(Some(PATIENCE)).expect("timeout");
        let agent = std::thread::spawn(move || {
            let freezer = Err(Failure::ours("freeze", 0, "not in tests"));
            let port = Port::over_socket(OwnedFd::from(theirs));
            Agent::new(port, place, true, freezer, calls).run().expect("serves");
        });
        let mut host = Self { socket, decoder: Decoder::new(), heard: VecDeque::new(), agent: Some(agent) };
        let hello = host.hear();
        assert!(
            matches!(&hello, GuestFrame::Hello(hello) if hello.protocol == qrexec::PROTOCOL && hello.session),
            "{hello:?}"
        );
        host
    }

    pub fn say(&mut self, frame: HostFrame) {
        let mut bytes = Vec::new();
        frame.encode(&mut bytes).expect("valid");
        self.socket.write_all(&bytes).expect("write");
    }

    pub fn exec<A: Into<Vec<u8>>>(&mut self, stream: u32, argv: impl IntoIterator<Item = A>) {
        self.say(HostFrame::Exec { stream, exec: Box::new(Exec::user(argv)) });
    }

    pub fn sh(&mut self, stream: u32, script: &str) {
        self.exec(stream, ["sh", "-c", script]);
    }

    /// The next frame.
    pub fn hear(&mut self) -> GuestFrame {
        let mut buffer = [0; 65536];
        loop {
            if let Some(frame) = self.heard.pop_front() {
                return frame;
            }
            let count = match self.socket.read(&mut buffer) {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue, // a child of another test
                read => read.expect("the agent answers in time"),
            };
            assert!(count > 0, "the agent has gone");
            let mut input = &buffer[..count];
            while let Some(raw) = self.decoder.next(&mut input).expect("decodes") {
                self.heard.push_back(GuestFrame::parse(raw).expect("parses"));
            }
        }
    }

    /// Listens until the command ended, giving credit for its output.
    pub fn finish(&mut self, stream: u32) -> Output {
        let mut output = Output::default();
        while output.exit.is_none() {
            let frame = self.hear();
            self.collect(&mut output, stream, frame);
        }
        output
    }

    /// As [`finish`](Self::finish), for a stream that has run out of credit.
    pub fn finish_after_credit(&mut self, stream: u32) -> Option<Exit> {
        self.say(HostFrame::StdoutCredit { stream, bytes: qrexec::INITIAL_WINDOW });
        self.finish(stream).exit
    }

    pub fn collect(&mut self, output: &mut Output, wanted: u32, frame: GuestFrame) {
        match frame {
            GuestFrame::Stdout { stream, bytes } if stream == wanted => {
                self.say(HostFrame::StdoutCredit { stream, bytes: bytes.len() as u32 });
                output.stdout.extend(bytes);
            }
            GuestFrame::Stderr { stream, bytes } if stream == wanted => {
                self.say(HostFrame::StderrCredit { stream, bytes: bytes.len() as u32 });
                output.stderr.extend(bytes);
            }
            GuestFrame::Exited { stream, exit } if stream == wanted => output.exit = Some(exit),
            GuestFrame::StdoutEof { stream } | GuestFrame::StderrEof { stream } if stream == wanted => {}
            GuestFrame::StdinClosed { .. } | GuestFrame::StdinCredit { .. } => {}
            other => panic!("unexpected: {other:?}"),
        }
    }

    /// Runs a script with no stdin.
    pub fn run(&mut self, stream: u32, script: &str) -> Output {
        self.sh(stream, script);
        self.say(HostFrame::StdinEof { stream });
        self.finish(stream)
    }

    pub fn ping(&mut self, number: u64) {
        self.say(HostFrame::Ping(number));
        assert_eq!(self.hear(), GuestFrame::Pong(number));
    }

    /// Hangs up and waits until the agent has noticed.
    pub fn hang_up(mut self) {
        let agent = self.agent.take();
        drop(self);
        agent.expect("there was one").join().expect("the agent ended well");
    }
}
