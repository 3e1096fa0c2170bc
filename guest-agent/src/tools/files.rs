//! `qvm-copy`, `qvm-move` and their kin that name the target, and the receiving end of theirs: the service `qubes.Filecopy`.

use std::ffi::OsString;
use std::io::{self, stderr, stdin, stdout, IsTerminal};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use filecopy::{receive, Characters, Job, Limits, Tree, UNSAFE_CHARACTERS};
use qrexec::service::EXIT_REFUSED;

use super::qrexec_client_vm;
use crate::failure::{Failure, Step};

/// As Qubes' own have it.
const EXIT_USAGE: u8 = 1;
/// Which qube gets them is asked, where policy says so.
const ASK: &str = "@default";

/// One of the four.
#[derive(Clone, Copy)]
struct Program {
    name: &'static str,
    moves: bool,
    names_target: bool,
}

/// A command line, understood.
#[derive(Debug, PartialEq, Eq)]
struct Options {
    socket: Option<OsString>,
    shows_progress: bool,
    ignores_links: bool,
    target: OsString,
    files: Vec<PathBuf>,
}

pub fn copy(args: Vec<OsString>) -> ExitCode {
    run(Program { name: "qvm-copy", moves: false, names_target: false }, args)
}

pub fn move_(args: Vec<OsString>) -> ExitCode {
    run(Program { name: "qvm-move", moves: true, names_target: false }, args)
}

pub fn copy_to_vm(args: Vec<OsString>) -> ExitCode {
    run(Program { name: "qvm-copy-to-vm", moves: false, names_target: true }, args)
}

pub fn move_to_vm(args: Vec<OsString>) -> ExitCode {
    run(Program { name: "qvm-move-to-vm", moves: true, names_target: true }, args)
}

/// Takes what a caller sends, into QubesIncoming in this user's home.
pub fn receive_files() -> ExitCode {
    match try_receive() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("qubes.Filecopy: {failure}");
            ExitCode::FAILURE
        }
    }
}

fn try_receive() -> Result<(), Failure> {
    let variable = |name: &str| {
        std::env::var(name).map_err(|_| Failure::ours(format!("learn {name}"), libc::EINVAL, "it is not set"))
    };
    let (home, source) = (variable("HOME")?, variable("QREXEC_REMOTE_DOMAIN")?);
    let characters = match variable("QREXEC_SERVICE_ARGUMENT").as_deref() {
        Ok(UNSAFE_CHARACTERS) => Characters::Any,
        _ => Characters::Displayable,
    };
    let tree =
        Tree::incoming(Path::new(&home), &source).step(|| format!("make {home}/QubesIncoming/{source}"))?;
    let received = receive(stdin().lock(), stdout().lock(), &tree, characters, &Limits::default());
    received.map(drop).map_err(|error| Failure::system("take all of it", io::Error::other(error)))
}

fn run(program: Program, args: Vec<OsString>) -> ExitCode {
    let asks_help = args.first().is_some_and(|arg| arg == "-h" || arg == "--help");
    let Some(options) = parse(program, args).filter(|_| !asks_help) else {
        eprintln!("{}", usage(program));
        return if asks_help { ExitCode::SUCCESS } else { ExitCode::from(EXIT_USAGE) };
    };
    let Options { socket, shows_progress, ignores_links, target, files } = options;
    let shows_progress = shows_progress && stderr().is_terminal();
    let job = Job { paths: &files, moves: program.moves, ignores_links, shows_progress };
    match job.run(|service| call(socket, target, service)) {
        Ok(()) => ExitCode::SUCCESS,
        // The program that called has said so.
        Err(filecopy::JobError::Denied) => ExitCode::from(EXIT_REFUSED),
        Err(error) => {
            eprintln!("{}: {error}", program.name);
            ExitCode::from(error.status())
        }
    }
}

/// The program that calls: this one, by another name.
fn call(socket: Option<OsString>, target: OsString, service: &str) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg0(qrexec_client_vm::NAME).arg("--filter-escape-chars-stderr");
    if let Some(socket) = socket {
        command.arg("--agent-socket").arg(socket);
    }
    command.arg("--").arg(target).arg(service);
    command
}

fn usage(program: Program) -> String {
    let Program { name, moves, names_target } = program;
    let target = if names_target { "VM " } else { "" };
    let does = if moves { "Moves" } else { "Copies" };
    let whom = if names_target { "VM" } else { "the qube that you are asked for" };
    format!(
        "usage: {name} [--without-progress] [--ignore-symlinks] {target}FILE...\n\
         {does} files and folders to {whom}, into ~/QubesIncoming and the name of this qube there."
    )
}

fn parse(program: Program, args: Vec<OsString>) -> Option<Options> {
    let (mut socket, mut shows_progress, mut ignores_links) = (None, true, false);
    let mut words = args.into_iter().peekable();
    while let Some(option) = words.next_if(|word| word.to_str().is_some_and(|word| word.starts_with('-'))) {
        match option.to_str()? {
            "--" => break,
            "--without-progress" => shows_progress = false,
            "--ignore-symlinks" => ignores_links = true,
            option => socket = Some(option.strip_prefix("--agent-socket=")?.into()),
        }
    }
    let target = if program.names_target { words.next()? } else { ASK.into() };
    let files: Vec<PathBuf> = words.map(PathBuf::from).collect();
    (!files.is_empty()).then_some(Options { socket, shows_progress, ignores_links, target, files })
}
