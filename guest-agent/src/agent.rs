//! The agent's loop: one thread, one poll over the port and everything that runs.
//!
//! Invariants:
//! - Frames are handled in the order they come, each before the next is looked at. A control frame is answered before the next one is
//!   handled, so an answer's arrival tells when its operation was over. (`Thaw` is carried out once the command under way has said
//!   something or had its time to; its frames go on meanwhile.)
//! - After a frame that breaks the protocol the host gets `Failed` without an operation, the connection's commands are killed, and the
//!   rest of what had arrived is thrown away; the next bytes are taken for the start of a frame.
//! - Idle, there is no timer: the agent sleeps in poll, so an idle clone's memory stays the template's.
//! - A guest may be captured whenever it is frozen. The answer to `Freeze` is the last thing written before, so both directions are at a
//!   frame's boundary when another host takes over.

mod clone;

use std::fs;
use std::io::{self, IoSlice};
use std::time::{Duration, Instant};

use qrexec::{kind, Decoder, GuestFrame, Hello, HostFrame, Op, Piece, ProtocolError, PROTOCOL};

use crate::calls::Calls;
use crate::cgroup::Freezer;
use crate::command::Unborn;
use crate::commands::Commands;
use crate::errand::{Errand, Hook};
use crate::failure::{Failure, Step};
use crate::identity::Kit;
use crate::outbox::{Outbox, FULL};
use crate::place::Place;
use crate::port::{Port, SLOTS};
use crate::power;
use crate::stock::site::XenSite;
use crate::stock::Stock;
use crate::sys::{self, PollSlot};

/// Bytes taken from the port before others have their turn.
const READ_BYTES: usize = 256 << 10;

/// Pieces that are handed on at once; more than fit [`READ_BYTES`] when frames are full.
const RUN_PIECES: usize = 64;

/// The agent.
pub struct Agent {
    port: Port,
    place: Place,
    session: bool,
    freezer: Result<Freezer, Failure>,
    kit: Option<Kit>,
    thaw_by: Option<Instant>,
    /// Closing it can wait until the command that was launched has ended.
    spent: Option<Kit>,
    unborn: Option<Unborn>,
    /// Whether the last identity was not taken on: no program may run then.
    nobody: bool,
    decoder: Decoder,
    outbox: Outbox,
    commands: Commands,
    calls: Calls,
    /// Whether calls are served before commands, in every other turn: whoever comes first may fill the outbox.
    calls_first: bool,
    stock: Stock<XenSite>,
    hook: Option<Result<Hook, Failure>>,
    errand: Option<Errand>,
    slots: Vec<PollSlot>,
    buffer: Vec<u8>,
}

impl Agent {
    /// An agent that talks over `port`, runs commands in `place` and takes calls at the socket of `calls`.
    pub fn new(
        port: Port,
        place: Place,
        session: bool,
        freezer: Result<Freezer, Failure>,
        calls: Calls,
    ) -> Self {
        Self {
            port,
            place,
            session,
            freezer,
            kit: None,
            thaw_by: None,
            spent: None,
            unborn: None,
            nobody: false,
            decoder: Decoder::new(),
            outbox: Outbox::default(),
            commands: Commands::default(),
            calls,
            calls_first: false,
            stock: Stock::default(),
            hook: None,
            errand: None,
            slots: Vec::new(),
            buffer: vec![0; READ_BYTES],
        }
    }

    /// Serves one host after the other; returns when there can't be another.
    pub fn run(&mut self) -> io::Result<()> {
        loop {
            self.greet();
            while self.turn()? {}
            self.drop_connection();
            if !self.port.wait_for_host()? {
                return Ok(());
            }
        }
    }

    /// Waits for something to happen and deals with it. `false`: the host is gone.
    fn turn(&mut self) -> io::Result<bool> {
        let spoken = self.outbox.waiting() > 0;
        self.flush();
        if spoken || self.thaw_by.is_some_and(|deadline| Instant::now() >= deadline) {
            self.thaw_now();
        }
        if !self.commands.any() {
            self.spent = None;
        }
        let mut slots = std::mem::take(&mut self.slots);
        let events = self.events();
        self.watch(&mut slots, events);
        let ready = [self.port.is_ready(events), self.stock.is_ready()].contains(&true);
        let timeout_ms = if ready { Some(0) } else { self.timeout_ms() };
        sys::poll(&mut slots, timeout_ms)?;
        let mut ready = &slots[SLOTS..];
        if self.calls_first {
            self.attend_calls(&mut ready);
        }
        self.commands.serve(&mut ready, &mut self.outbox);
        self.serve_errand(&mut ready);
        if !self.calls_first {
            self.attend_calls(&mut ready);
        }
        self.calls_first = !self.calls_first;
        let heard = self.port.is_heard(&slots[..SLOTS], events);
        self.slots = slots;
        Ok(!heard || self.listen())
    }

    /// What is waited for at the port.
    fn events(&self) -> i16 {
        let listen = if self.outbox.waiting() < FULL { libc::POLLIN } else { 0 };
        let speak = if self.outbox.waiting() > 0 { libc::POLLOUT } else { 0 };
        listen | speak
    }

    fn watch(&self, slots: &mut Vec<PollSlot>, events: i16) {
        slots.clear();
        slots.extend(self.port.slots(events));
        if self.calls_first {
            self.watch_calls(slots);
        }
        self.commands.watch(slots, &self.outbox);
        if let Some(errand) = &self.errand {
            errand.watch(slots);
        }
        if !self.calls_first {
            self.watch_calls(slots);
        }
    }

    fn watch_calls(&self, slots: &mut Vec<PollSlot>) {
        self.stock.watch(slots);
        self.calls.watch(slots, &self.outbox);
    }

    fn attend_calls(&mut self, ready: &mut &[PollSlot]) {
        self.stock.serve(ready, &self.place, self.commands.count());
        self.calls.serve(ready, &mut self.outbox, &mut self.stock);
    }

    fn timeout_ms(&self) -> Option<u32> {
        let errand = self.errand.as_ref().and_then(Errand::deadline);
        let deadlines = [self.commands.deadline(), self.stock.deadline(), errand, self.thaw_by];
        let deadline = deadlines.into_iter().flatten().min()?;
        let left = deadline.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
        Some(u32::try_from(left.as_millis()).unwrap_or(u32::MAX))
    }

    /// Reads what there is, within the buffer, and handles it. `false`: the host is gone.
    fn listen(&mut self) -> bool {
        let mut buffer = std::mem::take(&mut self.buffer);
        let (count, there) = self.port.fill(&mut buffer);
        if let Err(error) = self.handle_bytes(&buffer[..count]) {
            self.protest(error);
        }
        self.buffer = buffer;
        there
    }

    fn handle_bytes(&mut self, mut input: &[u8]) -> Result<(), ProtocolError> {
        let mut run = Run::default();
        loop {
            if let Some(piece) = self.decoder.next_piece(&mut input)? {
                if !run.takes(&piece) {
                    self.hand_on(&mut run)?;
                }
                run.push(piece);
            } else if let Some(raw) = self.decoder.next(&mut input)? {
                self.hand_on(&mut run)?;
                self.handle(HostFrame::parse(raw)?)?;
            } else {
                return self.hand_on(&mut run);
            }
        }
    }

    /// Bytes for a pipe, straight from where they were read.
    fn hand_on(&mut self, run: &mut Run<'_>) -> Result<(), ProtocolError> {
        let Run { kind, stream, pieces } = std::mem::take(run);
        match kind {
            _ if pieces.is_empty() => Ok(()),
            kind::STDIN => self.commands.stdin(stream, &pieces, &mut self.outbox),
            _ => self.calls.output(stream, kind, &pieces, &mut self.outbox),
        }
    }

    fn handle(&mut self, frame: HostFrame) -> Result<(), ProtocolError> {
        if is_control(&frame) {
            self.thaw_now();
        }
        if let Some(stream) = frame.call() {
            return self.calls.handle(stream, frame, &mut self.outbox);
        }
        match frame {
            HostFrame::Prerun(piece) => self.take_hook(&piece),
            HostFrame::Settle => self.answer(Op::Settle, Self::settle),
            HostFrame::Warm => self.send_on(Op::Warm, Ok(Errand::warm())),
            HostFrame::Freeze => self.answer(Op::Freeze, Self::freeze),
            HostFrame::Identify(identity) => self.answer(Op::Identify, |agent| agent.identify(&identity)),
            HostFrame::Thaw if self.nobody => self.refuse(0, Op::Thaw),
            HostFrame::Exec { stream, .. } if self.nobody => self.refuse(stream, Op::Exec),
            HostFrame::Thaw => self.thaw_by = Some(Instant::now() + self.thaw_pause()),
            HostFrame::Shutdown => self.shut_down(),
            HostFrame::ServeCalls => self.answer(Op::ServeCalls, Self::serve_calls),
            HostFrame::Ping(number) => self.outbox.push(&GuestFrame::Pong(number)),
            HostFrame::Exec { stream, exec } => self.execute(stream, *exec)?,
            other => self.commands.handle(other, &self.place, &mut self.outbox)?,
        }
        Ok(())
    }

    /// Stores a piece of the hook; the empty piece has it run. A failure is told once, at the end.
    fn take_hook(&mut self, piece: &[u8]) {
        let hook = self.hook.take().unwrap_or_else(Hook::new);
        if piece.is_empty() {
            return self.send_on(Op::Prerun, hook.and_then(Hook::run));
        }
        self.hook = Some(hook.and_then(|mut hook| hook.append(piece).map(|()| hook)));
    }

    /// Starts an errand, whose operation is answered when it is over.
    fn send_on(&mut self, op: Op, errand: Result<Errand, Failure>) {
        let started = self.alone().and(errand).and_then(|mut errand| {
            errand.start(&self.place)?;
            Ok(errand)
        });
        match started {
            Ok(errand) => self.errand = Some(errand),
            Err(failure) => self.fail(0, Some(op), failure),
        }
    }

    fn serve_errand(&mut self, ready: &mut &[PollSlot]) {
        let Some(errand) = &mut self.errand else { return };
        let Some(result) = errand.serve(ready, &self.place) else { return };
        let op = errand.op();
        self.errand.take().into_iter().for_each(|mut errand| errand.abandon(&mut self.commands));
        self.answer(op, |agent| match op {
            Op::Warm => result.and_then(|()| {
                agent.place.look_around();
                Kit::open()?.rehearse()
            }),
            _ => result,
        });
    }

    fn settle(&mut self) -> Result<(), Failure> {
        self.alone()?;
        let free_bytes = power::settle()?;
        self.outbox.push(&GuestFrame::FreeMemory(free_bytes));
        Ok(())
    }

    /// Nothing of it may be captured, and nobody's calls are served.
    fn serve_calls(&mut self) -> Result<(), Failure> {
        self.alone()?;
        if self.nobody {
            return Err(Failure::ours(
                "serve calls",
                libc::EPERM,
                "the guest has not become who it was to be",
            ));
        }
        self.stock.offer().step(|| "offer the channel of calls")
    }

    /// The answer goes first: there may be no time after. Frozen processes can't shut down.
    fn shut_down(&mut self) {
        let _ = self.freezer().and_then(|freezer| freezer.thaw());
        self.outbox.push(&GuestFrame::Done(Op::Shutdown));
        self.flush();
        if let Err(failure) = power::shut_down() {
            self.fail(0, Some(Op::Shutdown), failure);
        }
    }

    /// No hook and no rehearsal is under way, and processes can run.
    fn alone(&self) -> Result<(), Failure> {
        if self.errand.is_some() {
            return Err(Failure::ours("begin", libc::EBUSY, "a hook or a rehearsal is running"));
        }
        if self.freezer.as_ref().is_ok_and(Freezer::is_frozen) {
            return Err(Failure::ours("begin", libc::EBUSY, "the guest is frozen"));
        }
        Ok(())
    }

    fn freezer(&mut self) -> Result<&mut Freezer, Failure> {
        self.freezer.as_mut().map_err(|failure| failure.clone())
    }

    fn answer(&mut self, op: Op, run: impl FnOnce(&mut Self) -> Result<(), Failure>) {
        match run(self) {
            Ok(()) => self.outbox.push(&GuestFrame::Done(op)),
            Err(failure) => self.fail(0, Some(op), failure),
        }
        self.flush();
    }

    fn fail(&mut self, stream: u32, op: Option<Op>, failure: Failure) {
        self.outbox.push(&GuestFrame::Failed { stream, failed: failure.into_frame(op) });
    }

    fn protest(&mut self, error: ProtocolError) {
        self.forget();
        self.fail(0, None, Failure::ours("understand the host", libc::EPROTO, error.to_string()));
    }

    fn greet(&mut self) {
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        self.outbox.push(&GuestFrame::Hello(Hello {
            protocol: PROTOCOL,
            agent_version: env!("CARGO_PKG_VERSION").into(),
            kernel: kernel.trim_end().into(),
            session: self.session,
            frozen: self.freezer.as_ref().is_ok_and(Freezer::is_frozen),
        }));
    }

    /// Errors of writing show as a hang-up when reading.
    fn flush(&mut self) {
        let port = &mut self.port;
        let _ = self.outbox.flush(|bytes| port.write(bytes));
    }

    fn drop_connection(&mut self) {
        self.thaw_now();
        self.forget();
        match self.port.was_suspended() {
            true => self.stock.abandon(),
            false => self.stock.end(),
        }
        self.outbox.clear();
    }

    fn forget(&mut self) {
        self.commands.abandon();
        self.calls.abandon();
        self.errand.take().into_iter().for_each(|mut errand| errand.abandon(&mut self.commands));
        self.hook = None;
        self.decoder = Decoder::new();
    }
}

/// Pieces of one stream in a row. A pipe gets them at once, and its reader wakes up for all of them once.
#[derive(Default)]
struct Run<'a> {
    kind: u16,
    stream: u32,
    pieces: Vec<IoSlice<'a>>,
}

impl<'a> Run<'a> {
    /// Whether a piece can be added.
    fn takes(&self, piece: &Piece<'_>) -> bool {
        let is_same = (self.kind, self.stream) == (piece.kind, piece.stream);
        self.pieces.is_empty() || is_same && self.pieces.len() < RUN_PIECES
    }

    /// Adds one that it takes.
    fn push(&mut self, piece: Piece<'a>) {
        (self.kind, self.stream) = (piece.kind, piece.stream);
        self.pieces.push(IoSlice::new(piece.bytes));
    }
}

/// Whether a frame is about the guest as a whole, not about one command or call.
fn is_control(frame: &HostFrame) -> bool {
    use HostFrame::{Freeze, Identify, Ping, Prerun, ServeCalls, Settle, Shutdown, Thaw, Warm};
    matches!(frame, Prerun(_) | Settle | Warm | Freeze | Identify(_) | Thaw | Shutdown | Ping(_) | ServeCalls)
}
