//! The two ends of a data channel: bytes in, events out; bytes and ends in, messages out.
//!
//! Invariants:
//! - Nothing is buffered: data is handed on as it comes, in pieces of a message, and a hostile length costs no memory.
//! - Each end says `Hello` first and sends nothing more before it heard the other's ([`WireError::OutOfTurn`]).
//! - A stream ends with a message of no bytes, once; the exit code is the last message of a service, and both its ends come before it.
//! - From the peer: data after its stream's end, and what a client has no business to say (stderr, an exit code), goes nowhere, as
//!   in libqrexec/remote.c. Either of the two data kinds is taken as the peer's stream, as there. A short exit code is 255.

use super::decoder::{take, Gather};
use super::message::{kind, put, Header, Rules, HEADER_BYTES};
use super::{Version, WireError};

/// What the stock client makes of an exit code of less than four bytes.
const EXIT_UNREADABLE: i32 = 255;

/// What a client hears.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FromService<'a> {
    /// The first event: both may send now.
    Agreed(Version),
    /// A piece of the output, never empty.
    Stdout(&'a [u8]),
    /// No more output.
    StdoutEof,
    /// A piece of what it complains, never empty.
    Stderr(&'a [u8]),
    /// No more complaints.
    StderrEof,
    /// It is over, whatever ends came before. The status of a process is its low 8 bits.
    Exit(i32),
}

/// What a service hears.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FromClient<'a> {
    /// The first event: both may send now.
    Agreed(Version),
    /// A piece of the input, never empty.
    Stdin(&'a [u8]),
    /// No more input.
    StdinEof,
}

/// The end that asked for the call.
#[derive(Debug)]
pub struct ClientEnd {
    reader: Reader,
    stdin_open: bool,
    stdout_open: bool,
    stderr_open: bool,
    exited: bool,
}

/// The end where the service runs.
#[derive(Debug)]
pub struct ServiceEnd {
    reader: Reader,
    stdin_open: bool,
    stdout_open: bool,
    stderr_open: bool,
    exited: bool,
}

impl ClientEnd {
    /// A channel's client, which offers `ours`; its `Hello` is appended to `out`.
    pub fn new(ours: Version, out: &mut Vec<u8>) -> Self {
        let reader = Reader::new(ours, out);
        Self { reader, stdin_open: true, stdout_open: true, stderr_open: true, exited: false }
    }

    /// Takes bytes off the front of `input`, up to the next event. `None`: all of `input` is taken, more is needed.
    pub fn receive<'a>(&mut self, input: &mut &'a [u8]) -> Result<Option<FromService<'a>>, WireError> {
        while let Some(piece) = self.reader.next(input)? {
            let event = match piece {
                _ if self.exited => continue,
                Piece::Hello(version) => FromService::Agreed(version),
                Piece::Bytes(kind::DATA_STDERR, bytes) if self.stderr_open => FromService::Stderr(bytes),
                Piece::End(kind::DATA_STDERR) if self.stderr_open => {
                    self.stderr_open = false;
                    FromService::StderrEof
                }
                Piece::Bytes(kind::DATA_STDIN | kind::DATA_STDOUT, bytes) if self.stdout_open => {
                    FromService::Stdout(bytes)
                }
                Piece::End(kind::DATA_STDIN | kind::DATA_STDOUT) if self.stdout_open => {
                    self.stdout_open = false;
                    FromService::StdoutEof
                }
                Piece::Exit(code) => {
                    (self.exited, self.stdin_open) = (true, false);
                    FromService::Exit(code)
                }
                Piece::Bytes(..) | Piece::End(_) => continue,
            };
            return Ok(Some(event));
        }
        Ok(None)
    }

    /// Appends input for the service, in as many messages as it takes.
    pub fn stdin(&mut self, bytes: &[u8], out: &mut Vec<u8>) -> Result<(), WireError> {
        self.reader.send(self.stdin_open, kind::DATA_STDIN, bytes, out)
    }

    /// Appends the end of the input, unless it is over already.
    pub fn stdin_eof(&mut self, out: &mut Vec<u8>) -> Result<(), WireError> {
        self.reader.end(&mut self.stdin_open, kind::DATA_STDIN, out)
    }

    /// Whether input can still be sent: agreed, not ended, and the service runs.
    pub fn takes_stdin(&self) -> bool {
        self.reader.agreed.is_some() && self.stdin_open
    }

    /// Whether the service's exit code has come; a channel that closes before that broke off.
    pub fn finished(&self) -> bool {
        self.exited
    }
}

impl ServiceEnd {
    /// A channel's service, which offers `ours`; its `Hello` is appended to `out`.
    pub fn new(ours: Version, out: &mut Vec<u8>) -> Self {
        let reader = Reader::new(ours, out);
        Self { reader, stdin_open: true, stdout_open: true, stderr_open: true, exited: false }
    }

    /// Takes bytes off the front of `input`, up to the next event. `None`: all of `input` is taken, more is needed.
    pub fn receive<'a>(&mut self, input: &mut &'a [u8]) -> Result<Option<FromClient<'a>>, WireError> {
        while let Some(piece) = self.reader.next(input)? {
            let event = match piece {
                Piece::Hello(version) => FromClient::Agreed(version),
                Piece::Bytes(kind::DATA_STDIN | kind::DATA_STDOUT, bytes) if self.stdin_open => {
                    FromClient::Stdin(bytes)
                }
                Piece::End(kind::DATA_STDIN | kind::DATA_STDOUT) if self.stdin_open => {
                    self.stdin_open = false;
                    FromClient::StdinEof
                }
                Piece::Bytes(..) | Piece::End(_) | Piece::Exit(_) => continue,
            };
            return Ok(Some(event));
        }
        Ok(None)
    }

    /// Appends output, in as many messages as it takes.
    pub fn stdout(&mut self, bytes: &[u8], out: &mut Vec<u8>) -> Result<(), WireError> {
        self.reader.send(self.stdout_open, kind::DATA_STDOUT, bytes, out)
    }

    /// Appends the end of the output, unless it is over already.
    pub fn stdout_eof(&mut self, out: &mut Vec<u8>) -> Result<(), WireError> {
        self.reader.end(&mut self.stdout_open, kind::DATA_STDOUT, out)
    }

    /// Appends complaints, in as many messages as it takes.
    pub fn stderr(&mut self, bytes: &[u8], out: &mut Vec<u8>) -> Result<(), WireError> {
        self.reader.send(self.stderr_open, kind::DATA_STDERR, bytes, out)
    }

    /// Appends the end of the complaints, unless they are over already.
    pub fn stderr_eof(&mut self, out: &mut Vec<u8>) -> Result<(), WireError> {
        self.reader.end(&mut self.stderr_open, kind::DATA_STDERR, out)
    }

    /// Appends the ends that are missing and the exit code; nothing may be sent after it.
    pub fn exit(&mut self, code: i32, out: &mut Vec<u8>) -> Result<(), WireError> {
        if self.exited {
            return Err(WireError::OutOfTurn("the exit code is said already"));
        }
        self.stdout_eof(out)?;
        self.stderr_eof(out)?;
        put(out, kind::DATA_EXIT_CODE, &code.to_le_bytes());
        self.exited = true;
        Ok(())
    }

    /// Whether the exit code is sent.
    pub fn finished(&self) -> bool {
        self.exited
    }
}

/// What stands on the wire, whoever says it.
enum Piece<'a> {
    Hello(Version),
    Bytes(u32, &'a [u8]),
    End(u32),
    Exit(i32),
}

/// What both ends share: the handshake, and where in a message we are.
#[derive(Debug)]
struct Reader {
    ours: Version,
    agreed: Option<Version>,
    header: Gather<HEADER_BYTES>,
    /// The kind of the message under way, and the bytes of it that are to come.
    current: Option<(u32, usize)>,
    /// The number that a `Hello` or an exit code begins with.
    word: Gather<4>,
    number: Option<[u8; 4]>,
    broken: Option<WireError>,
}

impl Reader {
    fn new(ours: Version, out: &mut Vec<u8>) -> Self {
        ours.encode_hello(out);
        let (header, word) = (Gather::default(), Gather::default());
        Self { ours, agreed: None, header, current: None, word, number: None, broken: None }
    }

    fn next<'a>(&mut self, input: &mut &'a [u8]) -> Result<Option<Piece<'a>>, WireError> {
        if let Some(error) = &self.broken {
            return Err(error.clone());
        }
        let piece = self.piece(input);
        piece.inspect_err(|error| self.broken = Some(error.clone()))
    }

    fn piece<'a>(&mut self, input: &mut &'a [u8]) -> Result<Option<Piece<'a>>, WireError> {
        loop {
            let Some((kind, left)) = self.current else {
                let Some(bytes) = self.header.take(input) else { return Ok(None) };
                let header = Header::parse(bytes);
                match self.agreed.map_or(Rules::Hello, Rules::Data).check(header)? {
                    0 if header.kind == kind::DATA_EXIT_CODE => {
                        return Ok(Some(Piece::Exit(EXIT_UNREADABLE)))
                    }
                    0 => return Ok(Some(Piece::End(header.kind))),
                    length => self.current = Some((header.kind, length)),
                }
                continue;
            };
            if input.is_empty() {
                return Ok(None);
            }
            let bytes = take(input, left);
            let left = left - bytes.len();
            self.current = (left > 0).then_some((kind, left));
            if kind != kind::HELLO && kind != kind::DATA_EXIT_CODE {
                return Ok(Some(Piece::Bytes(kind, bytes)));
            }
            if self.number.is_none() {
                self.number = self.word.take(&mut &bytes[..]);
            }
            if left == 0 {
                return self.number_is_whole(kind).map(Some);
            }
        }
    }

    /// The end of a `Hello` or of an exit code.
    fn number_is_whole<'a>(&mut self, kind: u32) -> Result<Piece<'a>, WireError> {
        self.word = Gather::default();
        let number = self.number.take();
        if kind == kind::DATA_EXIT_CODE {
            return Ok(Piece::Exit(number.map_or(EXIT_UNREADABLE, i32::from_le_bytes)));
        }
        let version = self.ours.agree(number.map_or(0, u32::from_le_bytes))?;
        self.agreed = Some(version);
        Ok(Piece::Hello(version))
    }

    fn send(&self, open: bool, kind: u32, bytes: &[u8], out: &mut Vec<u8>) -> Result<(), WireError> {
        let version = self.agreed.ok_or(WireError::OutOfTurn("the peer's Hello has not come yet"))?;
        if !open {
            return Err(WireError::OutOfTurn("the stream has ended"));
        }
        for chunk in bytes.chunks(version.chunk_bytes_max()) {
            put(out, kind, chunk);
        }
        Ok(())
    }

    fn end(&self, open: &mut bool, kind: u32, out: &mut Vec<u8>) -> Result<(), WireError> {
        self.agreed.ok_or(WireError::OutOfTurn("the peer's Hello has not come yet"))?;
        if std::mem::replace(open, false) {
            put(out, kind, &[]);
        }
        Ok(())
    }
}
