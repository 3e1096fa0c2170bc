//! Files from and to other qubes: `qvm-copy`, `qvm-move`, `qvm-copy-to-vm`, `qvm-move-to-vm`, and what `qubes.Filecopy` runs. Command lines
//! as Qubes' own have them (QubesOS/qubes-core-agent-linux, qubes-rpc/qvm-copy 03e46949).

use std::ffi::{OsStr, OsString};
use std::io::{self, IsTerminal};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use filecopy::{receive, Characters, Job, Limits, Tree, UNSAFE_CHARACTERS};

use crate::tools::Tool;

/// Chosen by the policy, or by who is asked.
const TARGET_DEFAULT: &str = "@default";
const EXIT_USAGE: u8 = 1;

/// One of the four programs.
struct Program {
    name: &'static str,
    names_target: bool,
    moves: bool,
}

const COPY: Program = Program { name: "qvm-copy", names_target: false, moves: false };
const MOVE: Program = Program { name: "qvm-move", names_target: false, moves: true };
const COPY_TO: Program = Program { name: "qvm-copy-to-vm", names_target: true, moves: false };
const MOVE_TO: Program = Program { name: "qvm-move-to-vm", names_target: true, moves: true };

/// The program that goes by this name.
pub fn named(program: &OsStr) -> Option<Tool> {
    match Path::new(program).file_name()?.to_str()? {
        "qvm-copy" => Some(|args| COPY.run(args)),
        "qvm-move" => Some(|args| MOVE.run(args)),
        "qvm-copy-to-vm" => Some(|args| COPY_TO.run(args)),
        "qvm-move-to-vm" => Some(|args| MOVE_TO.run(args)),
        _ => None,
    }
}

/// A command line, understood.
#[derive(Debug, Default, PartialEq, Eq)]
struct Options {
    socket: Option<OsString>,
    without_progress: bool,
    target: OsString,
    paths: Vec<PathBuf>,
}

impl Program {
    fn run(&self, args: Vec<OsString>) -> ExitCode {
        if args.first().is_some_and(|arg| arg == "-h" || arg == "--help") {
            println!("{}", self.usage());
            return ExitCode::SUCCESS;
        }
        let Some(options) = self.parse(args) else {
            eprintln!("{}", self.usage());
            return ExitCode::from(EXIT_USAGE);
        };
        let shows_progress = !options.without_progress && io::stderr().is_terminal();
        let job = Job { paths: &options.paths, moves: self.moves, ignores_links: false, shows_progress };
        match job.run(|service| client(&options, service)) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("{}: {error}", self.name);
                ExitCode::from(error.status())
            }
        }
    }

    fn usage(&self) -> String {
        let target = if self.names_target { "VM " } else { "" };
        let verb = if self.moves { "Moves" } else { "Copies" };
        format!(
            "usage: {} [--without-progress] {target}FILE...\n{verb} files and folders into QubesIncoming/{{this qube}} in another qube, \
             which the policy or you choose.",
            self.name
        )
    }

    fn parse(&self, args: Vec<OsString>) -> Option<Options> {
        let mut options = Options { target: TARGET_DEFAULT.into(), ..Options::default() };
        let mut words = args.into_iter().peekable();
        while let Some(option) = words.next_if(|word| word.as_bytes().starts_with(b"-")) {
            match option.to_str()? {
                "--" => break,
                "--without-progress" => options.without_progress = true,
                option => options.socket = Some(option.strip_prefix("--agent-socket=")?.into()),
            }
        }
        if self.names_target {
            options.target = words.next()?;
        }
        options.paths = words.map(PathBuf::from).collect();
        (!options.paths.is_empty()).then_some(options)
    }
}

/// This binary once more, as the program that calls.
fn client(options: &Options, service: &str) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg0("qrexec-client-vm").arg("--filter-escape-chars-stderr");
    if let Some(socket) = &options.socket {
        command.arg("--agent-socket").arg(socket);
    }
    command.arg("--").arg(&options.target).arg(service);
    command
}

/// Takes what comes on standard input into the home's QubesIncoming/CALLER. The argument is the service's.
pub fn receive_files(argument: &OsStr) -> ExitCode {
    let variable = |name| std::env::var(name).map_err(|_| io::Error::other(format!("{name} is not set")));
    let tree = variable("QREXEC_REMOTE_DOMAIN")
        .and_then(|source| Tree::incoming(Path::new(&variable("HOME")?), &source));
    let tree = match tree {
        Ok(tree) => tree,
        Err(error) => {
            eprintln!("qubes.Filecopy: cannot make a folder for what comes: {error}");
            return ExitCode::FAILURE;
        }
    };
    let characters = match argument == UNSAFE_CHARACTERS {
        true => Characters::Any,
        false => Characters::Displayable,
    };
    match receive(io::stdin().lock(), io::stdout().lock(), &tree, characters, &Limits::default()) {
        Ok(_) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("qubes.Filecopy: {error}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(program: &Program, line: &str) -> Option<(String, Vec<String>)> {
        let options = program.parse(line.split_whitespace().map(OsString::from).collect())?;
        let paths = options.paths.into_iter().map(|path| path.display().to_string()).collect();
        Some((options.target.into_string().ok()?, paths))
    }

    #[test]
    fn the_target_is_named_or_the_policys() {
        let is = |target: &str, paths: &[&str]| {
            Some((target.to_owned(), paths.iter().map(|path| path.to_string()).collect()))
        };
        assert_eq!(parsed(&COPY, "a b"), is("@default", &["a", "b"]));
        assert_eq!(parsed(&MOVE_TO, "work a"), is("work", &["a"]));
        assert_eq!(parsed(&COPY_TO, "--without-progress -- @dispvm -a"), is("@dispvm", &["-a"]));
        for (program, line) in [(&COPY, ""), (&COPY_TO, "work"), (&COPY, "-x a"), (&MOVE_TO, "")] {
            assert_eq!(parsed(program, line), None, "{} {line}", program.name);
        }
        assert!(named(OsStr::new("/usr/bin/qvm-copy")).is_some() && named(OsStr::new("agent")).is_none());
    }
}
