//! What a server answers: `0\0DATA`, an exception, or events.

use crate::error::DecodeError;
use crate::event::{Event, EVENT};
use crate::exception::Exception;

/// Bytes of a reply that a client takes. The longest there are, lists of qubes and properties, have some hundred bytes a
/// line: this is room for tens of thousands of lines.
pub const REPLY_BYTES_MAX: usize = 8 << 20;

const OK: &[u8] = b"0\0";
const EXCEPTION: &[u8] = b"2\0";

/// What a call led to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// It was carried out, and this is what it answers.
    Ok(Vec<u8>),
    /// It failed.
    Exception(Exception),
    /// Something happened; the only reply that others follow.
    Event(Event),
}

impl Reply {
    /// The bytes for the socket.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Reply::Ok(data) => [OK, data].concat(),
            Reply::Exception(exception) => [EXCEPTION, &exception.encode()].concat(),
            Reply::Event(event) => event.encode(),
        }
    }

    /// A whole reply, as it came up to the end of the stream. Of events, that is one: see [`Event::decode`] for a stream of them.
    pub fn decode(bytes: &[u8]) -> Result<Reply, DecodeError> {
        if bytes.len() > REPLY_BYTES_MAX {
            return Err(DecodeError::TooLong { what: "reply", limit: REPLY_BYTES_MAX });
        }
        if let Some(data) = bytes.strip_prefix(OK) {
            return Ok(Reply::Ok(data.to_vec()));
        }
        if let Some(fields) = bytes.strip_prefix(EXCEPTION) {
            return Exception::decode(fields).map(Reply::Exception);
        }
        if !bytes.starts_with(EVENT) {
            return Err(DecodeError::malformed("reply", "begins with none of 0, 1 and 2"));
        }
        match Event::decode(bytes)? {
            Some((event, len)) if len == bytes.len() => Ok(Reply::Event(event)),
            Some(_) => Err(DecodeError::malformed("event", "has more after its end")),
            None => Err(DecodeError::malformed("event", "has no end")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exception::Kind;
    use proptest::prelude::*;

    #[test]
    fn it_is_what_qubesd_sends() {
        assert_eq!(Reply::Ok(b"a\n".to_vec()).encode(), b"0\0a\n");
        let gone = Reply::Exception(Exception::new(Kind::VmNotFound, "No such domain: 'x'"));
        assert_eq!(gone.encode(), b"2\0QubesVMNotFoundError\0\0No such domain: 'x'\0");
        assert_eq!(Reply::decode(&gone.encode()), Ok(gone));
    }

    #[test]
    fn what_is_no_reply_is_refused() {
        for bytes in
            [&b""[..], b"0", b"3\0", b"2\0", b"2\0A\0B\0", b"2\0A\0B\0C", b"1\0a\0b\0", b"1\0a\0b\0\0x"]
        {
            assert!(Reply::decode(bytes).is_err(), "{bytes:?}");
        }
    }

    proptest! {
        #[test]
        fn an_exception_comes_back(name in "[A-Za-z]{1,20}", traceback in "[a-z\n]{0,9}", format in "[a-z%é]{0,20}",
            arguments in prop::collection::vec("[a-z0-9]{0,5}", 0..4)) {
            let reply = Reply::Exception(Exception { kind: Kind::from_name(&name), traceback, format, arguments });
            prop_assert_eq!(Reply::decode(&reply.encode()).unwrap(), reply);
        }

        #[test]
        fn no_bytes_panic(bytes in "[012]\0[a%sr\0]{0,20}|.{0,20}") {
            if let Ok(Reply::Exception(exception)) = Reply::decode(bytes.as_bytes()) {
                exception.message();
            }
        }
    }
}
