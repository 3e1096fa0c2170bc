//! Calls by Qubes' own protocol (docs/qrexec.md), each over a vchan of its own: what Qubes' qrexec-agent does in a guest.
//!
//! Invariants:
//! - Nothing is offered before the host asks for it, nor to another than dom0; a frozen guest has nothing of it. Where Qubes' own agent has offered,
//!   it is left alone.
//! - Dom0's end may say anything and go at any time: it ends its own calls, never the agent. What it can have started is bounded by
//!   [`STREAMS_MAX`], all commands counted, and each call holds two pieces of bytes.
//! - When dom0's end of the control channel goes, all calls end, and the channel is offered anew at once.
//! - The end that asked for a call serves its vchan.
//!
//! | module | what is in it |
//! |---|---|
//! | [`control`] | the messages with dom0 (pure) |
//! | [`site`] | where vchans are: Xen's, and in tests sockets |
//! | `call` | one call, in either direction |
//! | `run` | a command line, as a process |

mod call;
pub mod control;
mod run;
pub mod site;

use std::io;
use std::os::fd::OwnedFd;
use std::time::Instant;

use call_channel::{Channel, Slot, Wants};
use nix::poll::PollFlags;
use qrexec::stock::control::{Endpoint, RequestId};
use qrexec::stock::WireError;
use qrexec::{Call as Wanted, STREAMS_MAX};

use crate::calls::message::Answer;
use crate::calls::Other;
use crate::place::Place;
use crate::sys::{self, PollSlot};
use call::{Call, Line, SLOTS};
use control::{Control, Heard, UNSENT_MAX};
use site::Site;

/// Bytes of the control channel that are taken at once.
const PIECE_BYTES: usize = 4096;

/// See the module.
pub struct Stock<S: Site> {
    site: Option<S>,
    control: Option<Offered<S::Link>>,
    calls: Vec<Call<S::Link>>,
    asked: u64,
}

/// The control channel.
struct Offered<L> {
    link: L,
    control: Control,
}

impl<S: Site> Default for Stock<S> {
    fn default() -> Self {
        Self { site: None, control: None, calls: Vec::new(), asked: 0 }
    }
}

impl<S: Site> Stock<S> {
    /// Offers dom0 the control channel, unless an offer stands.
    pub fn offer(&mut self) -> io::Result<()> {
        if self.control.is_some() {
            return Ok(());
        }
        let site = match self.site.take() {
            Some(site) => site,
            None => S::open()?,
        };
        let offered = self.site.insert(site).offer()?;
        self.control = offered.map(|link| Offered { link, control: Control::new() });
        Ok(())
    }

    /// Whether anything of a call is left.
    pub fn any(&self) -> bool {
        !self.calls.is_empty()
    }

    /// Commands of dom0's, the processes that are left of one among them.
    pub fn commands(&self) -> usize {
        self.calls.iter().filter(|call| !call.is_outward()).count()
    }

    /// Ends all of it, and takes the offer back. Whoever calls this may not serve any of it for long.
    pub fn end(&mut self) {
        self.close();
        self.calls.iter_mut().for_each(Call::kill);
        // The guest may have another number when it is asked next.
        self.site = None;
    }

    fn close(&mut self) {
        self.calls.iter_mut().for_each(Call::end);
        self.sweep();
        if let (Some(mut offered), Some(site)) = (self.control.take(), &mut self.site) {
            offered.link.hang_up();
            drop(offered);
            site.withdraw();
        }
    }

    /// The same, after a suspend that has ended the channels.
    pub fn abandon(&mut self) {
        self.calls.iter_mut().for_each(Call::abandon);
        self.calls.iter_mut().for_each(Call::kill);
        if let (Some(offered), Some(site)) = (self.control.take(), &mut self.site) {
            site.abandon(offered.link);
        }
        self.site = None;
        self.sweep();
    }

    /// Appends what is waited for.
    pub fn watch(&self, slots: &mut Vec<PollSlot>) {
        slots.push(self.site.as_ref().map_or(sys::slot(None, 0), Site::slot));
        let channel = self.control.as_ref().and_then(|offered| offered.link.slot(offered.wants()));
        slots.push(poll_slot(channel));
        slots.extend(self.calls.iter().flat_map(Call::slots));
    }

    /// Whether there is something to do already, so that poll is not to wait. Legal just before it.
    pub fn is_ready(&self) -> bool {
        // All are asked: each has to be told by its peer.
        let calls = self.calls.iter().filter(|call| call.is_ready()).count();
        let control = self.control.as_ref().is_some_and(|offered| offered.link.ask(offered.wants()));
        calls > 0 || control || self.site.as_ref().is_some_and(Site::has_news)
    }

    /// When to look again even if nothing happens.
    pub fn deadline(&self) -> Option<Instant> {
        self.calls.iter().filter_map(Call::deadline).min()
    }

    /// Serves all, with the slots that [`watch`](Self::watch) appended, and takes them off the front of `ready`. `others`: commands that run beside
    /// these.
    pub fn serve(&mut self, ready: &mut &[PollSlot], place: &Place, others: usize) {
        let came = |slot: Option<&PollSlot>| slot.is_some_and(|slot| slot.revents != 0);
        let (first, rest) = ready.split_at(2.min(ready.len()));
        *ready = rest;
        self.look_for_peers(came(first.first()));
        let may_start = self.commands() + others <= STREAMS_MAX;
        for call in &mut self.calls {
            let (slots, rest) = ready.split_at(SLOTS.min(ready.len()));
            *ready = rest;
            call.serve(slots, place, may_start);
        }
        if came(first.get(1)) {
            self.control.iter_mut().for_each(|offered| offered.link.hear());
        }
        self.sweep();
        if self.talk(others).is_err() {
            self.close();
            if let Err(error) = self.offer() {
                eprintln!("dispvm-agent: cannot offer calls anew: {error}");
            }
        }
    }

    /// Where xenstore has news, those whose peers have not come look again.
    fn look_for_peers(&mut self, news: bool) {
        let Some(site) = &mut self.site else { return };
        if !news && !site.has_news() {
            return;
        }
        if site.hear().is_err() {
            return self.end();
        }
        for call in self.calls.iter_mut().filter(|call| call.is_coming()) {
            if let Some((endpoint, link)) = call.endpoint.and_then(|at| Some((at, site.connect(at)?))) {
                site.unwatch(endpoint);
                call.meet(link);
            }
        }
    }

    /// Sends and hears what can be. An error: the control channel is over.
    fn talk(&mut self, others: usize) -> Result<(), Over> {
        loop {
            let Some(offered) = &mut self.control else { return Ok(()) };
            offered.flush()?;
            if offered.control.unsent().len() > UNSENT_MAX {
                return Ok(());
            }
            let mut piece = [0; PIECE_BYTES];
            let count = offered.link.read(&mut piece)?;
            let mut input = piece.get(..count).unwrap_or_default();
            if input.is_empty() {
                return Ok(());
            }
            while let Some(heard) =
                self.control.as_mut().and_then(|offered| offered.control.hear(&mut input).transpose())
            {
                self.obey(heard?, others)?;
            }
        }
    }

    fn obey(&mut self, heard: Heard, others: usize) -> Result<(), Over> {
        match heard {
            Heard::Agreed => {}
            Heard::Exec { endpoint, line, just } => {
                // One that has no place is not met: its caller sees the port come back.
                if self.commands() + others >= STREAMS_MAX
                    || !self.expect(endpoint, Line { bytes: line, just })
                {
                    self.tell_terminated(endpoint)?;
                }
            }
            Heard::Connect(endpoint, request) => {
                if !self.connect(endpoint, &request) {
                    self.tell_terminated(endpoint)?;
                }
            }
            Heard::Refused(request) => {
                if let Some(call) = self.calls.iter_mut().find(|call| call.has_asked(&request)) {
                    call.dismiss(&Answer::Refused);
                }
                self.sweep();
            }
        }
        Ok(())
    }

    /// Takes in what is to run. `false`: its vchan cannot be waited for.
    fn expect(&mut self, endpoint: Endpoint, line: Line) -> bool {
        let Some(site) = &mut self.site else { return false };
        let mut call = Call::coming(endpoint, line);
        match site.connect(endpoint) {
            Some(link) => call.meet(link),
            None if site.watch(endpoint).is_err() => return false,
            None => {}
        }
        self.calls.push(call);
        // Waiting for a watch may have swallowed the news of others, and it may have come meanwhile.
        if self.calls.last().is_some_and(Call::is_coming) {
            self.look_for_peers(true);
        }
        true
    }

    /// A program's call may happen. `false`: nobody has asked for it, or there is no channel for it.
    fn connect(&mut self, endpoint: Endpoint, request: &RequestId) -> bool {
        let Some(call) = self.calls.iter_mut().find(|call| call.has_asked(request)) else { return false };
        let Some(site) = &mut self.site else { return false };
        let connected = site
            .serve(endpoint)
            .map_err(|error| format!("no channel to the other end: {error}"))
            .and_then(|link| call.connect(endpoint, link).map_err(|failure| failure.to_string()));
        if let Err(problem) = connected {
            call.dismiss(&Answer::Problem(problem));
            site.end_serving(endpoint);
            call.endpoint = None;
            self.sweep();
            return false;
        }
        true
    }

    /// Tells dom0 of channels that have ended, and forgets what is over.
    fn sweep(&mut self) {
        let mut ended = Vec::new();
        for call in self.calls.iter_mut().filter(|call| !call.holds_channel()) {
            ended.extend(call.endpoint.take());
        }
        self.calls.retain(|call| !call.is_over());
        for endpoint in ended {
            if let Some(site) = &mut self.site {
                site.unwatch(endpoint);
                site.end_serving(endpoint);
            }
            // It can be said, so there is no error.
            let _ = self.tell_terminated(endpoint);
        }
    }

    fn tell_terminated(&mut self, endpoint: Endpoint) -> Result<(), WireError> {
        self.control.as_mut().map_or(Ok(()), |offered| offered.control.terminated(endpoint))
    }
}

/// Why the control channel is over: dom0's end has gone, or lies.
struct Over;

impl From<io::Error> for Over {
    fn from(_: io::Error) -> Self {
        Self
    }
}

impl From<WireError> for Over {
    fn from(_: WireError) -> Self {
        Self
    }
}

impl<L: Channel> Offered<L> {
    fn wants(&self) -> Wants {
        let waiting = self.control.unsent().len();
        Wants { bytes: waiting <= UNSENT_MAX, room: waiting > 0 }
    }

    fn flush(&mut self) -> io::Result<()> {
        while !self.control.unsent().is_empty() {
            match self.link.write(self.control.unsent())? {
                0 => return Ok(()),
                count => self.control.sent(count),
            }
        }
        Ok(())
    }
}

impl<S: Site> Other for Stock<S> {
    fn count(&self) -> usize {
        self.calls.iter().filter(|call| call.is_outward()).count()
    }

    fn takes_calls(&self) -> bool {
        let ready = |offered: &Offered<_>| {
            offered.control.is_agreed() && offered.control.unsent().len() <= UNSENT_MAX
        };
        self.control.as_ref().is_some_and(ready)
    }

    fn begin(&mut self, client: OwnedFd, wanted: &Wanted) {
        self.asked = self.asked.wrapping_add(1);
        let Some(request) = RequestId::new(&format!("call{}", self.asked)) else { return };
        let mut call = Call::asked(client, request.clone());
        let asked = self.control.as_mut().map(|offered| offered.control.trigger(wanted, request));
        if let Some(Err(error)) = asked {
            return call.dismiss(&Answer::Problem(error.to_string()));
        }
        self.calls.push(call);
    }
}

/// A slot of poll for one of an end's.
fn poll_slot(slot: Slot<'_>) -> PollSlot {
    let events = slot.map_or(PollFlags::empty(), |(_, flags)| flags);
    sys::slot(slot.map(|(fd, _)| fd), events.bits())
}

#[cfg(test)]
mod tests;
