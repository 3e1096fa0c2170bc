//! `qvm-run-vm VM COMMAND…`, which R3.2 calls `qvm-run`: runs a command in another qube, or in a disposable that lives as long as it.
//!
//! The command is joined by spaces and goes as a first line to `qubes.VMShell`, in a disposable `qubes.VMShell+WaitForSession`, as that of Qubes' own
//! does (qubes-rpc/qvm-run-vm 25b304cc, qrun-in-vm 3b0f80e1): behind that line comes the command's own stdin. Beyond theirs, the exit status is
//! the command's.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::process::ExitCode;

use qrexec::service::EXIT_PROBLEM;
use qrexec::Call;

use super::client::{self, Carriage};
use crate::calls::SOCKET;

const NAME: &str = "qvm-run-vm";
const EXIT_USAGE: u8 = 1;
const SHELL: &str = "qubes.VMShell";
/// What a disposable that has just started is asked for.
const SHELL_OF_A_SESSION: &str = "qubes.VMShell+WaitForSession";
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
    /// For the shell, before all else.
    line: Vec<u8>,
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
    let Options { filter, line, .. } = options;
    let carriage = Carriage { filter_stdout: filter, filter_stderr: filter, prefix: line, local: None };
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
    let (service, line) = match (is_service, words.as_slice()) {
        (_, []) => return None,
        (true, [service]) => (String::from_utf8(service.clone()).ok()?, Vec::new()),
        (true, _) => return None,
        (false, words) => {
            let service = if is_disposable(&target) { SHELL_OF_A_SESSION } else { SHELL };
            (service.to_owned(), line_of(&words.join(&b' ')))
        }
    };
    Some(Options { socket, filter, target, service, line })
}

fn is_disposable(target: &OsString) -> bool {
    let keyword = target.as_bytes().strip_prefix(b"@").or_else(|| target.as_bytes().strip_prefix(b"$"));
    keyword.is_some_and(|keyword| keyword == b"dispvm" || keyword.starts_with(b"dispvm:"))
}

/// The line that has a shell become the command: bash, as with Qubes, or what there is.
fn line_of(command: &[u8]) -> Vec<u8> {
    let mut line = b"exec $(command -v bash || command -v sh) -c '".to_vec();
    for (at, byte) in command.iter().enumerate() {
        match byte {
            b'\'' => line.extend_from_slice(b"'\\''"),
            // Two of them would be the beginning of a document to who looks at lines alone, as qubes.VMShell does where there is no bash.
            b'<' if at > 0 && command.get(at - 1) == Some(&b'<') => line.extend_from_slice(b"''<"),
            byte => line.push(*byte),
        }
    }
    line.extend_from_slice(b"' || exit 127\n");
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Option<(String, String, String)> {
        let options = parse(line.split_whitespace().map(OsString::from).collect())?;
        let line = String::from_utf8(options.line).ok()?;
        Some((options.target.into_string().ok()?, options.service, line))
    }

    #[test]
    fn f5_qvm_run_names_target_and_command() {
        let shell =
            |command: &str| format!("exec $(command -v bash || command -v sh) -c '{command}' || exit 127\n");
        let is =
            |target: &str, service: &str, line: String| Some((target.to_owned(), service.to_owned(), line));
        let fresh = "qubes.VMShell+WaitForSession";
        assert_eq!(parsed("$dispvm xterm"), is("$dispvm", fresh, shell("xterm")));
        assert_eq!(parsed("work ls -la"), is("work", "qubes.VMShell", shell("ls -la")));
        assert_eq!(parsed("work it's <<<x"), is("work", "qubes.VMShell", shell("it'\\''s <''<''<x")));
        assert_eq!(parsed("--dispvm xterm"), is("@dispvm", fresh, shell("xterm")));
        assert_eq!(parsed("-q --dispvm=deb-dvm -- xterm"), is("@dispvm:deb-dvm", fresh, shell("xterm")));
        let app = "--dispvm=deb-dvm --service qubes.StartApp+xterm";
        assert_eq!(parsed(app), is("@dispvm:deb-dvm", "qubes.StartApp+xterm", String::new()));
        assert_eq!(
            parsed("--no-gui --service work qubes.GetDate"),
            is("work", "qubes.GetDate", String::new())
        );
        for wrong in ["", "work", "--dispvm", "--service work", "--service work a b", "--nonsense work ls"] {
            assert_eq!(parsed(wrong), None, "{wrong}");
        }
    }

    /// Whatever is in the command, a shell makes it of the line again.
    #[test]
    fn a_shell_understands_the_line() {
        let command = "printf '%s|' \"$0\" 'a  b' <<x\nit's\nx\ncat";
        let mut shell = std::process::Command::new("sh")
            .arg("-c")
            .arg({
                String::from_utf8(line_of(command.as_bytes()))
                    .expect("text")
                    .replace("$(command -v bash || command -v sh)", "printf")
                    .replace(" -c ", " %s ")
            })
            .stdout(std::process::Stdio::piped())
            .spawn()
            .expect("runs");
        let mut said = String::new();
        std::io::Read::read_to_string(shell.stdout.as_mut().expect("piped"), &mut said).expect("reads");
        shell.wait().expect("ends");
        assert_eq!(said, command);
    }
}
