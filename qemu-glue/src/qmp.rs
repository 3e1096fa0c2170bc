//! QEMU's machine protocol (docs/interop/qmp-spec.rst) over a socket pair: one JSON object a line.
//!
//! Invariants: one command is under way at a time, its answer is the next `return` or `error`; events may come in
//! between and are kept in order. A QEMU whose guest has taken it over cannot make its caller wait beyond the limit, nor hold
//! more than a line of [`LINE_BYTES_MAX`] and events of [`EVENTS_BYTES_MAX`]: either ends the conversation.

use std::collections::VecDeque;
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::sys::socket::{sendmsg, ControlMessage, MsgFlags};
use serde_json::{json, Value};

/// No answer this engine asks for is near this long; the console's tail is the longest.
const LINE_BYTES_MAX: usize = 1 << 20;
/// Events that wait for somebody to ask for them, as lines. Some 250 bytes each; most come when a full overlay fails all
/// requests of the volumes' queues at once, 256 each.
const EVENTS_BYTES_MAX: usize = 1 << 20;
/// For so long beyond a limit what has arrived is read; a QEMU that always has another line would be listened to for ever.
const TALK_MAX: Duration = Duration::from_millis(100);

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// QEMU answered with an error.
    #[error("{command}: {message}")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's description.
        message: String,
    },
    /// QEMU has closed the socket: it has ended.
    #[error("QEMU has ended")]
    Closed,
    /// Nothing came in time.
    #[error("no answer within {} s", .0.as_secs())]
    Timeout(Duration),
    /// The socket failed, or carried something that is not QMP.
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// Something QEMU reported by itself.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Its name, in capitals.
    pub name: String,
    /// Its data, `Null` when it has none.
    pub data: Value,
}

/// A conversation with one QEMU.
pub struct Qmp {
    socket: UnixStream,
    received: Vec<u8>,
    scanned: usize,
    /// Each with the length of its line.
    events: VecDeque<(Event, usize)>,
    events_bytes: usize,
}

impl Qmp {
    /// Over a connected socket on which QEMU will greet. Sends `qmp_capabilities` at once, without waiting.
    pub fn start(socket: UnixStream) -> io::Result<Qmp> {
        (&socket).write_all(b"{\"execute\":\"qmp_capabilities\",\"id\":\"hello\"}\n")?;
        Ok(Qmp {
            socket,
            received: Vec::with_capacity(4096),
            scanned: 0,
            events: VecDeque::new(),
            events_bytes: 0,
        })
    }

    /// Sends a command whose answer nobody waits for; a failure shows in what it should have brought about.
    pub fn post(&mut self, command: &str, arguments: Value) -> Result<(), QmpError> {
        self.send(command, arguments, "posted", None)
    }

    /// Sends a command and waits for its answer.
    pub fn execute(&mut self, command: &str, arguments: Value, limit: Duration) -> Result<Value, QmpError> {
        self.send(command, arguments, "asked", None)?;
        self.answer(command, limit)
    }

    /// Hands QEMU a descriptor under a name, for `fd:NAME`.
    pub fn give_fd(&mut self, name: &str, fd: BorrowedFd<'_>, limit: Duration) -> Result<(), QmpError> {
        self.send("getfd", json!({ "fdname": name }), "asked", Some(fd))?;
        self.answer("getfd", limit).map(drop)
    }

    /// Adds a descriptor to a set, for `/dev/fdset/SET`.
    pub fn add_fd(&mut self, set: u32, fd: BorrowedFd<'_>, limit: Duration) -> Result<(), QmpError> {
        self.send("add-fd", json!({ "fdset-id": set }), "asked", Some(fd))?;
        self.answer("add-fd", limit).map(drop)
    }

    /// The next event, those already received first.
    pub fn next_event(&mut self, limit: Duration) -> Result<Event, QmpError> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some((event, bytes)) = self.events.pop_front() {
                self.events_bytes -= bytes;
                return Ok(event);
            }
            let (message, bytes) = self.message(deadline, limit)?;
            if let Some(message) = error_of(&message) {
                return Err(QmpError::Refused { command: "a posted command".to_owned(), message });
            }
            self.keep_if_event(message, bytes)?;
        }
    }

    /// The next event that has already arrived, if there is one.
    pub fn pending_event(&mut self) -> Result<Option<Event>, QmpError> {
        match self.next_event(Duration::ZERO) {
            Ok(event) => Ok(Some(event)),
            Err(QmpError::Timeout(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn send(
        &mut self,
        command: &str,
        arguments: Value,
        id: &str,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<(), QmpError> {
        let mut line = json!({ "execute": command, "arguments": arguments, "id": id }).to_string();
        line.push('\n');
        let fds: Vec<i32> = fd.iter().map(|fd| fd.as_raw_fd()).collect();
        let control: &[ControlMessage<'_>] =
            if fds.is_empty() { &[] } else { &[ControlMessage::ScmRights(&fds)] };
        let sent = sendmsg::<()>(
            self.socket.as_raw_fd(),
            &[IoSlice::new(line.as_bytes())],
            control,
            MsgFlags::MSG_NOSIGNAL,
            None,
        )
        .map_err(io::Error::from)?;
        self.socket.write_all(&line.as_bytes()[sent..])?;
        Ok(())
    }

    fn answer(&mut self, command: &str, limit: Duration) -> Result<Value, QmpError> {
        let deadline = Instant::now() + limit;
        loop {
            let (mut message, bytes) = self.message(deadline, limit)?;
            if message.get("id").and_then(Value::as_str) != Some("asked") {
                self.keep_if_event(message, bytes)?;
            } else if let Some(message) = error_of(&message) {
                return Err(QmpError::Refused { command: command.to_owned(), message });
            } else {
                return Ok(message["return"].take());
            }
        }
    }

    fn keep_if_event(&mut self, mut message: Value, bytes: usize) -> Result<(), QmpError> {
        let Some(name) = message.get("event").and_then(Value::as_str).map(str::to_owned) else {
            return Ok(());
        };
        self.events_bytes += bytes;
        if self.events_bytes > EVENTS_BYTES_MAX {
            return Err(QmpError::Io(io::Error::other("a flood of events from QEMU")));
        }
        self.events.push_back((Event { name, data: message["data"].take() }, bytes));
        Ok(())
    }

    /// The next line, parsed, and its length.
    fn message(&mut self, deadline: Instant, limit: Duration) -> Result<(Value, usize), QmpError> {
        loop {
            if let Some(at) = self.received[self.scanned..].iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.received.drain(..=self.scanned + at).collect();
                self.scanned = 0;
                let message = serde_json::from_slice(&line).map_err(|error| QmpError::Io(error.into()))?;
                return Ok((message, line.len()));
            }
            self.scanned = self.received.len();
            if self.scanned > LINE_BYTES_MAX {
                return Err(QmpError::Io(io::Error::other("an endless line from QEMU")));
            }
            // No whole line is left here, so whoever polls the socket misses none.
            if Instant::now() >= deadline + TALK_MAX {
                return Err(QmpError::Timeout(limit));
            }
            self.receive(deadline, limit)?;
        }
    }

    fn receive(&mut self, deadline: Instant, limit: Duration) -> Result<(), QmpError> {
        if !crate::sys::wait_readable(self.socket.as_fd(), deadline)? {
            return Err(QmpError::Timeout(limit));
        }
        let mut buffer = [0u8; 8192];
        match self.socket.read(&mut buffer) {
            Ok(0) => Err(QmpError::Closed),
            Ok(count) => {
                self.received.extend_from_slice(&buffer[..count]);
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Err(QmpError::Closed),
            Err(error) => Err(error.into()),
        }
    }
}

/// QEMU's description, if the message is an error.
fn error_of(message: &Value) -> Option<String> {
    let error = message.get("error")?;
    Some(error.get("desc").and_then(Value::as_str).unwrap_or("no description").to_owned())
}

impl AsFd for Qmp {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (Qmp, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Qmp::start(ours).unwrap(), theirs)
    }

    const SOON: Duration = Duration::from_secs(5);

    #[test]
    fn events_before_the_answer_are_kept_in_order() {
        let (mut qmp, mut qemu) = pair();
        qemu.write_all(b"{\"QMP\":{}}\n{\"return\":{},\"id\":\"hello\"}\n{\"event\":\"A\"}\n").unwrap();
        qemu.write_all(b"{\"event\":\"B\",\"data\":{\"x\":1}}\n{\"return\":{\"n\":7},\"id\":\"asked\"}\n")
            .unwrap();
        assert_eq!(qmp.execute("query-x", json!({}), SOON).unwrap()["n"], 7);
        assert_eq!(qmp.next_event(SOON).unwrap().name, "A");
        assert_eq!(qmp.pending_event().unwrap().unwrap().data["x"], 1);
        assert_eq!(qmp.pending_event().unwrap(), None);
    }

    #[test]
    fn errors_silence_and_the_end_are_told_apart() {
        let (mut qmp, mut qemu) = pair();
        qemu.write_all(b"{\"error\":{\"desc\":\"no such thing\"},\"id\":\"asked\"}\n").unwrap();
        let error = qmp.execute("frob", json!({}), SOON).unwrap_err();
        assert_eq!(error.to_string(), "frob: no such thing");
        let error = qmp.execute("frob", json!({}), Duration::from_millis(10)).unwrap_err();
        assert!(matches!(error, QmpError::Timeout(_)), "{error}");
        drop(qemu);
        assert!(matches!(qmp.next_event(SOON), Err(QmpError::Closed | QmpError::Io(_))));
    }

    /// A QEMU that says the same for as long as it is listened to.
    fn flood(mut qemu: UnixStream, line: &'static [u8]) -> std::thread::JoinHandle<()> {
        std::thread::spawn(move || {
            let lines = line.repeat(100);
            while qemu.write_all(&lines).is_ok() {}
        })
    }

    #[test]
    fn events_that_nobody_asked_for_are_kept_up_to_a_limit() {
        let (mut qmp, qemu) = pair();
        let flood = flood(qemu, b"{\"event\":\"A\"}\n");
        let error = qmp.execute("query-x", json!({}), SOON).unwrap_err();
        assert!(error.to_string().contains("flood of events"), "{error}");
        assert!(qmp.events_bytes <= EVENTS_BYTES_MAX + LINE_BYTES_MAX);
        drop(qmp);
        flood.join().unwrap();
    }

    #[test]
    fn a_qemu_that_never_stops_talking_is_not_listened_to_beyond_the_limit() {
        let (mut qmp, qemu) = pair();
        let flood = flood(qemu, b"{}\n");
        let error = qmp.execute("query-x", json!({}), Duration::from_millis(200)).unwrap_err();
        assert!(matches!(error, QmpError::Timeout(_)), "{error}");
        let error = qmp.next_event(Duration::from_millis(200)).unwrap_err();
        assert!(matches!(error, QmpError::Timeout(_)), "{error}");
        assert_eq!(qmp.pending_event().unwrap(), None, "what is there already ends too");
        drop(qmp);
        flood.join().unwrap();
    }

    #[test]
    fn an_endless_line_is_refused() {
        let (mut qmp, mut qemu) = pair();
        let flood = std::thread::spawn(move || while qemu.write_all(&[b'x'; 4096]).is_ok() {});
        assert!(matches!(qmp.next_event(SOON), Err(QmpError::Io(_))));
        drop(qmp);
        flood.join().unwrap();
    }
}
