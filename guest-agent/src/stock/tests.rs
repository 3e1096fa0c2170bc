//! The agent's part against a dom0 that is this test: its vchans are sockets, its xenstore a table. Real programs run.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use call_channel::port::Port;
use call_channel::{run_client, run_service, Broken, Running, Socket, Streams, Watch};
use qrexec::stock::control::ToAgent;
use qrexec::stock::{Decoder, FromAgent, RawMessage, Rules, Version};
use rustix::event::{eventfd, EventfdFlags};
use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::*;
use crate::calls::Calls;
use crate::outbox::Outbox;

const LIMIT: Duration = Duration::from_secs(20);

/// What both sides see.
#[derive(Default)]
struct World {
    /// Control channels that have been offered: dom0's ends.
    offered: Vec<UnixStream>,
    /// Whether another agent's offer stands.
    foreign: bool,
    withdrawn: usize,
    /// What dom0 serves, for the guest to connect to.
    by_dom0: HashMap<u32, UnixStream>,
    /// What the guest serves.
    by_guest: HashMap<u32, UnixStream>,
    watched: usize,
}

#[derive(Clone)]
struct TestSite {
    world: Arc<Mutex<World>>,
    bell: Arc<OwnedFd>,
}

impl Site for TestSite {
    type Link = Socket;

    fn open() -> io::Result<Self> {
        Err(io::ErrorKind::NotFound.into())
    }
    fn offer(&mut self) -> io::Result<Option<Socket>> {
        let mut world = self.world.lock().expect("lock");
        if world.foreign {
            return Ok(None);
        }
        let (ours, theirs) = UnixStream::pair()?;
        world.offered.push(theirs);
        Socket::new(ours).map(Some)
    }
    fn withdraw(&mut self) {
        self.world.lock().expect("lock").withdrawn += 1;
    }
    fn connect(&mut self, endpoint: Endpoint) -> Option<Socket> {
        let found = self.world.lock().expect("lock").by_dom0.remove(&endpoint.port);
        found.map(|stream| Socket::new(stream).expect("a socket"))
    }
    fn watch(&mut self, _: Endpoint) -> io::Result<()> {
        self.world.lock().expect("lock").watched += 1;
        Ok(())
    }
    fn unwatch(&mut self, _: Endpoint) {
        let mut world = self.world.lock().expect("lock");
        world.watched = world.watched.saturating_sub(1);
    }
    fn serve(&mut self, endpoint: Endpoint) -> io::Result<Socket> {
        let (ours, theirs) = UnixStream::pair()?;
        self.world.lock().expect("lock").by_guest.insert(endpoint.port, theirs);
        Socket::new(ours)
    }
    fn end_serving(&mut self, _: Endpoint) {}
    fn abandon(&mut self, link: Socket) {
        std::mem::forget(link);
    }
    fn slot(&self) -> PollSlot {
        sys::slot(Some((*self.bell).as_fd()), libc::POLLIN)
    }
    fn has_news(&self) -> bool {
        false
    }
    fn hear(&mut self) -> io::Result<()> {
        let _ = rustix::io::read(&*self.bell, &mut [0; 8]);
        Ok(())
    }
}

/// An agent's loop in a thread.
struct Lab {
    world: Arc<Mutex<World>>,
    bell: Arc<OwnedFd>,
    stop: Arc<AtomicBool>,
    path: PathBuf,
    agent: Option<JoinHandle<()>>,
    _folder: tempfile::TempDir,
}

impl Lab {
    fn new() -> Lab {
        let folder = tempfile::tempdir().expect("tempdir");
        let path = folder.path().join("socket");
        let world = Arc::<Mutex<World>>::default();
        let bell = Arc::new(eventfd(0, EventfdFlags::NONBLOCK).expect("eventfd"));
        let stop = Arc::<AtomicBool>::default();
        let calls = Calls::listen(&path).expect("listens");
        let site = TestSite { world: world.clone(), bell: bell.clone() };
        let stopped = stop.clone();
        let mut stock = Stock { site: Some(site), ..Stock::default() };
        stock.offer().expect("offers");
        let agent = thread::spawn(move || run(stock, calls, &stopped));
        Lab { world, bell, stop, path, agent: Some(agent), _folder: folder }
    }

    fn dom0(&self) -> Dom0 {
        let started = Instant::now();
        loop {
            if let Some(stream) = self.world.lock().expect("lock").offered.pop() {
                return Dom0::new(stream);
            }
            assert!(started.elapsed() < LIMIT, "nothing is offered");
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// Serves a call's channel at a port.
    fn publish(&self, port: u32) -> Socket {
        let (ours, theirs) = UnixStream::pair().expect("pair");
        self.world.lock().expect("lock").by_dom0.insert(port, theirs);
        rustix::io::write(&*self.bell, &1u64.to_ne_bytes()).expect("rings");
        Socket::new(ours).expect("a socket")
    }

    fn served(&self, port: u32) -> Socket {
        let started = Instant::now();
        loop {
            if let Some(stream) = self.world.lock().expect("lock").by_guest.remove(&port) {
                return Socket::new(stream).expect("a socket");
            }
            assert!(started.elapsed() < LIMIT, "nothing is served");
            thread::sleep(Duration::from_millis(2));
        }
    }

    fn program(&self, said: &[u8]) -> OwnedFd {
        let flags = SocketFlags::CLOEXEC;
        let socket =
            net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).expect("socket");
        net::connect(&socket, &SocketAddrUnix::new(&self.path).expect("short")).expect("connects");
        net::send(&socket, said, net::SendFlags::NOSIGNAL).expect("sends");
        socket
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let _ = rustix::io::write(&*self.bell, &1u64.to_ne_bytes());
        let ended = self.agent.take().map(JoinHandle::join);
        assert!(thread::panicking() || ended.is_some_and(|ended| ended.is_ok()));
    }
}

fn run(mut stock: Stock<TestSite>, mut calls: Calls, stop: &AtomicBool) {
    let (place, mut outbox) = (Place::here(), Outbox::default());
    while !stop.load(Ordering::SeqCst) {
        let mut slots = Vec::new();
        stock.watch(&mut slots);
        calls.watch(&mut slots, &outbox);
        let left =
            stock.deadline().map(|at| at.saturating_duration_since(Instant::now()).as_millis() as u32 + 1);
        let timeout = if stock.is_ready() { Some(0) } else { left };
        sys::poll(&mut slots, timeout).expect("polls");
        let mut ready = &slots[..];
        stock.serve(&mut ready, &place, 0);
        calls.serve(&mut ready, &mut outbox, &mut stock);
        assert_eq!(outbox.waiting(), 0, "no call goes by frames");
    }
}

/// Dom0's end of the control channel.
struct Dom0 {
    stream: UnixStream,
    decoder: Decoder,
}

impl Dom0 {
    fn new(mut stream: UnixStream) -> Dom0 {
        stream.set_read_timeout(Some(LIMIT)).expect("a limit");
        let mut hello = Vec::new();
        Version::V3.encode_hello(&mut hello);
        stream.write_all(&hello).expect("writes");
        let mut dom0 = Dom0 { stream, decoder: Decoder::new() };
        assert_eq!(dom0.raw().kind, 0x300);
        dom0.decoder.expect(Rules::FromAgent(Version::V3));
        dom0
    }

    fn raw(&mut self) -> RawMessage {
        loop {
            let mut byte = [0];
            self.stream.read_exact(&mut byte).expect("the agent speaks");
            if let Some(raw) = self.decoder.next(&mut &byte[..]).expect("sound") {
                return raw;
            }
        }
    }

    fn hear(&mut self) -> FromAgent {
        FromAgent::parse(&self.raw()).expect("parses")
    }

    fn say(&mut self, message: &ToAgent) {
        let mut bytes = Vec::new();
        message.encode(&mut bytes).expect("encodes");
        self.stream.write_all(&bytes).expect("writes");
    }

    fn exec(&mut self, port: u32, line: &str) {
        self.say(&ToAgent::ExecCmdline(at(port), line.into()));
    }

    fn terminated(&mut self) -> u32 {
        match self.hear() {
            FromAgent::ConnectionTerminated(endpoint) => endpoint.port,
            other => panic!("unexpected: {other:?}"),
        }
    }
}

fn at(port: u32) -> Endpoint {
    Endpoint { domain: 0, port }
}

/// Carries a caller's end: output, complaints, status.
fn call(channel: Socket, input: &[u8]) -> (Vec<u8>, Vec<u8>, Result<i32, Broken>) {
    let pipe = || std::io::pipe().expect("pipe");
    let ((stdin, mut to), (mut out, stdout), (mut err, stderr)) = (pipe(), pipe(), pipe());
    let own = |fd: OwnedFd| Some(Port::own(fd).expect("a port"));
    let streams =
        Streams { stdin: own(stdin.into()), stdout: own(stdout.into()), stderr: own(stderr.into()) };
    let client = thread::spawn(move || run_client(channel, streams, Watch::default()));
    to.write_all(input).expect("fits a pipe");
    drop(to);
    let (mut output, mut complaints) = (Vec::new(), Vec::new());
    out.read_to_end(&mut output).expect("reads");
    err.read_to_end(&mut complaints).expect("reads");
    (output, complaints, client.join().expect("ends"))
}

#[test]
fn what_dom0_wants_runs_and_its_port_comes_back() {
    let lab = Lab::new();
    let mut dom0 = lab.dom0();
    let channel = lab.publish(513);
    dom0.exec(513, "DEFAULT:cat; echo no >&2; exit 4");
    let (out, err, status) = call(channel, b"in");
    assert_eq!((out, err, status.expect("ends")), (b"in".to_vec(), b"no\n".to_vec(), 4));
    assert_eq!(dom0.terminated(), 513);
}

#[test]
fn a_vchan_that_comes_after_the_message_is_waited_for() {
    let lab = Lab::new();
    let mut dom0 = lab.dom0();
    dom0.exec(600, "root:echo one");
    dom0.exec(601, "root:echo two");
    thread::sleep(Duration::from_millis(50));
    let channels = [lab.publish(601), lab.publish(600)];
    let outputs = channels.map(|channel| call(channel, b"").0);
    assert_eq!(outputs, [b"two\n", b"one\n"]);
    let mut ended = [dom0.terminated(), dom0.terminated()];
    ended.sort_unstable();
    assert_eq!((ended, lab.world.lock().expect("lock").watched), ([600, 601], 0));
}

#[test]
fn lines_that_nobody_can_run_are_a_status() {
    let lab = Lab::new();
    let mut dom0 = lab.dom0();
    let lines =
        [("no colon", 125), ("nobody:id", 125), ("DEFAULT:QUBESRPC no.Such work", 127), ("root:exit 9", 9)];
    for (port, (line, status)) in (513..).zip(lines) {
        let channel = lab.publish(port);
        dom0.exec(port, line);
        assert_eq!(call(channel, b"").2.expect("ends"), status, "{line}");
        assert_eq!(dom0.terminated(), port);
    }
}

#[test]
fn what_is_just_started_is_zero_at_once() {
    let (lab, folder) = (Lab::new(), tempfile::tempdir().expect("tempdir"));
    let mut dom0 = lab.dom0();
    let file = folder.path().join("file");
    let channel = lab.publish(520);
    let line = format!("root:sleep 0.3; readlink /proc/self/fd/0 > {}", file.display());
    dom0.say(&ToAgent::JustExec(at(520), line.into_bytes()));
    let (out, _, status) = call(channel, b"");
    assert_eq!((out, status.expect("ends")), (Vec::new(), 0));
    assert_eq!(dom0.terminated(), 520);
    assert!(!file.exists(), "it is not waited for");
    until("it has run", || std::fs::read_to_string(&file).is_ok_and(|text| text == "/dev/null\n"));
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let started = Instant::now();
    while !done() {
        assert!(started.elapsed() < LIMIT, "waited in vain until {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

fn lives(pid: &str) -> bool {
    let state = std::fs::read_to_string(Path::new("/proc").join(pid.trim()).join("stat"));
    state.is_ok_and(|state| !state.contains(") Z "))
}

#[test]
fn a_caller_that_goes_ends_its_command() {
    let (lab, folder) = (Lab::new(), tempfile::tempdir().expect("tempdir"));
    let mut dom0 = lab.dom0();
    let file = folder.path().join("pid");
    let channel = lab.publish(513);
    dom0.exec(513, &format!("root:echo $$ > {}; exec sleep 60", file.display()));
    let (read, hang_up) = std::io::pipe().expect("pipe");
    let caller = thread::spawn(move || {
        let watch = Watch { until: Some(read.as_fd()), ..Watch::default() };
        run_client(channel, Streams::default(), watch)
    });
    until("it runs", || std::fs::read_to_string(&file).is_ok_and(|text| text.ends_with('\n')));
    let pid = std::fs::read_to_string(&file).expect("there");
    assert!(lives(&pid));
    drop(hang_up);
    assert!(caller.join().expect("ends").is_err());
    assert_eq!(dom0.terminated(), 513);
    until("it has ended", || !lives(&pid));
}

#[test]
fn a_programs_call_goes_to_dom0_which_connects_to_what_it_serves() {
    let lab = Lab::new();
    let mut dom0 = lab.dom0();
    // Dom0's Hello is heard with the first message that follows it, at the latest.
    let channel = lab.publish(513);
    dom0.exec(513, "root:true");
    assert_eq!(call(channel, b"").2.expect("ends"), 0);
    assert_eq!(dom0.terminated(), 513);
    let program = lab.program(b"dom0\0test.Who+x\0");
    let FromAgent::Trigger(trigger) = dom0.hear() else { panic!("no call") };
    assert_eq!((trigger.target.as_slice(), trigger.service.as_slice()), (&b"dom0"[..], &b"test.Who+x"[..]));
    let port = 530;
    dom0.say(&ToAgent::ServiceConnect(at(port), trigger.request));
    let channel = lab.served(port);
    let service = thread::spawn(move || {
        let start = || {
            let mut command = std::process::Command::new("sh");
            let piped = std::process::Stdio::piped;
            command.args(["-c", "cat; exit 6"]).stdin(piped()).stdout(piped());
            Ok(Running::of(command.spawn().expect("sh")).expect("runs"))
        };
        run_service(channel, start, Watch::default())
    });
    let (answer, fds) = Answer::receive(&program).expect("reads").expect("answers");
    assert_eq!(answer, Answer::Accepted);
    let [to, from, _complaints]: [OwnedFd; 3] = fds.try_into().expect("three");
    File::from(to).write_all(b"said").expect("writes");
    let mut heard = Vec::new();
    File::from(from).read_to_end(&mut heard).expect("reads");
    assert_eq!(heard, b"said");
    let (answer, _) = Answer::receive(&program).expect("reads").expect("answers");
    assert_eq!((answer, service.join().expect("ends").expect("over")), (Answer::Exited(6), 6));
    assert_eq!(dom0.terminated(), port);
}

#[test]
fn a_call_that_may_not_be_is_refused_and_one_whose_program_is_gone_is_let_go() {
    let lab = Lab::new();
    let mut dom0 = lab.dom0();
    let channel = lab.publish(513);
    dom0.exec(513, "root:true");
    assert_eq!(call(channel, b"").2.expect("ends"), 0);
    dom0.terminated();
    let program = lab.program(b"work\0test.Who\0");
    let FromAgent::Trigger(trigger) = dom0.hear() else { panic!("no call") };
    dom0.say(&ToAgent::ServiceRefused(trigger.request));
    let (answer, _) = Answer::receive(&program).expect("reads").expect("answers");
    assert_eq!(answer, Answer::Refused);
    drop(lab.program(b"work\0test.Who\0"));
    let FromAgent::Trigger(trigger) = dom0.hear() else { panic!("no call") };
    thread::sleep(Duration::from_millis(50));
    dom0.say(&ToAgent::ServiceConnect(at(540), trigger.request));
    assert_eq!(dom0.terminated(), 540);
}

#[test]
fn a_dom0_that_goes_or_lies_ends_its_calls_and_finds_another_offer() {
    let lab = Lab::new();
    for lie in [false, true] {
        let mut dom0 = lab.dom0();
        let channel = lab.publish(513);
        dom0.exec(513, "root:echo up; exec sleep 60");
        let (mut out, stdout) = std::io::pipe().expect("pipe");
        let streams =
            Streams { stdout: Some(Port::own(stdout.into()).expect("a port")), ..Streams::default() };
        let caller = thread::spawn(move || run_client(channel, streams, Watch::default()));
        out.read_exact(&mut [0; 3]).expect("it runs");
        let program = lab.program(b"work\0test.Who\0");
        assert!(matches!(dom0.hear(), FromAgent::Trigger(_)));
        if lie {
            dom0.stream.write_all(&[0xff; 64]).expect("writes");
        } else {
            drop(dom0);
        }
        assert!(matches!(caller.join().expect("ends"), Err(Broken::Gone(_))));
        assert!(Answer::receive(&program).expect("reads").is_none(), "it is sent away");
    }
    drop(lab.dom0());
    assert!(lab.world.lock().expect("lock").withdrawn >= 2);
}

#[test]
fn a_flood_of_commands_is_not_run() {
    let lab = Lab::new();
    let mut dom0 = lab.dom0();
    let mut bytes = Vec::new();
    for port in 1..2000 {
        ToAgent::ExecCmdline(at(513 + port % 256), b"root:sleep 5".to_vec())
            .encode(&mut bytes)
            .expect("encodes");
    }
    let mut writer = dom0.stream.try_clone().expect("clones");
    let writing = thread::spawn(move || writer.write_all(&bytes));
    let mut refused = 0;
    while refused < 1999 - STREAMS_MAX {
        dom0.terminated();
        refused += 1;
    }
    writing.join().expect("ends").expect("writes");
    assert_eq!(lab.world.lock().expect("lock").watched, STREAMS_MAX);
}

#[test]
fn where_another_agent_serves_nothing_is_offered() {
    let world = Arc::<Mutex<World>>::default();
    world.lock().expect("lock").foreign = true;
    let bell = Arc::new(eventfd(0, EventfdFlags::NONBLOCK).expect("eventfd"));
    let site = TestSite { world: world.clone(), bell };
    let mut stock = Stock { site: Some(site), ..Stock::default() };
    stock.offer().expect("is left alone");
    assert!(
        stock.control.is_none() && !stock.takes_calls() && world.lock().expect("lock").offered.is_empty()
    );
    stock.end();
    assert_eq!(world.lock().expect("lock").withdrawn, 0, "it is not ours to take back");
    let mut without: Stock<TestSite> = Stock::default();
    assert!(without.offer().is_err());
}
