//! Starting a command: unsafe, and by system calls alone from `clone3` to `execve`.
//!
//! Invariants: between `clone3` and `execve` the child makes system calls and nothing else: no allocation, no lock, no libc function
//! with state; everything it needs was prepared before. A `Launch` owns what its pointers point into.
//!
//! The child shares the agent's memory and the agent waits until it has become the command, as with vfork: an emulated guest pays for each
//! piece of code it runs for the first time, and copying an address space to tear the copy down again is a twentieth of what a
//! launch runs (counted in QEMU's translation blocks). `posix_spawn` does the same, but can't put the child in a cgroup.
//! Before a capture even that is done for the command to come, as far as it goes: see [`Zygote`].

use std::cell::UnsafeCell;
use std::ffi::{c_char, c_int, c_long, c_void, CString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::mem::{size_of, ManuallyDrop, MaybeUninit};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;

use super::{poll, slot};

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
    let mut child = Child { launch, failed: None };
    let mut args = clone_args(libc::CLONE_PIDFD | libc::CLONE_VM | libc::CLONE_VFORK, launch.cgroup);
    args.pidfd = ptr::from_mut(&mut pidfd) as u64;
    let mut stack = MaybeUninit::<ChildStack>::uninit();
    // SAFETY: the child shares this memory, and this thread is suspended until the child has called execve or exit, so `child` and
    // `stack` outlive its use of them and nobody else uses them meanwhile; `run_child` is made for a `Child`.
    let result = unsafe { spawn(args, stack.as_mut_ptr(), run_child, ptr::from_mut(&mut child).cast()) };
    let pid = result.map_err(|error| LaunchError::Step("clone3", error))?;
    // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    // SAFETY: `failed` may have been written behind the compiler's back; `child` is alive and no longer shared.
    match unsafe { ptr::read_volatile(&child.failed) } {
        None => Ok((pid, pidfd)),
        Some(failed) => {
            wait(pid);
            Err(failed.into())
        }
    }
}

/// A child that has come as far as it can without knowing its command: it has its pipes, its session, its user, its cgroup and its
/// folder, and sleeps. Forking and all of this is done before a capture, so that a clone has nothing left to do but execve.
///
/// It shares the agent's memory until then, as a child of [`launch`] does, but beside the running agent. It ends when the agent
/// ends, and is killed when dropped.
pub struct Zygote {
    pid: i32,
    pidfd: OwnedFd,
    /// A byte into it tells that [`Shared`] has the command. (Pipes, because every command's output has their code translated.)
    go: File,
    /// A byte from it tells that the child is ready; its end, that the child has left this memory, by execve or by its end.
    gone: File,
    // Boxed: the child has their addresses.
    shared: Box<Shared>,
    _stack: Box<MaybeUninit<ChildStack>>,
}

/// What agent and zygote tell each other. Never accessed by both at once: a byte in a pipe hands it over.
struct Shared {
    launch: UnsafeCell<*const Launch<'static>>,
    failed: UnsafeCell<Option<Failed>>,
}

struct Conception<'a> {
    newborn: Newborn,
    stack: *mut ChildStack,
    cgroup: Option<BorrowedFd<'a>>,
    resets_oom: bool,
    result: Result<i32, i32>,
}

/// A zygote's argument, at the far end of its own stack.
#[derive(Clone, Copy)]
struct Newborn {
    launch: *const Launch<'static>,
    shared: *const Shared,
    go: c_int,
    gone: c_int,
}

impl Zygote {
    /// Makes one for whatever will be launched with `launch`'s descriptors, user, folder and cgroup.
    pub fn new(launch: &Launch<'_>) -> Result<Self, LaunchError> {
        let pipe = || nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC);
        let pipes = pipe().and_then(|go| Ok((go, pipe()?)));
        let ((go_theirs, go), (gone, gone_theirs)) =
            pipes.map_err(|errno| LaunchError::Step("pipe2", errno.into()))?;
        let shared = Box::new(Shared { launch: UnsafeCell::new(ptr::null()), failed: UnsafeCell::new(None) });
        let mut own_stack = Box::new(MaybeUninit::<ChildStack>::uninit());
        let mut conception = Conception {
            newborn: Newborn {
                launch: ptr::from_ref(launch).cast(),
                shared: &*shared,
                go: go_theirs.as_raw_fd(),
                gone: gone_theirs.as_raw_fd(),
            },
            stack: own_stack.as_mut_ptr(),
            cgroup: launch.cgroup,
            resets_oom: launch.resets_oom,
            result: Err(libc::EIO),
        };
        let mut stack = MaybeUninit::<ChildStack>::uninit();
        let args = clone_args(libc::CLONE_VM | libc::CLONE_VFORK, None);
        // SAFETY: as in `launch`; `conceive` is made for a `Conception`.
        let middle =
            unsafe { spawn(args, stack.as_mut_ptr(), conceive, ptr::from_mut(&mut conception).cast()) };
        wait(middle.map_err(|error| LaunchError::Step("clone3", error))?);
        // SAFETY: written behind the compiler's back; the one who did has ended.
        let pid = unsafe { ptr::read_volatile(&conception.result) };
        let pid = pid.map_err(|errno| LaunchError::Step("clone3", io::Error::from_raw_os_error(errno)))?;
        drop((go_theirs, gone_theirs));
        let mut gone = File::from(gone);
        let ready = gone.read_exact(&mut [0]);
        // SAFETY: no memory is involved; `pid` is our child and has not been reaped.
        let pidfd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        if pidfd < 0 {
            let error = io::Error::last_os_error();
            end(pid);
            return Err(LaunchError::Step("pidfd_open", error));
        }
        // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
        let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd as c_int) };
        let zygote = Self { pid, pidfd, go: go.into(), gone, shared, _stack: own_stack };
        ready.map(|()| zygote).map_err(|error| LaunchError::Step("prepare a process", error))
    }

    /// Whether it still waits.
    pub fn is_alive(&self) -> bool {
        let mut slots = [slot(Some(self.gone.as_fd()), libc::POLLIN)];
        poll(&mut slots, Some(0)).is_ok() && slots[0].revents == 0
    }

    /// Has it become the command, as [`launch`] does. `thaw` lets it run, and is called when it has been told what to run.
    pub fn launch<E: From<LaunchError>>(
        self,
        launch: &Launch<'_>,
        thaw: impl FnOnce() -> Result<(), E>,
    ) -> Result<(i32, OwnedFd), E> {
        // SAFETY: the child waits for the byte that is written next, and reads the pointer only then.
        unsafe { *self.shared.launch.get() = ptr::from_ref(launch).cast() };
        let told =
            (&self.go).write_all(&[0]).map_err(|error| LaunchError::Step("wake a process", error).into());
        let thawed = told.and_then(|()| thaw());
        // Whatever happens, `launch` is not given back before the child has left this memory.
        let gone = thawed.and_then(|()| match (&self.gone).read_exact(&mut [0]) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(()),
            other => other
                .and(Err(io::ErrorKind::InvalidData.into()))
                .map_err(|error| LaunchError::Step("wait for a process", error).into()),
        });
        if let Err(error) = gone {
            drop(self);
            return Err(error);
        }
        // SAFETY: the child has left this memory, so nobody else refers to it.
        if let Some(failed) = unsafe { (*self.shared.failed.get()).take() } {
            return Err(LaunchError::from(failed).into());
        }
        let this = ManuallyDrop::new(self);
        // SAFETY: each field is read once and `this` never dropped; the child uses the boxes no more.
        unsafe {
            drop((
                ptr::read(&this.go),
                ptr::read(&this.gone),
                ptr::read(&this.shared),
                ptr::read(&this._stack),
            ));
            Ok((this.pid, ptr::read(&this.pidfd)))
        }
    }
}

impl Drop for Zygote {
    fn drop(&mut self) {
        end(self.pid);
    }
}

/// Kills a zygote unless it has ended, and reaps it: then it uses no memory of ours.
fn end(pid: i32) {
    // SAFETY: no memory is involved; `pid` is a child that has not been reaped.
    unsafe { libc::kill(pid, libc::SIGKILL) };
    wait(pid);
}

/// The middle one of agent and zygote. Who is suspended for a child with vfork is not taken to share memory with it in what
/// follows: giving up the protection from the OOM killer would otherwise take it from the agent as well.
///
/// # Safety
/// Only as the first function of a child of [`spawn`], with a `Conception`.
unsafe extern "C" fn conceive(conception: *mut c_void) -> ! {
    // SAFETY: the parent is suspended, so this is the only reference. What `newborn` points to and `stack` outlive the child that
    // they are given to: `Zygote` keeps them until the child has left this memory, and `new` keeps `launch` until it is ready.
    unsafe {
        let conception = &mut *conception.cast::<Conception<'_>>();
        if conception.resets_oom {
            reset_oom();
        }
        let mut args = clone_args(libc::CLONE_VM | libc::CLONE_PARENT, conception.cgroup);
        args.exit_signal = 0; // like its elder sibling's: SIGCHLD
        let argument = conception.stack.cast::<Newborn>();
        argument.write(conception.newborn);
        let result = spawn(args, conception.stack, run_zygote, argument.cast());
        conception.result = result.map_err(|error| error.raw_os_error().unwrap_or(libc::EIO));
        exit()
    }
}

/// # Safety
/// Only as the first function of a zygote, with a `Newborn`.
unsafe extern "C" fn run_zygote(newborn: *mut c_void) -> ! {
    const GO: usize = 3;
    const GONE: usize = 4;
    // SAFETY: `shared` lives until this process has left the memory, `launch` until the first byte is written, the second `launch`
    // until this process has left. The agent runs beside: it touches `shared` only before it writes its byte and after this
    // process is gone. No function of libc is called, so none of its state is shared.
    unsafe {
        let Newborn { launch, shared, go, gone } = newborn.cast::<Newborn>().read();
        let mut byte = 0u8;
        let byte = ptr::from_mut(&mut byte) as usize;
        let prepared = prepare(&*launch, &[go, gone]);
        if prepared.is_err() || raw(libc::SYS_write, [GONE, byte, 1, 0]) != 1 {
            exit();
        }
        let told = loop {
            match raw(libc::SYS_read, [GO, byte, 1, 0]) {
                error if error == -(libc::EINTR as isize) => {}
                told => break told,
            }
        };
        if told == 1 {
            *(*shared).failed.get() = Some(execute(&**(*shared).launch.get()));
        }
        exit()
    }
}

/// Waits for a child that has called exit or is about to.
fn wait(pid: i32) {
    // SAFETY: no status is asked for.
    while unsafe { libc::waitpid(pid, ptr::null_mut(), 0) } == -1
        && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted
    {}
}

fn clone_args(flags: c_int, cgroup: Option<BorrowedFd<'_>>) -> libc::clone_args {
    // SAFETY: `clone_args` is a plain struct of integers, for which zero means "not asked for".
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = flags as u64;
    args.exit_signal = libc::SIGCHLD as u64;
    if let Some(cgroup) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = cgroup.as_raw_fd() as u64;
    }
    args
}

/// Starts a child on `stack` with `entry(argument)`.
///
/// # Safety
/// With CLONE_VM in the flags, for the child uses `stack`. It must outlive the child's use of this memory, and so must whatever
/// `entry` gets at by `argument`.
unsafe fn spawn(
    mut args: libc::clone_args,
    stack: *mut ChildStack,
    entry: unsafe extern "C" fn(*mut c_void) -> !,
    argument: *mut c_void,
) -> io::Result<i32> {
    args.stack = stack as u64;
    args.stack_size = STACK_BYTES as u64;
    let result: i64;
    // SAFETY: the child starts right after the system call with rsp at the 16-aligned end of `stack`, where the call pushes a return
    // address as the ABI wants it; `entry` never returns. It takes nothing from this frame but two registers. The parent
    // comes back with all registers but rax, rcx and r11 as they were.
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
            in("r12") argument,
            in("r13") entry,
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    if result < 0 {
        return Err(io::Error::from_raw_os_error(-result as i32));
    }
    Ok(result as i32)
}

const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
const EXEC: &str = "execve";
/// The child's frames are small: a few system calls deep.
const STACK_BYTES: usize = 16 << 10;

#[repr(C, align(16))]
struct ChildStack(#[allow(dead_code)] [u8; STACK_BYTES]);

struct Child<'a> {
    launch: &'a Launch<'a>,
    failed: Option<Failed>,
}

/// The step that failed, and its errno.
type Failed = (&'static str, i32);

impl From<Failed> for LaunchError {
    fn from((step, errno): Failed) -> Self {
        let error = io::Error::from_raw_os_error(errno);
        if step == EXEC {
            Self::Exec(error)
        } else {
            Self::Step(step, error)
        }
    }
}

/// # Safety
/// Only as the first function of a child of [`spawn`], with a `Child`.
unsafe extern "C" fn run_child(child: *mut c_void) -> ! {
    // SAFETY: the parent is suspended, so this is the only reference.
    unsafe {
        let child = &mut *child.cast::<Child<'_>>();
        if child.launch.resets_oom {
            reset_oom();
        }
        let failed = match prepare(child.launch, &[]) {
            Ok(()) => execute(child.launch),
            Err(failed) => failed,
        };
        ptr::write_volatile(&mut child.failed, Some(failed));
        exit()
    }
}

/// Gives up the agent's protection from the OOM killer. Before the ids change: afterwards the file is root's.
///
/// # Safety
/// Only in a child whose parent is suspended.
unsafe fn reset_oom() {
    // SAFETY: both pointers are to constants.
    unsafe {
        let path = c"/proc/self/oom_score_adj".as_ptr() as usize;
        let file = raw(libc::SYS_open, [path, (libc::O_WRONLY | libc::O_CLOEXEC) as usize, 0, 0]);
        raw(libc::SYS_write, [file as usize, c"0".as_ptr() as usize, 1, 0]);
        raw(libc::SYS_close, [file as usize, 0, 0, 0]);
    }
}

/// All that a child does before it must know its command. `kept` become the descriptors from 3 on; with none, all stay until execve.
///
/// # Safety
/// Only in a child of [`spawn`].
unsafe fn prepare(launch: &Launch<'_>, kept: &[c_int]) -> Result<(), Failed> {
    // SAFETY: all pointers point into `launch`, whose strings end with NUL, or to a constant.
    unsafe {
        step("setsid", libc::SYS_setsid, [0; 4])?;
        // Out of the way of what goes to the first places; the copies are closed below.
        let mut aside = [0; 2];
        for (copy, source) in aside.iter_mut().zip(kept) {
            *copy = step("fcntl", libc::SYS_fcntl, [*source as usize, libc::F_DUPFD as usize, 16, 0])?;
        }
        for (target, source) in launch.stdio.iter().enumerate() {
            step("dup2", libc::SYS_dup2, [source.as_raw_fd() as usize, target, 0, 0])?;
        }
        for (place, copy) in aside.iter().take(kept.len()).enumerate() {
            step("dup2", libc::SYS_dup2, [*copy, 3 + place, 0, 0])?;
        }
        if !kept.is_empty() {
            raw(libc::SYS_close_range, [3 + kept.len(), u32::MAX as usize, 0, 0]);
        }
        raw(libc::SYS_close_range, [3, u32::MAX as usize, libc::CLOSE_RANGE_CLOEXEC as usize, 0]);
        if let Some(keep) = launch.keep {
            raw(libc::SYS_fcntl, [keep.as_raw_fd() as usize, libc::F_SETFD as usize, 0, 0]);
        }
        // The kernel's struct sigaction: all zero is the default action.
        let default = [0usize; 4];
        raw(libc::SYS_rt_sigaction, [libc::SIGPIPE as usize, default.as_ptr() as usize, 0, 8]);
        raw(libc::SYS_umask, [0o022, 0, 0, 0]);
        if let Some((uid, gid, groups)) = &launch.become_user {
            let (uid, gid) = (*uid as usize, *gid as usize);
            step("setgroups", libc::SYS_setgroups, [groups.len(), groups.as_ptr() as usize, 0, 0])?;
            step("setgid", libc::SYS_setresgid, [gid, gid, gid, 0])?;
            step("setuid", libc::SYS_setresuid, [uid, uid, uid, 0])?;
        }
        let mut entered = Err(("chdir", libc::ENOENT));
        for folder in &launch.folders {
            entered = step("chdir", libc::SYS_chdir, [folder.as_ptr() as usize, 0, 0, 0]);
            if entered.is_ok() {
                break;
            }
        }
        entered.map(drop)
    }
}

/// Becomes the command, or tells why not.
///
/// # Safety
/// Only in a child of [`spawn`].
unsafe fn execute(launch: &Launch<'_>) -> Failed {
    let mut errno = libc::ENOENT;
    for candidate in &launch.candidates {
        let (argv, env) = (launch.argv.pointers.as_ptr(), launch.env.pointers.as_ptr());
        // SAFETY: the path ends with NUL, the arrays with NULL, and all of them are `launch`'s.
        let error =
            unsafe { raw(libc::SYS_execve, [candidate.as_ptr() as usize, argv as usize, env as usize, 0]) };
        match -error as i32 {
            other @ (libc::ENOENT | libc::ENOTDIR) => {
                errno = if errno == libc::EACCES { errno } else { other }
            }
            libc::EACCES => errno = libc::EACCES,
            other => return (EXEC, other),
        }
    }
    (EXEC, errno)
}

/// A system call, without libc: the child of a running parent shares libc's errno with it. Negative: an error.
///
/// # Safety
/// As the system call.
unsafe fn raw(number: c_long, arguments: [usize; 4]) -> isize {
    let result: isize;
    // SAFETY: the kernel changes rax, rcx and r11, and what the arguments point to, which is the caller's contract.
    unsafe {
        std::arch::asm!(
            "syscall",
            inlateout("rax") number as isize => result,
            in("rdi") arguments[0],
            in("rsi") arguments[1],
            in("rdx") arguments[2],
            in("r10") arguments[3],
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result
}

/// A system call that may fail.
///
/// # Safety
/// As the system call.
unsafe fn step(name: &'static str, number: c_long, arguments: [usize; 4]) -> Result<usize, Failed> {
    // SAFETY: the caller's contract.
    match unsafe { raw(number, arguments) } {
        error if error < 0 => Err((name, -error as i32)),
        result => Ok(result as usize),
    }
}

/// Ends a child without running anything of the parent's.
fn exit() -> ! {
    loop {
        // SAFETY: no memory is involved.
        unsafe { raw(libc::SYS_exit_group, [127, 0, 0, 0]) };
    }
}
