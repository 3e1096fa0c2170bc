//! The agent's only unsafe code: the system calls that no crate wraps safely, each as a safe function.
//!
//! Starting commands is a matter of its own: [`spawn`]. What Xen is asked is crate `vchan`'s.

mod spawn;

pub use spawn::{c_string, launch, CStrings, Launch, LaunchError, Zygote};

use std::ffi::{c_int, c_ulong};
use std::fs::File;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use memmap2::{MmapMut, MmapOptions};

/// A slot of poll; a negative `fd` is ignored.
pub type PollSlot = libc::pollfd;

/// A slot that waits for `events` on `fd`, or for nothing.
pub fn slot(fd: Option<BorrowedFd<'_>>, events: i16) -> PollSlot {
    PollSlot { fd: fd.map_or(-1, |fd| fd.as_raw_fd()), events, revents: 0 }
}

/// Waits until a slot is ready or the time is over; `None` waits for ever. An interruption counts as nothing being ready.
pub fn poll(slots: &mut [PollSlot], timeout_ms: Option<u32>) -> io::Result<()> {
    let timeout = timeout_ms.map_or(-1, |ms| c_int::try_from(ms).unwrap_or(c_int::MAX));
    // SAFETY: the pointer and the count describe `slots`, which is borrowed mutably for the whole call.
    let ready = unsafe { libc::poll(slots.as_mut_ptr(), slots.len() as libc::nfds_t, timeout) };
    if ready >= 0 {
        return Ok(());
    }
    slots.iter_mut().for_each(|slot| slot.revents = 0);
    match io::Error::last_os_error() {
        error if error.kind() == io::ErrorKind::Interrupted => Ok(()),
        error => Err(error),
    }
}

/// Gives every signal its default action and unblocks all, so that children start clean. SIGPIPE stays ignored here.
pub fn reset_signals() {
    // SAFETY: SIG_DFL and SIG_IGN are no code of ours; the set is initialised by sigemptyset before its use.
    unsafe {
        for signal in 1..=64 {
            libc::signal(signal, libc::SIG_DFL);
        }
        libc::signal(libc::SIGPIPE, libc::SIG_IGN);
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &none, ptr::null_mut());
    }
}

/// Lets this process run before all others that are ready; what it starts has the usual priority again.
pub fn go_first() -> io::Result<()> {
    let usual = libc::sched_param { sched_priority: 0 };
    let policy = libc::SCHED_OTHER | libc::SCHED_RESET_ON_FORK;
    // SAFETY: the kernel reads one `struct sched_param`, which outlives the call.
    check_errno(unsafe { libc::sched_setscheduler(0, policy, &usual) })?;
    // SAFETY: no memory is involved.
    check_errno(unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, -20) })
}

/// Hands entropy to the kernel's generator, all of it credited.
pub fn add_entropy(random: BorrowedFd<'_>, entropy: &[u8; 64], credit: bool) -> io::Result<()> {
    #[repr(C)]
    struct RandPoolInfo {
        entropy_count: c_int,
        buf_size: c_int,
        buf: [u8; 64],
    }
    let bits = if credit { 512 } else { 0 };
    let info = RandPoolInfo { entropy_count: bits, buf_size: 64, buf: *entropy };
    // SAFETY: RNDADDENTROPY reads two ints and `buf_size` bytes behind them; `info` is exactly that.
    check_errno(unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY as _, &info) })
}

/// Has the kernel's generator take its pool over at once, also for the per-CPU states.
pub fn reseed(random: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: RNDRESEEDCRNG takes no argument.
    check_errno(unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG as _, 0) })
}

const RNDADDENTROPY: c_ulong = 0x4008_5203;
const RNDRESEEDCRNG: c_ulong = 0x5207;

/// `struct ifreq`: a name, and a union that the request gives its meaning.
#[repr(C, align(8))]
pub struct IfRequest {
    /// The interface, padded with NULs.
    pub name: [u8; 16],
    /// Flags, or a socket address.
    pub value: [u8; 24],
}

/// `struct rtentry`, with addresses as bytes of a `sockaddr`.
#[repr(C)]
#[allow(missing_docs)]
pub struct RouteRequest {
    pub pad1: c_ulong,
    pub target: [u8; 16],
    pub gateway: [u8; 16],
    pub mask: [u8; 16],
    pub flags: u16,
    pub pad2: i16,
    pub pad3: c_ulong,
    pub pad4: usize,
    pub metric: i16,
    /// A pointer to the interface's name; filled in by [`route_ioctl`].
    pub device: usize,
    pub mtu: c_ulong,
    pub window: c_ulong,
    pub irtt: u16,
}

const _: () = assert!(size_of::<IfRequest>() == 40 && size_of::<RouteRequest>() == 120);

/// A request about an interface.
pub fn interface_ioctl(socket: BorrowedFd<'_>, request: u32, argument: &mut IfRequest) -> io::Result<()> {
    // SAFETY: all SIOC[GS]IF* requests read and write one `struct ifreq`, which `argument` is in size and alignment.
    check_errno(unsafe { libc::ioctl(socket.as_raw_fd(), request as _, argument) })
}

/// A request about a route, over the interface `device`.
pub fn route_ioctl(
    socket: BorrowedFd<'_>,
    request: u32,
    mut route: RouteRequest,
    device: &[u8; 16],
) -> io::Result<()> {
    route.device = device.as_ptr() as usize;
    // SAFETY: SIOCADDRT reads one `struct rtentry`, which `route` is by layout, and up to 15 bytes of the name, which lives as long.
    check_errno(unsafe { libc::ioctl(socket.as_raw_fd(), request as _, &route) })
}

/// Maps the first `length` bytes of a file, shared, for writing. Legal only while nobody else can truncate the file: a store to a page
/// that is gone would kill the agent.
pub fn map_file(file: &File, length: usize) -> io::Result<MmapMut> {
    // SAFETY: the mapping is only ever stored to; whoever else could change the file is frozen, by this function's contract.
    unsafe { MmapOptions::new().len(length).map_mut(file) }
}

/// Switches the machine off at once. Returns only on failure.
pub fn power_off() -> io::Error {
    // SAFETY: no memory is involved.
    unsafe { libc::reboot(libc::RB_POWER_OFF) };
    io::Error::last_os_error()
}

/// Sends signal `SIGRTMIN + offset` to process 1.
pub fn signal_init(offset: i32) -> io::Result<()> {
    // SAFETY: no memory is involved.
    check_errno(unsafe { libc::kill(1, libc::SIGRTMIN() + offset) })
}

/// Sends `signal` to the process group `pid`, or to the process when it has no group of its own yet.
pub fn signal_group(pid: i32, signal: i32) {
    // SAFETY: no memory is involved; `pid` is a child that has not been reaped, so the number is still its own.
    unsafe {
        if libc::kill(-pid, signal) == -1 {
            libc::kill(pid, signal);
        }
    }
}

/// The wait status of a child that has ended, which is then no more; `None` while it lives.
pub fn reap(pid: i32) -> Option<i32> {
    let mut status = 0;
    // SAFETY: the kernel writes one int to `status`, which outlives the call.
    let reaped = unsafe { libc::waitpid(pid, &mut status, libc::WNOHANG) };
    (reaped == pid).then_some(status)
}

fn check_errno(result: c_int) -> io::Result<()> {
    if result == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
