//! The caller's side of a call: it asks the agent, then carries the bytes between the agent's pipes and its own streams, or leaves them to
//! a program of the caller's.
//!
//! Invariant: the call lives as long as this process: its end hangs up at the agent, which has the service ended.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, stderr, stdin, stdout, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;

use qrexec::service::{EXIT_PROBLEM, EXIT_REFUSED};
use qrexec::Call;
use rustix::net::{self, AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType};

use super::filter;
use crate::calls::message::Answer;
use crate::failure::{Failure, Step};

/// What a shell says of a program that a closed pipe has ended.
const EXIT_PIPE: u8 = 128 + libc::SIGPIPE as u8;

/// How a call is carried.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Carriage {
    /// Whether stdout is filtered; `None`: if it is a terminal.
    pub filter_stdout: Option<bool>,
    /// The same for stderr.
    pub filter_stderr: Option<bool>,
    /// Bytes that go to the service before all else.
    pub prefix: Vec<u8>,
    /// A program that has the service's stdout as its stdin, and the other way around; and its arguments.
    pub local: Option<(OsString, Vec<OsString>)>,
}

/// The service's ends.
struct Streams {
    stdin: OwnedFd,
    stdout: OwnedFd,
    stderr: OwnedFd,
}

/// Makes the call. The status is the service's or the local program's; what went wrong is said on stderr in the name of `tool`.
pub fn call(tool: &str, socket: &Path, call: &Call, carriage: Carriage) -> u8 {
    match try_call(socket, call, carriage) {
        Ok(Answer::Exited(status)) => status,
        Ok(Answer::Refused) => {
            eprintln!("Request refused");
            EXIT_REFUSED
        }
        Ok(Answer::Problem(reason)) => {
            eprintln!("{tool}: the agent cannot make the call: {reason}");
            EXIT_PROBLEM
        }
        Ok(Answer::Accepted) => EXIT_PROBLEM,
        Err(failure) => {
            eprintln!("{tool}: {failure}");
            EXIT_PROBLEM
        }
    }
}

fn try_call(path: &Path, call: &Call, carriage: Carriage) -> Result<Answer, Failure> {
    let socket = connect(path).step(|| format!("reach this qube's agent at {}", path.display()))?;
    net::send(&socket, &call.encode(), SendFlags::NOSIGNAL).step(|| "ask this qube's agent")?;
    let (answer, fds) = hear(&socket)?;
    if answer != Answer::Accepted {
        return Ok(answer);
    }
    let Ok([stdin, stdout, stderr]) = <[OwnedFd; 3]>::try_from(fds) else {
        return Err(Failure::ours("begin the call", libc::EPROTO, "the agent sent no streams"));
    };
    let streams = Streams { stdin, stdout, stderr };
    match carriage.local {
        Some((program, arguments)) => {
            lend(&socket, streams, &program, &arguments, carriage.filter_stderr, &carriage.prefix)
        }
        None => carry(&socket, streams, carriage),
    }
}

/// Between the service's streams and this process's own. Stdin may have more to come when the service ends: nobody waits for it.
fn carry(socket: &OwnedFd, streams: Streams, carriage: Carriage) -> Result<Answer, Failure> {
    let Streams { stdin: service_stdin, stdout: service_stdout, stderr: service_stderr } = streams;
    thread::spawn(move || {
        let mut service_stdin = File::from(service_stdin);
        // A service that reads no more is not the caller's trouble.
        let _ = service_stdin.write_all(&carriage.prefix);
        let _ = filter::copy(stdin().lock(), service_stdin, false);
    });
    let complain = complain(service_stderr, carriage.filter_stderr);
    let filtered = filter::wanted(carriage.filter_stdout, &stdout());
    match filter::copy(File::from(service_stdout), stdout().lock(), filtered) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(Answer::Exited(EXIT_PIPE)),
        copied => copied.step(|| "write to stdout")?,
    }
    close_stdout().step(|| "close stdout")?;
    let _ = complain.join();
    hear(socket).map(|(answer, _)| answer)
}

/// The service has ended its stdout, and whoever reads ours is to see that now: it may be what the service waits for.
fn close_stdout() -> io::Result<()> {
    let nowhere = File::options().write(true).open("/dev/null")?;
    nix::unistd::dup2(nowhere.as_raw_fd(), libc::STDOUT_FILENO)?;
    Ok(())
}

/// Leaves the service's streams to a program; whoever calls learns how that one ended, as with Qubes.
fn lend(
    socket: &OwnedFd,
    streams: Streams,
    program: &OsStr,
    arguments: &[OsString],
    filter_stderr: Option<bool>,
    prefix: &[u8],
) -> Result<Answer, Failure> {
    let mut service_stdin = File::from(streams.stdin);
    service_stdin.write_all(prefix).step(|| "write to the service")?;
    let mut child = start(program, arguments, service_stdin, streams.stdout)?;
    let _ = complain(streams.stderr, filter_stderr).join();
    let heard = hear(socket);
    let status = child.wait().step(|| "wait for the local program")?;
    heard?;
    let signalled = || status.signal().map_or(EXIT_PROBLEM, |signal| 128u8.saturating_add(signal as u8));
    Ok(Answer::Exited(status.code().map_or_else(signalled, |code| code as u8)))
}

/// The caller's own stdin and stdout stay open in the program, whose environment tells where, as with Qubes.
fn start(
    program: &OsStr,
    arguments: &[OsString],
    service_stdin: File,
    service_stdout: OwnedFd,
) -> Result<Child, Failure> {
    let mut command = Command::new(program);
    command.arg0(Path::new(program).file_name().unwrap_or(program)).args(arguments);
    command.stdin(Stdio::from(service_stdout)).stdout(Stdio::from(service_stdin));
    let keeps_stderr = std::env::var_os("PASS_LOCAL_STDERR").is_some();
    for fd in [0, 1, 2].into_iter().filter(|fd| *fd != 2 || keeps_stderr) {
        if let Ok(copy) = nix::unistd::dup(fd) {
            command.env(format!("SAVED_FD_{fd}"), copy.to_string());
        }
    }
    // With `command` go this process's copies of the service's ends.
    command.spawn().step(|| format!("run {}", program.to_string_lossy()))
}

/// Copies the service's stderr beside all else.
fn complain(service_stderr: OwnedFd, filter: Option<bool>) -> thread::JoinHandle<io::Result<()>> {
    let filtered = filter::wanted(filter, &stderr());
    thread::spawn(move || filter::copy(File::from(service_stderr), stderr(), filtered))
}

fn connect(path: &Path) -> io::Result<OwnedFd> {
    let socket = net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

fn hear(socket: &OwnedFd) -> Result<(Answer, Vec<OwnedFd>), Failure> {
    let answer = Answer::receive(socket).step(|| "hear this qube's agent")?;
    answer.ok_or_else(|| Failure::ours("go on with the call", libc::ECONNRESET, "the qube has lost its host"))
}
