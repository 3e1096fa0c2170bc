//! What a client asks. A request is decoded whole, after the client has shut its side: only then is its end known.

use std::io::{self, Read};

use crate::error::{DecodeError, EncodeError};
use crate::ADMIN_VM;

/// Bytes of a request, header and payload together. qubesd's own limit (`QubesDaemonProtocol.buffer_size`): whoever sends
/// more is hung up on. Volumes' data does not go through this socket.
pub const REQUEST_BYTES_MAX: usize = 65536;

/// The one kind of destination there is, but for `keyword adminvm`.
const BY_NAME: &str = "name";

/// A call of a method.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// What to do: `admin.vm.property.Set`.
    pub method: String,
    /// What with: a property's name, a volume's, a class; empty for most.
    pub argument: String,
    /// The qube that asks. On the host's own socket it is what the peer says, and the peer is trusted.
    pub source: String,
    /// The qube it is about, `dom0` for what is about none.
    pub destination: String,
    /// The value, the rules, the new qube's name and label; empty for most.
    pub payload: Vec<u8>,
}

impl Request {
    /// A call from the host, without argument and payload.
    pub fn new(method: impl Into<String>, destination: impl Into<String>) -> Request {
        Request {
            method: method.into(),
            argument: String::new(),
            source: ADMIN_VM.into(),
            destination: destination.into(),
            payload: Vec::new(),
        }
    }

    /// The same with an argument.
    pub fn argument(mut self, argument: impl Into<String>) -> Request {
        self.argument = argument.into();
        self
    }

    /// The same with a payload.
    pub fn payload(mut self, payload: impl Into<Vec<u8>>) -> Request {
        self.payload = payload.into();
        self
    }

    /// The bytes for the socket. The `+` stands there without an argument too, as the stock client has it.
    pub fn encode(&self) -> Result<Vec<u8>, EncodeError> {
        let parts = [
            ("method", &self.method, is_method(self.method.as_bytes())),
            ("argument", &self.argument, is_word(self.argument.as_bytes())),
            ("source", &self.source, is_name(self.source.as_bytes())),
            ("destination", &self.destination, is_name(self.destination.as_bytes())),
        ];
        if let Some((part, value, _)) = parts.into_iter().find(|(.., fine)| !fine) {
            return Err(EncodeError::Header { part, value: value.clone() });
        }
        let Request { method, argument, source, destination, payload } = self;
        let mut bytes = format!("{method}+{argument} {source} {BY_NAME} {destination}\0").into_bytes();
        bytes.extend_from_slice(payload);
        match bytes.len() {
            0..=REQUEST_BYTES_MAX => Ok(bytes),
            bytes => Err(EncodeError::TooLong { bytes, limit: REQUEST_BYTES_MAX }),
        }
    }

    /// A whole request, as it came up to the end of the stream.
    pub fn decode(bytes: &[u8]) -> Result<Request, DecodeError> {
        if bytes.len() > REQUEST_BYTES_MAX {
            return Err(DecodeError::TooLong { what: "request", limit: REQUEST_BYTES_MAX });
        }
        let end = bytes.iter().position(|&byte| byte == 0).ok_or(wrong("has no end (a zero byte)"))?;
        let (header, payload) = (&bytes[..end], &bytes[end + 1..]);
        let mut words = header.splitn(4, |&byte| byte == b' ');
        let mut next = || words.next().ok_or(wrong("has fewer than four words"));
        let (call, source, kind, destination) = (next()?, next()?, next()?, next()?);
        let plus = call.iter().position(|&byte| byte == b'+');
        let (method, argument) = match plus {
            Some(plus) => (&call[..plus], &call[plus + 1..]),
            None => (call, &[][..]),
        };
        let destination = match (kind, destination) {
            (b"keyword", b"adminvm") => ADMIN_VM.as_bytes(),
            (kind, name) if kind == BY_NAME.as_bytes() => name,
            _ => return Err(wrong("names its destination by other than a name")),
        };
        Ok(Request {
            method: text(method, is_method, "has no proper method")?,
            argument: text(argument, is_word, "has an argument that is not printable ASCII")?,
            source: text(source, is_name, "has no proper source")?,
            destination: text(destination, is_name, "has no proper destination")?,
            payload: payload.to_vec(),
        })
    }

    /// Reads one request up to the end of the stream. `Err` inside `Ok`: the peer said something that is no request.
    pub fn read(stream: impl Read) -> io::Result<Result<Request, DecodeError>> {
        let mut bytes = Vec::new();
        stream.take(REQUEST_BYTES_MAX as u64 + 1).read_to_end(&mut bytes)?;
        Ok(Request::decode(&bytes))
    }
}

fn wrong(wrong: &'static str) -> DecodeError {
    DecodeError::malformed("request header", wrong)
}

fn text(bytes: &[u8], fine: fn(&[u8]) -> bool, otherwise: &'static str) -> Result<String, DecodeError> {
    match std::str::from_utf8(bytes) {
        Ok(text) if fine(bytes) => Ok(text.to_owned()),
        _ => Err(wrong(otherwise)),
    }
}

/// Printable, and no space: what the header can hold at all.
fn is_word(bytes: &[u8]) -> bool {
    bytes.iter().all(u8::is_ascii_graphic)
}

fn is_name(bytes: &[u8]) -> bool {
    !bytes.is_empty() && is_word(bytes)
}

fn is_method(bytes: &[u8]) -> bool {
    is_name(bytes) && !bytes.contains(&b'+')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bytes(request: &Request) -> Vec<u8> {
        request.encode().unwrap()
    }

    #[test]
    fn it_is_what_the_stock_client_sends() {
        assert_eq!(bytes(&Request::new("admin.vm.List", "dom0")), b"admin.vm.List+ dom0 name dom0\0");
        let set = Request::new("admin.vm.property.Set", "work").argument("netvm").payload("sys-net");
        assert_eq!(bytes(&set), b"admin.vm.property.Set+netvm dom0 name work\0sys-net");
    }

    #[test]
    fn what_other_clients_may_send_is_understood() {
        let plain = Request::decode(b"admin.vm.List dom0 name dom0\0").unwrap();
        assert_eq!(plain, Request::new("admin.vm.List", "dom0"));
        let keyword = Request::decode(b"admin.vm.List+ sys-gui keyword adminvm\0").unwrap();
        assert_eq!((&keyword.source[..], &keyword.destination[..]), ("sys-gui", "dom0"));
        let plus = Request::decode(b"admin.vm.device.pci.Attach+dom0+00:1f.3 dom0 name work\0a\0b").unwrap();
        assert_eq!((&plus.argument[..], &plus.payload[..]), ("dom0+00:1f.3", &b"a\0b"[..]));
    }

    #[test]
    fn what_is_no_request_is_refused_by_name() {
        for (bytes, part) in [
            (&b"admin.vm.List+ dom0 name dom0"[..], "no end"),
            (b"\0", "fewer"),
            (b"admin.vm.List+ dom0 name\0", "fewer"),
            (b"admin.vm.List+ dom0 keyword dispvm\0", "other than a name"),
            (b"admin.vm.List+ dom0 NAME dom0\0", "other than a name"),
            (b"+x dom0 name dom0\0", "method"),
            (b"admin.vm.List+ dom0 name \0", "destination"),
            (b"admin.vm.List+ dom0 name a b\0", "destination"),
            (b"admin.vm.List+  name a\0", "source"),
            (b"admin.vm.List+\xff dom0 name a\0", "argument"),
        ] {
            let error = Request::decode(bytes).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn the_limit_is_that_of_qubesd() {
        let header = bytes(&Request::new("admin.vm.firewall.Set", "work")).len();
        let largest =
            Request::new("admin.vm.firewall.Set", "work").payload(vec![b'x'; REQUEST_BYTES_MAX - header]);
        assert_eq!(Request::decode(&bytes(&largest)).unwrap(), largest);
        let mut payload = largest.payload.clone();
        payload.push(b'x');
        let error = largest.clone().payload(payload).encode().unwrap_err();
        assert_eq!(error, EncodeError::TooLong { bytes: 65537, limit: 65536 });
        let endless = io::repeat(b'x');
        assert!(matches!(Request::read(endless).unwrap(), Err(DecodeError::TooLong { .. })));
    }

    #[test]
    fn a_name_cannot_carry_another_header() {
        let error = Request::new("admin.vm.Start", "a\0").encode().unwrap_err();
        assert!(error.to_string().contains("destination"), "{error}");
        assert!(Request::new("admin.vm.Start+x", "a").encode().is_err());
        assert!(Request::new("admin.vm.Start", "a").argument("x y").encode().is_err());
    }

    proptest! {
        #[test]
        fn a_request_comes_back(
            method in "[a-zA-Z.]{1,30}", argument in "[!-~]{0,30}", source in "[!-~]{1,30}",
            destination in "[!-~]{1,30}", payload: Vec<u8>,
        ) {
            let request = Request { method, argument, source, destination, payload };
            prop_assert_eq!(Request::decode(&bytes(&request)).unwrap(), request);
        }

        #[test]
        fn no_bytes_panic(bytes in "[a+ .\0]{0,40}|.{0,40}") {
            if let Ok(request) = Request::decode(bytes.as_bytes()) {
                let again = request.encode().unwrap();
                prop_assert_eq!(Request::decode(&again).unwrap(), request);
            }
        }
    }
}
