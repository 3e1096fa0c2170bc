//! `dispvm-agent` serves the host, as root; `dispvm-agent session` stands for the login session, as its user; `dispvm-agent vmexec
//! ARGUMENT` becomes the command that is encoded in the argument, for `qubes.VMExec`; `dispvm-agent receive-files` is `qubes.Filecopy`;
//! `dispvm-agent connect-service …` carries the bytes of a service behind a socket.
//! Started as one of `tools`, it is that.

use std::ffi::{OsStr, OsString};
use std::io::ErrorKind;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};

use guest_agent::agent::Agent;
use guest_agent::calls::{Calls, SOCKET};
use guest_agent::cgroup::Freezer;
use guest_agent::failure::{Failure, Step};
use guest_agent::place::Place;
use guest_agent::port::{Port, Site};
use guest_agent::session::{self, Session};
use guest_agent::{services, sys, tools};

fn main() -> ExitCode {
    let mut args = std::env::args_os();
    let tool = args.next().and_then(|program| tools::named(&program));
    let args: Vec<_> = args.collect();
    if let Some(tool) = tool {
        return tool(args);
    }
    let result = match args.as_slice() {
        [] => serve(),
        [word] if word == "session" => session::run().map(|never| match never {}),
        [word, argument] if word == "vmexec" => return become_command(argument),
        [word] if word == "receive-files" => return tools::receive_files(),
        [word, words @ ..] if word == services::CONNECT => return services::connect(words),
        _ => {
            eprintln!("usage: dispvm-agent [session | vmexec ARGUMENT | receive-files]");
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

/// Returns when it could not, with the status that qrexec has for that.
fn become_command(encoded: &OsStr) -> ExitCode {
    let argv = match qrexec::vmexec::decode(encoded.as_bytes()) {
        Ok(argv) => argv,
        Err(error) => {
            eprintln!("dispvm-agent: qubes.VMExec: {error}");
            return ExitCode::from(125);
        }
    };
    let mut argv = argv.into_iter().map(OsString::from_vec);
    let program = argv.next().unwrap_or_default();
    let error = Command::new(&program).args(argv).exec();
    eprintln!("dispvm-agent: run {}: {error}", program.to_string_lossy());
    ExitCode::from(if error.kind() == ErrorKind::NotFound { 127 } else { 126 })
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
    let calls = Calls::listen(Path::new(SOCKET)).unwrap_or_else(|failure| {
        eprintln!("dispvm-agent: {failure}; programs here can't call others");
        Calls::default()
    });
    Agent::new(port, place, session.is_some(), freezer, calls).run().step(|| "serve the host")
}
