//! Calls by Qubes' own protocol: the holder's side, against an agent that is played by hand. What carries the bytes is not there: a caller says
//! where its pages would be, and in the place of `qrexec-policy-exec` stands a script that does.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Instant;

use common::{Guest, LIMIT};
use control_plane::calls::client;
use control_plane::calls::message::{Answer, Message, Serving};
use control_plane::calls::outgoing::CALLS_OUT_MAX;
use control_plane::calls::requests::CALLS_MAX;
use control_plane::calls::wire::Vchans;
use control_plane::daemon::channel::Channel;
use qrexec::service::CommandLine;
use qrexec::stock::control::{Endpoint, RequestId, Trigger, DATA_PORTS};
use qrexec::stock::{Decoder, FromAgent, Rules, ToAgent, Version};
use qrexec::{GuestFrame, HostFrame, Op};
use vchan::link::Offer;

const SOURCE: &str = "work";
const DOMAIN: u16 = 7;
const LINE: &[u8] = b"user:QUBESRPC test.Echo dom0";

type Published = Arc<Mutex<BTreeMap<u32, Offer>>>;

/// The guest's domain: hands the agent's end of its control channel to the test.
struct Domain {
    agents: Sender<UnixStream>,
    published: Published,
}

/// What xenstore has no room for, as its quota may have it.
const FAILING: u32 = 0xbad;

impl Vchans for Domain {
    fn domain(&self) -> u16 {
        DOMAIN
    }

    fn control(&mut self) -> io::Result<(UnixStream, Box<dyn Send>)> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        theirs.set_read_timeout(Some(LIMIT))?;
        self.agents.send(theirs).map_err(io::Error::other)?;
        Ok((ours, Box::new(())))
    }

    fn publish(&mut self, port: u32, offer: Offer) -> io::Result<()> {
        if offer.grant == FAILING {
            return Err(io::Error::other("no room"));
        }
        self.published.lock().unwrap().insert(port, offer);
        Ok(())
    }

    fn withdraw(&mut self, port: u32) -> io::Result<()> {
        self.published.lock().unwrap().remove(&port);
        Ok(())
    }
}

/// A stock agent.
struct Agent {
    stream: UnixStream,
    decoder: Decoder,
    unread: Vec<u8>,
}

impl Agent {
    fn hear(&mut self) -> ToAgent {
        loop {
            let mut input = &self.unread[..];
            let raw = self.decoder.next(&mut input).unwrap();
            self.unread = input.to_vec();
            if let Some(raw) = raw {
                return ToAgent::parse(&raw).unwrap();
            }
            let mut buffer = [0; 4096];
            let count = match self.stream.read(&mut buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                read => read.expect("a message from the holder"),
            };
            assert!(count > 0, "the holder has hung up");
            self.unread.extend(&buffer[..count]);
        }
    }

    fn say(&mut self, message: &FromAgent) {
        let mut bytes = Vec::new();
        message.encode(Version::V3, &mut bytes).unwrap();
        self.stream.write_all(&bytes).unwrap();
    }

    fn asks(&mut self, service: &str, request: &str) {
        self.say(&FromAgent::Trigger(Trigger {
            service: service.into(),
            target: b"dom0".to_vec(),
            source: Vec::new(),
            request: RequestId::new(request).unwrap(),
        }));
    }

    fn terminated(&mut self, port: u32) {
        self.say(&FromAgent::ConnectionTerminated(Endpoint { domain: 0, port }));
    }
}

struct Lab {
    guest: Guest,
    agents: Receiver<UnixStream>,
    published: Published,
}

impl Lab {
    fn new() -> Lab {
        setup();
        let (tell, agents) = channel();
        let published = Published::default();
        let domain = Domain { agents: tell, published: published.clone() };
        let finder = Box::new(move || Ok(Some(Box::new(domain) as Box<dyn Vchans>)));
        Lab { guest: Guest::start_with(SOURCE, true, Some(finder)), agents, published }
    }

    /// With an agent that has said its Hello, and been heard.
    fn agreed() -> (Lab, Agent) {
        let mut lab = Lab::new();
        lab.guest.agent.say(&GuestFrame::Done(Op::Thaw));
        assert_eq!(lab.guest.agent.hear(), HostFrame::ServeCalls);
        let mut agent = lab.agent();
        // It has been heard when what came behind it is answered.
        agent.asks("test.No", "first");
        assert_eq!(agent.hear(), ToAgent::ServiceRefused(RequestId::new("first").unwrap()));
        lab.until("its process has ended", |lab| lab.calls_out() == 0);
        (lab, agent)
    }

    fn agent(&mut self) -> Agent {
        let mut stream = self.agents.recv_timeout(LIMIT).unwrap();
        let mut hello = Vec::new();
        Version::V3.encode_hello(&mut hello);
        stream.write_all(&hello).unwrap();
        let mut theirs = [0; 12];
        stream.read_exact(&mut theirs).unwrap();
        let mut newest = Vec::new();
        Version::NEWEST.encode_hello(&mut newest);
        assert_eq!(theirs, newest[..]);
        let mut decoder = Decoder::new();
        decoder.expect(Rules::ToAgent);
        Agent { stream, decoder, unread: Vec::new() }
    }

    fn ports(&self) -> Vec<u32> {
        self.published.lock().unwrap().keys().copied().collect()
    }

    fn calls(&self) -> Channel {
        let holder = Channel::connect(&self.guest.state.call_socket(SOURCE)).unwrap();
        let line = Message::Line(CommandLine::parse(LINE).unwrap()).encode().unwrap();
        let null = fs::File::open("/dev/null").unwrap();
        holder.send_bytes(&line, &[null.as_fd(), null.as_fd(), null.as_fd()]).unwrap();
        holder
    }

    /// A caller that serves what it is asked to.
    fn serves(&self) -> Channel {
        self.serves_at(9)
    }

    fn serves_at(&self, grant: u32) -> Channel {
        let holder = self.calls();
        let (answer, _) = holder.receive_within::<Answer>(LIMIT).unwrap().unwrap();
        assert_eq!(answer, Answer::Serve { domain: DOMAIN });
        holder.send(&Serving { grant, port: 5 }, &[]).unwrap();
        holder
    }

    fn until(&self, what: &str, is_so: impl Fn(&Lab) -> bool) {
        let start = Instant::now();
        while !is_so(self) {
            assert!(start.elapsed() < LIMIT, "in vain until {what}");
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
    }

    fn calls_out(&self) -> usize {
        client::status(&self.guest.state, SOURCE).unwrap().calls_out
    }
}

/// A `qrexec-policy-exec` that refuses test.No, and accepts all else until it is told to end.
fn setup() {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("calls-wire");
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).unwrap();
        let program = folder.join("qrexec-policy-exec");
        let text = r#"#!/bin/sh
verdict=/proc/self/fd/$DISPVM_CALL_VERDICT
case "$*" in
*--meet\ 7*test.No) printf '%s' '-no' >$verdict; exit 126;;
*--meet\ 7\ --port\ 5*) printf '%s' '+a rule' >$verdict; exec sleep 60;;
*) printf '%s' '-not to be met' >$verdict;;
esac
"#;
        fs::write(&program, text).unwrap();
        fs::set_permissions(program, fs::Permissions::from_mode(0o755)).unwrap();
        let path = format!("{}:{}", folder.display(), std::env::var("PATH").unwrap());
        std::env::set_var("PATH", path);
        folder
    });
}

fn exec(port: u32) -> ToAgent {
    ToAgent::ExecCmdline(Endpoint { domain: 0, port }, LINE.to_vec())
}

#[test]
fn a_callers_command_has_a_port_of_its_own_until_both_have_let_go_of_it() {
    let (lab, mut agent) = Lab::agreed();
    let callers: Vec<Channel> = (513..516)
        .map(|port| {
            let caller = lab.serves();
            assert_eq!(agent.hear(), exec(port));
            caller
        })
        .collect();
    assert_eq!(lab.ports(), [513, 514, 515]);
    assert_eq!(lab.published.lock().unwrap()[&514], Offer { grant: 9, port: 5 });
    assert_eq!(client::status(&lab.guest.state, SOURCE).unwrap().commands, 3);
    // That the guest has let go is no reason for a caller to end: it may have something to read yet.
    agent.terminated(513);
    agent.terminated(513);
    agent.terminated(700);
    let said = callers[0].receive_within::<Answer>(LIMIT).unwrap().unwrap().0;
    assert!(matches!(said, Answer::NotStarted { .. }), "{said:?}: one who waits for it yet waits in vain");
    // What was said before this has been heard.
    agent.asks("../bin/sh", "again");
    assert_eq!(agent.hear(), ToAgent::ServiceRefused(RequestId::new("again").unwrap()));
    assert_eq!(client::status(&lab.guest.state, SOURCE).unwrap().commands, 3);
    let silent = |caller: &Channel| {
        let waited = caller.receive_within::<Answer>(std::time::Duration::from_millis(1));
        waited.is_err_and(|error| error.kind() == io::ErrorKind::TimedOut)
    };
    assert!(callers.iter().all(silent), "told once, and nobody else");
    drop(callers);
    lab.until("the nodes are gone", |lab| lab.ports().is_empty());
    let _caller = lab.serves();
    assert_eq!(agent.hear(), exec(516));
    // One that has nothing to say is let go of when it hangs up.
    drop(lab.calls());
    lab.until("it is forgotten", |lab| client::status(&lab.guest.state, SOURCE).unwrap().commands == 1);
    let published = lab.published.clone();
    lab.guest.end().unwrap();
    assert!(published.lock().unwrap().is_empty(), "no node outlives its guest");
}

#[test]
fn a_call_of_the_guests_is_connected_refused_and_ended() {
    let (lab, mut agent) = Lab::agreed();
    agent.asks("test.Yes", "SOCKET11");
    let connect =
        ToAgent::ServiceConnect(Endpoint { domain: 0, port: 513 }, RequestId::new("SOCKET11").unwrap());
    assert_eq!(agent.hear(), connect);
    assert!(lab.ports().is_empty(), "the guest serves it");
    for (service, request) in [("../bin/sh", "SOCKET12"), ("test.No", "SOCKET13")] {
        agent.asks(service, request);
        assert_eq!(agent.hear(), ToAgent::ServiceRefused(RequestId::new(request).unwrap()));
    }
    lab.until("what was refused has ended", |lab| lab.calls_out() == 1);
    agent.terminated(514);
    agent.terminated(513);
    lab.until("its process has ended", |lab| lab.calls_out() == 0);
    lab.guest.end().unwrap();
}

#[test]
fn floods_are_bounded_either_way() {
    let (lab, mut agent) = Lab::agreed();
    for number in 0..200 {
        agent.asks("test.Yes", &number.to_string());
    }
    let answers: Vec<ToAgent> = (0..200).map(|_| agent.hear()).collect();
    let connected = answers.iter().filter(|answer| matches!(answer, ToAgent::ServiceConnect(..))).count();
    assert_eq!((connected, lab.calls_out()), (CALLS_OUT_MAX, CALLS_OUT_MAX));
    let callers: Vec<Channel> = (0..CALLS_MAX).map(|_| lab.serves()).collect();
    let (answer, _) = lab.calls().receive_within::<Answer>(LIMIT).unwrap().unwrap();
    assert!(matches!(answer, Answer::Refused { .. }), "{answer:?}");
    assert_eq!(callers.len(), CALLS_MAX);
    lab.guest.end().unwrap();
}

#[test]
fn before_the_channel_stands_and_after_it_was_given_up_calls_go_by_frames() {
    let mut lab = Lab::new();
    let framed = |lab: &mut Lab| {
        let _caller = lab.calls();
        let stream = lab.guest.agent.take_exec();
        lab.guest.agent.say(&GuestFrame::Exited { stream, exit: qrexec::Exit::Code(0) });
    };
    framed(&mut lab);
    lab.guest.agent.say(&GuestFrame::Done(Op::Thaw));
    while lab.guest.agent.hear() != HostFrame::ServeCalls {}
    let mut agent = lab.agent();
    let _caller = lab.serves();
    assert_eq!(agent.hear(), exec(513));
    let mut second = Vec::new();
    Version::V3.encode_hello(&mut second);
    agent.stream.write_all(&second).unwrap();
    assert_eq!(agent.stream.read(&mut [0]).unwrap(), 0, "the channel is given up");
    framed(&mut lab);
    assert_eq!(lab.ports(), [513], "what has a vchan goes on");
    lab.guest.end().unwrap();
}

#[test]
fn where_the_guest_cannot_be_told_of_a_channel_the_caller_hears_it_and_later_ones_go_by_frames() {
    let (mut lab, mut agent) = Lab::agreed();
    let first = lab.serves();
    assert_eq!(agent.hear(), exec(513));
    let (answer, _) = lab.serves_at(FAILING).receive_within::<Answer>(LIMIT).unwrap().unwrap();
    assert!(matches!(&answer, Answer::NotStarted { reason } if reason.contains("no room")), "{answer:?}");
    let caller = lab.calls();
    let stream = lab.guest.agent.take_exec();
    lab.guest.agent.say(&GuestFrame::Exited { stream, exit: qrexec::Exit::Code(4) });
    let (answer, _) = caller.receive_within::<Answer>(LIMIT).unwrap().unwrap();
    assert_eq!(answer, Answer::Exited(qrexec::Exit::Code(4)));
    assert_eq!(lab.ports(), [513], "what has a vchan goes on");
    // The guest's own calls need no node of ours.
    agent.asks("test.Yes", "SOCKET14");
    assert!(matches!(agent.hear(), ToAgent::ServiceConnect(Endpoint { port: 515, .. }, _)));
    drop(first);
    lab.guest.end().unwrap();
}

#[test]
fn a_new_agent_has_none_of_the_ports_that_the_one_before_it_did_not_let_go_of() {
    let (mut lab, mut agent) = Lab::agreed();
    for port in DATA_PORTS {
        let caller = lab.serves();
        assert_eq!(agent.hear(), exec(port));
        drop(caller);
        lab.until("it is forgotten", |lab| lab.ports().is_empty());
    }
    let caller = lab.calls();
    let stream = lab.guest.agent.take_exec();
    lab.guest.agent.say(&GuestFrame::Exited { stream, exit: qrexec::Exit::Code(0) });
    let (answer, _) = caller.receive_within::<Answer>(LIMIT).unwrap().unwrap();
    assert_eq!(answer, Answer::Exited(qrexec::Exit::Code(0)), "no port is left");
    drop(agent);
    while lab.guest.agent.hear() != HostFrame::ServeCalls {}
    let mut agent = lab.agent();
    agent.asks("../bin/sh", "second");
    assert_eq!(agent.hear(), ToAgent::ServiceRefused(RequestId::new("second").unwrap()));
    let _caller = lab.serves();
    assert_eq!(agent.hear(), exec(513));
    lab.guest.end().unwrap();
}
