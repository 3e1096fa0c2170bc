//! In a fresh disposable, by `dispvm-launch`: in this process's place, or behind a filter if a terminal is to show what it prints.

use std::io::{self, IsTerminal};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::thread;

use super::command::What;
use super::filter::copy;
use super::Options;
use crate::outcome::{Failure, Outcome, FAILED};
use crate::programs::{not_started, own, status_of, LAUNCHER};

/// Runs it, in a disposable of `dvm`, or of the default one if that is empty.
pub fn run(options: &Options, dvm: &str, what: &What) -> Outcome {
    options.tell(what, &if dvm.is_empty() { "@dispvm".to_owned() } else { format!("@dispvm:{dvm}") });
    let mut command = own(LAUNCHER);
    if let Some(user) = &options.user {
        command.args(["--user", user]);
    }
    if !dvm.is_empty() {
        command.args(["--dvm", dvm]);
    }
    match what {
        What::Service(service) => command.args(["--service", service]),
        What::Shell(line) => command.args(["--", "sh", "-c", line]),
        What::Argv(words) => command.arg("--").args(words),
    };
    let filters = Filters {
        stdout: options.pass_io && options.filters_escapes(),
        stderr: options.filters_escapes() || (!options.no_filter_escape_chars && io::stderr().is_terminal()),
    };
    if let Some(local) = &options.localcmd {
        return connect(command, local, &filters);
    }
    if !options.pass_io {
        // Standard error stays: it is where the launcher says why there is no disposable.
        command.stdin(Stdio::null()).stdout(Stdio::null());
    }
    match filters {
        Filters { stdout: false, stderr: false } if !options.is_marked() => {
            let error = command.exec();
            Err(not_started(&command, &error))
        }
        filters => filter(command, filters),
    }
}

/// Which of its streams go to a terminal.
struct Filters {
    stdout: bool,
    stderr: bool,
}

/// Runs the launcher with nothing in what it prints that a terminal obeys. When this process ends early, nobody reads that any
/// more, and the launcher ends too.
fn filter(mut launcher: Command, filters: Filters) -> Outcome {
    if filters.stdout {
        launcher.stdout(Stdio::piped());
    }
    if filters.stderr {
        launcher.stderr(Stdio::piped());
    }
    let mut launched = launcher.spawn().map_err(|error| not_started(&launcher, &error))?;
    let (out, err) = (launched.stdout.take(), launched.stderr.take());
    thread::scope(|scope| {
        scope.spawn(|| out.map(|out| copy(out, io::stdout())));
        err.map(|err| copy(err, io::stderr()));
    });
    launched.wait().map(status_of).map_err(|error| not_started(&launcher, &error))
}

/// Connects what runs in the disposable with a program here, each one's output being the other's input.
fn connect(mut launcher: Command, local: &str, filters: &Filters) -> Outcome {
    if filters.stderr {
        launcher.stderr(Stdio::piped());
    }
    launcher.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut launched = launcher.spawn().map_err(|error| not_started(&launcher, &error))?;
    let (Some(input), Some(output)) = (launched.stdin.take(), launched.stdout.take()) else {
        return Err(not_started(&launcher, &io::Error::other("it has no pipes")));
    };
    let local = Command::new("sh").args(["-c", local]).stdin(output).stdout(input).spawn();
    let failed = |step| move |error| Failure::Runtime(format!("cannot {step}: {error}"), FAILED);
    let mut local = local.map_err(failed("run the --localcmd"))?;
    if let Some(err) = launched.stderr.take() {
        let _ = copy(err, io::stderr());
    }
    let status = launched.wait().map_err(failed("wait for dispvm-launch"))?;
    local.wait().map_err(failed("wait for the --localcmd"))?;
    Ok(status_of(status))
}
