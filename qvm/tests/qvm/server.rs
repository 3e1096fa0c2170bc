//! The tools against a server on a real socket, which answers from a table and keeps what it was asked.

use std::collections::HashMap;
use std::io::Write;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use admin_api::{Exception, Kind, Reply, Request};
use nix::sys::signal::Signal;

/// Requests as `METHOD+ARGUMENT DESTINATION PAYLOAD`, without what is empty.
type Asked = Arc<Mutex<Vec<String>>>;

pub struct Server {
    pub folder: tempfile::TempDir,
    asked: Asked,
}

/// How long an answer takes that takes its time: long enough to be interrupted.
const LATE: Duration = Duration::from_millis(500);

/// What a line of a table is answered: `!KIND MESSAGE` is an exception, `!` a connection that is closed, `~TEXT` an answer that comes late.
fn answer(text: &str) -> Vec<u8> {
    if let Some(text) = text.strip_prefix('~') {
        thread::sleep(LATE);
        return answer(text);
    }
    match text.strip_prefix('!') {
        None => Reply::Ok(text.into()).encode(),
        Some("") => Vec::new(),
        Some(failure) => {
            let (kind, message) = failure.split_once(' ').unwrap();
            Reply::Exception(Exception::new(Kind::from_name(kind), message)).encode()
        }
    }
}

fn line(request: &Request) -> String {
    let Request { method, argument, destination, payload, .. } = request;
    let mut line = method.clone();
    if !argument.is_empty() {
        line += &format!("+{argument}");
    }
    line += &format!(" {destination}");
    if !payload.is_empty() {
        line += &format!(" {}", String::from_utf8_lossy(payload));
    }
    line
}

impl Server {
    /// A server that answers these requests so; several answers to the same one are given in turn, the last again and again.
    pub fn new(table: &[(&str, &str)]) -> Server {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("api.sock")).unwrap();
        let asked = Asked::default();
        let mut answers: HashMap<String, Vec<String>> = HashMap::new();
        for (request, answer) in table.iter().rev() {
            answers.entry(request.to_string()).or_default().push(answer.to_string());
        }
        let log = Arc::clone(&asked);
        thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let request = Request::read(&stream).unwrap().unwrap();
                assert_eq!(request.source, "dom0");
                let line = line(&request);
                log.lock().unwrap().push(line.clone());
                let left = answers.get_mut(&line);
                let text = match left {
                    Some(left) if left.len() > 1 => left.pop().unwrap(),
                    Some(left) => left[0].clone(),
                    None => format!("!ProtocolError nobody expects {line}"),
                };
                let _ = stream.write_all(&answer(&text));
            }
        });
        Server { folder, asked }
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("api.sock")
    }

    pub fn command(&self, tool: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_qvm"));
        command.arg(tool).env("DISPVM_API_SOCKET", self.socket()).stdin(Stdio::null());
        command
    }

    /// Runs a tool with arguments divided by spaces.
    pub fn run(&self, line: &str) -> Ended {
        let mut words = line.split(' ');
        let tool = words.next().unwrap();
        Ended::of(self.command(tool).args(words).output().unwrap())
    }

    /// Runs a tool, and sends it a signal while it waits for the answer to this request.
    pub fn interrupt(&self, command: &mut Command, request: &str, signal: Signal) -> Ended {
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        while !self.asked.lock().unwrap().iter().any(|line| line == request) {
            assert!(Instant::now() < deadline, "{request} is not asked");
            thread::sleep(Duration::from_millis(2));
        }
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(child.id().try_into().unwrap()), signal).unwrap();
        Ended::of(child.wait_with_output().unwrap())
    }

    /// What was asked since the last time, but for the list of qubes.
    pub fn asked(&self) -> Vec<String> {
        let mut asked = std::mem::take(&mut *self.asked.lock().unwrap());
        asked.retain(|line| line != "admin.vm.List dom0");
        asked
    }
}

#[derive(Debug, PartialEq)]
pub struct Ended {
    pub status: i32,
    pub out: String,
    pub err: String,
}

impl Ended {
    pub fn of(output: Output) -> Ended {
        Ended {
            status: output.status.code().unwrap(),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// It did this, and said nothing on standard error.
    pub fn is(&self, status: i32, out: &str) {
        assert_eq!((self.status, &self.out[..], &self.err[..]), (status, out, ""));
    }

    /// It failed so, the last line of standard error being this.
    pub fn fails(&self, status: i32, last: &str) {
        assert_eq!(
            (self.status, &self.out[..], self.err.lines().last()),
            (status, "", Some(last)),
            "{}",
            self.err
        );
    }
}
