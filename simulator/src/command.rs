//! The commands a simulated guest has, within the windows the protocol gives them.
//!
//! `echo ARG…`, `cat`, `exit N`, `name` (host name and machine-id), `flood N` (N bytes), `fill N` (writes N pages to the
//! root volume), `save N` (writes page N of what is kept), and `witness`: answers each line of stdin with `ok LINE` if the clone's memory and volumes are as they must be.

use qrexec::{Exec, Exit, GuestFrame, ProtocolError, ReceiveWindow, SendWindow};

use crate::vm::Vm;

/// Bytes of output in one frame.
const FRAME_BYTES: usize = 16 << 10;

#[derive(Debug, PartialEq, Eq)]
enum Kind {
    Prints,
    Cat,
    Witness,
    /// So many pages are still to be written.
    Fill(u64),
}

/// A command that runs.
pub struct Command {
    stream: u32,
    kind: Kind,
    exit: Exit,
    stdin: ReceiveWindow,
    stdin_ended: bool,
    stdout: SendWindow,
    line: Vec<u8>,
    pending: Vec<u8>,
}

impl Command {
    /// Starts one; `Err` when there is none of that name.
    pub fn start(stream: u32, exec: &Exec, vm: &Vm) -> Result<Command, Exit> {
        let text =
            |at: usize| exec.argv.get(at).map_or(String::new(), |arg| String::from_utf8_lossy(arg).into());
        let number = || text(1).parse().unwrap_or(0u64);
        let mut command = Command {
            stream,
            kind: Kind::Prints,
            exit: Exit::Code(0),
            stdin: ReceiveWindow::default(),
            stdin_ended: false,
            stdout: SendWindow::default(),
            line: Vec::new(),
            pending: Vec::new(),
        };
        match text(0).as_str() {
            "echo" => {
                command.pending = exec.argv[1..].join(&b' ');
                command.pending.push(b'\n');
            }
            // A rehearsal's: what it reads is nothing.
            "cat" | "sh" => command.kind = Kind::Cat,
            "witness" => command.kind = Kind::Witness,
            "exit" => command.exit = Exit::Code(number() as u8),
            "flood" => {
                command.pending = (0..number()).map(|at| b"0123456789abcde\n"[at as usize % 16]).collect()
            }
            "save" => match vm.stopped().guest.save(number()) {
                Ok(count) => command.pending = format!("saved to {count}\n").into_bytes(),
                Err(_) => command.exit = Exit::Code(1),
            },
            "fill" => command.kind = Kind::Fill(number()),
            "name" => {
                let identity = vm.stopped().guest.identity.clone().unwrap_or_default();
                command.pending = format!("{} {:02x?}\n", identity.0, identity.1).into_bytes();
            }
            _ => return Err(Exit::NotFound(nix::libc::ENOENT as u32)),
        }
        Ok(command)
    }

    /// Whether it reads what is sent to it.
    pub fn reads(&self) -> bool {
        matches!(self.kind, Kind::Cat | Kind::Witness)
    }

    /// Takes stdin.
    pub fn stdin(&mut self, bytes: &[u8], vm: &Vm, out: &mut Vec<u8>) -> Result<(), ProtocolError> {
        self.stdin.received(bytes.len())?;
        match self.kind {
            Kind::Cat => self.pending.extend_from_slice(bytes),
            Kind::Witness => {
                self.line.extend_from_slice(bytes);
                while let Some(end) = self.line.iter().position(|byte| *byte == b'\n') {
                    let line: Vec<u8> = self.line.drain(..=end).collect();
                    let verdict = match vm.stopped().guest.check() {
                        Ok(()) => "ok ".to_owned(),
                        Err(why) => format!("disturbed: {why}: "),
                    };
                    self.pending.extend_from_slice(verdict.as_bytes());
                    self.pending.extend_from_slice(&line);
                }
            }
            _ => {}
        }
        if let Some(bytes) = self.stdin.consumed(bytes.len()) {
            GuestFrame::StdinCredit { stream: self.stream, bytes }.encode(out);
        }
        Ok(())
    }

    /// Takes the end of stdin.
    pub fn stdin_eof(&mut self) {
        self.stdin_ended = true;
    }

    /// Takes credit for its output.
    pub fn credit(&mut self, bytes: u32) -> Result<(), ProtocolError> {
        self.stdout.credit(bytes)
    }

    /// Does what it can: sends what the window allows, writes to its volume. `true` once it is over; then
    /// [`Command::end`] is to be called.
    pub fn go_on(&mut self, vm: &Vm, out: &mut Vec<u8>) -> bool {
        if let Kind::Fill(left) = self.kind {
            for place in 0..left {
                let Some(mut state) = vm.when(|guest| !guest.must_spill()) else { return false };
                state.guest.fill(place);
                if state.guest.must_spill() {
                    vm.ring();
                }
            }
            self.kind = Kind::Prints;
            self.pending = b"filled\n".to_vec();
        }
        while !self.pending.is_empty() && self.stdout.left() > 0 {
            let count = self.pending.len().min(self.stdout.left()).min(FRAME_BYTES);
            self.stdout.sent(count);
            let bytes = self.pending.drain(..count).collect();
            GuestFrame::Stdout { stream: self.stream, bytes }.encode(out);
        }
        self.pending.is_empty() && (!self.reads() || self.stdin_ended)
    }

    /// Its last frames.
    pub fn end(&self, out: &mut Vec<u8>) {
        let (stream, exit) = (self.stream, self.exit);
        GuestFrame::StdoutEof { stream }.encode(out);
        GuestFrame::StderrEof { stream }.encode(out);
        GuestFrame::Exited { stream, exit }.encode(out);
    }
}
