//! A channel against a guest that is a thread here: its vchan in a file that both map, its event channel two counters of the kernel, its nodes in
//! the simulated xenstored.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use memmap2::MmapOptions;
use nix::sys::eventfd::{EfdFlags, EventFd};
use vchan::end::{End, Peer};
use vchan::layout::{at, Layout, PAGE_BYTES};
use vchan::link::{Bell, Link, Offer};
use vchan::shared::Shared;
use vchan::{AGENT_ORDERS, REQUEST};

use super::link::Reach;
use super::{Channel, LetGoError};
use crate::hypercalls::DomId;
use crate::xenstore::simulated::Simulated;

const DOMID: DomId = DomId(7);
const HOME: &str = "/local/domain/7";
const LIMIT: Duration = Duration::from_secs(20);

#[derive(Clone)]
struct TestBell {
    mine: Arc<EventFd>,
    theirs: Arc<EventFd>,
}

impl Bell for TestBell {
    fn ring(&self) {
        self.theirs.write(1).expect("rings");
    }
    fn hear(&self) {
        let _ = self.mine.read();
    }
}

impl AsFd for TestBell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.mine.as_fd()
    }
}

/// What the guest has of a channel, and the host's way to it.
#[derive(Clone)]
struct Guest {
    xenstore: Simulated,
    memory: Arc<File>,
    bell: TestBell,
    over: Arc<AtomicBool>,
}

impl Guest {
    fn new() -> Guest {
        let xenstore = Simulated::new();
        xenstore.set(&format!("{HOME}/domid"), "7");
        let counter = || Arc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK).expect("a counter"));
        let memory = tempfile::tempfile().expect("a file");
        memory.set_len(21 * PAGE_BYTES as u64).expect("its length");
        let bell = TestBell { mine: counter(), theirs: counter() };
        Guest { xenstore, memory: Arc::new(memory), bell, over: Arc::default() }
    }

    fn map(&self, first: usize, count: usize) -> Shared {
        let offset = (first * PAGE_BYTES) as u64;
        let mapping = MmapOptions::new().offset(offset).len(count * PAGE_BYTES).map_raw(&*self.memory);
        Shared::new(mapping.expect("a mapping"))
    }

    fn channel(&self) -> (UnixStream, Channel) {
        let opened = Channel::over(DOMID, self.xenstore.connect(), Box::new(self.clone()));
        let (stream, channel) = opened.expect("opens");
        stream.set_nonblocking(false).expect("blocking");
        stream.set_read_timeout(Some(LIMIT)).expect("a limit");
        (stream, channel)
    }

    fn offer(&self) -> End {
        let layout = Layout::new(AGENT_ORDERS).expect("a layout");
        let (left, right) = (self.map(1, 4), self.map(5, 16));
        let end = End::serve(self.map(0, 1), Some(left), Some(right), layout).expect("serves");
        self.xenstore.set(&format!("{HOME}/data/vchan/0/3349/event-channel"), "5");
        self.xenstore.set(&format!("{HOME}/data/vchan/0/3349/ring-ref"), "9");
        end
    }

    fn withdraw(&self) {
        use crate::xenstore::Nodes;
        self.xenstore.connect().rm(&format!("{HOME}/data/vchan/0/3349")).expect("removes");
    }

    fn write(&self, end: &mut End, bytes: &[u8]) -> usize {
        let (count, tell) = end.write(bytes).expect("an honest host");
        if tell {
            self.bell.ring();
        }
        count
    }

    /// Reads until there are so many bytes.
    fn read(&self, end: &mut End, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        let mut filled = 0;
        until("the host writes", || {
            let (more, tell) = end.read(&mut bytes[filled..]).expect("an honest host");
            if tell {
                self.bell.ring();
            }
            filled += more;
            filled == count
        });
        bytes
    }
}

impl Reach for Guest {
    fn connect(&self, offer: Offer) -> io::Result<Link> {
        assert_eq!(offer, Offer { grant: 9, port: 5 });
        let page = self.map(0, 1);
        let layout = vchan::end::read_layout(&page).map_err(io::Error::other)?;
        let end = End::connect(page, Some(self.map(1, 4)), Some(self.map(5, 16)), layout);
        let bell = TestBell { mine: self.bell.theirs.clone(), theirs: self.bell.mine.clone() };
        Ok(Link::over(end.map_err(io::Error::other)?, Box::new(bell)))
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let started = Instant::now();
    while !done() {
        assert!(started.elapsed() < LIMIT, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn what_was_said_before_anybody_listened_is_heard() {
    let guest = Guest::new();
    let (mut stream, channel) = guest.channel();
    stream.write_all(b"ping").expect("writes");
    assert!(channel.connected_at().is_none());
    let mut end = guest.offer();
    guest.write(&mut end, b"hello");
    let mut heard = [0; 5];
    stream.read_exact(&mut heard).expect("reads");
    assert_eq!((&heard, guest.read(&mut end, 4).as_slice()), (b"hello", &b"ping"[..]));
    assert!(channel.connected_at().is_some());
}

#[test]
fn an_offer_is_asked_for_once_where_there_is_none() {
    let guest = Guest::new();
    let path = format!("{HOME}/{REQUEST}");
    guest.xenstore.set(&path, "41");
    let (_stream, channel) = guest.channel();
    until("it asks", || guest.xenstore.get(&path).as_deref() == Some("42"));
    let _end = guest.offer();
    until("it connects", || channel.connected_at().is_some());
    assert_eq!(guest.xenstore.get(&path).as_deref(), Some("42"));
}

#[test]
fn an_offer_made_at_any_moment_is_seen() {
    for round in 0..400 {
        let guest = Guest::new();
        let other = guest.clone();
        let offering = std::thread::spawn(move || {
            let pause = Duration::from_micros(round);
            let started = Instant::now();
            while started.elapsed() < pause {
                std::hint::spin_loop();
            }
            other.offer()
        });
        let (_stream, channel) = guest.channel();
        until("it connects", || channel.connected_at().is_some());
        let _ = offering.join();
    }
}

#[test]
fn a_stale_offer_is_waited_out_and_a_new_one_asked_for() {
    let guest = Guest::new();
    let stale = guest.offer();
    guest.map(0, 1).set_byte(at::CLI_LIVE, 0);
    let (_stream, channel) = guest.channel();
    let path = format!("{HOME}/{REQUEST}");
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!((channel.connected_at(), guest.xenstore.get(&path)), (None, None));
    drop(stale);
    guest.withdraw();
    until("it asks", || guest.xenstore.get(&path).is_some());
    let _end = guest.offer();
    until("it connects", || channel.connected_at().is_some());
}

#[test]
fn a_side_that_does_not_read_stops_the_other() {
    let guest = Guest::new();
    let mut end = guest.offer();
    let (mut stream, _channel) = guest.channel();
    let mut sent = 0;
    let mut quiet_since = Instant::now();
    while quiet_since.elapsed() < Duration::from_millis(200) {
        let count = guest.write(&mut end, &[sent as u8; 1000]);
        sent += count;
        if count > 0 {
            quiet_since = Instant::now();
            assert!(sent < 4 << 20, "it takes without end");
        }
    }
    let mut heard = vec![0; sent];
    stream.read_exact(&mut heard).expect("reads");
    until("there is room again", || guest.write(&mut end, b"x") == 1);
}

#[test]
fn a_megabyte_goes_each_way() {
    let guest = Guest::new();
    let mut end = guest.offer();
    let (mut stream, _channel) = guest.channel();
    let sent: Vec<u8> = (0..1u32 << 20).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    std::thread::scope(|scope| {
        let mut writer = stream.try_clone().expect("clones");
        let to_guest = &sent;
        scope.spawn(move || writer.write_all(to_guest).expect("writes"));
        let reader = scope.spawn(|| {
            let mut heard = vec![0; sent.len()];
            stream.read_exact(&mut heard).expect("reads");
            heard
        });
        let (mut out, mut heard) = (0, Vec::new());
        let mut buffer = vec![0; 3000];
        until("all is over", || {
            loop {
                let (count, tell) = end.read(&mut buffer).expect("an honest host");
                if tell {
                    guest.bell.ring();
                }
                heard.extend_from_slice(&buffer[..count]);
                let written = guest.write(&mut end, &sent[out..(out + 5000).min(sent.len())]);
                out += written;
                if count + written == 0 {
                    // As an agent does before it sleeps.
                    let _ = (end.ask(vchan::end::Want::Bytes), end.ask(vchan::end::Want::Room));
                    return heard.len() == sent.len() && out == sent.len();
                }
            }
        });
        assert!(heard == sent && reader.join().expect("ends") == sent);
    });
}

#[test]
fn letting_go_delivers_and_waits_for_the_guest() {
    let guest = Guest::new();
    let mut end = guest.offer();
    let (mut stream, mut channel) = guest.channel();
    until("it connects", || channel.connected_at().is_some());
    guest.write(&mut end, b"frozen");
    stream.write_all(b"last").expect("writes");
    let letting = std::thread::spawn(move || channel.let_go(LIMIT));
    until("it hangs up", || end.peer() == Peer::Gone);
    assert_eq!(guest.read(&mut end, 4), b"last");
    std::thread::sleep(Duration::from_millis(50));
    assert!(!letting.is_finished(), "the guest has its grants still");
    drop(end);
    guest.withdraw();
    letting.join().expect("ends").expect("is let go");
    let mut heard = Vec::new();
    stream.read_to_end(&mut heard).expect("reads");
    assert_eq!(heard, b"frozen");
}

#[test]
fn a_guest_that_does_not_let_go_is_an_error_in_time() {
    let guest = Guest::new();
    let _end = guest.offer();
    let (_stream, mut channel) = guest.channel();
    until("it connects", || channel.connected_at().is_some());
    let result = channel.let_go(Duration::from_millis(100));
    assert!(matches!(result, Err(LetGoError::Late { .. })), "{result:?}");
}

#[test]
fn hang_ups_go_through_both_ways() {
    let guest = Guest::new();
    let end = guest.offer();
    let (stream, channel) = guest.channel();
    until("it connects", || channel.connected_at().is_some());
    drop(stream);
    until("the guest is told", || end.peer() == Peer::Gone);
    let guest = Guest::new();
    let mut end = guest.offer();
    let (mut stream, channel) = guest.channel();
    until("it connects", || channel.connected_at().is_some());
    guest.write(&mut end, b"bye");
    end.hang_up();
    guest.bell.ring();
    let mut heard = Vec::new();
    stream.read_to_end(&mut heard).expect("reads");
    assert_eq!(heard, b"bye");
}

#[test]
fn the_domains_end_and_the_channels_end_it_at_once() {
    let guest = Guest::new();
    let (mut stream, _channel) = guest.channel();
    std::thread::sleep(Duration::from_millis(20));
    guest.over.store(true, Ordering::SeqCst);
    guest.xenstore.release_domain();
    assert_eq!(stream.read(&mut [0]).expect("reads"), 0);

    let guest = Guest::new();
    let mut end = guest.offer();
    let (mut stream, channel) = guest.channel();
    until("it connects", || channel.connected_at().is_some());
    guest.write(&mut end, b"crash");
    guest.over.store(true, Ordering::SeqCst);
    guest.xenstore.release_domain();
    let mut heard = Vec::new();
    stream.read_to_end(&mut heard).expect("reads");
    assert_eq!(heard, b"crash");

    let guest = Guest::new();
    let end = guest.offer();
    let (mut stream, channel) = guest.channel();
    until("it connects", || channel.connected_at().is_some());
    let started = Instant::now();
    drop(channel);
    assert!(started.elapsed() < Duration::from_secs(5) && end.peer() == Peer::Gone);
    assert_eq!(stream.read(&mut [0]).expect("reads"), 0);
}

#[test]
fn a_lying_guest_is_hung_up_on() {
    let guest = Guest::new();
    let end = guest.offer();
    let (mut stream, channel) = guest.channel();
    until("it connects", || channel.connected_at().is_some());
    guest.map(0, 1).set_counter(at::RIGHT_PROD, 1 << 20);
    guest.bell.ring();
    assert_eq!(stream.read(&mut [0]).expect("reads"), 0);
    until("it hangs up", || end.peer() == Peer::Gone);
}
