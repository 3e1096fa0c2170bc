//! The bytes of a call to a service behind a socket: from the caller to the service and back, until the call is over.
//!
//! The call is over when either
//! - both have ended what they write: the caller's end becomes the service's, the service's the caller's;
//! - the service has closed its socket, and the caller has what it had said;
//! - one of them has ended what it writes, and the configuration has that end the call;
//! - nobody reads what the service says.
//!
//! Invariants: each way holds no more than a pipe's worth, and neither waits for the other. A call that came to its end has the status 0,
//! however it came: a socket has no other way to tell.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{fcntl, open, FcntlArg, OFlag};
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::socket::{recv, send, shutdown, MsgFlags, Shutdown};
use nix::sys::stat::{fstat, Mode, SFlag};

use crate::config::Config;
use crate::find::Served;
use crate::tcp::Place;

/// A pipe's worth.
const BUFFER_BYTES: usize = 64 << 10;
/// Of a socket's address, without the NUL that ends it (unix(7)).
const SOCKET_PATH_BYTES_MAX: usize = 107;
const GONE: PollFlags = PollFlags::POLLERR.union(PollFlags::POLLHUP).union(PollFlags::POLLNVAL);

/// The way to a service, which has been reached.
pub struct Connection {
    socket: OwnedFd,
    ends: Ends,
    /// What the service is told before all else.
    greeting: Vec<u8>,
}

/// What ends a call beside the end of both.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Ends {
    /// The end of what the caller writes.
    pub on_client_eof: bool,
    /// The end of what the service writes.
    pub on_service_eof: bool,
}

impl Ends {
    /// As configured.
    pub fn of(config: &Config) -> Ends {
        Ends { on_client_eof: config.exit_on_client_eof, on_service_eof: config.exit_on_service_eof }
    }
}

impl Connection {
    /// Reaches a service. `descriptor` is what was called and by whom, as a command line of qrexec's has it; with one, the service is told, and
    /// then a NUL.
    pub fn open(served: &Served, descriptor: Option<&str>, ends: Ends) -> io::Result<Connection> {
        let socket = match served {
            Served::Socket(path) => connect(path)?.into(),
            Served::Tcp(Place { address }) => TcpStream::connect(address)?.into(),
            Served::Program(_) => return Err(io::ErrorKind::Unsupported.into()),
        };
        let greeting = descriptor.map(|descriptor| [descriptor.as_bytes(), b"\0"].concat());
        Ok(Connection { socket, ends, greeting: greeting.unwrap_or_default() })
    }

    /// Carries the call's bytes to its end. Nobody else may have `client_out` open here, or its reader would not see its end.
    pub fn carry(self, client_in: File, client_out: File) -> io::Result<()> {
        let Connection { socket, ends, greeting } = self;
        nonblocking(socket.as_fd())?;
        if is_pipe(&client_out) {
            // Of this process alone, as its caller's end of it is another.
            nonblocking(client_out.as_fd())?;
        }
        let up = Buffer { bytes: greeting, at: 0 };
        let mut relay = Relay {
            socket,
            client_in: Some(client_in),
            client_out: Some(client_out),
            up,
            down: Buffer::default(),
            takes: true,
            speaks: true,
        };
        while !relay.is_over(ends) {
            relay.turn()?;
        }
        Ok(())
    }
}

/// A long path is reached by way of a descriptor, as an address has room for a short one.
fn connect(path: &Path) -> io::Result<UnixStream> {
    if path.as_os_str().as_bytes().len() <= SOCKET_PATH_BYTES_MAX {
        return UnixStream::connect(path);
    }
    let there = open(path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?;
    let connected = UnixStream::connect(format!("/proc/self/fd/{there}"));
    let _ = nix::unistd::close(there);
    connected
}

struct Relay {
    socket: OwnedFd,
    /// Until the caller has ended what it writes, or the service takes no more.
    client_in: Option<File>,
    /// Until the service has ended what it writes, and the caller has it.
    client_out: Option<File>,
    up: Buffer,
    down: Buffer,
    /// Whether the service takes more.
    takes: bool,
    /// Whether the service may say more.
    speaks: bool,
}

impl Relay {
    /// Passes ends on; whether that was all.
    fn is_over(&mut self, ends: Ends) -> bool {
        if self.takes && self.client_in.is_none() && self.up.is_empty() {
            self.takes = false;
            let _ = shutdown(self.socket.as_raw_fd(), Shutdown::Write);
            if ends.on_client_eof {
                return true;
            }
        }
        if !self.speaks && self.down.is_empty() && self.client_out.take().is_some() && ends.on_service_eof {
            return true;
        }
        !self.takes && self.client_out.is_none()
    }

    /// Waits, and does what can be done.
    fn turn(&mut self) -> io::Result<()> {
        for (which, flags) in self.wait()? {
            match which {
                Which::ClientIn => self.hear_client(),
                Which::ClientOut if flags.contains(PollFlags::POLLOUT) => self.tell_client(),
                Which::ClientOut => self.lose_client(),
                Which::Service => {
                    if flags.intersects(GONE) {
                        self.stop_telling();
                    }
                    if self.takes && flags.contains(PollFlags::POLLOUT) {
                        self.tell_service();
                    }
                    if self.speaks && self.down.is_empty() {
                        self.hear_service();
                    }
                }
            }
        }
        Ok(())
    }

    /// What is ready.
    fn wait(&self) -> io::Result<Vec<(Which, PollFlags)>> {
        let mut slots: Vec<(Which, BorrowedFd<'_>, PollFlags)> = Vec::with_capacity(3);
        if let Some(client) = self.client_in.as_ref().filter(|_| self.up.is_empty()) {
            slots.push((Which::ClientIn, client.as_fd(), PollFlags::POLLIN));
        }
        if let Some(client) = &self.client_out {
            // Without anything to write, poll still tells that its reader has gone.
            let flags = if self.down.is_empty() { PollFlags::empty() } else { PollFlags::POLLOUT };
            slots.push((Which::ClientOut, client.as_fd(), flags));
        }
        let mut service = PollFlags::empty();
        service.set(PollFlags::POLLIN, self.speaks && self.down.is_empty());
        service.set(PollFlags::POLLOUT, self.takes && !self.up.is_empty());
        // One that has hung up would be ready for ever.
        if self.takes || !service.is_empty() {
            slots.push((Which::Service, self.socket.as_fd(), service));
        }
        let mut fds: Vec<PollFd<'_>> = slots.iter().map(|(_, fd, flags)| PollFd::new(*fd, *flags)).collect();
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let flags = fds.iter().map(|fd| fd.revents().unwrap_or(PollFlags::empty()));
        Ok(slots.iter().map(|(which, ..)| *which).zip(flags).filter(|(_, flags)| !flags.is_empty()).collect())
    }

    fn hear_client(&mut self) {
        let Some(client) = &mut self.client_in else { return };
        match self.up.fill(|buffer| client.read(buffer)) {
            Filled::End => self.client_in = None,
            Filled::On => {}
        }
    }

    fn tell_service(&mut self) {
        let socket = self.socket.as_raw_fd();
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        if !self.up.drain(|bytes| send(socket, bytes, flags).map_err(io::Error::from)) {
            self.stop_telling();
        }
    }

    /// The service takes no more: what the caller still says is for nobody.
    fn stop_telling(&mut self) {
        self.takes = false;
        self.client_in = None;
        self.up = Buffer::default();
    }

    fn hear_service(&mut self) {
        let socket = self.socket.as_raw_fd();
        let filled =
            self.down.fill(|buffer| recv(socket, buffer, MsgFlags::MSG_DONTWAIT).map_err(io::Error::from));
        if let Filled::End = filled {
            self.speaks = false;
        }
    }

    fn tell_client(&mut self) {
        let Some(client) = &mut self.client_out else { return };
        if !self.down.drain(|bytes| client.write(bytes)) {
            self.lose_client();
        }
    }

    /// Nobody hears the service any more, so there is no call.
    fn lose_client(&mut self) {
        self.stop_telling();
        self.speaks = false;
        self.down = Buffer::default();
        self.client_out = None;
    }
}

#[derive(Clone, Copy)]
enum Which {
    ClientIn,
    ClientOut,
    Service,
}

/// What has been read and is to be written.
#[derive(Default)]
struct Buffer {
    bytes: Vec<u8>,
    at: usize,
}

enum Filled {
    On,
    /// There is no more, or none that can be read.
    End,
}

impl Buffer {
    fn is_empty(&self) -> bool {
        self.at >= self.bytes.len()
    }

    /// Reads once. Legal only when it is empty.
    fn fill(&mut self, read: impl FnOnce(&mut [u8]) -> io::Result<usize>) -> Filled {
        self.bytes.resize(BUFFER_BYTES, 0);
        let read = read(&mut self.bytes);
        self.at = 0;
        self.bytes.truncate(*read.as_ref().unwrap_or(&0));
        match read {
            Ok(0) => Filled::End,
            Ok(_) => Filled::On,
            Err(error) if is_passing(&error) => Filled::On,
            Err(_) => Filled::End,
        }
    }

    /// Writes once. `false`: nothing can be written any more.
    fn drain(&mut self, write: impl FnOnce(&[u8]) -> io::Result<usize>) -> bool {
        match write(self.bytes.get(self.at..).unwrap_or_default()) {
            Ok(count) => self.at += count,
            Err(error) => return is_passing(&error),
        }
        true
    }
}

fn is_passing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

fn nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(fd.as_raw_fd(), FcntlArg::F_GETFL)?);
    fcntl(fd.as_raw_fd(), FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

fn is_pipe(file: &File) -> bool {
    let kind =
        fstat(file.as_raw_fd()).map(|there| SFlag::from_bits_truncate(there.st_mode & SFlag::S_IFMT.bits()));
    kind == Ok(SFlag::S_IFIFO)
}

/// This process's standard input and output, for nobody but [`Connection::carry`]; what stands in their place, and for standard error, is nothing.
pub fn take_standard_streams() -> io::Result<(File, File)> {
    let client_in = io::stdin().as_fd().try_clone_to_owned()?;
    let client_out = io::stdout().as_fd().try_clone_to_owned()?;
    let nothing = File::options().read(true).write(true).open("/dev/null")?;
    for standard in 0..=2 {
        nix::unistd::dup2(nothing.as_raw_fd(), standard)?;
    }
    Ok((client_in.into(), client_out.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::pipe;
    use std::io::{PipeReader, PipeWriter};
    use std::net::TcpListener;
    use std::os::unix::net::UnixListener;
    use std::thread::{spawn, JoinHandle};

    /// A call: what the caller writes to, what it reads from, and the relay's end.
    struct Call(PipeWriter, PipeReader, JoinHandle<()>);

    fn call(connection: Connection) -> Call {
        let (client_in, to) = pipe().unwrap();
        let (from, client_out) = pipe().unwrap();
        let carry = move || {
            connection.carry(OwnedFd::from(client_in).into(), OwnedFd::from(client_out).into()).unwrap();
        };
        Call(to, from, spawn(carry))
    }

    fn unix(ends: Ends, descriptor: Option<&str>) -> (Call, UnixStream) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let call = call(Connection::open(&Served::Socket(path), descriptor, ends).unwrap());
        (call, listener.accept().unwrap().0)
    }

    fn rest(mut from: impl Read) -> String {
        let mut text = String::new();
        from.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn the_descriptor_goes_first_and_both_ends_end_the_call() {
        let (Call(mut to, from, relay), mut service) = unix(Ends::default(), Some("a+b work"));
        to.write_all(b"hello").unwrap();
        drop(to);
        assert_eq!(rest(&mut service), "a+b work\0hello");
        service.write_all(b"and back").unwrap();
        service.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(rest(from), "and back");
        relay.join().unwrap();
    }

    #[test]
    fn a_service_that_closes_its_socket_ends_the_call_though_the_caller_would_go_on() {
        let (Call(to, from, relay), mut service) = unix(Ends::default(), None);
        service.write_all(b"that is all").unwrap();
        drop(service);
        assert_eq!(rest(from), "that is all");
        relay.join().unwrap();
        drop(to);
    }

    #[test]
    fn a_service_that_has_said_all_hears_on_until_the_caller_ends() {
        let (Call(mut to, from, relay), mut service) = unix(Ends::default(), None);
        service.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(rest(from), "");
        to.write_all(b"still there").unwrap();
        drop(to);
        assert_eq!(rest(&mut service), "still there");
        relay.join().unwrap();
    }

    #[test]
    fn one_end_is_enough_where_the_configuration_says_so() {
        let (Call(mut to, from, relay), service) =
            unix(Ends { on_client_eof: true, ..Ends::default() }, None);
        to.write_all(b"all of it").unwrap();
        drop(to);
        relay.join().unwrap();
        assert_eq!((rest(from), rest(&service)), (String::new(), "all of it".into()));
        let (Call(to, from, relay), service) = unix(Ends { on_service_eof: true, ..Ends::default() }, None);
        service.shutdown(std::net::Shutdown::Write).unwrap();
        relay.join().unwrap();
        drop((to, from));
    }

    #[test]
    fn nobody_waits_for_a_service_whose_output_nobody_reads() {
        let (Call(to, from, relay), service) = unix(Ends::default(), None);
        drop(from);
        relay.join().unwrap();
        drop((to, service));
    }

    /// Each way is full before the other is read.
    #[test]
    fn neither_way_waits_for_the_other() {
        const BYTES: usize = 8 << 20;
        let (Call(mut to, mut from, relay), mut service) = unix(Ends::default(), None);
        let mut service_too = service.try_clone().unwrap();
        let writers = [
            spawn(move || to.write_all(&vec![1; BYTES]).unwrap()),
            spawn(move || {
                service_too.write_all(&vec![2; BYTES]).unwrap();
                service_too.shutdown(std::net::Shutdown::Write).unwrap();
            }),
        ];
        let mut heard = Vec::new();
        from.read_to_end(&mut heard).unwrap();
        assert!(heard.len() == BYTES && heard.iter().all(|byte| *byte == 2));
        heard.clear();
        service.read_to_end(&mut heard).unwrap();
        assert!(heard.len() == BYTES && heard.iter().all(|byte| *byte == 1));
        writers.into_iter().for_each(|writer| writer.join().unwrap());
        relay.join().unwrap();
    }

    #[test]
    fn a_place_behind_tcp_is_reached_and_so_is_a_socket_with_a_long_path() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let served = Served::Tcp(Place { address: listener.local_addr().unwrap() });
        let Call(to, from, relay) = call(Connection::open(&served, Some("a work"), Ends::default()).unwrap());
        drop(to);
        let (mut service, _) = listener.accept().unwrap();
        assert_eq!(rest(&mut service), "a work\0");
        service.write_all(b"fine").unwrap();
        drop(service);
        assert_eq!(rest(from), "fine");
        relay.join().unwrap();
        drop(listener);
        assert!(Connection::open(&served, None, Ends::default()).is_err(), "nobody listens");

        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("socket")).unwrap();
        let long = folder.path().join("x".repeat(200));
        std::os::unix::fs::symlink("socket", &long).unwrap();
        let Call(to, from, relay) =
            call(Connection::open(&Served::Socket(long), None, Ends::default()).unwrap());
        drop(listener.accept().unwrap());
        relay.join().unwrap();
        drop((to, from));
    }
}
