//! The calls that are under way by vchans of their own: commands of callers in the guest, and calls of the guest's own.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::poll::PollFlags;
use qrexec::service::CommandLine;
use qrexec::stock::control::RequestId;
use vchan::link::Offer;

use super::control::{Asked, Control};
use super::ports::Ports;
use super::Vchans;
use crate::calls::message::{Answer, Serving};
use crate::calls::outgoing::{Outgoing, CALLS_OUT_MAX};
use crate::calls::process::{end_all, Errand, Process};
use crate::calls::verdict::{Refusals, Verdict};
use crate::daemon::channel::Channel;
use crate::state::State;

/// A caller that is to serve a vchan does so at once.
const SERVE_LIMIT: Duration = Duration::from_secs(10);

const NO_PORT: &str = "a call was refused: the guest has let go of none of the channels that calls had";

/// What a caller hears whose guest has let go of the vchan. It is news to one whose guest has not spoken: others have seen the end, or will.
const LET_GO: &str =
    "the guest does not take it: it runs all the commands that it can, or cannot reach the call's channel";

/// What of a call can be ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    Caller,
    Verdict,
    End,
}

/// All of them.
pub(super) struct Calls {
    /// Who calls. A guest without a name makes no calls.
    caller: Option<(State, String)>,
    calls: BTreeMap<u64, Call>,
    last: u64,
    ports: Ports,
    /// The guest could not be told of a call's vchan: nor will it be of others'.
    cannot_tell: bool,
}

struct Call {
    /// Where its vchan is: of a caller's, once the guest has been told; a guest's own serves it there once it may.
    port: Option<u32>,
    whose: Whose,
}

enum Whose {
    /// Of somebody at the call socket. Until its vchan is served, what is to run, and until when it may take.
    Caller { channel: Channel, waits: Option<(CommandLine, Instant)> },
    /// Of the guest. The request is taken once it is answered.
    Guest { process: Process, request: Option<RequestId> },
}

impl Calls {
    /// Of a guest that is held under this name.
    pub(super) fn of(caller: Option<(State, String)>) -> Calls {
        Calls { caller, calls: BTreeMap::new(), last: 0, ports: Ports::default(), cannot_tell: false }
    }

    /// Commands of callers, and calls of the guest.
    pub(super) fn counts(&self) -> (usize, usize) {
        let into = self.calls.values().filter(|call| matches!(call.whose, Whose::Caller { .. })).count();
        (into, self.calls.len() - into)
    }

    fn add(&mut self, port: Option<u32>, whose: Whose) {
        self.last += 1;
        self.calls.insert(self.last, Call { port, whose });
    }

    /// Whether there is a port for one more caller's, of which the guest can be told.
    pub(super) fn has_port(&self) -> bool {
        self.ports.has_one() && !self.cannot_tell
    }

    /// The guest has a new agent, which knows nothing of the one before it.
    pub(super) fn renew_agent(&mut self) {
        self.ports.renew();
    }

    /// Has a caller serve a vchan for its command.
    pub(super) fn begin(&mut self, channel: Channel, line: CommandLine, domain: u16) {
        // One that has gone has no ears.
        if channel.send(&Answer::Serve { domain }, &[]).is_ok() {
            let waits = Some((line, Instant::now() + SERVE_LIMIT));
            self.add(None, Whose::Caller { channel, waits });
        }
    }

    /// Has the policy asked about a call that the guest wants. The error is a request to refuse.
    pub(super) fn ask(&mut self, asked: Asked, domain: u16, other: &mut Outgoing) -> Result<(), RequestId> {
        let Asked { target, service, request } = asked;
        let Some((state, name)) = &self.caller else { return Err(request) };
        if other.is_too_often(name) || self.counts().1 + other.count() >= CALLS_OUT_MAX {
            return Err(request);
        }
        let Some(port) = self.ports.take() else {
            other.refusals.log(NO_PORT);
            return Err(request);
        };
        let logged = other.verdicts.takes(Instant::now());
        let errand = Errand { state, name, target: &target, service: &service, logged };
        match Process::start_meeting(&errand, (domain, port)) {
            Ok(process) => {
                self.add(Some(port), Whose::Guest { process, request: Some(request) });
                Ok(())
            }
            Err(error) => {
                other.refusals.log(&format!("cannot start a call of {name}: {error}"));
                self.ports.free(port);
                Err(request)
            }
        }
    }

    pub(super) fn interests(&self) -> impl Iterator<Item = (u64, Part, BorrowedFd<'_>, PollFlags)> {
        self.calls.iter().flat_map(|(number, call)| {
            let ready = match &call.whose {
                Whose::Caller { channel, .. } => {
                    [Some((Part::Caller, (channel.as_fd(), PollFlags::POLLIN))), None]
                }
                Whose::Guest { process, .. } => {
                    let [verdict, end] = process.interests();
                    [verdict.map(|one| (Part::Verdict, one)), end.map(|one| (Part::End, one))]
                }
            };
            ready.into_iter().flatten().map(|(part, (fd, flags))| (*number, part, fd, flags))
        })
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        let of = |call: &Call| match &call.whose {
            Whose::Caller { waits, .. } => waits.as_ref().map(|(_, until)| *until),
            Whose::Guest { process, .. } => process.kill_at(),
        };
        self.calls.values().filter_map(of).min()
    }

    pub(super) fn kill_those_due(&mut self) {
        for call in self.calls.values_mut() {
            if let Whose::Guest { process, .. } = &mut call.whose {
                process.kill_if_due();
            }
        }
    }

    /// Lets go of callers that have not served anything in time.
    pub(super) fn expire(&mut self, guest: &mut dyn Vchans) {
        let now = Instant::now();
        let late = |call: &Call| match &call.whose {
            Whose::Caller { waits: Some((_, until)), .. } => *until <= now,
            _ => false,
        };
        let late: Vec<u64> =
            self.calls.iter().filter(|(_, call)| late(call)).map(|(number, _)| *number).collect();
        late.into_iter().for_each(|number| self.forget(number, guest));
    }

    /// Does what a ready descriptor is for. Without a control channel, a call that is not begun cannot be any more.
    pub(super) fn turn(
        &mut self,
        number: u64,
        part: Part,
        guest: &mut dyn Vchans,
        control: Option<&mut Control>,
        refusals: &mut Refusals,
    ) {
        let Some(call) = self.calls.get_mut(&number) else { return };
        let goes_on = match (&mut call.whose, part) {
            (Whose::Caller { channel, waits }, Part::Caller) => match (waits.take(), control) {
                (Some((line, _)), Some(control)) => {
                    let offer = serving(channel);
                    let told = offer.map(|offer| publish(&mut self.ports, guest, offer, refusals));
                    if let Some(Err(Untold { why, for_ever })) = &told {
                        self.cannot_tell |= for_ever;
                        tell(channel, why);
                    }
                    call.port = told.and_then(Result::ok);
                    call.port.is_some_and(|port| control.exec(port, &line.to_bytes()).is_ok())
                }
                // It has nothing more to say: what comes is its end.
                _ => false,
            },
            (Whose::Guest { process, request }, Part::Verdict | Part::End) => {
                if part == Part::End {
                    process.look();
                }
                // What was decided may be unread yet when it has ended.
                if let Some(verdict) = process.hear_verdict(refusals) {
                    let may = verdict == Verdict::Accepted && process.exit().is_none();
                    let answered = match (request.take(), control, call.port.filter(|_| may)) {
                        (Some(request), Some(control), Some(port)) => control.connect(port, request).is_ok(),
                        (Some(request), Some(control), None) => {
                            // Nothing of a request that was parsed can be wrong.
                            let _ = control.refuse(request);
                            false
                        }
                        _ => false,
                    };
                    if !answered {
                        // The guest has not heard of it.
                        call.port.take().into_iter().for_each(|port| self.ports.free(port));
                        process.end_soon();
                    }
                }
                process.exit().is_none()
            }
            _ => true,
        };
        if !goes_on {
            self.forget(number, guest);
        }
    }

    /// The guest has let go of a call's channel. A caller whose guest has spoken sees that for itself, behind what is left to read.
    pub(super) fn terminated(&mut self, port: u32) {
        let is_news = self.ports.terminated(port);
        let of_port = self.calls.values_mut().find(|call| call.port == Some(port));
        match of_port.map(|call| &mut call.whose) {
            Some(Whose::Caller { channel, .. }) if is_news => tell(channel, LET_GO),
            // What carries the call sees its end as well, and may have seen it first: what a service leaves behind is not for the guest to end.
            Some(Whose::Guest { process, .. }) => process.end_by_itself(),
            Some(Whose::Caller { .. }) | None => {}
        }
    }

    /// Those that the agent has not heard of it never will.
    pub(super) fn lose_agent(&mut self) {
        let ports = &mut self.ports;
        self.calls.retain(|_, call| match &mut call.whose {
            Whose::Caller { waits, .. } => waits.is_none(),
            Whose::Guest { process, request } => {
                if request.take().is_some() {
                    call.port.take().into_iter().for_each(|port| ports.free(port));
                    process.end_soon();
                }
                true
            }
        });
    }

    fn forget(&mut self, number: u64, guest: &mut dyn Vchans) {
        let Some(call) = self.calls.remove(&number) else { return };
        call.port.into_iter().for_each(|port| self.ports.give_back(port));
        match (call.whose, call.port) {
            (Whose::Guest { process, .. }, _) => process.forget(),
            (Whose::Caller { .. }, Some(port)) => withdraw(guest, port),
            (Whose::Caller { .. }, None) => {}
        }
    }

    /// Takes back all that the guest was told.
    pub(super) fn withdraw_all(&mut self, guest: &mut dyn Vchans) {
        self.calls.values().filter_map(|call| call.port).for_each(|port| withdraw(guest, port));
    }
}

impl Drop for Calls {
    fn drop(&mut self) {
        let processes = std::mem::take(&mut self.calls).into_values().filter_map(|call| match call.whose {
            Whose::Guest { process, .. } => Some(process),
            Whose::Caller { .. } => None,
        });
        end_all(processes.collect());
    }
}

/// What a caller serves; `None`: it has gone, or cannot.
fn serving(channel: &Channel) -> Option<Offer> {
    let (Serving { grant, port }, _) = channel.receive::<Serving>().ok()??;
    Some(Offer { grant, port })
}

/// Tells a caller that its command has not been started.
fn tell(caller: &Channel, why: &str) {
    // One that has gone has no ears.
    let _ = caller.send(&Answer::NotStarted { reason: why.to_owned() }, &[]);
}

/// Why the guest was told of no vchan.
struct Untold {
    why: String,
    /// Whether it will be of none.
    for_ever: bool,
}

/// Tells the guest of a vchan: the port.
fn publish(
    ports: &mut Ports,
    guest: &mut dyn Vchans,
    offer: Offer,
    refusals: &mut Refusals,
) -> Result<u32, Untold> {
    let Some(port) = ports.take() else {
        refusals.log(NO_PORT);
        return Err(Untold { why: NO_PORT.to_owned(), for_ever: false });
    };
    guest.publish(port, offer).map(|()| port).map_err(|error| {
        let why = format!("cannot tell a guest of a call's channel: {error}");
        refusals.log(&format!("{why}; calls into it go by frames from here on"));
        withdraw(guest, port);
        // The guest may have seen half of it, but has not been told to look.
        ports.terminated(port);
        ports.give_back(port);
        Untold { why, for_ever: true }
    })
}

fn withdraw(guest: &mut dyn Vchans, port: u32) {
    if let Err(error) = guest.withdraw(port) {
        tracing::warn!("a call's channel stays in xenstore until the guest ends: {error}");
    }
}
