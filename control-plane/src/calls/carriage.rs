//! A call's bytes over a vchan, a command's that we serve to the guest, or that of its own call, which it serves: what the process of a caller, or of a service, does while the holder looks on.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use call_channel::{run_client, run_service, Broken, Running, Streams, Watch};
use nix::errno::Errno;
use nix::sys::signal::{killpg, Signal};
use nix::sys::wait::{waitpid, WaitPidFlag};
use nix::unistd::{dup2, getpgrp};
use vchan::devices::gntalloc::Gntalloc;
use vchan::layout::Orders;
use vchan::link::{self, Link, Offer};
use xen_glue::hypercalls::DomId;

use crate::session::Signals;

/// The rings of a call, those that Qubes' agents have: 64 KiB each way.
const ORDERS: Orders = Orders { left: 16, right: 16 };
/// How long a guest may take to begin to speak. A stock agent may wait for the user's session first.
const HELLO_LIMIT: Duration = Duration::from_secs(60);
/// How long the processes of a service may take to end after SIGTERM.
const TERM_LIMIT: Duration = Duration::from_secs(5);

/// Whether this process can serve a vchan: it may grant pages, and there is a device to do it by.
pub fn can_serve() -> bool {
    Gntalloc::open().is_ok()
}

/// Makes pages for a call, and grants them to the guest.
pub fn serve(domain: u16) -> io::Result<(Link, Offer)> {
    link::serve(domain, ORDERS)
}

/// Waits for what a guest serves at a port, and connects to it. Ends when `until` becomes readable.
pub fn meet((domain, port): (u16, u16), until: BorrowedFd<'_>) -> io::Result<Link> {
    xen_glue::calls::meet(DomId(domain), port, until, Instant::now() + HELLO_LIMIT)
}

/// Carries a caller's streams: the command's status. Ends when `holder` hangs up, which it does with the guest.
pub fn call(link: Link, fds: [BorrowedFd<'_>; 3], holder: BorrowedFd<'_>) -> Result<u8, Broken> {
    let streams = Streams::of_client(fds).map_err(Broken::Wait)?;
    let watch = Watch { until: Some(holder), hello_by: Some(Instant::now() + HELLO_LIMIT) };
    // As with a process, the low byte counts.
    run_client(link, streams, watch).map(|code| code as u8)
}

/// Runs a service's program once the guest is there, or says the status in place of one, and carries its streams. Its processes are ours, of
/// our group, and end with the call: when a signal ends us, too.
pub fn answer(link: Link, program: Result<Command, u8>, signals: &Signals) -> Result<u8, Broken> {
    let start = || match program {
        Ok(program) => start(program, signals).map_err(|_| i32::from(qrexec::service::EXIT_PROBLEM)),
        Err(status) => Err(i32::from(status)),
    };
    let watch = Watch { until: Some(signals.as_fd()), hello_by: Some(Instant::now() + HELLO_LIMIT) };
    let ended = run_service(link, start, watch).map(|code| code as u8);
    if ended.is_err() {
        end_group();
    }
    ended
}

/// What the program's errors go to is the program's to say, or else our own stderr: so that is the call's while it starts.
fn start(mut program: Command, signals: &Signals) -> io::Result<Running> {
    let (errors, writer) = io::pipe()?;
    let nothing = std::fs::File::open("/dev/null")?;
    let stderr = io::stderr().as_raw_fd();
    dup2(writer.as_raw_fd(), stderr)?;
    drop(writer);
    program.stdin(Stdio::piped()).stdout(Stdio::piped());
    let child: io::Result<Child> = signals.lifted(|| program.spawn());
    dup2(nothing.as_raw_fd(), stderr)?;
    let mut running = Running::of(child?)?;
    running.streams.stderr = Some(call_channel::port::Port::own(errors.into())?);
    Ok(running)
}

/// Ends what is of our group, which is the call's alone.
fn end_group() {
    // It reaches us as well, but is blocked.
    let _ = killpg(getpgrp(), Signal::SIGTERM);
    let deadline = Instant::now() + TERM_LIMIT;
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Err(Errno::ECHILD) => return,
            _ if Instant::now() >= deadline => break,
            _ => std::thread::sleep(Duration::from_millis(5)),
        }
    }
    let _ = killpg(getpgrp(), Signal::SIGKILL);
}
