//! Both ends over a vchan in memory that both map, rung by counters of the kernel: nothing is lost, and no end sleeps for ever.

use std::fs::File;
use std::io::{pipe, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use call_channel::port::Port;
use call_channel::{run_client, run_service, Broken, Running, Streams, Watch};
use memmap2::MmapOptions;
use rustix::event::{eventfd, EventfdFlags};
use vchan::end::{read_layout, End};
use vchan::layout::{at, Layout, Orders, PAGE_BYTES};
use vchan::link::{Bell, Link};
use vchan::shared::Shared;

const LIMIT: Duration = Duration::from_secs(30);
const LARGE: Orders = Orders { left: 16, right: 16 };

struct Counter {
    mine: Arc<std::os::fd::OwnedFd>,
    theirs: Arc<std::os::fd::OwnedFd>,
}

impl Bell for Counter {
    fn ring(&self) {
        rustix::io::write(&*self.theirs, &1u64.to_ne_bytes()).unwrap();
    }
    fn hear(&self) {
        let _ = rustix::io::read(&*self.mine, &mut [0; 8]);
    }
}

impl AsFd for Counter {
    fn as_fd(&self) -> BorrowedFd<'_> {
        (*self.mine).as_fd()
    }
}

struct Memory(File, [Arc<std::os::fd::OwnedFd>; 2]);

impl Memory {
    fn new() -> Memory {
        let file = tempfile::tempfile().unwrap();
        file.set_len(33 * PAGE_BYTES as u64).unwrap();
        let counter = || Arc::new(eventfd(0, EventfdFlags::NONBLOCK).unwrap());
        Memory(file, [counter(), counter()])
    }

    fn map(&self, first: usize, count: usize) -> Option<Shared> {
        let offset = (first * PAGE_BYTES) as u64;
        let mapping = MmapOptions::new().offset(offset).len(count * PAGE_BYTES).map_raw(&self.0);
        (count > 0).then(|| Shared::new(mapping.unwrap()))
    }

    fn page(&self) -> Shared {
        self.map(0, 1).unwrap()
    }

    fn bell(&self, mine: usize) -> Box<Counter> {
        Box::new(Counter { mine: self.1[mine].clone(), theirs: self.1[1 - mine].clone() })
    }

    fn server(&self, orders: Orders) -> Link {
        let layout = Layout::new(orders).unwrap();
        let (left, right) = (self.map(1, layout.left_pages()), self.map(17, layout.right_pages()));
        Link::over(End::serve(self.page(), left, right, layout).unwrap(), self.bell(0))
    }

    fn client(&self) -> Link {
        let layout = read_layout(&self.page()).unwrap();
        let (left, right) = (self.map(1, layout.left_pages()), self.map(17, layout.right_pages()));
        let bell = self.bell(1);
        let end = End::connect(self.page(), left, right, layout).unwrap();
        bell.ring();
        Link::over(end, bell)
    }
}

fn shell(line: &str) -> Running {
    let mut command = Command::new("sh");
    command.args(["-c", line]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    Running::of(command.spawn().unwrap()).unwrap()
}

/// Serves `line` at the client's end of the vchan, which comes after a while.
fn serve(memory: &Memory, line: &'static str, after: Duration) -> Result<i32, Broken> {
    thread::sleep(after);
    let watch = Watch { hello_by: Some(Instant::now() + LIMIT), ..Watch::default() };
    run_service(memory.client(), || Ok(shell(line)), watch)
}

fn there_and_back(orders: Orders, bytes: usize) {
    let memory = Memory::new();
    let server = memory.server(orders);
    let sent: Vec<u8> = (0..bytes as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let ((stdin, mut to), (mut out, stdout)) = (pipe().unwrap(), pipe().unwrap());
    let own = |fd| Some(Port::own(fd).unwrap());
    let streams = Streams { stdin: own(stdin.into()), stdout: own(stdout.into()), stderr: None };
    let (memory, sent) = (&memory, &sent);
    thread::scope(|scope| {
        let service = scope.spawn(move || serve(memory, "cat; exit 5", Duration::from_millis(20)));
        scope.spawn(move || to.write_all(sent).unwrap());
        let client = scope.spawn(move || run_client(server, streams, Watch::default()));
        let mut heard = Vec::new();
        out.read_to_end(&mut heard).unwrap();
        assert!(heard == *sent);
        assert_eq!((client.join().unwrap().unwrap(), service.join().unwrap().unwrap()), (5, 5));
    });
}

#[test]
fn megabytes_go_there_and_back_through_large_rings() {
    there_and_back(LARGE, 16 << 20);
}

#[test]
fn and_through_small_ones() {
    there_and_back(Orders { left: 10, right: 11 }, 2 << 20);
}

#[test]
fn a_server_that_goes_ends_a_program_that_sleeps() {
    let memory = Memory::new();
    let server = memory.server(LARGE);
    let (read, hang_up) = pipe().unwrap();
    let started = Instant::now();
    thread::scope(|scope| {
        let service = scope.spawn(|| serve(&memory, "sleep 40", Duration::ZERO));
        let client = scope.spawn(move || {
            let watch = Watch { until: Some(read.as_fd()), ..Watch::default() };
            let (stdin, _held) = pipe().unwrap();
            run_client(
                server,
                Streams { stdin: Some(Port::own(stdin.into()).unwrap()), ..Streams::default() },
                watch,
            )
        });
        thread::sleep(Duration::from_millis(100));
        drop(hang_up);
        assert!(matches!(client.join().unwrap(), Err(Broken::HungUp)));
        assert!(matches!(service.join().unwrap(), Err(Broken::Gone(_))));
    });
    assert!(started.elapsed() < Duration::from_secs(20));
}

#[test]
fn a_lie_in_the_ring_breaks_the_call() {
    let memory = Memory::new();
    let server = memory.server(LARGE);
    let client = memory.client();
    memory.page().set_counter(at::LEFT_PROD, 1 << 20);
    let broken = run_client(server, Streams::default(), Watch::default());
    assert!(matches!(broken, Err(Broken::Gone(_))), "{broken:?}");
    drop(client);
}

/// Time of the processor that this thread has used.
fn used() -> Duration {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap().into()
}

#[test]
fn nobody_who_sleeps_uses_the_processor() {
    let memory = Memory::new();
    let server = memory.server(LARGE);
    let (stdin, to) = pipe().unwrap();
    let streams = Streams { stdin: Some(Port::own(stdin.into()).unwrap()), ..Streams::default() };
    thread::scope(|scope| {
        let service = scope.spawn(|| (serve(&memory, "cat; cat", Duration::ZERO), used()));
        let client = scope.spawn(move || (run_client(server, streams, Watch::default()), used()));
        thread::sleep(Duration::from_secs(1));
        drop(to);
        for (ended, used) in [client.join().unwrap(), service.join().unwrap()] {
            assert_eq!(ended.unwrap(), 0);
            assert!(used < Duration::from_millis(200), "{used:?} of a second's sleep");
        }
    });
}
