//! `dispvm-agent` serves the host, as root; `dispvm-agent session` stands for the login session, as its user.

use std::process::ExitCode;

use guest_agent::agent::Agent;
use guest_agent::cgroup::Freezer;
use guest_agent::failure::{Failure, Step};
use guest_agent::place::Place;
use guest_agent::port::{Port, Site};
use guest_agent::session::{self, Session};
use guest_agent::sys;

fn main() -> ExitCode {
    let args: Vec<_> = std::env::args_os().skip(1).collect();
    let result = match args.as_slice() {
        [] => serve(),
        [word] if word == "session" => session::run().map(|never| match never {}),
        _ => {
            eprintln!("usage: dispvm-agent [session]");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("dispvm-agent: {failure}");
            ExitCode::FAILURE
        }
    }
}

/// Waits for port and session, then serves until the guest is no more.
fn serve() -> Result<(), Failure> {
    sys::reset_signals();
    let freezer = Freezer::enter();
    let site = Site::find();
    let session = Session::wait(&session::runtime_folder(session::UID), session::UID);
    let place = Place::in_session(session.as_ref())?;
    let port = Port::open(&site)?;
    if site == Site::Xen {
        // After a restore the kernel connects all disks and cards again, which the first answer need not wait for. Without the right
        // to, it does.
        let _ = sys::go_first();
    }
    Agent::new(port, place, session.is_some(), freezer).run().step(|| "serve the host")
}
