//! The holder of a spare that is no launch's: `admin.vm.CreateDisposable` hands it out by its name, and it lives on by itself.
//!
//! One process, in a session of its own. It takes a spare as a launch does, but without a command, says its name to whoever wants it, and
//! carries calls into it until it ends. The clone is its keeper's, whose record and end are as those of a launch that got a spare; a holder
//! that is killed takes it along.

use std::time::{Duration, Instant};

use engine::timeline::Timeline;

use super::channel::Channel;
use super::client::{self, Found, HandedOut, Lifeline};
use super::protocol::{HolderHears, HolderSays};
use crate::agent_link::AgentLink;
use crate::calls::Exchange;
use crate::error::{Error, Kind, Result};
use crate::launcher::wake;
use crate::machine::{self, Machine};
use crate::output::error_text;
use crate::run::runner::starter;
use crate::session::{SessionError, Signals};
use crate::state::State;

/// Whoever wants it notes a few words first, for which it may wait behind others.
const WORD_LIMIT: Duration = Duration::from_secs(30);

/// Takes a spare of `dvm` and holds it to its end. Our standard input is the channel to whoever wants it, and hears [`HolderSays`].
pub fn run(state: &State, machine: &dyn Machine, dvm: &str) -> Result<()> {
    // Whose session we were in may end. Refused to who leads one, which is as good.
    let _ = nix::unistd::setsid();
    machine::forbid_core_dump()?;
    let asker = starter().map_err(Error::failed("take our standard input"))?;
    let mut signals = Signals::block().map_err(Error::failed("block signals"))?;
    // Whether its savefile is to be rebuilt is the business of who makes a disposable instead.
    let Found::Spare(found) = client::spare(state, dvm, machine.settings(), false) else {
        return say(&asker, &HolderSays::NoSpare);
    };
    let mut timeline = Timeline::since(Instant::now());
    let (name, mut lifeline, mut exchange) = match take(state, machine, found, &mut timeline) {
        Ok(taken) => taken,
        Err(error) => {
            say(&asker, &HolderSays::Failed { reason: error_text(&error) })?;
            return Err(error);
        }
    };
    // Whoever does not hear of it will never use it.
    let held = say(&asker, &HolderSays::Holds { name }).and_then(|()| await_word(&asker)).and_then(|()| {
        drop(asker);
        let ended = exchange.run(&mut lifeline, None, &mut signals, &mut timeline);
        ended.map(drop).or_else(over)
    });
    drop(exchange);
    held.and(lifeline.end().map_err(Error::failed("end the disposable")))
}

fn take(
    state: &State,
    machine: &dyn Machine,
    found: HandedOut,
    timeline: &mut Timeline,
) -> Result<(String, Lifeline, Exchange)> {
    let HandedOut { spare, number, agent, lifeline } = found;
    let link = wake(AgentLink::new(Box::new(agent)), number, &spare, machine, timeline)?;
    let name = number.to_string();
    // Without calls it would be of no use to anybody.
    let exchange = Exchange::new(state, &name, link)?;
    Ok((name, lifeline, exchange))
}

/// That its keeper has ended it is how most of them end.
fn over(error: SessionError) -> Result<()> {
    match error {
        SessionError::Host(error) => {
            tracing::info!("{error}");
            Ok(())
        }
        error => Err(Error::failed("hold the disposable")(error)),
    }
}

/// Before it, nobody has noted whose the disposable is; one of which nobody comes to know would run for ever.
fn await_word(asker: &Channel) -> Result<()> {
    match asker.receive_within::<HolderHears>(WORD_LIMIT) {
        Ok(Some((HolderHears::Go, _))) => Ok(()),
        Ok(None) => Err(Error::new(Kind::Failed, "whoever wanted the disposable has gone")),
        Err(error) => Err(Error::failed("wait for the word to go on")(error)),
    }
}

fn say(asker: &Channel, word: &HolderSays) -> Result<()> {
    asker.send(word, &[]).map_err(Error::failed("answer who wants a disposable"))
}
