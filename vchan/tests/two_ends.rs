//! Both ends over one memory, each in a thread of its own, as two domains are; and an end against a peer that lies.

use std::fs::File;
use std::sync::mpsc::{channel, Receiver, Sender};
use std::thread;
use std::time::{Duration, Instant};

use memmap2::MmapOptions;
use proptest::prelude::*;
use vchan::end::{read_grants, read_layout, write_grants, End, NoEnd, Peer, Want};
use vchan::layout::{at, Layout, Orders, PAGE_BYTES};
use vchan::shared::Shared;

/// A file that both ends map.
struct Memory(File);

const LEFT: u64 = PAGE_BYTES as u64;
const RIGHT: u64 = LEFT + (1 << 16);

impl Memory {
    fn new() -> Memory {
        let file = tempfile::tempfile().expect("a file");
        file.set_len(RIGHT + (1 << 16)).expect("its length");
        Memory(file)
    }

    fn map(&self, offset: u64, pages: usize) -> Shared {
        let mapping = MmapOptions::new().offset(offset).len(pages * PAGE_BYTES).map_raw(&self.0);
        Shared::new(mapping.expect("a mapping"))
    }

    fn page(&self) -> Shared {
        self.map(0, 1)
    }

    fn rings(&self, layout: &Layout) -> (Option<Shared>, Option<Shared>) {
        let ring = |offset, pages| (pages > 0).then(|| self.map(offset, pages));
        (ring(LEFT, layout.left_pages()), ring(RIGHT, layout.right_pages()))
    }

    fn server(&self, orders: Orders) -> End {
        let layout = Layout::new(orders).expect("a layout");
        let (left, right) = self.rings(&layout);
        End::serve(self.page(), left, right, layout).expect("a server")
    }

    fn client(&self) -> Result<End, NoEnd> {
        let layout = read_layout(&self.page())?;
        let (left, right) = self.rings(&layout);
        End::connect(self.page(), left, right, layout)
    }
}

/// The event channel: like Xen's it remembers that it was rung, not how often.
struct Bell(Sender<()>, Receiver<()>);

impl Bell {
    fn pair() -> (Bell, Bell) {
        let ((to_a, at_a), (to_b, at_b)) = (channel(), channel());
        (Bell(to_b, at_a), Bell(to_a, at_b))
    }
    fn ring(&self, tell: bool) {
        if tell {
            let _ = self.0.send(());
        }
    }
    /// A lost wake-up shows here: nothing else would end the wait.
    fn wait(&self) {
        self.1.recv_timeout(Duration::from_secs(20)).expect("a wake-up was lost");
        while self.1.try_recv().is_ok() {}
    }
}

fn byte(seed: u64, position: u64) -> u8 {
    ((position ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}

/// Sends `total` bytes of `mine` and receives as many of `theirs`, checking each.
fn exchange(end: &mut End, bell: Bell, mine: u64, theirs: u64, total: u64) {
    let (mut sent, mut received) = (0u64, 0u64);
    let mut buffer = vec![0; 5000];
    while sent < total || received < total {
        let (count, tell) = end.read(&mut buffer).expect("an honest peer");
        bell.ring(tell);
        for value in &buffer[..count] {
            assert_eq!(*value, byte(theirs, received), "at {received}");
            received += 1;
        }
        let piece = (total - sent).min(1 + sent % 4999);
        let bytes: Vec<u8> = (sent..sent + piece).map(|position| byte(mine, position)).collect();
        let (written, tell) = end.write(&bytes).expect("an honest peer");
        bell.ring(tell);
        sent += written as u64;
        let idle = count == 0 && written == 0 && (sent < total || received < total);
        let ready = idle && {
            let bytes = received < total && end.ask(Want::Bytes).expect("an honest peer");
            let room = sent < total && end.ask(Want::Room).expect("an honest peer");
            bytes || room
        };
        if idle && !ready {
            bell.wait();
        }
    }
}

fn both_ways(orders: Orders, total: u64) {
    let memory = Memory::new();
    let mut server = memory.server(orders);
    assert_eq!(server.peer(), Peer::Awaited);
    let mut client = memory.client().expect("a client");
    assert_eq!((server.peer(), client.peer()), (Peer::Live, Peer::Live));
    let (bell_s, bell_c) = Bell::pair();
    thread::scope(|scope| {
        let (server, client) = (&mut server, &mut client);
        scope.spawn(move || exchange(server, bell_s, 1, 2, total));
        scope.spawn(move || exchange(client, bell_c, 2, 1, total));
    });
    client.hang_up();
    assert_eq!(server.peer(), Peer::Gone);
}

#[test]
fn megabytes_both_ways_through_the_small_rings() {
    both_ways(Orders { left: 10, right: 11 }, 2 << 20);
}

#[test]
fn megabytes_both_ways_through_the_agents_rings() {
    both_ways(vchan::AGENT_ORDERS, 8 << 20);
}

#[test]
fn a_ring_takes_its_size_and_no_more() {
    let memory = Memory::new();
    let mut server = memory.server(Orders { left: 10, right: 11 });
    let started = Instant::now();
    assert_eq!(server.write(&[7; 9000]).expect("writes"), (2048, false));
    assert_eq!(server.write(&[7]).expect("writes"), (0, false));
    assert_eq!(server.unread(), Ok(2048));
    let mut client = memory.client().expect("a client");
    assert!(!server.ask(Want::Room).expect("asks"));
    assert!(!server.ask(Want::Bytes).expect("asks"));
    let mut buffer = [0; 100];
    assert_eq!(client.read(&mut buffer).expect("reads"), (100, true));
    assert_eq!(client.read(&mut buffer).expect("reads"), (100, false), "told once");
    assert_eq!(client.write(&[1]).expect("writes"), (1, true));
    assert!(started.elapsed() < Duration::from_secs(5));
}

#[test]
fn what_was_written_before_the_hang_up_can_be_read_after_it() {
    let memory = Memory::new();
    let mut server = memory.server(Orders { left: 10, right: 11 });
    let mut client = memory.client().expect("a client");
    client.write(b"bye").expect("writes");
    client.hang_up();
    drop(client);
    assert_eq!((server.peer(), server.readable()), (Peer::Gone, Ok(3)));
    let mut buffer = [0; 8];
    assert_eq!(server.read(&mut buffer).expect("reads").0, 3);
}

#[test]
fn only_a_fresh_offer_is_connected_to() {
    let memory = Memory::new();
    let server = memory.server(vchan::AGENT_ORDERS);
    drop(memory.client().expect("the first"));
    assert_eq!(memory.client().err(), Some(NoEnd::Stale), "the first one is live still");
    server.hang_up();
    memory.page().set_byte(at::CLI_LIVE, 2);
    assert_eq!(memory.client().err(), Some(NoEnd::Stale), "the server has gone");
}

#[test]
fn grants_are_read_back() {
    let memory = Memory::new();
    let layout = Layout::new(vchan::AGENT_ORDERS).expect("a layout");
    let (left, right): (Vec<u32>, Vec<u32>) = ((100..104).collect(), (200..216).collect());
    write_grants(&memory.page(), &layout, &left, &right);
    assert_eq!(read_grants(&memory.page(), &layout), (left, right));
}

proptest! {
    /// Whatever the peer writes into the first page, an end gives an answer or an error, and never more than its buffer.
    #[test]
    fn an_end_survives_any_page(
        junk in proptest::collection::vec(any::<u8>(), 24),
        piece in 0usize..70_000,
        server: bool,
        large: bool,
    ) {
        let memory = Memory::new();
        let orders = if large { vchan::AGENT_ORDERS } else { Orders { left: 11, right: 10 } };
        let mut serving = memory.server(orders);
        let mut client = memory.client().expect("a client");
        memory.page().copy_from(0, &junk);
        let end = if server { &mut serving } else { &mut client };
        let mut buffer = vec![0; piece];
        if let Ok((count, _)) = end.read(&mut buffer) {
            prop_assert!(count <= piece);
        }
        if let Ok((count, _)) = end.write(&buffer) {
            prop_assert!(count <= piece);
        }
        let _ = (end.ask(Want::Bytes), end.ask(Want::Room), end.peer(), end.unread());
        let _ = read_layout(&memory.page()).map(|layout| read_grants(&memory.page(), &layout));
        let _ = memory.client();
    }
}
