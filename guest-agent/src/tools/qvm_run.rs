//! `qvm-run-vm VM COMMAND…`, which R3.2 calls `qvm-run`: runs a command in another qube, or in a disposable that lives as long as it.
//!
//! The command is joined by spaces and run by a shell, as Qubes' own does. It goes by `qubes.VMExec`, not, as theirs, as a first line to
//! `qubes.VMShell`: that line is followed by the command's own stdin, of which only bash leaves the rest untouched.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::process::ExitCode;

use qrexec::service::EXIT_PROBLEM;
use qrexec::{vmexec, Call};

use super::client::{self, Carriage};
use crate::calls::SOCKET;

const NAME: &str = "qvm-run-vm";
const EXIT_USAGE: u8 = 2;
const USAGE: &str = "\
usage: qvm-run-vm [options] VM COMMAND [ARGUMENTS]
       qvm-run-vm [options] --dispvm[=TEMPLATE] COMMAND [ARGUMENTS]
Runs a command in another qube, in a new disposable if VM is @dispvm, $dispvm or @dispvm:TEMPLATE. Stdin, stdout, stderr and the exit
status are the command's.
Options:
  --service                  COMMAND is a service, SERVICE[+ARGUMENT]
  --filter-escape-chars      replace all but printable ASCII in the output (the default if it is a terminal)
  --no-filter-escape-chars   do not
  --agent-socket=PATH        where the agent is, by default /run/dispvm/qrexec.sock
  -p, -q, -v, -a, --pass-io, --quiet, --verbose, --autostart, --gui, --no-gui   taken, of no effect
  -h, --help                 this text";

/// A command line, understood.
#[derive(Debug, PartialEq, Eq)]
struct Options {
    socket: PathBuf,
    filter: Option<bool>,
    target: OsString,
    service: String,
}

/// Runs it.
pub fn run(args: Vec<OsString>) -> ExitCode {
    if args.first().is_some_and(|arg| arg == "-h" || arg == "--help") {
        println!("{USAGE}");
        return ExitCode::SUCCESS;
    }
    let Some(options) = parse(args) else {
        eprintln!("{USAGE}");
        return ExitCode::from(EXIT_USAGE);
    };
    let carriage =
        Carriage { filter_stdout: options.filter, filter_stderr: options.filter, ..Carriage::default() };
    match Call::parse(&options.target.into_vec(), options.service.as_bytes()) {
        Ok(call) => ExitCode::from(client::call(NAME, &options.socket, &call, carriage)),
        Err(error) => {
            eprintln!("{NAME}: {error}");
            ExitCode::from(EXIT_PROBLEM)
        }
    }
}

fn parse(args: Vec<OsString>) -> Option<Options> {
    let mut socket = PathBuf::from(SOCKET);
    let (mut filter, mut is_service, mut disposable) = (None, false, None);
    let mut words = args.into_iter().peekable();
    while let Some(option) = words.next_if(|word| word.as_bytes().starts_with(b"-")) {
        match option.to_str()? {
            "--" => break,
            "--service" => is_service = true,
            "--filter-escape-chars" => filter = Some(true),
            "--no-filter-escape-chars" => filter = Some(false),
            "--dispvm" => disposable = Some(OsString::from("@dispvm")),
            "-p" | "-q" | "-v" | "-a" | "--pass-io" | "--quiet" | "--verbose" | "--autostart" | "--gui"
            | "--no-gui" => {}
            option => match option.split_once('=')? {
                ("--dispvm", template) => disposable = Some(format!("@dispvm:{template}").into()),
                ("--agent-socket", path) => socket = path.into(),
                _ => return None,
            },
        }
    }
    let target = disposable.or_else(|| words.next())?;
    words.next_if(|word| word == "--");
    let words: Vec<Vec<u8>> = words.map(OsString::into_vec).collect();
    let service = match (is_service, words.as_slice()) {
        (_, []) => return None,
        (true, [service]) => String::from_utf8(service.clone()).ok()?,
        (true, _) => return None,
        (false, words) => {
            format!("qubes.VMExec+{}", vmexec::encode(&[&b"/bin/sh"[..], b"-c", &words.join(&b' ')]))
        }
    };
    Some(Options { socket, filter, target, service })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Option<(String, String)> {
        let options = parse(line.split_whitespace().map(OsString::from).collect())?;
        Some((options.target.into_string().ok()?, options.service))
    }

    #[test]
    fn f5_qvm_run_names_target_and_command() {
        let shell = |command: &str| format!("qubes.VMExec+-2Fbin-2Fsh+--c+{command}");
        let is = |target: &str, service: String| Some((target.to_owned(), service));
        assert_eq!(parsed("$dispvm xterm"), is("$dispvm", shell("xterm")));
        assert_eq!(parsed("work ls -la"), is("work", shell("ls-20--la")));
        assert_eq!(parsed("--dispvm xterm"), is("@dispvm", shell("xterm")));
        assert_eq!(parsed("-q --dispvm=deb-dvm -- xterm"), is("@dispvm:deb-dvm", shell("xterm")));
        let app = "--dispvm=deb-dvm --service qubes.StartApp+xterm";
        assert_eq!(parsed(app), is("@dispvm:deb-dvm", "qubes.StartApp+xterm".into()));
        assert_eq!(parsed("--no-gui --service work qubes.GetDate"), is("work", "qubes.GetDate".into()));
        for wrong in ["", "work", "--dispvm", "--service work", "--service work a b", "--nonsense work ls"] {
            assert_eq!(parsed(wrong), None, "{wrong}");
        }
    }
}
