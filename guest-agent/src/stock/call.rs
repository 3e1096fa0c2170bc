//! One call by Qubes' own protocol, in either direction.
//!
//! Invariants:
//! - What dom0 wants run runs once its end of the vchan has spoken, and not before. When that end goes first, the command gets SIGTERM, and
//!   SIGKILL [`TERM_LIMIT`] later; it stays in the table until it is reaped.
//! - A program that calls gets pipes of ours, as in `calls`: no descriptor of its own is touched but its socket.
//! - Dom0 is told once that a call's vchan is let go, after it is.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use call_channel::service::Step;
use call_channel::{Came, Channel, Client, Service, Streams, SLOTS as END_SLOTS};
use nix::poll::PollFlags;
use qrexec::service::EXIT_PROBLEM;
use qrexec::stock::control::{Endpoint, RequestId};

use super::run::{self, Child};
use crate::calls::message::Answer;
use crate::failure::Failure;
use crate::flow::{pipe_from, pipe_to};
use crate::place::Place;
use crate::sys::{self, PollSlot};

/// Slots of poll that each call has: those of its end, and the process or the program that waits.
pub const SLOTS: usize = END_SLOTS + 1;
/// How long the other end may take until it has come and spoken. A caller's own limit is shorter; this is for one that has been killed.
const PEER_LIMIT: Duration = Duration::from_secs(60);
/// How long a command may take to end after SIGTERM.
const TERM_LIMIT: Duration = Duration::from_secs(5);

/// See the module.
pub struct Call<L: Channel> {
    /// Where its vchan is, as long as dom0 has not been told of its end.
    pub endpoint: Option<Endpoint>,
    state: State<L>,
    /// When the other end has to have come.
    by: Instant,
}

enum State<L: Channel> {
    /// Dom0 wants this line run, and its vchan is not there yet.
    Coming(Line),
    /// Its vchan is there; the line is taken when it is run.
    Serving(Box<Service<L>>, Option<Line>, Option<Child>),
    /// The call is over, a process of its is not.
    Left(Child),
    /// A program has asked.
    Asked(OwnedFd, RequestId),
    /// It may; its bytes flow.
    Calling(Box<Client<L>>, OwnedFd),
    Over,
}

/// What is to run.
pub struct Line {
    /// Not looked into.
    pub bytes: Vec<u8>,
    /// Whether only that it starts is of interest.
    pub just: bool,
}

impl<L: Channel> Call<L> {
    /// Dom0 wants something run.
    pub fn coming(endpoint: Endpoint, line: Line) -> Self {
        Self::new(Some(endpoint), State::Coming(line))
    }

    /// A program has asked for a call.
    pub fn asked(client: OwnedFd, request: RequestId) -> Self {
        Self::new(None, State::Asked(client, request))
    }

    fn new(endpoint: Option<Endpoint>, state: State<L>) -> Self {
        Self { endpoint, state, by: Instant::now() + PEER_LIMIT }
    }

    /// Whether it looks for the other end's vchan.
    pub fn is_coming(&self) -> bool {
        matches!(self.state, State::Coming(_))
    }

    /// Whether it is of a program here.
    pub fn is_outward(&self) -> bool {
        matches!(self.state, State::Asked(..) | State::Calling(..))
    }

    /// Whether nothing of it is left.
    pub fn is_over(&self) -> bool {
        matches!(self.state, State::Over)
    }

    /// Whether it holds something of a vchan, or may.
    pub fn holds_channel(&self) -> bool {
        matches!(self.state, State::Coming(_) | State::Serving(..) | State::Calling(..))
    }

    /// Whether a program waits for the answer to this.
    pub fn has_asked(&self, request: &RequestId) -> bool {
        matches!(&self.state, State::Asked(_, own) if own == request)
    }

    /// The other end's vchan is there.
    pub fn meet(&mut self, link: L) {
        if let State::Coming(line) = std::mem::replace(&mut self.state, State::Over) {
            self.state = State::Serving(Box::new(Service::new(link)), Some(line), None);
        }
    }

    /// The program's call may happen, over this.
    pub fn connect(&mut self, endpoint: Endpoint, link: L) -> Result<(), Failure> {
        if let State::Asked(client, _) = std::mem::replace(&mut self.state, State::Over) {
            self.endpoint = Some(endpoint);
            self.by = Instant::now() + PEER_LIMIT;
            let streams = hand_pipes(&client)?;
            self.state = State::Calling(Box::new(Client::new(link, streams)), client);
        }
        Ok(())
    }

    /// The last that a program hears.
    pub fn dismiss(&mut self, answer: &Answer) {
        if let State::Asked(client, _) | State::Calling(_, client) =
            std::mem::replace(&mut self.state, State::Over)
        {
            // It is not the agent's concern whether it does.
            let _ = answer.send(client, &[]);
        }
    }

    /// Ends it: the channel hangs up, the command is told, the program is sent away.
    pub fn end(&mut self) {
        self.state = match std::mem::replace(&mut self.state, State::Over) {
            State::Serving(_, _, Some(child)) => State::Left(child.told_to_end(TERM_LIMIT)),
            State::Left(child) => State::Left(child),
            _ => State::Over,
        };
    }

    /// Kills what was told to end, if it has not: nobody will look after it.
    pub fn kill(&mut self) {
        if let State::Left(child) = &mut self.state {
            child.kill_if_told();
        }
    }

    /// Ends it like [`end`](Self::end), where a suspend has ended its channel.
    pub fn abandon(&mut self) {
        self.state = match std::mem::replace(&mut self.state, State::Over) {
            State::Serving(service, _, child) => {
                service.abandon();
                child.map_or(State::Over, |child| State::Left(child.told_to_end(TERM_LIMIT)))
            }
            State::Calling(client, _) => {
                client.abandon();
                State::Over
            }
            State::Left(child) => State::Left(child),
            _ => State::Over,
        };
    }

    /// What it waits for.
    pub fn slots(&self) -> [PollSlot; SLOTS] {
        let none = || sys::slot(None, 0);
        let (end, also) = match &self.state {
            State::Serving(service, _, child) => (service.slots(), child.as_ref().map(Child::slot)),
            State::Calling(client, socket) => {
                (client.slots(), Some(sys::slot(Some(socket.as_fd()), libc::POLLIN)))
            }
            State::Left(child) => ([None; END_SLOTS], Some(child.slot())),
            State::Asked(client, _) => {
                ([None; END_SLOTS], Some(sys::slot(Some(client.as_fd()), libc::POLLIN)))
            }
            State::Coming(_) | State::Over => ([None; END_SLOTS], None),
        };
        let [channel, stdin, stdout, stderr] = end.map(super::poll_slot);
        [channel, stdin, stdout, stderr, also.unwrap_or_else(none)]
    }

    /// Whether there is something to do already; has the peer tell when there is, if not.
    pub fn is_ready(&self) -> bool {
        match &self.state {
            State::Serving(service, ..) => service.is_ready(),
            State::Calling(client, _) => client.is_ready(),
            _ => false,
        }
    }

    /// When to look again even if nothing happens.
    pub fn deadline(&self) -> Option<Instant> {
        match &self.state {
            State::Coming(_) => Some(self.by),
            State::Serving(service, ..) => {
                let by = (!service.has_agreed()).then_some(self.by);
                service.deadline().into_iter().chain(by).min()
            }
            State::Calling(client, _) => (!client.has_agreed()).then_some(self.by),
            State::Left(child) => child.kill_at(),
            State::Asked(..) | State::Over => None,
        }
    }

    /// Does what can be done. `may_start`: there is room for one more command.
    pub fn serve(&mut self, ready: &[PollSlot], place: &Place, may_start: bool) {
        let events = |at: usize| ready.get(at).map_or(0, |slot: &PollSlot| slot.revents);
        let came: Came = std::array::from_fn(|at| PollFlags::from_bits_truncate(events(at)));
        let also = events(END_SLOTS) != 0;
        let late = self.by <= Instant::now();
        match &mut self.state {
            State::Coming(_) if late => self.state = State::Over,
            State::Serving(..) => self.serve_command(came, also, late, (place, may_start)),
            State::Calling(client, _) => match client.turn(came) {
                Ok(Some(code)) => self.finish_call(code),
                Ok(None) if also || late && !client.has_agreed() => self.end(),
                Ok(None) => {}
                Err(_) => self.end(),
            },
            // A program that has asked has nothing more to say: whatever it is, it ends the call.
            State::Asked(..) if also => self.end(),
            State::Left(child) => {
                if also && child.reap().is_some() {
                    self.state = State::Over;
                } else {
                    child.kill_if_due();
                }
            }
            State::Coming(_) | State::Asked(..) | State::Over => {}
        }
    }

    fn serve_command(&mut self, came: Came, ended: bool, late: bool, (place, may_start): (&Place, bool)) {
        let State::Serving(service, line, child) = &mut self.state else { return };
        if let Some(status) = child.as_mut().filter(|_| ended).and_then(Child::reap) {
            *child = None;
            service.end(status);
        }
        let mut step = service.turn(came);
        if matches!(step, Ok(Step::Agreed)) {
            match line.take().filter(|_| may_start).map(|line| run::start(&line, place)) {
                Some(Ok(started)) if started.just => {
                    *child = Some(started.child);
                    service.end(0);
                }
                Some(Ok(started)) => {
                    *child = Some(started.child);
                    service.begin(started.streams);
                }
                Some(Err(status)) => service.end(status.into()),
                None => service.end(EXIT_PROBLEM.into()),
            }
            step = service.turn(call_channel::NOTHING_CAME);
        }
        let is_late = late && !service.has_agreed();
        match step {
            Ok(Step::Over) => {
                let left = child.take();
                self.state = left.map_or(State::Over, State::Left);
            }
            Ok(_) if !is_late => {}
            Ok(_) | Err(_) => self.end(),
        }
    }

    /// Once its pipes are closed, the program is told the status.
    fn finish_call(&mut self, code: i32) {
        if let State::Calling(client, socket) = std::mem::replace(&mut self.state, State::Over) {
            drop(client);
            // As with a process, the low byte counts.
            let _ = Answer::Exited(code as u8).send(socket, &[]);
        }
    }
}

/// Gives the program its ends of three pipes: ours.
fn hand_pipes(client: &OwnedFd) -> Result<Streams, Failure> {
    let (stdin_theirs, stdin) = pipe_from()?;
    let (stdout_theirs, stdout) = pipe_to()?;
    let (stderr_theirs, stderr) = pipe_to()?;
    let theirs = [stdin_theirs.as_fd(), stdout_theirs.as_fd(), stderr_theirs.as_fd()];
    let told = |error| Failure::system("answer the caller", error);
    Answer::Accepted.send(client, &theirs).map_err(told)?;
    run::streams([stdin, stdout, stderr])
}
