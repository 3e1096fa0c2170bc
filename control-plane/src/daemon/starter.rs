//! Starting a qube: its runner is a process of ours, by way of the daemon where there is one.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use engine::build::BOOT_LIMIT;

use super::channel::Channel;
use super::client::is_nobody;
use super::protocol::{Hello, HolderHears, HolderSays, RunnerSays};
use crate::clones::{self, Power};
use crate::error::{Error, Kind, Result};
use crate::qube::check_name;
use crate::state::{self, State};

/// A boot has its own limit; beside it a runner copies a volume, or has a hot image made.
const START_LIMIT: Duration = Duration::from_secs(BOOT_LIMIT.as_secs() + 120);
/// A runner says its first word within some milliseconds. A daemon that is stopped, or whose machine is out of breath, is not waited for.
const WORD_LIMIT: Duration = Duration::from_secs(2);
/// A spare is up within milliseconds, or given up after 5 s.
const HOLD_LIMIT: Duration = Duration::from_secs(8);
/// How often is looked whether a qube that somebody else starts is up.
const UP_POLL: Duration = Duration::from_millis(20);
/// A longer log is begun anew at the next start.
const LOG_BYTES_MAX: u64 = 1 << 20;

/// Starts the qube `name` and waits until its agent is up. Answers whether it was down: one that runs, or that somebody is starting, is
/// as good.
pub fn start(state: &State, name: &str) -> Result<bool> {
    // It becomes the name of a folder.
    check_name(name)?;
    let cannot = || Error::new(Kind::Failed, format!("cannot start {name}"));
    let begun = match by_the_daemon(state, name) {
        Ok(begun) => Ok(begun),
        // It may have started one all the same: the second finds that the first has the qube.
        Err(error) => {
            if !is_nobody(&error) {
                tracing::warn!("dispvmd does not start {name}, doing it ourselves: {error}");
            }
            by_ourselves(state, name)
        }
    };
    let (runner, mut says) = begun.map_err(|error| cannot().because(error))?;
    while says == RunnerSays::Starting {
        let heard = runner.receive_within::<RunnerSays>(START_LIMIT);
        let ended = || cannot().because("its runner was ended before it was up");
        (says, _) = heard.map_err(|error| cannot().because(error))?.ok_or_else(ended)?;
    }
    match says {
        RunnerSays::RunsAlready => await_up(state, name).map(|()| false),
        RunnerSays::Failed { reason } => Err(cannot().because(reason)),
        RunnerSays::Up | RunnerSays::Starting => Ok(true),
    }
}

/// A disposable that was a spare. It ends with this, unless it is let go on.
pub struct Held {
    /// Its name.
    pub name: String,
    holder: Channel,
}

impl Held {
    /// Everything is noted of it: from now on it takes and makes calls, and runs by itself.
    pub fn go(&self) -> io::Result<()> {
        self.holder.send(&HolderHears::Go, &[])
    }
}

/// Has a spare of `dvm` become a disposable, if the daemon has one that serves.
pub fn hold_spare(state: &State, dvm: &str) -> Option<Held> {
    let says = Channel::connect(&state.daemon_socket()).and_then(|daemon| {
        daemon.send(&Hello::Hold { dvm: dvm.to_owned() }, &[])?;
        Ok(daemon.receive_within::<HolderSays>(HOLD_LIMIT)?.map(|(says, _)| (says, daemon)))
    });
    match says {
        Ok(Some((HolderSays::Holds { name }, holder))) => return Some(Held { name, holder }),
        Ok(Some((HolderSays::NoSpare, _)) | None) => {}
        Ok(Some((HolderSays::Failed { reason }, _))) => {
            tracing::warn!("a spare of {dvm} did not wake up: {reason}");
        }
        Err(error) if is_nobody(&error) => {}
        Err(error) => tracing::warn!("no spare of {dvm}: {error}"),
    }
    None
}

/// The channel to its runner, and the first word on it. An error where the daemon is not there, is stopped, or knows of no such thing.
fn by_the_daemon(state: &State, name: &str) -> io::Result<(Channel, RunnerSays)> {
    let daemon = Channel::connect(&state.daemon_socket())?;
    daemon.send(&Hello::Start { qube: name.to_owned() }, &[])?;
    let (says, _) = daemon.receive_within(WORD_LIMIT)?.ok_or(io::ErrorKind::UnexpectedEof)?;
    Ok((daemon, says))
}

fn by_ourselves(state: &State, name: &str) -> io::Result<(Channel, RunnerSays)> {
    let (ours, theirs) = Channel::pair()?;
    let program = std::env::current_exe()?.with_file_name("dispvmd");
    spawn(Command::new(program), state, name, theirs.as_fd())?;
    Ok((ours, RunnerSays::Starting))
}

/// Waits while somebody else is starting it.
fn await_up(state: &State, name: &str) -> Result<()> {
    let deadline = Instant::now() + START_LIMIT;
    let lock = state.qube(name).join("start.lock");
    loop {
        // Asked first: one that begins afterwards has a record by the time that it is up.
        let is_held = state::is_locked(&lock).unwrap_or(false);
        let clones = clones::list(state)?;
        match clones.iter().find(|clone| clone.qube.as_deref() == Some(name)).map(|clone| clone.power) {
            Some(Power::Running | Power::Paused) => return Ok(()),
            // Without a record, what it stands on is still being prepared.
            starting if (is_held || starting.is_some()) && Instant::now() < deadline => {
                std::thread::sleep(UP_POLL);
            }
            _ => {
                let why = format!("cannot start {name}: another attempt to start or change it is under way");
                return Err(Error::new(Kind::Failed, why).hint("try again when that has ended"));
            }
        }
    }
}

/// Starts the runner of `name` as the daemon does: as ourselves, with `answer` to say on how it went.
pub(super) fn runner(state: &State, name: &str, answer: BorrowedFd<'_>) -> io::Result<()> {
    // Not by our path: an upgrade may have put another file there, or none.
    let mut command = Command::new("/proc/self/exe");
    command.arg0("dispvmd");
    spawn(command, state, name, answer)
}

/// Starts the holder of a spare of `dvm`, as [`runner`]. What it has to say goes where what we say goes.
pub(super) fn holder(state: &State, dvm: &str, answer: BorrowedFd<'_>) -> io::Result<()> {
    let mut command = Command::new("/proc/self/exe");
    command.arg0("dispvmd").arg("--root").arg(state.root()).args(["holder", dvm]);
    command.stdin(answer.try_clone_to_owned()?).stdout(Stdio::null());
    command.spawn().map(drop)
}

/// It takes a session of its own, and has the daemon's children's end reaped or is nobody's child any more.
fn spawn(mut command: Command, state: &State, name: &str, answer: BorrowedFd<'_>) -> io::Result<()> {
    command.arg("--root").arg(state.root()).args(["runner", name]);
    command.stdin(answer.try_clone_to_owned()?).stdout(Stdio::null()).stderr(log(&state.qube(name)));
    command.spawn().map(drop)
}

/// What the runner says goes into the qube's folder, behind what others say there: one may run already. Where there is no folder, it ends at
/// once anyway.
fn log(folder: &Path) -> Stdio {
    let log = File::options().append(true).create(true).open(folder.join("runner.log"));
    let log = log.inspect(|log| {
        if log.metadata().is_ok_and(|log| log.len() > LOG_BYTES_MAX) {
            let _ = log.set_len(0);
        }
    });
    log.map_or_else(|_| Stdio::null(), Stdio::from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clones::{Claim, Keeping, Lease};
    use crate::qube;

    #[test]
    fn a_start_that_has_no_record_yet_is_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let state = State::open(folder.path()).unwrap();
        qube::tests::dvm("work").save(&state).unwrap();
        let running = qube::hold_running(&state, "work").unwrap();
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| await_up(&state, "work"));
            std::thread::sleep(4 * UP_POLL);
            assert!(!waits.is_finished());
            let template = ("debian-12".to_owned(), 1);
            let (dvm, keeping, qube) = ("work", Keeping::Runner, Some("work"));
            let claim = Claim { dvm, root_hash: "", template, keeping, label: None, qube };
            let mut lease = Lease::claim(&state, claim).unwrap();
            lease.tell(Power::Running).unwrap();
            waits.join().unwrap().unwrap();
        });
        drop(running);
        assert!(await_up(&state, "work").is_err(), "nobody starts it");
    }
}
