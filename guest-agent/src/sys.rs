//! The agent's only unsafe code: the system calls that no crate wraps safely, each as a safe function.
//!
//! Invariants: between `clone3` and `execve` the child makes system calls and nothing else: no allocation, no lock, no libc function
//! with state; everything it needs was prepared before. A `Launch` owns what its pointers point into.
//!
//! The child shares the agent's memory and the agent waits until it has become the command, as with vfork: an emulated guest pays for each
//! piece of code it runs for the first time, and copying an address space to tear the copy down again is a twentieth of what a
//! launch runs (counted in QEMU's translation blocks). `posix_spawn` does the same, but can't put the child in a cgroup.

use std::ffi::{c_char, c_int, c_ulong, CString};
use std::fs::File;
use std::io;
use std::mem::{size_of, MaybeUninit};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
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

/// A NULL-ended array of C strings, as `execve` takes it.
pub struct CStrings {
    pointers: Vec<*const c_char>,
    _strings: Vec<CString>,
}

impl CStrings {
    /// Takes the strings over. A string with a NUL inside is cut there; validated input has none.
    pub fn new(strings: impl IntoIterator<Item = Vec<u8>>) -> Self {
        let strings: Vec<CString> = strings.into_iter().map(c_string).collect();
        let pointers = strings.iter().map(|string| string.as_ptr()).chain([ptr::null()]).collect();
        Self { pointers, _strings: strings }
    }
}

/// The bytes up to the first NUL.
pub fn c_string(mut bytes: Vec<u8>) -> CString {
    bytes.truncate(bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len()));
    CString::new(bytes).unwrap_or_default()
}

/// Everything a child needs until it has become the command.
pub struct Launch<'a> {
    /// Paths to try, in order.
    pub candidates: Vec<CString>,
    /// Arguments.
    pub argv: CStrings,
    /// Environment.
    pub env: CStrings,
    /// Folders to try, in order.
    pub folders: Vec<CString>,
    /// (uid, gid, groups) to become; `None` stays.
    pub become_user: Option<(u32, u32, Vec<u32>)>,
    /// Stdin, stdout, stderr.
    pub stdio: [BorrowedFd<'a>; 3],
    /// A descriptor that stays open in the command.
    pub keep: Option<BorrowedFd<'a>>,
    /// Whether it must give up the agent's protection from the OOM killer.
    pub resets_oom: bool,
    /// The cgroup to be born in.
    pub cgroup: Option<BorrowedFd<'a>>,
}

/// Why there is no command.
#[derive(Debug)]
pub enum LaunchError {
    /// There is no such command, or none that can be executed.
    Exec(io::Error),
    /// This step before it failed.
    Step(&'static str, io::Error),
}

/// Starts the command; when this returns it runs. Gives its process number and a descriptor of it.
pub fn launch(launch: &Launch<'_>) -> Result<(i32, OwnedFd), LaunchError> {
    let mut pidfd: c_int = -1;
    let mut stack = MaybeUninit::<ChildStack>::uninit();
    let mut child = Child { launch, failed: None };
    // SAFETY: `clone_args` is a plain struct of integers, for which zero means "not asked for".
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = (libc::CLONE_PIDFD | libc::CLONE_VM | libc::CLONE_VFORK) as u64;
    args.pidfd = ptr::from_mut(&mut pidfd) as u64;
    args.exit_signal = libc::SIGCHLD as u64;
    args.stack = stack.as_mut_ptr() as u64;
    args.stack_size = STACK_BYTES as u64;
    if let Some(cgroup) = launch.cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = cgroup.as_raw_fd() as u64;
    }
    let result: i64;
    // SAFETY: the child shares this memory, and this thread is suspended until the child has called execve or _exit, so `args`,
    // `child` and `stack` outlive its use of them and nobody else uses them meanwhile. It starts right after the system call with
    // rsp at the 16-aligned end of `stack`, where the call pushes a return address as the ABI wants it; `run_child` never returns.
    // The parent comes back with all registers but rax, rcx and r11 as they were.
    unsafe {
        std::arch::asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, r12",
            "call r13",
            "ud2",
            "2:",
            inlateout("rax") libc::SYS_clone3 => result,
            in("rdi") ptr::from_mut(&mut args),
            in("rsi") size_of::<libc::clone_args>(),
            in("r12") ptr::from_mut(&mut child),
            in("r13") run_child as unsafe extern "C" fn(*mut Child<'_>) -> !,
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    if result < 0 {
        return Err(LaunchError::Step("clone3", io::Error::from_raw_os_error(-result as i32)));
    }
    let pid = result as i32;
    // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    // SAFETY: `failed` may have been written behind the compiler's back; `child` is alive and no longer shared.
    match unsafe { ptr::read_volatile(&child.failed) } {
        None => Ok((pid, pidfd)),
        Some((step, errno)) => {
            // SAFETY: the child has called _exit, so this waits for nothing but its last few instructions.
            unsafe { libc::waitpid(pid, ptr::null_mut(), 0) };
            let error = io::Error::from_raw_os_error(errno);
            Err(if step == EXEC { LaunchError::Exec(error) } else { LaunchError::Step(step, error) })
        }
    }
}

const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
const EXEC: &str = "execve";
/// The child's frames are small: a few system calls deep.
const STACK_BYTES: usize = 16 << 10;

#[repr(C, align(16))]
struct ChildStack(#[allow(dead_code)] [u8; STACK_BYTES]);

struct Child<'a> {
    launch: &'a Launch<'a>,
    failed: Option<(&'static str, i32)>,
}

/// # Safety
/// Only as the first function of a child of [`launch`], with its `Child`.
unsafe extern "C" fn run_child(child: *mut Child<'_>) -> ! {
    // SAFETY: the parent is suspended, so this is the only reference. All pointers below point into `launch`, whose strings end with NUL
    // and whose arrays end with NULL; the calls are raw system calls or thin wrappers of one, and those that change ids are
    // raw because libc's would change the parent's idea of its threads. _exit runs no handlers of the parent's.
    unsafe {
        let child = &mut *child;
        let step = become_command(child.launch);
        ptr::write_volatile(&mut child.failed, Some((step, *libc::__errno_location())));
        libc::_exit(127)
    }
}

/// Becomes the command, or returns the step that failed, with errno set.
///
/// # Safety
/// Only in a child of [`launch`].
unsafe fn become_command(launch: &Launch<'_>) -> &'static str {
    // SAFETY: see `run_child`.
    unsafe {
        if libc::setsid() == -1 {
            return "setsid";
        }
        for (target, source) in launch.stdio.iter().enumerate() {
            if libc::dup2(source.as_raw_fd(), target as c_int) == -1 {
                return "dup2";
            }
        }
        libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC);
        if let Some(keep) = launch.keep {
            libc::fcntl(keep.as_raw_fd(), libc::F_SETFD, 0);
        }
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        libc::umask(0o022);
        if launch.resets_oom {
            // Before the ids change: afterwards the file is root's.
            let adjust = libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
            libc::write(adjust, c"0".as_ptr().cast(), 1);
        }
        if let Some((uid, gid, groups)) = &launch.become_user {
            if libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) == -1 {
                return "setgroups";
            }
            if libc::syscall(libc::SYS_setresgid, *gid, *gid, *gid) == -1 {
                return "setgid";
            }
            if libc::syscall(libc::SYS_setresuid, *uid, *uid, *uid) == -1 {
                return "setuid";
            }
        }
        if !launch.folders.iter().any(|folder| libc::chdir(folder.as_ptr()) == 0) {
            return "chdir";
        }
        let mut denied = false;
        for candidate in &launch.candidates {
            libc::execve(candidate.as_ptr(), launch.argv.pointers.as_ptr(), launch.env.pointers.as_ptr());
            match *libc::__errno_location() {
                libc::ENOENT | libc::ENOTDIR => {}
                libc::EACCES => denied = true,
                _ => return EXEC,
            }
        }
        if denied {
            *libc::__errno_location() = libc::EACCES;
        }
        EXEC
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
