//! `qrexec-client-vm [options] TARGET SERVICE [LOCAL_PROGRAM [ARGUMENTS]]`: calls a service of another qube, if policy allows it.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::process::ExitCode;

use qrexec::Call;

use super::client::{self, Carriage};
use crate::calls::SOCKET;

/// What it is called.
pub const NAME: &str = "qrexec-client-vm";
const EXIT_USAGE: u8 = 2;
const USAGE: &str = "\
usage: qrexec-client-vm [options] target_vmname program_ident [local_program [local program arguments]]
Options:
  --buffer-size=BUFFER_SIZE         taken, of no effect: buffers are as large as they need to be
  -t, --filter-escape-chars-stdout  replace all but printable ASCII on stdout (the default if it is a terminal)
  -T, --filter-escape-chars-stderr  the same on stderr
  --no-filter-escape-chars-stdout   do not
  --no-filter-escape-chars-stderr   do not
  --agent-socket=PATH               where the agent is, by default /run/dispvm/qrexec.sock
  -p, --prefix-data=DATA            data for the service, before all other
  -h, --help                        this text";

/// A command line, understood.
#[derive(Debug, PartialEq, Eq)]
struct Options {
    socket: PathBuf,
    target: OsString,
    service: OsString,
    carriage: Carriage,
}

enum Wrong {
    /// Help was asked for.
    Help,
    /// What is wrong.
    With(String),
}

/// Runs it.
pub fn run(args: Vec<OsString>) -> ExitCode {
    let options = match parse(args) {
        Ok(options) => options,
        Err(Wrong::Help) => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        Err(Wrong::With(what)) => {
            eprintln!("{NAME}: {what}\n{USAGE}");
            return ExitCode::from(EXIT_USAGE);
        }
    };
    let Options { socket, target, service, carriage } = options;
    match Call::parse(&target.into_vec(), &service.into_vec()) {
        Ok(call) => ExitCode::from(client::call(NAME, &socket, &call, carriage)),
        Err(error) => {
            eprintln!("{NAME}: {error}");
            ExitCode::from(qrexec::service::EXIT_PROBLEM)
        }
    }
}

/// Options end at the first word that is none, as the local program's own must be left to it.
fn parse(args: Vec<OsString>) -> Result<Options, Wrong> {
    let (mut socket, mut carriage) = (PathBuf::from(SOCKET), Carriage::default());
    let mut args = args.into_iter();
    let target = loop {
        let arg = args.next().ok_or_else(|| Wrong::With("no target".into()))?;
        let Some(text) = arg.to_str().filter(|text| text.starts_with('-') && text.len() > 1) else {
            break arg;
        };
        let (name, value) = match text.split_once('=').filter(|_| text.starts_with("--")) {
            Some((name, value)) => (name, Some(OsString::from(value))),
            None => (text, None),
        };
        let mut value = || {
            value.clone().or_else(|| args.next()).ok_or_else(|| Wrong::With(format!("{name} needs a value")))
        };
        match name {
            "--" => break args.next().ok_or_else(|| Wrong::With("no target".into()))?,
            "-t" | "--filter-escape-chars-stdout" => carriage.filter_stdout = Some(true),
            "-T" | "--filter-escape-chars-stderr" => carriage.filter_stderr = Some(true),
            "-tT" | "-Tt" => (carriage.filter_stdout, carriage.filter_stderr) = (Some(true), Some(true)),
            "--no-filter-escape-chars-stdout" => carriage.filter_stdout = Some(false),
            "--no-filter-escape-chars-stderr" => carriage.filter_stderr = Some(false),
            "--buffer-size" => is_size(&value()?)?,
            "-a" | "--agent-socket" => socket = value()?.into(),
            "-p" | "--prefix-data" => carriage.prefix = value()?.into_vec(),
            "-h" | "--help" => return Err(Wrong::Help),
            _ => return Err(Wrong::With(format!("unknown option {name}"))),
        }
    };
    let service = args.next().ok_or_else(|| Wrong::With("no service".into()))?;
    carriage.local = args.next().map(|program| (program, args.collect()));
    Ok(Options { socket, target, service, carriage })
}

fn is_size(value: &OsString) -> Result<(), Wrong> {
    match value.to_str().map(str::parse::<u32>) {
        Some(Ok(_)) => Ok(()),
        _ => Err(Wrong::With(format!("{} is no size of a buffer", value.to_string_lossy()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Option<Options> {
        parse(line.split(' ').map(OsString::from).collect()).ok()
    }

    #[test]
    fn options_end_at_the_target() {
        let options =
            parsed("--buffer-size=70000 -t --agent-socket /x work svc+a /bin/tool -T b").expect("fine");
        assert_eq!(
            (options.socket, options.target, options.service),
            ("/x".into(), "work".into(), "svc+a".into())
        );
        assert_eq!((options.carriage.filter_stdout, options.carriage.filter_stderr), (Some(true), None));
        assert_eq!(options.carriage.local, Some(("/bin/tool".into(), vec!["-T".into(), "b".into()])));
        let options = parsed("-p=DATA -- work svc");
        assert!(options.is_none(), "short options take their value as the next word");
        let options = parsed("--prefix-data=A=B -- work svc").expect("fine");
        assert_eq!(options.carriage, Carriage { prefix: b"A=B".to_vec(), ..Carriage::default() });
        for wrong in ["work", "--nonsense work svc", "--buffer-size=big work svc", "-t"] {
            assert!(parsed(wrong).is_none(), "{wrong}");
        }
    }
}
