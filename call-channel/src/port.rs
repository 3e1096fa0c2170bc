//! One end of a stream of somebody else's, made so that using it never blocks.
//!
//! Invariant: no descriptor that may be shared with others is made non-blocking. A pipe or terminal is opened a second time instead, to have an
//! open file description of our own; a socket is asked each time not to block; a file that may hang can be a thread's (`file`). What cannot be
//! opened again is used only when poll says so, and then for no more than a pipe takes without blocking ([`POLLED_BYTES`]), and by one at a
//! time.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use rustix::fs::{FileType, Mode, OFlags};
use rustix::net::{RecvFlags, SendFlags, Shutdown};

use super::file;

/// What a pipe that polls writable takes without blocking (PIPE_BUF, pipe(7)).
const POLLED_BYTES: usize = 4096;

/// Major numbers (devices.txt): /dev/null and its like; pseudo-terminals' slaves, which are what they are whoever opens them, unlike /dev/tty
/// and /dev/ptmx.
const MEMORY_DEVICES: u32 = 1;
const TERMINALS: std::ops::RangeInclusive<u32> = 136..=143;

/// One end of a stream; see the module.
#[derive(Debug)]
pub struct Port {
    fd: OwnedFd,
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Does not block, or never does for long: our own, or a file.
    Free,
    Socket,
    /// A thread's socket, which stands for a file.
    File,
    /// Blocks if others use it between poll and us.
    Polled,
}

impl Port {
    /// To read from `fd`. A file is read at once, however long that takes.
    pub fn input(fd: BorrowedFd<'_>) -> io::Result<Port> {
        Port::of(fd, OFlags::RDONLY)
    }

    /// To write to `fd`. A file is written at once, however long that takes.
    pub fn output(fd: BorrowedFd<'_>) -> io::Result<Port> {
        Port::of(fd, OFlags::WRONLY)
    }

    /// To read from `fd`, for a loop that others wait for: a file that may hang is left to a thread.
    pub fn patient_input(fd: BorrowedFd<'_>) -> io::Result<Port> {
        match file::may_hang(fd)? {
            true => Port::own(file::reader(fd.try_clone_to_owned()?)?),
            false => Port::input(fd),
        }
    }

    /// To write to `fd`, for a loop that others wait for. Such a loop has to [`Port::finish`], lest it end before the thread has.
    pub fn patient_output(fd: BorrowedFd<'_>) -> io::Result<Port> {
        match file::may_hang(fd)? {
            true => Ok(Port { fd: file::writer(fd.try_clone_to_owned()?)?, kind: Kind::File }),
            false => Port::output(fd),
        }
    }

    /// A descriptor that nobody else has.
    pub fn own(fd: OwnedFd) -> io::Result<Port> {
        let flags = rustix::fs::fcntl_getfl(&fd)?;
        rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
        Ok(Port { fd, kind: Kind::Free })
    }

    fn of(fd: BorrowedFd<'_>, access: OFlags) -> io::Result<Port> {
        let there = rustix::fs::fstat(fd)?;
        let device = rustix::fs::major(there.st_rdev);
        let kind = match FileType::from_raw_mode(there.st_mode) {
            FileType::Socket => Kind::Socket,
            FileType::CharacterDevice if device == MEMORY_DEVICES => Kind::Free,
            FileType::CharacterDevice if !TERMINALS.contains(&device) => Kind::Polled,
            FileType::Fifo | FileType::CharacterDevice => match again(fd, access) {
                Some(fd) => return Ok(Port { fd, kind: Kind::Free }),
                None => Kind::Polled,
            },
            FileType::RegularFile | FileType::Directory | FileType::BlockDevice => Kind::Free,
            // An eventfd, a timer, a watch: they have no file, and may block.
            _ => Kind::Polled,
        };
        Ok(Port { fd: fd.try_clone_to_owned()?, kind })
    }

    /// Whether it may be used only once between two polls, for others may be the same pipe.
    pub fn is_polled(&self) -> bool {
        self.kind == Kind::Polled
    }

    /// Reads what there is.
    pub fn read(&self, buffer: &mut [u8]) -> nix::Result<usize> {
        match self.kind {
            Kind::Free | Kind::Polled => nix::unistd::read(self.fd.as_raw_fd(), buffer),
            Kind::Socket | Kind::File => match rustix::net::recv(&self.fd, buffer, RecvFlags::DONTWAIT) {
                Ok((count, _)) => Ok(count),
                Err(error) => Err(Errno::from_raw(error.raw_os_error())),
            },
        }
    }

    /// Writes what fits.
    pub fn write(&self, bytes: &[u8]) -> nix::Result<usize> {
        match self.kind {
            Kind::Free => nix::unistd::write(&self.fd, bytes),
            Kind::Polled => nix::unistd::write(&self.fd, bytes.get(..POLLED_BYTES).unwrap_or(bytes)),
            Kind::Socket | Kind::File => {
                rustix::net::send(&self.fd, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)
                    .map_err(|error| Errno::from_raw(error.raw_os_error()))
            }
        }
    }

    /// Says that nothing more is written. Whether that takes its time: then it hangs up.
    pub fn finish(&self) -> bool {
        self.kind == Kind::File && rustix::net::shutdown(&self.fd, Shutdown::Write).is_ok()
    }

    /// Why one that has hung up takes no more, if it says so.
    pub fn failure(&self) -> Option<Errno> {
        let mut number = [0; 4];
        let told = self.kind == Kind::File && self.read(&mut number) == Ok(number.len());
        told.then(|| Errno::from_raw(i32::from_ne_bytes(number)))
    }
}

/// Opens a pipe or terminal once more; only for what `fd` itself can do, lest a pipe's writer could read it.
fn again(fd: BorrowedFd<'_>, access: OFlags) -> Option<OwnedFd> {
    let flags = rustix::fs::fcntl_getfl(fd).ok()?;
    let has = flags & OFlags::ACCMODE;
    if flags.contains(OFlags::PATH) || has != access && has != OFlags::RDWR {
        return None;
    }
    let path = Path::new("/proc/self/fd").join(fd.as_raw_fd().to_string());
    let flags = access | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
    rustix::fs::open(path, flags, Mode::empty()).ok()
}

impl AsFd for Port {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{pipe, Read, Write};
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_full_pipe_and_an_empty_one_do_not_block_and_stay_blocking_for_others() {
        let (mut reader, mut writer) = pipe().unwrap();
        let (input, output) = (Port::input(reader.as_fd()).unwrap(), Port::output(writer.as_fd()).unwrap());
        assert_eq!(input.read(&mut [0; 8]), Err(Errno::EAGAIN));
        while output.write(&[7; 4096]).is_ok() {}
        assert_eq!(output.write(&[7]), Err(Errno::EAGAIN));
        assert!(!rustix::fs::fcntl_getfl(&reader).unwrap().contains(OFlags::NONBLOCK));
        let mut bytes = [0; 4096];
        reader.read_exact(&mut bytes).unwrap();
        writer.write_all(b"x").unwrap();
        assert_eq!(input.read(&mut bytes), Ok(4096));
    }

    /// A terminal's master that is opened again is another terminal's.
    #[test]
    fn a_terminals_master_is_not_opened_again() {
        let master = rustix::fs::open("/dev/ptmx", OFlags::RDWR | OFlags::NOCTTY, Mode::empty()).unwrap();
        assert!(Port::output(master.as_fd()).unwrap().is_polled());
        let null = std::fs::File::options().write(true).open("/dev/null").unwrap();
        assert!(!Port::output(null.as_fd()).unwrap().is_polled());
    }

    #[test]
    fn what_gives_no_right_to_read_is_not_opened_to_read_and_what_may_block_is_polled() {
        let folder = tempfile::tempdir().unwrap();
        let fifo = folder.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let path_only = rustix::fs::open(&fifo, OFlags::PATH, Mode::empty()).unwrap();
        assert_eq!(Port::input(path_only.as_fd()).unwrap().read(&mut [0; 8]), Err(Errno::EBADF));
        let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::empty()).unwrap();
        assert!(Port::input(event.as_fd()).unwrap().is_polled());
    }

    #[test]
    fn a_full_socket_does_not_block_and_the_wrong_end_of_a_pipe_is_not_opened_as_the_other() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let output = Port::output(ours.as_fd()).unwrap();
        while output.write(&[7; 4096]).is_ok() {}
        assert_eq!(output.write(&[7]), Err(Errno::EAGAIN));
        assert_eq!(Port::input(ours.as_fd()).unwrap().read(&mut [0; 8]), Err(Errno::EAGAIN));
        let (_reader, writer) = pipe().unwrap();
        assert_eq!(Port::input(writer.as_fd()).unwrap().read(&mut [0; 8]), Err(Errno::EBADF));
    }
}
