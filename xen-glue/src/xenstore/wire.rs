//! The xenstore protocol, as bytes (`xen/include/public/io/xs_wire.h`, `docs/misc/xenstore.txt`).
//!
//! Invariants:
//! - a message is a header of four little-endian u32 (type, request, transaction, length) and a payload of at most
//!   [`PAYLOAD_MAX`] bytes; nothing longer is made or accepted;
//! - what is parsed came from another process, some of it (values, paths of watches) from a guest: it is bounded before
//!   room is made for it, and what does not fit the grammar is an error.

use std::fmt;

use nix::errno::Errno;

/// XENSTORE_PAYLOAD_MAX.
pub const PAYLOAD_MAX: usize = 4096;
/// XENSTORE_ABS_PATH_MAX.
pub const PATH_MAX: usize = 3072;
/// Bytes of a header.
pub const HEADER_BYTES: usize = 16;

/// What a message is: `enum xsd_sockmsg_type`, those that are used here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Op {
    Directory,
    Read,
    GetPerms,
    Watch,
    Unwatch,
    TransactionStart,
    TransactionEnd,
    Introduce,
    Release,
    Write,
    Mkdir,
    Rm,
    SetPerms,
    WatchEvent,
    Error,
    Resume,
}

const OPS: [(Op, u32, &str); 16] = [
    (Op::Directory, 1, "list"),
    (Op::Read, 2, "read"),
    (Op::GetPerms, 3, "read the permissions of"),
    (Op::Watch, 4, "watch"),
    (Op::Unwatch, 5, "unwatch"),
    (Op::TransactionStart, 6, "begin a transaction for"),
    (Op::TransactionEnd, 7, "end the transaction for"),
    (Op::Introduce, 8, "introduce"),
    (Op::Release, 9, "release"),
    (Op::Write, 11, "write"),
    (Op::Mkdir, 12, "make"),
    (Op::Rm, 13, "remove"),
    (Op::SetPerms, 14, "set the permissions of"),
    (Op::WatchEvent, 15, "watch event"),
    (Op::Error, 16, "error"),
    (Op::Resume, 18, "resume"),
];

impl Op {
    /// Its number on the wire.
    pub fn number(self) -> u32 {
        OPS.iter().find(|(op, ..)| *op == self).map_or(u32::MAX, |(_, number, _)| *number)
    }

    /// The one of that number.
    pub fn from_number(number: u32) -> Option<Op> {
        OPS.iter().find(|(_, known, _)| *known == number).map(|(op, ..)| *op)
    }
}

impl fmt::Display for Op {
    /// As a verb, before a path.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(OPS.iter().find(|(op, ..)| op == self).map_or("?", |(_, _, verb)| verb))
    }
}

/// A message of either side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// What it is; a reply repeats that of its request, or is an error.
    pub op: Op,
    /// The requester's own number, repeated in the reply; 0 in watch events.
    pub request: u32,
    /// The transaction, 0 outside any.
    pub transaction: u32,
    /// Its words.
    pub payload: Vec<u8>,
}

/// Bytes that are no message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// A payload is longer than the protocol allows.
    #[error("a message of {0} bytes; at most {PAYLOAD_MAX} are allowed")]
    TooLong(usize),
    /// The type is none that is used here.
    #[error("a message of unknown type {0}")]
    UnknownType(u32),
    /// The payload is not what its type asks for.
    #[error("a malformed {0}")]
    Malformed(&'static str),
    /// A path or value the protocol has no way to say.
    #[error("{0:?} cannot be said in xenstore")]
    Unspeakable(String),
}

impl Message {
    /// Its bytes.
    pub fn to_bytes(&self) -> Result<Vec<u8>, WireError> {
        if self.payload.len() > PAYLOAD_MAX {
            return Err(WireError::TooLong(self.payload.len()));
        }
        let mut bytes = Vec::with_capacity(HEADER_BYTES + self.payload.len());
        for field in [self.op.number(), self.request, self.transaction, self.payload.len() as u32] {
            bytes.extend_from_slice(&field.to_le_bytes());
        }
        bytes.extend_from_slice(&self.payload);
        Ok(bytes)
    }

    /// The first message in `bytes` and how many bytes it took; `None` while it is not complete.
    pub fn parse(bytes: &[u8]) -> Result<Option<(Message, usize)>, WireError> {
        let Some((header, rest)) = bytes.split_first_chunk::<HEADER_BYTES>() else { return Ok(None) };
        let field =
            |at: usize| header[at * 4..].first_chunk::<4>().map_or(0, |field| u32::from_le_bytes(*field));
        let length = field(3) as usize;
        if length > PAYLOAD_MAX {
            return Err(WireError::TooLong(length));
        }
        let op = Op::from_number(field(0)).ok_or(WireError::UnknownType(field(0)))?;
        Ok(rest.get(..length).map(|payload| {
            let message = Message { op, request: field(1), transaction: field(2), payload: payload.to_vec() };
            (message, HEADER_BYTES + length)
        }))
    }

    /// What an error says. An errno nobody knows counts as EIO.
    pub fn errno(&self) -> Errno {
        let name = self.payload.split(|byte| *byte == 0).next().unwrap_or_default();
        ERRORS.iter().find(|(_, known)| known.as_bytes() == name).map_or(Errno::EIO, |(errno, _)| *errno)
    }

    /// What a watch event says: the path that changed and the token the watch was set with.
    pub fn event(&self) -> Result<Event, WireError> {
        const WHAT: WireError = WireError::Malformed("watch event");
        match strings(&self.payload).map_err(|_| WHAT)?.as_slice() {
            [path, token, ..] => Ok(Event { path: path.clone(), token: token.clone() }),
            _ => Err(WHAT),
        }
    }
}

/// `xsd_errors`: the names of errors on the wire.
pub const ERRORS: [(Errno, &str); 17] = [
    (Errno::EINVAL, "EINVAL"),
    (Errno::EACCES, "EACCES"),
    (Errno::EEXIST, "EEXIST"),
    (Errno::EISDIR, "EISDIR"),
    (Errno::ENOENT, "ENOENT"),
    (Errno::ENOMEM, "ENOMEM"),
    (Errno::ENOSPC, "ENOSPC"),
    (Errno::EIO, "EIO"),
    (Errno::ENOTEMPTY, "ENOTEMPTY"),
    (Errno::ENOSYS, "ENOSYS"),
    (Errno::EROFS, "EROFS"),
    (Errno::EBUSY, "EBUSY"),
    (Errno::EAGAIN, "EAGAIN"),
    (Errno::EISCONN, "EISCONN"),
    (Errno::E2BIG, "E2BIG"),
    (Errno::EPERM, "EPERM"),
    (Errno::EDOM, "EDOM"),
];

/// A change to something watched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// What changed: the watched path or one below it, or a special one ("@releaseDomain").
    pub path: String,
    /// Which watch.
    pub token: String,
}

/// What one domain may do with a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Nothing.
    None,
    /// Read it.
    Read,
    /// Write it.
    Write,
    /// Both.
    Both,
}

/// One entry of a node's permissions. The first entry of a list names the node's owner, who may always do all, and what
/// domains that have no entry may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Perm {
    /// The domain.
    pub domid: u16,
    /// What it may do.
    pub access: Access,
}

const ACCESS: [(Access, char); 4] =
    [(Access::None, 'n'), (Access::Read, 'r'), (Access::Write, 'w'), (Access::Both, 'b')];

impl Perm {
    /// For a domain.
    pub const fn new(domid: u16, access: Access) -> Perm {
        Perm { domid, access }
    }

    /// Reads `r7`.
    pub fn parse(text: &str) -> Result<Perm, WireError> {
        const WHAT: WireError = WireError::Malformed("permission");
        let mut letters = text.chars();
        let letter = letters.next().ok_or(WHAT)?;
        let (access, _) = ACCESS.iter().find(|(_, known)| *known == letter).ok_or(WHAT)?;
        let domid = letters.as_str().parse().map_err(|_| WHAT)?;
        Ok(Perm { domid, access: *access })
    }
}

impl fmt::Display for Perm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let letter =
            ACCESS.iter().find(|(access, _)| *access == self.access).map_or('n', |(_, letter)| *letter);
        write!(f, "{letter}{}", self.domid)
    }
}

/// Words, each ended by a NUL: what most requests and lists are.
pub fn words<'a>(words: impl IntoIterator<Item = &'a str>) -> Result<Vec<u8>, WireError> {
    let mut bytes = Vec::new();
    for word in words {
        push_word(&mut bytes, word)?;
    }
    bounded(bytes)
}

/// A path ended by a NUL and a value that is not: what WRITE takes.
pub fn path_and_value(path: &str, value: &[u8]) -> Result<Vec<u8>, WireError> {
    let mut bytes = Vec::with_capacity(path.len() + 1 + value.len());
    push_word(&mut bytes, path)?;
    bytes.extend_from_slice(value);
    bounded(bytes)
}

fn push_word(bytes: &mut Vec<u8>, word: &str) -> Result<(), WireError> {
    if word.contains('\0') {
        return Err(WireError::Unspeakable(word.to_owned()));
    }
    bytes.extend_from_slice(word.as_bytes());
    bytes.push(0);
    Ok(())
}

fn bounded(bytes: Vec<u8>) -> Result<Vec<u8>, WireError> {
    match bytes.len() {
        long if long > PAYLOAD_MAX => Err(WireError::TooLong(long)),
        _ => Ok(bytes),
    }
}

/// The words of a payload, each ended by a NUL.
pub fn strings(payload: &[u8]) -> Result<Vec<String>, WireError> {
    const WHAT: WireError = WireError::Malformed("list");
    let Some((last, words)) = payload.split_last() else { return Ok(Vec::new()) };
    if *last != 0 {
        return Err(WHAT);
    }
    let word = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).map_err(|_| WHAT);
    words.split(|byte| *byte == 0).map(word).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message() -> impl Strategy<Value = Message> {
        let op = proptest::sample::select(OPS.map(|(op, ..)| op).to_vec());
        (op, any::<u32>(), any::<u32>(), proptest::collection::vec(any::<u8>(), 0..200))
            .prop_map(|(op, request, transaction, payload)| Message { op, request, transaction, payload })
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(message in message(), tail in proptest::collection::vec(any::<u8>(), 0..40)) {
            let mut bytes = message.to_bytes().unwrap();
            let length = bytes.len();
            for short in 0..length {
                prop_assert_eq!(Message::parse(&bytes[..short]), Ok(None));
            }
            bytes.extend(tail);
            prop_assert_eq!(Message::parse(&bytes), Ok(Some((message, length))));
        }

        #[test]
        fn anything_is_read_without_harm(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            if let Ok(Some((message, used))) = Message::parse(&bytes) {
                prop_assert!(used <= bytes.len());
                let _ = (message.event(), message.errno());
            }
            let _ = strings(&bytes);
            let _ = Perm::parse(&String::from_utf8_lossy(&bytes));
        }

        #[test]
        fn words_survive(list in proptest::collection::vec("[a-z/@ ]{0,20}", 0..10)) {
            let bytes = words(list.iter().map(String::as_str)).unwrap();
            prop_assert_eq!(strings(&bytes).unwrap(), list);
        }
    }

    #[test]
    fn a_length_beyond_the_limit_is_refused_before_its_bytes_come() {
        let mut header =
            Message { op: Op::Read, request: 1, transaction: 0, payload: Vec::new() }.to_bytes().unwrap();
        header[12..16].copy_from_slice(&4097u32.to_le_bytes());
        assert_eq!(Message::parse(&header), Err(WireError::TooLong(4097)));
        let long = Message { op: Op::Write, request: 1, transaction: 0, payload: vec![0; 4097] };
        assert_eq!(long.to_bytes(), Err(WireError::TooLong(4097)));
        assert!(path_and_value("/a", &[0; 4094]).is_err());
        assert!(words(["a\0b"]).is_err());
    }

    #[test]
    fn permissions_are_a_letter_and_a_domain() {
        for text in ["n0", "r7", "w12", "b65535"] {
            assert_eq!(Perm::parse(text).unwrap().to_string(), text);
        }
        for bad in ["", "x1", "r", "r-1", "r65536", "é1"] {
            assert!(Perm::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn errors_have_names() {
        let error = |name: &str| Message { op: Op::Error, request: 1, transaction: 0, payload: name.into() };
        assert_eq!(error("EAGAIN\0").errno(), Errno::EAGAIN);
        assert_eq!(error("EWHAT\0").errno(), Errno::EIO);
    }
}
