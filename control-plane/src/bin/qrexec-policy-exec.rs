//! `qrexec-policy-exec`: what becomes of a qube's call. The holder of a qube starts one for each call, with the call's streams as its own; it asks
//! the policy, tells the holder, and becomes what carries the call out.
//!
//! Invariants: nothing is read of the call's streams or written to them here, the guest would hear it; what is to be known is told to the
//! holder, and to the system's log.

use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use clap::Parser;
use control_plane::calls::decide::{self, Asked, Rules};
use control_plane::calls::verdict::Teller;
use control_plane::calls::{carriage, carry_out, service, system_log};
use control_plane::cli::{generate_if_asked, Common};
use control_plane::error::{Error, Kind, Result};
use control_plane::output::error_text;
use control_plane::session::Signals;
use nix::sys::signal::SigSet;
use qrexec::service::{Target, EXIT_NOT_FOUND, EXIT_PROBLEM, EXIT_REFUSED};

const NAME: &str = "qrexec-policy-exec";

/// Carries out a call of a qube, if the policy allows it.
///
/// Its standard input and output are the call's. Started by whoever holds the qube.
///
/// Exit status: the service's; 125 when the call failed, 126 when it was refused, 127 when there is no such service.
#[derive(Parser)]
#[command(name = "qrexec-policy-exec", version)]
struct Options {
    #[command(flatten)]
    common: Common,
    /// Carry the call's streams over a vchan that this domain serves at --port, in place of standard input and output
    #[arg(long, value_name = "DOMAIN", hide = true, requires = "port")]
    meet: Option<u16>,
    /// Where it is
    #[arg(long, value_name = "PORT", hide = true)]
    port: Option<u16>,
    /// The qube that calls
    source: String,
    /// Whom it calls, as it says
    target: String,
    /// What it calls
    #[arg(value_name = "SERVICE[+ARG]")]
    service: String,
}

fn main() -> ExitCode {
    generate_if_asked::<Options>();
    let mut teller = Teller::of_environment();
    let options = match Options::try_parse() {
        Ok(options) => options,
        Err(error) => {
            tell(&mut teller, false, &error.to_string());
            return ExitCode::from(if error.use_stderr() { EXIT_PROBLEM } else { 0 });
        }
    };
    // The holder blocks signals, and a call ends with its holder.
    let _ = SigSet::all().thread_unblock();
    let _ = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM));
    match prepare(&options) {
        Ok((text, program)) => match options.meet.zip(options.port) {
            Some((domain, port)) => meet(&mut teller, (domain, port), &text, program),
            None => become_it(&mut teller, &text, program),
        },
        Err(error) => {
            tell(&mut teller, false, &error_text(&error));
            ExitCode::from(EXIT_REFUSED)
        }
    }
}

/// Has the call's streams as its own.
fn become_it(teller: &mut Teller, text: &str, program: Option<Command>) -> ExitCode {
    let Some(mut command) = program else {
        tell(teller, true, &no_service(text));
        return ExitCode::from(EXIT_NOT_FOUND);
    };
    if !tell(teller, true, text) {
        return ExitCode::from(EXIT_PROBLEM);
    }
    let error = command.exec();
    system_log::say(NAME, &format!("{text}, but cannot be run: {error}"));
    ExitCode::from(EXIT_PROBLEM)
}

/// Has the call's streams over a vchan, and the program below itself.
fn meet(teller: &mut Teller, place: (u16, u16), text: &str, program: Option<Command>) -> ExitCode {
    // Before anything is said: the holder ends us by a signal then.
    let signals = match Signals::block() {
        Ok(signals) => signals,
        Err(error) => {
            tell(teller, false, &format!("{text}, but signals cannot be waited for: {error}"));
            return ExitCode::from(EXIT_PROBLEM);
        }
    };
    let text = if program.is_some() { text.to_owned() } else { no_service(text) };
    if !tell(teller, true, &text) {
        return ExitCode::from(EXIT_PROBLEM);
    }
    let link = match carriage::meet(place, signals.as_fd()) {
        Ok(link) => link,
        Err(error) => {
            system_log::say(NAME, &format!("{text}, but its channel did not come: {error}"));
            return ExitCode::from(EXIT_PROBLEM);
        }
    };
    match carriage::answer(link, program.ok_or(EXIT_NOT_FOUND), &signals) {
        Ok(status) => ExitCode::from(status),
        // Its end is the caller's doing, or the holder's.
        Err(_) => ExitCode::from(EXIT_PROBLEM),
    }
}

fn no_service(text: &str) -> String {
    format!("{text}: there is no such service")
}

/// Decides, and finds what carries the call out.
fn prepare(options: &Options) -> Result<(String, Option<Command>)> {
    let state = options.common.state()?;
    let target = Target::parse(options.target.as_bytes()).map_err(|error| {
        Error::new(Kind::Refused, format!("{:?} is no target", options.target)).because(error)
    })?;
    let source = service::parse_source(&options.source)?;
    let asked = Asked { source, target, service: service::parse(&options.service)? };
    let allow = decide::decide(&state, &Rules::of_environment(), &asked)?;
    let text = decide::allowed_text(&asked, &allow);
    let command = carry_out::program(&state, &asked, &allow)
        .map_err(|error| Error::new(Kind::Refused, text.clone()).because(error))?;
    Ok((text, command))
}

/// Tells the system's log and the holder. Whether there still is somebody for whom to carry the call out.
fn tell(teller: &mut Teller, accepted: bool, text: &str) -> bool {
    system_log::say(NAME, text);
    teller.tell(accepted, &one_line(text))
}

/// Whatever an error's text has.
fn one_line(text: &str) -> String {
    text.replace(['\n', '\r'], " ")
}
