//! What needs `unsafe`: the child's last steps before it becomes QEMU, and the descriptor answered to it.
//!
//! Everything here is called with plain values prepared beforehand; no decision is taken in this file.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::poll::{poll, PollFd, PollFlags, PollTimeout};

/// The niceness of a clone that nobody waits for yet: it gets a tenth of the time of one that somebody waits for.
const BACKGROUND_NICE: i32 = 10;

/// What the child does to itself between fork and exec, in this order.
pub struct ChildPlan {
    /// Descriptors that stay open under their own numbers.
    pub inherit: Vec<RawFd>,
    /// The uid and gid to become, and the one further group (that of /dev/kvm), when the launcher is root.
    pub become_user: Option<(u32, Option<u32>)>,
    /// A Landlock rule set that forbids writing to files.
    pub landlock: Option<OwnedFd>,
    /// Where to send the listener of the filter that catches the opening of guest memory; see [`answer_open`].
    pub catch_open: Option<OwnedFd>,
    /// Whether it runs below foreground priority.
    pub background: bool,
    /// Whether it keeps, of root's capabilities, the one to lock memory.
    pub keep_ipc_lock: bool,
}

/// Adds `plan` to a command.
pub fn plan_child(command: &mut Command, plan: ChildPlan) {
    let parent = std::process::id();
    // SAFETY: the closure runs in the forked child of a process that may have other threads, so it must be
    // async-signal-safe: it allocates nothing and takes no lock, it makes system calls on values prepared above.
    // `open` and `write` on /proc/self/coredump_filter use a static path and a stack buffer.
    unsafe {
        command.pre_exec(move || prepare_child(&plan, parent));
    }
}

/// Runs in the child. Must be async-signal-safe.
fn prepare_child(plan: &ChildPlan, parent: u32) -> io::Result<()> {
    // SAFETY: all calls below are system calls on integers and on pointers to live locals or static strings; none keeps
    // a pointer after it returns.
    unsafe {
        for fd in &plan.inherit {
            check(libc::fcntl(*fd, libc::F_SETFD, 0))?;
        }
        forbid_core_dump()?;
        // A write past a size limit shall be an error to report, not a signal that kills.
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
        // Its own process group: a terminal's Ctrl-C goes to the launcher, which ends QEMU in order.
        check(libc::setpgid(0, 0))?;
        // Should the host run out of memory all the same, a clone goes before anything else does.
        write_file(c"/proc/self/oom_score_adj", c"1000")?;
        if plan.background {
            check(libc::setpriority(libc::PRIO_PROCESS, 0, BACKGROUND_NICE))?;
        }
        if plan.keep_ipc_lock {
            check(libc::prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0))?;
        }
        if let Some((id, group)) = plan.become_user {
            let groups = [group.unwrap_or(id)];
            check(libc::setgroups(1, groups.as_ptr()))?;
            check(libc::setresgid(id, id, id))?;
            check(libc::setresuid(id, id, id))?;
        }
        if plan.keep_ipc_lock {
            keep_only_ipc_lock()?;
        }
        // After setresuid, which clears it; then look whether the parent went away before it was set.
        check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))?;
        if libc::getppid() as u32 != parent {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        check(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
        if let Some(rules) = &plan.landlock {
            check(libc::syscall(libc::SYS_landlock_restrict_self, rules.as_raw_fd(), 0) as i32)?;
        }
        if let Some(socket) = &plan.catch_open {
            send_listener(socket.as_raw_fd())?;
        }
    }
    Ok(())
}

/// Drops all capabilities but CAP_IPC_LOCK, which the program to be executed gets, too. After a change of uid, for which
/// PR_SET_KEEPCAPS must have been set.
///
/// # Safety
/// Async-signal-safe: system calls on stack values only.
unsafe fn keep_only_ipc_lock() -> io::Result<()> {
    // linux/capability.h; not in libc.
    const CAPABILITY_VERSION_3: u32 = 0x2008_0522;
    const CAP_IPC_LOCK: libc::c_ulong = 14;
    let header = [CAPABILITY_VERSION_3, 0];
    // Two halves of effective, permitted, inheritable.
    let sets = [1u32 << CAP_IPC_LOCK, 1 << CAP_IPC_LOCK, 1 << CAP_IPC_LOCK, 0, 0, 0];
    // SAFETY: `header` and `sets` are live locals laid out as the kernel's structs, of which version 3 takes two.
    check(unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr()) } as i32)?;
    // SAFETY: integers only.
    check(unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE, CAP_IPC_LOCK, 0, 0) })?;
    Ok(())
}

/// No core file, no core pipe, and no guest memory in either.
///
/// # Safety
/// Async-signal-safe: system calls on stack values only.
unsafe fn forbid_core_dump() -> io::Result<()> {
    // A limit of 1 forbids a file (too small) and, by the kernel's own convention (fs/coredump.c), a pipe as well.
    let limit = libc::rlimit { rlim_cur: 1, rlim_max: 1 };
    // SAFETY: `limit` is a live local.
    check(unsafe { libc::setrlimit(libc::RLIMIT_CORE, &limit) })?;
    // SAFETY: as this function's.
    unsafe { write_file(c"/proc/self/coredump_filter", c"0") }
}

/// Writes a text to a file of the kernel's.
///
/// # Safety
/// Async-signal-safe: system calls on static strings only.
unsafe fn write_file(path: &'static CStr, text: &'static CStr) -> io::Result<()> {
    // SAFETY: a static NUL-terminated path; the descriptor is closed below.
    let fd = check(unsafe { libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC) })?;
    let length = text.count_bytes();
    // SAFETY: `length` bytes of a static string; `fd` is open and ours.
    let written = unsafe { libc::write(fd, text.as_ptr().cast(), length) };
    let result = check(written as i32);
    // SAFETY: `fd` is ours and not used again.
    unsafe { libc::close(fd) };
    result.map(drop)
}

/// Installs a filter that hands every `openat(…, O_RDWR)` (these flags and no other) to a listener, and sends the
/// listener's descriptor over `socket`.
///
/// QEMU before 8.2 opens a memory backend's file for writing even where it maps it privately, and does so with a plain
/// `open(path, O_RDWR)`; everything else it opens goes through a helper that adds O_CLOEXEC.
///
/// # Safety
/// Async-signal-safe: system calls on stack values only. `socket` must be an open socket.
unsafe fn send_listener(socket: RawFd) -> io::Result<()> {
    const fn statement(code: u32, k: u32) -> libc::sock_filter {
        libc::sock_filter { code: code as u16, jt: 0, jf: 0, k }
    }
    const fn unless_equal(k: u32, skip: u8) -> libc::sock_filter {
        libc::sock_filter { code: (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16, jt: 0, jf: skip, k }
    }
    const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    const RETURN: u32 = libc::BPF_RET | libc::BPF_K;
    const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
    // Offsets in struct seccomp_data: nr 0, arch 4, args from 16, 8 bytes each, low half first.
    let mut filter = [
        statement(LOAD, 4),
        unless_equal(AUDIT_ARCH_X86_64, 5),
        statement(LOAD, 0),
        unless_equal(libc::SYS_openat as u32, 3),
        statement(LOAD, 16 + 2 * 8),
        unless_equal(libc::O_RDWR as u32, 1),
        statement(RETURN, libc::SECCOMP_RET_USER_NOTIF),
        statement(RETURN, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: `program` and the filter it points to are live locals; the kernel copies them.
    let listener = check(unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
            &program,
        )
    } as i32)?;

    let mut byte = [0u8; 1];
    let mut slice = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 };
    // Room for one control message with one descriptor: CMSG_SPACE(4) is 24 on x86-64, aligned as u64s.
    let mut control = [0u64; 3];
    // SAFETY: an all-zero msghdr is valid; the pointers set are to live locals of the stated lengths; CMSG_FIRSTHDR
    // points into `control`, which is large enough and aligned for one header and one int.
    unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &mut slice;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = libc::CMSG_SPACE(size_of::<RawFd>() as u32) as usize;
        let header = libc::CMSG_FIRSTHDR(&message);
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(size_of::<RawFd>() as u32) as usize;
        libc::CMSG_DATA(header).cast::<RawFd>().write_unaligned(listener);
        check(libc::sendmsg(socket, &message, 0) as i32)?;
        libc::close(listener);
    }
    Ok(())
}

/// Receives the listener a child sent by `send_listener`.
pub fn receive_listener(socket: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    use nix::sys::socket::{recvmsg, ControlMessageOwned, MsgFlags};
    let mut byte = [0u8; 1];
    let mut slices = [io::IoSliceMut::new(&mut byte)];
    let mut control = nix::cmsg_space!([RawFd; 1]);
    let message =
        recvmsg::<()>(socket.as_raw_fd(), &mut slices, Some(&mut control), MsgFlags::MSG_CMSG_CLOEXEC)?;
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = part {
            if let [fd] = fds[..] {
                // SAFETY: the kernel has just installed this descriptor for us; nobody else owns it.
                return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
            }
        }
    }
    Err(io::Error::other("the child sent no listener"))
}

/// Waits for the caught `open` and answers it with a duplicate of `file`, opened read-only here. Every further such
/// call of the child fails with ENOSYS once the listener is dropped, as it is on return.
pub fn answer_open(listener: OwnedFd, file: &File, limit: Duration) -> io::Result<()> {
    if !wait_readable(listener.as_fd(), Instant::now() + limit)? {
        return Err(io::ErrorKind::TimedOut.into());
    }
    nix::ioctl_readwrite!(receive, b'!', 0, libc::seccomp_notif);
    nix::ioctl_write_ptr!(add_fd, b'!', 3, libc::seccomp_notif_addfd);
    // SAFETY: all-zero is a valid seccomp_notif, and the kernel demands it zeroed.
    let mut notification: libc::seccomp_notif = unsafe { std::mem::zeroed() };
    // SAFETY: `notification` is a live local of the type the request fills.
    unsafe { receive(listener.as_raw_fd(), &mut notification) }?;
    let answer = libc::seccomp_notif_addfd {
        id: notification.id,
        flags: libc::SECCOMP_ADDFD_FLAG_SEND as u32,
        srcfd: file.as_raw_fd() as u32,
        newfd: 0,
        newfd_flags: libc::O_CLOEXEC as u32,
    };
    // SAFETY: `answer` is a live local of the type the request reads; `file` stays open throughout.
    unsafe { add_fd(listener.as_raw_fd(), &answer) }?;
    Ok(())
}

/// Whether `fd` becomes readable (or its other side goes away) before `deadline`.
pub fn wait_readable(fd: BorrowedFd<'_>, deadline: Instant) -> io::Result<bool> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        // Rounded up, so that the last millisecond is not spent spinning.
        let timeout = PollTimeout::try_from(left.as_micros().div_ceil(1000)).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], timeout) {
            Ok(0) if Instant::now() >= deadline => return Ok(false),
            Ok(0) | Err(nix::errno::Errno::EINTR) => continue,
            Ok(_) => return Ok(true),
            Err(error) => return Err(error.into()),
        }
    }
}

/// A tap interface's descriptor (linux/if_tun.h): the interface must exist and be ours to use.
pub fn open_tap(name: &str) -> io::Result<OwnedFd> {
    nix::ioctl_write_int!(set_interface, b'T', 202);
    let tun = File::options().read(true).write(true).open("/dev/net/tun")?;
    // struct ifreq is 40 bytes: a name of 16, NUL-padded, then a union of which the flags are the first two bytes.
    let mut request = [0u8; 40];
    if name.is_empty() || name.len() > 15 {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("no interface name: {name:?}")));
    }
    request[..name.len()].copy_from_slice(name.as_bytes());
    let flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as u16;
    request[16..18].copy_from_slice(&flags.to_ne_bytes());
    // SAFETY: TUNSETIFF reads and writes an ifreq, for which `request` has the size; it outlives the call.
    unsafe { set_interface(tun.as_raw_fd(), request.as_mut_ptr() as libc::c_ulong) }?;
    Ok(tun.into())
}

fn check(result: i32) -> io::Result<i32> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}
