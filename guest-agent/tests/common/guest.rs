//! An agent that takes calls, and the programs that make them.

use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};

use guest_agent::calls::Calls;
use guest_agent::place::Place;
use qrexec::{Exit, GuestFrame, HostFrame};
use rustix::net::{self, AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType};

use super::Host;

/// An agent, its host and its socket's folder.
pub struct Guest {
    pub host: Host,
    folder: tempfile::TempDir,
}

impl Guest {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().expect("tempdir");
        let calls = Calls::listen(&folder.path().join("run/qrexec.sock")).expect("listens");
        Self { host: Host::connect_to(Place::here(), calls), folder }
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("run/qrexec.sock")
    }

    /// The agent's binary as the tool of this name.
    pub fn tool(&self, name: &str) -> Command {
        let mut command = Command::new(agent());
        command.arg0(format!("/usr/bin/{name}")).arg(format!("--agent-socket={}", self.socket().display()));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    pub fn call(&self, args: &[&str]) -> Child {
        self.tool("qrexec-client-vm").args(args).spawn().expect("starts")
    }

    /// A caller by hand.
    pub fn connect(&self) -> OwnedFd {
        let socket = net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .expect("socket");
        net::connect(&socket, &SocketAddrUnix::new(self.socket()).expect("short")).expect("connects");
        socket
    }

    /// A caller by hand that has asked for a service, and the call's stream.
    pub fn ask(&mut self) -> (OwnedFd, u32) {
        let socket = self.connect();
        net::send(&socket, b"work\0svc\0", SendFlags::empty()).expect("sends");
        (socket, self.hear_call().0)
    }

    /// The next call: its stream, target and service.
    pub fn hear_call(&mut self) -> (u32, String, String) {
        match self.host.hear() {
            GuestFrame::Call { stream, call } => (stream, call.target.to_string(), call.service.to_string()),
            other => panic!("unexpected: {other:?}"),
        }
    }

    /// All that the caller still writes.
    pub fn hear_stdin(&mut self) -> Vec<u8> {
        let mut heard = Vec::new();
        loop {
            match self.host.hear() {
                GuestFrame::CallStdin { bytes, .. } => heard.extend(bytes),
                GuestFrame::CallStdinEof { .. } => return heard,
                other => panic!("unexpected: {other:?}"),
            }
        }
    }

    pub fn exit(&mut self, stream: u32, status: u8) {
        self.host.say(HostFrame::CallExited { stream, exit: Exit::Code(status) });
    }
}

/// Cargo puts it beside the folder of tests. (Its own variable for that has a hyphen, with which it does not get through a shell.)
pub fn agent() -> PathBuf {
    let test = std::env::current_exe().expect("there is one");
    test.ancestors().nth(2).expect("it is in target/*/deps").join("dispvm-agent")
}

pub fn status(output: &Output) -> Option<i32> {
    output.status.code()
}

pub fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).expect("UTF-8")
}
