//! `qrexec-client`: a command or service in a qube that runs, or in a fresh disposable, with the options of Qubes' own.
//!
//! Options and meaning as in QubesOS/qubes-core-qrexec, daemon/qrexec-client.c (R4.1 to R4.3). The streams go straight to who holds the
//! qube; only what is to be filtered passes through here.

use std::fs::File;
use std::io::{self, pipe, PipeReader, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::Duration;

use std::ffi::OsString;

use clap::Parser;
use control_plane::calls::{client, programs, ready, service, system_log};
use control_plane::cli::{fail, generate_if_asked, Common};
use control_plane::error::{Error, Kind, Result};
use control_plane::output::error_text;
use control_plane::state::State;
use qrexec::service as text;
use qrexec::service::CommandLine;
use rustix::net::SocketType;

/// What Qubes' own says of a wrong command line, and of a standard input that is no socket.
const EXIT_USAGE: u8 = 1;
const EXIT_NO_SOCKET: u8 = 2;
/// Where a qube is ended.
const API_SOCKET: &str = "/var/run/qubesd.sock";

/// Runs a command or a service in a qube.
///
/// Exit status: the command's; 1 for a wrong command line, 125 when the call failed, 126 when it was refused, 127 when there is no such command or service in
/// the qube.
#[derive(Parser)]
#[command(name = "qrexec-client", version)]
struct Options {
    #[command(flatten)]
    common: Common,
    /// The qube: one that runs, @dispvm or @dispvm:NAME
    #[arg(short = 'd', value_name = "QUBE")]
    domain: String,
    /// Connect the command to this command line of dom0 instead of standard input and output
    #[arg(short = 'l', value_name = "COMMAND", conflicts_with_all = ["exit_at_once", "request", "one_socket"])]
    local: Option<OsString>,
    /// Exit as soon as the command is started; it has no input, and its output is not heard
    #[arg(short = 'e', conflicts_with = "request")]
    exit_at_once: bool,
    /// Exit with 0 whatever the command's status, unless the call failed
    #[arg(short = 'E', long = "no-exit-code")]
    any_status: bool,
    /// Replace all of the command's output but printable ASCII and blanks by `_`
    #[arg(short = 't')]
    filter_stdout: bool,
    /// The same for its standard error
    #[arg(short = 'T')]
    filter_stderr: bool,
    /// Seconds to wait for a qube that is paused, or whose holder does not answer; 0 for as long as it takes
    #[arg(short = 'w', value_name = "SECONDS", default_value_t = 5)]
    limit: u32,
    /// Wait for the end of the call, as is done anyway
    #[arg(short = 'W')]
    _wait: bool,
    /// Kill the qube afterwards, as is done with a disposable of our own anyway
    #[arg(short = 'k')]
    kill: bool,
    /// Refused: qubes' calls are answered by who holds them, not by this program
    #[arg(short = 'c', value_name = "REQUEST,SOURCE,DOMAIN")]
    request: Option<OsString>,
    /// Refused: calls go by the state folder's sockets, see --root
    #[arg(long, value_name = "DIR")]
    socket_dir: Option<PathBuf>,
    /// Use standard input, which must be a socket, for output as well
    #[arg(long = "use-stdin-socket")]
    one_socket: bool,
    /// Say what there is to say in the system's log, not on standard error, which is the command's alone then
    #[arg(long)]
    quiet: bool,
    /// USER:COMMAND, or USER:QUBESRPC SERVICE[+ARG] SOURCE; USER is DEFAULT, user or root
    #[arg(value_name = "USER:COMMAND")]
    line: OsString,
}

fn main() -> ExitCode {
    generate_if_asked::<Options>();
    let options = match Options::try_parse() {
        Ok(options) => options,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { EXIT_USAGE } else { 0 });
        }
    };
    match run(&options) {
        Ok(status) => ExitCode::from(if options.any_status { 0 } else { status }),
        Err(error) => {
            let status = match error.kind {
                Kind::Usage => EXIT_USAGE,
                Kind::Refused => text::EXIT_REFUSED,
                _ => text::EXIT_PROBLEM,
            };
            if options.quiet {
                system_log::say_of_call("qrexec-client", &error_text(&error));
                return ExitCode::from(status);
            }
            fail("qrexec-client", &error, status)
        }
    }
}

fn run(options: &Options) -> Result<u8> {
    options.refuse_what_is_not_here()?;
    if options.one_socket && rustix::net::sockopt::socket_type(io::stdin()) != Ok(SocketType::STREAM) {
        eprintln!("qrexec-client: --use-stdin-socket: standard input is no stream socket");
        return Ok(EXIT_NO_SOCKET);
    }
    let state = options.common.state()?;
    let line = CommandLine::parse(options.line.as_bytes()).map_err(|error| {
        Error::new(Kind::Usage, "no command line of qrexec's")
            .because(error)
            .hint("USER:COMMAND, or USER:QUBESRPC SERVICE[+ARG] SOURCE")
    })?;
    let remote = Remote::of(&state, &options.domain, &line, options.quiet)?;
    if let Remote::Running { state, name, .. } = &remote {
        ready::wait(state, name, options.patience())?;
    }
    let kills = options.kill && matches!(remote, Remote::Running { .. });
    let ended = match remote {
        remote if options.exit_at_once => remote.start().map(|()| 0),
        // Then its signals are the launch's.
        Remote::Fresh(mut launch) if options.takes_streams_as_they_are() => {
            Err(Error::failed("run dispvm-launch")(launch.exec()))
        }
        remote => converse(options, remote),
    };
    if kills {
        kill(&options.domain)?;
    }
    ended
}

/// Ends a qube that runs.
fn kill(name: &str) -> Result<()> {
    let named = std::env::var_os("DISPVM_API_SOCKET").filter(|path| !path.is_empty());
    let socket = named.map_or_else(|| API_SOCKET.into(), PathBuf::from);
    let killed = admin_api::client::call(&socket, &admin_api::Request::new("admin.vm.Kill", name));
    killed.map(drop).map_err(|error| {
        Error::new(Kind::Failed, format!("cannot kill {name}"))
            .because(error)
            .hint(format!("`qvm-kill {name}`"))
    })
}

impl Options {
    /// What Qubes' own takes and makes no sense here, with why.
    fn refuse_what_is_not_here(&self) -> Result<()> {
        if self.request.is_some() {
            let why = "-c answers a request that Qubes' own qrexec-daemon has taken, and there is none here";
            return Err(Error::new(Kind::Usage, why)
                .hint("who holds a qube has its calls carried out: qrexec-policy-exec"));
        }
        if self.socket_dir.is_some() {
            return Err(Error::new(
                Kind::Usage,
                "--socket-dir is for sockets of Qubes' own qrexec-daemon, and there are none here",
            )
            .hint("--root DIR names the state folder, where calls/QUBE.sock is"));
        }
        Ok(())
    }

    fn patience(&self) -> Option<Duration> {
        (self.limit > 0).then(|| Duration::from_secs(self.limit.into()))
    }

    fn takes_streams_as_they_are(&self) -> bool {
        self.local.is_none()
            && !self.one_socket
            && !self.filter_stdout
            && !self.filter_stderr
            && !self.any_status
    }
}

/// Where the command runs.
enum Remote<'a> {
    /// In a qube that runs.
    Running { state: &'a State, name: &'a str, line: &'a CommandLine },
    /// In a disposable of its own.
    Fresh(Command),
}

impl<'a> Remote<'a> {
    fn of(state: &'a State, domain: &'a str, line: &'a CommandLine, quiet: bool) -> Result<Remote<'a>> {
        let exec = service::line(line)?;
        let keyword = domain.strip_prefix(['@', '$']);
        match keyword.map(|keyword| keyword.split_once(':').unwrap_or((keyword, ""))) {
            None if domain != "dom0" => Ok(Remote::Running { state, name: domain, line }),
            Some(("dispvm", dvm)) => {
                let mut launch = programs::command("dispvm-launch", state);
                if !dvm.is_empty() {
                    launch.args(["--dvm", dvm]);
                }
                launch.args(["--user", &line.user]).args(quiet.then_some("--quiet"));
                match &line.command {
                    text::Command::Rpc { service, source, .. } => {
                        launch.args(["--source", source.as_str(), "--service", &service.to_string()])
                    }
                    text::Command::Shell(_) => {
                        launch.arg("--").args(exec.argv.iter().map(|word| std::ffi::OsStr::from_bytes(word)))
                    }
                };
                Ok(Remote::Fresh(launch))
            }
            None | Some(("adminvm", "")) => {
                Err(Error::new(Kind::Usage, "dom0 is here").hint("run the command itself"))
            }
            Some(_) => Err(Error::new(Kind::Usage, format!("{domain} is no qube"))
                .hint("the name of one that runs, @dispvm or @dispvm:NAME")),
        }
    }

    /// Starts it, to be left alone.
    fn start(self) -> Result<()> {
        match self {
            Remote::Running { state, name, line } => client::start(state, name, service::line(line)?),
            Remote::Fresh(mut launch) => {
                // A group of its own: what the terminal tells ours is not for it.
                launch.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
                launch.spawn().map(drop).map_err(Error::failed("run dispvm-launch"))
            }
        }
    }

    /// Runs it with these streams to its end.
    fn run(self, fds: [OwnedFd; 3]) -> Result<u8> {
        match self {
            Remote::Running { state, name, line } => {
                let borrowed: [BorrowedFd<'_>; 3] = fds.each_ref().map(AsFd::as_fd);
                client::call_line(state, name, line, borrowed)
            }
            Remote::Fresh(mut launch) => {
                let [stdin, stdout, stderr] = fds;
                launch.stdin(stdin).stdout(stdout).stderr(stderr);
                let child = launch.spawn();
                // What it holds of our streams would keep them open.
                drop(launch);
                let ended = child.and_then(|mut child| child.wait());
                ended.map(status_of).map_err(Error::failed("run dispvm-launch"))
            }
        }
    }
}

/// Connects the command to our own streams, or to a program here, by way of filters where they are wanted.
fn converse(options: &Options, remote: Remote<'_>) -> Result<u8> {
    let step = "connect the command";
    let own = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().map_err(Error::failed(step));
    let mut filters = Vec::new();
    let mut filtered = |wanted: bool, to: OwnedFd| -> Result<OwnedFd> {
        if !wanted {
            return Ok(to);
        }
        let (reader, writer) = pipe().map_err(Error::failed(step))?;
        filters.push(std::thread::spawn(move || filter(reader, to.into())));
        Ok(writer.into())
    };
    let stderr = filtered(options.filter_stderr, own(io::stderr().as_fd())?)?;
    let mut local = None;
    let (stdin, stdout) = match &options.local {
        None if options.one_socket => (own(io::stdin().as_fd())?, own(io::stdin().as_fd())?),
        None => (own(io::stdin().as_fd())?, own(io::stdout().as_fd())?),
        Some(line) => {
            let ((to_local, stdout), (stdin, from_local)) =
                (pipe().map_err(Error::failed(step))?, pipe().map_err(Error::failed(step))?);
            local = Some(start_local(line, to_local.into(), from_local.into())?);
            (stdin.into(), stdout.into())
        }
    };
    let stdout = filtered(options.filter_stdout, stdout)?;
    let ended = remote.run([stdin, stdout, stderr]);
    filters.into_iter().for_each(|filter: JoinHandle<()>| drop(filter.join()));
    if let Some(mut local) = local {
        let _ = local.wait();
    }
    ended
}

/// The line in a shell: bash, as with Qubes, or what there is.
fn start_local(line: &OsString, stdin: OwnedFd, stdout: OwnedFd) -> Result<Child> {
    let bash = std::path::Path::new("/bin/bash");
    let mut command = Command::new(if bash.exists() { bash } else { "/bin/sh".as_ref() });
    command.arg("-c").arg(line).stdin(stdin).stdout(stdout);
    command.spawn().map_err(Error::failed("run the local command"))
}

/// Passes on what a terminal may see, `_` for all else. A reader that has gone ends it, and by that the command.
fn filter(mut from: PipeReader, mut to: File) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        let Some(piece) = buffer.get_mut(..count) else { return };
        for byte in piece.iter_mut() {
            if !matches!(byte, b' '..=b'~' | b'\t' | b'\n' | b'\r' | 0x08 | 0x07) {
                *byte = b'_';
            }
        }
        if to.write_all(piece).is_err() {
            return;
        }
    }
}

fn status_of(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(text::EXIT_PROBLEM)
}
