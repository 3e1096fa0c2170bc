//! What a caller asks of the holder of a guest.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use call_channel::Broken;
use qrexec::service::{CommandLine, QubeName};
use qrexec::{Exec, Exit};

use super::message::{Answer, Control, Message, Serving, Status};
use super::{carriage, service};
use crate::daemon::channel::Channel;
use crate::error::{Error, Kind, Result};
use crate::state::State;

/// A holder answers within a millisecond, a hypervisor that stops CPUs within some.
const CONTROL_LIMIT: Duration = Duration::from_secs(30);

/// Runs `exec` in the guest `name`, with these as its stdin, stdout and stderr, and waits for its end. Whoever ends meanwhile
/// ends the command.
pub fn call(state: &State, name: &str, exec: Exec, fds: [BorrowedFd<'_>; 3]) -> Result<Exit> {
    let step = format!("run a command in {name}");
    let holder = send(state, name, &Message::Call(Box::new(exec)), &fds)?;
    let (answer, _) = holder.receive().map_err(Error::failed(&step))?.ok_or_else(|| gone(name))?;
    match answer {
        Answer::Exited(exit) => Ok(exit),
        other => Err(refusal(&step, other)),
    }
}

/// The same with a command line, over a vchan of its own where the guest's host has those for calls, and we may serve one.
pub fn call_line(state: &State, name: &str, line: &CommandLine, fds: [BorrowedFd<'_>; 3]) -> Result<u8> {
    let exec = service::line(line)?;
    if carriage::can_serve() {
        if let Some(status) = call_served(state, name, line, fds)? {
            return Ok(status);
        }
    }
    call(state, name, exec, fds).map(Exit::status)
}

/// `None`: nothing has been run, for want of pages to grant.
fn call_served(
    state: &State,
    name: &str,
    line: &CommandLine,
    fds: [BorrowedFd<'_>; 3],
) -> Result<Option<u8>> {
    let step = format!("run a command in {name}");
    let holder = send(state, name, &Message::Line(line.clone()), &fds)?;
    let (answer, _) = holder.receive().map_err(Error::failed(&step))?.ok_or_else(|| gone(name))?;
    let domain = match answer {
        Answer::Serve { domain } => domain,
        Answer::Exited(exit) => return Ok(Some(exit.status())),
        other => return Err(refusal(&step, other)),
    };
    let Ok((link, offer)) = carriage::serve(domain) else { return Ok(None) };
    let serving = Serving { grant: offer.grant, port: offer.port };
    holder.send(&serving, &[]).map_err(Error::failed(&step))?;
    carriage::call(link, fds, holder.as_fd()).map(Some).map_err(|broken| match broken {
        Broken::HungUp => gone(name),
        Broken::NotMet => not_met(name, &step, &holder),
        broken => Error::failed(&step)(broken),
    })
}

/// Starts `exec` in the guest `name`, with nothing to read and nobody to hear it; it goes on whoever ends.
pub fn start(state: &State, name: &str, exec: Exec) -> Result<()> {
    let holder = send(state, name, &Message::Start(Box::new(exec)), &[])?;
    match answer(name, &holder)? {
        Answer::Done => Ok(()),
        other => Err(refusal(&format!("start a command in {name}"), other)),
    }
}

/// Has something done to the guest itself. `Shutdown` is done when the guest has been asked.
pub fn control(state: &State, name: &str, control: Control) -> Result<()> {
    match ask(state, name, control)? {
        Answer::Done | Answer::Status(_) => Ok(()),
        other => Err(refusal(&format!("{control:?} {name}").to_lowercase(), other)),
    }
}

/// How the guest is.
pub fn status(state: &State, name: &str) -> Result<Status> {
    match ask(state, name, Control::Status)? {
        Answer::Status(status) => Ok(status),
        other => Err(refusal(&format!("ask how {name} is"), other)),
    }
}

fn ask(state: &State, name: &str, control: Control) -> Result<Answer> {
    answer(name, &send(state, name, &Message::Control(control), &[])?)
}

/// What is answered at once.
fn answer(name: &str, holder: &Channel) -> Result<Answer> {
    let answered = holder.receive_within(CONTROL_LIMIT);
    let (answer, _) =
        answered.map_err(Error::failed(&format!("hear from {name}")))?.ok_or_else(|| gone(name))?;
    Ok(answer)
}

fn send(state: &State, name: &str, message: &Message, fds: &[BorrowedFd<'_>]) -> Result<Channel> {
    // It becomes part of a path.
    QubeName::parse(name.as_bytes())
        .map_err(|error| Error::new(Kind::Usage, format!("{name:?} is no qube")).because(error))?;
    let bytes = message
        .encode()
        .map_err(|error| Error::new(Kind::Usage, "the command cannot be sent").because(error))?;
    let holder = Channel::connect(&state.call_socket(name)).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
            Error::new(Kind::Refused, format!("{name} does not run"))
                .hint(format!("`qvm-start {name}` starts a qube; `qvm-ls` lists those that run"))
        }
        _ => Error::failed(&format!("reach {name}"))(error),
    })?;
    holder.send_bytes(&bytes, fds).map_err(Error::failed(&format!("reach {name}")))?;
    Ok(holder)
}

fn refusal(step: &str, answer: Answer) -> Error {
    match answer {
        Answer::Refused { reason } => Error::new(Kind::Refused, format!("cannot {step}: {reason}")),
        Answer::NotStarted { reason } => Error::new(Kind::Failed, format!("cannot {step}: {reason}")),
        other => Error::new(Kind::Failed, format!("cannot {step}: its holder answers {other:?}")),
    }
}

/// The guest does not come to the call's vchan: why, in the words of its holder, unless that has gone.
fn not_met(name: &str, step: &str, holder: &Channel) -> Error {
    answer(name, holder).map_or_else(|error| error, |said| refusal(step, said))
}

fn gone(name: &str) -> Error {
    Error::new(Kind::Failed, format!("{name} has ended"))
}
