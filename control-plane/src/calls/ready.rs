//! Whether a guest can take a call: one that is paused would take it and say nothing.

use std::io;
use std::time::{Duration, Instant};

use super::message::{Answer, Control, Message};
use crate::daemon::channel::Channel;
use crate::error::{Error, Kind, Result};
use crate::state::State;

/// How often one that is paused is looked at.
const LOOK_PERIOD: Duration = Duration::from_millis(50);

/// Waits until the guest `name` takes calls, at most for so long; without a limit there is nothing to wait for, as the call itself waits. One that does not run is for
/// who calls to find out.
pub fn wait(state: &State, name: &str, limit: Option<Duration>) -> Result<()> {
    let Some(limit) = limit else { return Ok(()) };
    let deadline = Instant::now() + limit;
    let late = |what: &str| {
        Err(Error::new(Kind::Failed, format!("{name} {what} for {} s", limit.as_secs()))
            .hint(format!("`qvm-unpause {name}` lets one go on that is paused; -w says how long to wait")))
    };
    loop {
        match ask(state, name, deadline) {
            Ok(Some(Answer::Status(status))) if status.paused => {}
            Err(error) if error.kind() == io::ErrorKind::TimedOut => return late("has not answered"),
            _ => return Ok(()),
        }
        if Instant::now() >= deadline {
            return late("has been paused");
        }
        std::thread::sleep(LOOK_PERIOD);
    }
}

fn ask(state: &State, name: &str, deadline: Instant) -> io::Result<Option<Answer>> {
    let message = Message::Control(Control::Status).encode().map_err(io::Error::other)?;
    let holder = Channel::connect(&state.call_socket(name))?;
    holder.send_bytes(&message, &[])?;
    let left = deadline.saturating_duration_since(Instant::now());
    Ok(holder.receive_within(left.max(LOOK_PERIOD))?.map(|(answer, _)| answer))
}
