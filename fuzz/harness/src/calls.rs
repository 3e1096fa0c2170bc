//! Calls between qubes, apart from their frames: what callers say at a holder's call socket, what an agent and a dom0 say by
//! Qubes' own protocol, what programs in a guest and its agent say to each other, and the command lines of `qrexec-client`.

use std::os::fd::OwnedFd;

use control_plane::calls::message::{Answer, Message};
use control_plane::calls::service;
use control_plane::calls::wire::control::{Control, Heard};
use control_plane::calls::wire::ports::Ports;
use guest_agent::calls::message::{self, Answer as AgentsAnswer};
use guest_agent::stock::control::{Control as AgentsControl, Heard as Order};
use qrexec::service::{Command, CommandLine};
use qrexec::stock::control::DATA_PORTS;
use qrexec::stock::WireError;
use qrexec::{Call, Exec, HostFrame, PAYLOAD_BYTES_MAX};
use rustix::net::{self, AddressFamily, SendFlags, SocketFlags, SocketType};

/// The bytes as a caller's message to a holder, and as a holder's answer.
pub fn call_socket(data: &[u8]) {
    if let Ok(message) = Message::parse(data) {
        let again = message.encode().expect("what was parsed can be said again");
        assert_eq!(Message::parse(&again), Ok(message));
    }
    if let Ok(answer) = serde_json::from_slice::<Answer>(data) {
        let again = serde_json::to_vec(&answer).expect("an answer is JSON");
        assert_eq!(serde_json::from_slice::<Answer>(&again).expect("it comes back"), answer);
    }
}

/// The bytes as what an agent says to a holder, once its length of pieces is taken off. All that it asks for is answered, now so, now so.
pub fn call_control(mut data: &[u8]) {
    let [cut] = crate::take(&mut data);
    let (mut control, mut ports) = (Control::new(), Ports::default());
    let (mut held, mut asked) = (Vec::new(), 0usize);
    let hello = control.unsent().len();
    'channel: for piece in data.chunks(usize::from(cut).max(1)) {
        let mut input = piece;
        loop {
            match control.hear(&mut input) {
                Err(error) => {
                    assert_eq!(control.hear(&mut &piece[..]), Err(error), "for ever");
                    break 'channel;
                }
                Ok(None) => break,
                Ok(Some(Heard::Agreed(_))) => assert!(asked == 0 && held.is_empty() && control.is_agreed()),
                Ok(Some(Heard::Nonsense(request))) => {
                    asked += 1;
                    control.refuse(request).expect("what was parsed can be said");
                }
                Ok(Some(Heard::Asked(call))) => {
                    asked += 1;
                    assert!(!call.service.name().contains('/') && call.request.as_str().len() < 32);
                    match ports.take() {
                        Some(port) => {
                            assert!(!held.contains(&port), "a port has one call");
                            held.push(port);
                            control.connect(port, call.request)
                        }
                        None => control.refuse(call.request),
                    }
                    .expect("what was parsed can be said");
                }
                Ok(Some(Heard::Terminated(port))) => {
                    ports.terminated(port);
                    if let Some(at) = held.iter().position(|held| *held == port) {
                        ports.give_back(held.swap_remove(at));
                    }
                }
            }
        }
    }
    assert!(control.unsent().len() <= hello + 48 * asked, "each request has one short answer");
    assert!(held.len() <= DATA_PORTS.len());
    control.sent(usize::MAX);
    assert!(control.unsent().is_empty());
}

/// The bytes as what a dom0 says to a guest's agent, once its length of pieces is taken off: how it is cut makes no difference, and no more is to be
/// sent back than came.
pub fn agent_control(mut data: &[u8]) {
    let [cut] = crate::take(&mut data);
    let pieces = usize::from(cut).max(1);
    let (whole, end) = obeyed(data, data.len().max(1));
    assert_eq!(
        (&whole, &end),
        (&obeyed(data, pieces).0, &obeyed(data, pieces).1),
        "the pieces make a difference"
    );
}

/// What an agent hears of this, and what is in the way of more.
fn obeyed(data: &[u8], pieces: usize) -> (Vec<Order>, Option<WireError>) {
    let (mut control, mut orders) = (AgentsControl::new(), Vec::new());
    let hello = control.unsent().len();
    for piece in data.chunks(pieces) {
        let mut input = piece;
        loop {
            match control.hear(&mut input) {
                Err(error) => {
                    assert_eq!(control.hear(&mut &[][..]), Err(error.clone()), "for ever");
                    return (orders, Some(error));
                }
                Ok(None) => break,
                Ok(Some(order)) => {
                    assert_eq!(order == Order::Agreed, orders.is_empty() && control.is_agreed());
                    if let Order::Exec { endpoint, line, .. } = &order {
                        assert!(!line.is_empty() && !line.contains(&0));
                        control.terminated(*endpoint).expect("it can be said");
                    }
                    orders.push(order);
                }
            }
        }
    }
    assert!(control.unsent().len() <= hello + data.len(), "an answer is smaller than what it answers");
    (orders, None)
}

/// The bytes as what a program in a guest says to its agent, and as what it is answered, over a real socket of theirs.
pub fn agent_call(data: &[u8]) {
    let (ours, theirs) = pair();
    let fits = !data.is_empty() && net::send(&ours, data, SendFlags::NOSIGNAL).is_ok();
    if !fits {
        return;
    }
    let said = message::hear(&theirs).expect("it is there").expect("it is there");
    assert_eq!(said, data.get(..PAYLOAD_BYTES_MAX).unwrap_or(data));
    if let Ok(call) = Call::decode(&said) {
        assert_eq!(call.encode().len(), said.len() + tolerated(&said), "one form for a call");
        assert_eq!(Call::decode(&call.encode()), Ok(call));
    }
    net::send(&ours, data, SendFlags::NOSIGNAL).expect("there is room");
    if let Ok(Some((answer, fds))) = AgentsAnswer::receive(&theirs) {
        assert!(fds.is_empty());
        answer.send(&ours, &[]).expect("there is room");
        let (again, _) = AgentsAnswer::receive(&theirs).expect("it is one").expect("it is there");
        let is_cut = |answer: &AgentsAnswer| matches!(answer, AgentsAnswer::Problem(_));
        assert!(again == answer || is_cut(&again) && is_cut(&answer));
    }
}

/// How much longer a call is when it is said again: no target is `@default`.
fn tolerated(said: &[u8]) -> usize {
    if said.starts_with(b"\0") {
        "@default".len()
    } else {
        0
    }
}

fn pair() -> (OwnedFd, OwnedFd) {
    let flags = SocketFlags::CLOEXEC;
    net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).expect("a pair of sockets")
}

/// The bytes as a command line of `qrexec-client`'s, and what it has run in a guest.
pub fn call_line(data: &[u8]) {
    let Ok(line) = CommandLine::parse(data) else { return };
    assert_eq!(CommandLine::parse(&line.to_bytes()), Ok(line.clone()));
    let Ok(exec) = service::line(&line) else { return };
    let program = exec.argv.first().expect("something is run");
    match &line.command {
        Command::Rpc { service, .. } => {
            let file = program.strip_prefix(b"/etc/qubes-rpc/").expect("a service is run");
            assert_eq!(file, service.name().as_bytes());
            assert!(!file.contains(&b'/') && !file.starts_with(b".") && exec.argv.len() <= 2);
        }
        Command::Shell(_) => assert_eq!(program, b"/bin/sh"),
    }
    can_be_sent(exec);
}

/// Only what is too long cannot.
fn can_be_sent(exec: Exec) {
    let words = exec.argv.iter().map(|word| word.len() + 1);
    let variables = exec.env.iter().map(|(name, value)| name.len() + value.len() + 2);
    let bytes: usize = words.chain(variables).sum();
    let mut out = Vec::new();
    let sent = HostFrame::Exec { stream: 1, exec: Box::new(exec) }.encode(&mut out);
    assert!(sent.is_ok() || bytes > PAYLOAD_BYTES_MAX - 64, "{bytes} bytes");
}
