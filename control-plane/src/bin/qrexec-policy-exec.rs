//! `qrexec-policy-exec`: what becomes of a qube's call. The holder of a qube starts one for each call, with the call's streams as its own; it asks
//! the policy, tells the holder, and becomes what carries the call out, or has it carried out.
//!
//! Invariants: nothing is written to the call's streams here, the guest would hear it, but what a service behind a socket says; what is to be
//! known is told to the holder, and to the system's log.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::ExitCode;

use clap::Parser;
use control_plane::calls::carry_out::{self, Carrier};
use control_plane::calls::decide::{self, Asked, Rules};
use control_plane::calls::verdict::Teller;
use control_plane::calls::{carriage, programs, service, system_log};
use control_plane::cli::{generate_if_asked, Common};
use control_plane::error::{Error, Kind, Result};
use control_plane::output::error_text;
use nix::sys::signal::SigSet;
use qrexec::service::{Target, EXIT_PROBLEM, EXIT_REFUSED};

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
    if let Some(place) = options.meet.zip(options.port) {
        return meet(&options, place, &mut teller);
    }
    match prepare(&options) {
        Ok((text, Carrier::Nothing(why))) => {
            tell(&mut teller, true, &format!("{text}, but {why}"));
            ExitCode::from(why.status())
        }
        Ok((text, carrier)) => {
            if !tell(&mut teller, true, &text) {
                return ExitCode::from(EXIT_PROBLEM);
            }
            let error = match carry_out(carrier, &text) {
                Ok(status) => return ExitCode::from(status),
                Err(error) => error,
            };
            system_log::say_of_call(NAME, &format!("{text}, but cannot be carried out: {error}"));
            ExitCode::from(EXIT_PROBLEM)
        }
        Err(error) => {
            tell(&mut teller, false, &error_text(&error));
            ExitCode::from(EXIT_REFUSED)
        }
    }
}

/// Stays between the call's vchan and another of us, which decides and has the streams.
fn meet(options: &Options, place: (u16, u16), teller: &mut Teller) -> ExitCode {
    let carried = options.common.state().map_err(io::Error::other).and_then(|state| {
        let mut program = programs::command(NAME, &state);
        program.arg("--").args([&options.source, &options.target, &options.service]);
        carriage::answer(place, program, teller)
    });
    carried.map_or_else(
        |error| {
            tell(teller, false, &format!("a call cannot be carried: {error}"));
            ExitCode::from(EXIT_PROBLEM)
        },
        ExitCode::from,
    )
}

/// Becomes what carries the call out, or does so itself.
fn carry_out(carrier: Carrier, text: &str) -> io::Result<u8> {
    match carrier {
        Carrier::Program(mut command) => Err(command.exec()),
        Carrier::InDom0(service) => {
            service.notes().iter().for_each(|note| system_log::say_of_call(NAME, &format!("{text}: {note}")));
            service.serve()
        }
        Carrier::Nothing(why) => Err(io::Error::other(why)),
    }
}

/// Decides, and finds what carries the call out.
fn prepare(options: &Options) -> Result<(String, Carrier)> {
    let state = options.common.state()?;
    let target = Target::parse(options.target.as_bytes()).map_err(|error| {
        Error::new(Kind::Refused, format!("{:?} is no target", options.target)).because(error)
    })?;
    let source = service::parse_source(&options.source)?;
    let mut asked = Asked { source, target, service: service::parse(&options.service)? };
    let (allow, target) = decide::decide(&state, &Rules::of_environment(), &asked)?;
    let text = decide::allowed_text(&asked, &allow);
    asked.target = target;
    let carrier = carry_out::carrier(&state, &asked, &allow)
        .map_err(|error| Error::new(Kind::Refused, text.clone()).because(error))?;
    Ok((text, carrier))
}

/// Tells the system's log and the holder. Whether there still is somebody for whom to carry the call out. A call that may happen is logged however
/// many there are: a guest is not to hide one behind refusals.
fn tell(teller: &mut Teller, accepted: bool, text: &str) -> bool {
    match accepted {
        true => system_log::say(NAME, text),
        false => system_log::say_of_call(NAME, text),
    }
    // One line, whatever an error's text has.
    teller.tell(accepted, &text.replace(['\n', '\r'], " "))
}
