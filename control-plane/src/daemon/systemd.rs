//! What systemd hands a service and hears from it: a listening socket (sd_listen_fds(3)), and that it is ready (sd_notify(3)).

use std::env;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener};

use rustix::net::sockopt;
use rustix::process::{getpid, pidfd_getfd, pidfd_open, PidfdFlags, PidfdGetfdFlags};

use crate::error::{Error, Kind, Result};

/// The first descriptor that is handed over.
const FIRST: i32 = 3;

/// The socket that was handed to this process, if one was. Call once, before other threads or descriptors are made.
pub fn listener() -> Result<Option<UnixListener>> {
    let number = |name: &str| env::var(name).ok()?.parse::<u32>().ok();
    // Those of another process have come to us by way of the environment only.
    if number("LISTEN_PID") != Some(std::process::id()) {
        return Ok(None);
    }
    let wrong = |why: &str| {
        Error::new(Kind::Usage, format!("{why} was handed over, instead of one listening unix socket"))
            .hint("one ListenStream=PATH in the socket's unit")
    };
    if number("LISTEN_FDS") != Some(1) {
        return Err(wrong("another number of sockets"));
    }
    let listener = take().map_err(Error::failed("take the socket that was handed over"))?;
    match (sockopt::socket_acceptconn(&listener), listener.local_addr()) {
        (Ok(true), Ok(_)) => Ok(Some(listener)),
        _ => Err(wrong("something else")),
    }
}

/// A descriptor of our own of it, which no program that we start inherits; then the one that was handed over is closed.
fn take() -> io::Result<UnixListener> {
    let ourselves = pidfd_open(getpid(), PidfdFlags::empty())?;
    let socket = pidfd_getfd(&ourselves, FIRST, PidfdGetfdFlags::empty())?;
    nix::unistd::close(FIRST)?;
    let listener = UnixListener::from(socket);
    listener.set_nonblocking(false)?;
    Ok(listener)
}

/// Tells systemd, if it wants to hear it, that whoever calls now is heard.
pub fn ready() {
    let Some(path) = env::var_os("NOTIFY_SOCKET") else { return };
    let told = UnixDatagram::unbound().and_then(|socket| {
        let address = match path.as_bytes() {
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
            _ => SocketAddr::from_pathname(&path)?,
        };
        socket.send_to_addr(b"READY=1", &address)
    });
    if let Err(error) = told {
        tracing::warn!("cannot tell systemd that we are ready: {error}");
    }
}
