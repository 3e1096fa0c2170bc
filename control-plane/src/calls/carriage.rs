//! A call's bytes over a vchan: a command's, which we serve to the guest, or that of the guest's own call, which it serves. What the process of a
//! caller, or of a service, does while the holder looks on.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use call_channel::{run_client, run_service, Broken, Running, Streams, Watch};
use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::signal::{killpg, Signal};
use nix::sys::wait::{waitpid, WaitPidFlag};
use nix::unistd::getpgrp;
use qrexec::service::{EXIT_PROBLEM, EXIT_REFUSED};
use rustix::io::{fcntl_setfd, FdFlags};
use vchan::devices::gntalloc::Gntalloc;
use vchan::layout::Orders;
use vchan::link::{self, Link, Offer};
use xen_glue::hypercalls::DomId;

use super::verdict::{self, Teller, Verdict};
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

/// Carries a caller's streams: the command's status. Ends when `holder` hangs up, which it does with the guest, and with [`Broken::NotMet`] when it says
/// that the guest does not come.
pub fn call(link: Link, fds: [BorrowedFd<'_>; 3], holder: BorrowedFd<'_>) -> Result<u8, Broken> {
    let streams = Streams::of_client(fds).map_err(Broken::Wait)?;
    let watch = Watch { broker: Some(holder), hello_by: Some(Instant::now() + HELLO_LIMIT), until: None };
    // As with a process, the low byte counts.
    run_client(link, streams, watch).map(|code| code as u8)
}

/// Carries a call of the guest's: `program` is to be a `qrexec-policy-exec` that has the call's streams as its own. What it decides is passed on,
/// and the guest, if it may call, serves the vchan at `place`. The program's processes are of our group, and end with the call, or with us: the
/// status is its.
pub fn answer(place: (u16, u16), mut program: Command, teller: &mut Teller) -> io::Result<u8> {
    let signals = Signals::block()?;
    let (decided, tell) = io::pipe()?;
    fcntl_setfd(&tell, FdFlags::empty())?;
    program.env(verdict::VARIABLE, tell.as_raw_fd().to_string());
    program.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = program.spawn()?;
    drop(tell);
    if is_told_to_end(&signals, decided.as_fd())? {
        end_group();
        return Ok(EXIT_PROBLEM);
    }
    let (verdict, why) = verdict::read(decided.into());
    if verdict == Verdict::Refused {
        teller.tell(false, &why);
        child.wait()?;
        return Ok(EXIT_REFUSED);
    }
    let carried = Running::of(child).ok().filter(|_| teller.tell(true, &why)).and_then(|running| {
        let link = meet(place, signals.as_fd()).ok()?;
        let hello_by = Some(Instant::now() + HELLO_LIMIT);
        let watch = Watch { until: Some(signals.as_fd()), hello_by, broker: None };
        run_service(link, || Ok(running), watch).ok()
    });
    if carried.is_none() {
        end_group();
    }
    Ok(carried.map_or(EXIT_PROBLEM, |code| code as u8))
}

/// Waits for what is decided, which may be a long time: somebody may be asked. `true`: a signal came first.
fn is_told_to_end(signals: &Signals, decided: BorrowedFd<'_>) -> io::Result<bool> {
    let mut polled =
        [PollFd::new(signals.as_fd(), PollFlags::POLLIN), PollFd::new(decided, PollFlags::POLLIN)];
    while let Err(errno) = poll(&mut polled, PollTimeout::NONE) {
        if errno != Errno::EINTR {
            return Err(errno.into());
        }
    }
    Ok(polled.first().and_then(|slot| slot.any()).unwrap_or(true))
}

/// Ends what is of our group, which is the call's alone.
fn end_group() {
    // It reaches us as well, but is blocked.
    let _ = killpg(getpgrp(), Signal::SIGTERM);
    let deadline = Instant::now() + TERM_LIMIT;
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            // Grandchildren may be there yet.
            Err(Errno::ECHILD) => break,
            _ if Instant::now() >= deadline => break,
            _ => std::thread::sleep(Duration::from_millis(5)),
        }
    }
    let _ = killpg(getpgrp(), Signal::SIGKILL);
}
