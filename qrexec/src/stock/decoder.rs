//! Bytes of a control channel in, messages out.
//!
//! Invariants: at most one incomplete message is held, in a buffer that grows with the bytes that came and never beyond the length that
//! [`Rules::check`] let through. After an error it gives the same error for ever: a stream out of step has no next message.

use super::message::{put, Header, Rules, HEADER_BYTES};
use super::WireError;

/// A message whose length is right for its kind, but which is not yet looked into.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawMessage {
    /// One of [`kind`](super::message::kind).
    pub kind: u32,
    /// As long as its kind allows.
    pub body: Vec<u8>,
}

impl RawMessage {
    /// Appends its bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        put(out, self.kind, &self.body);
    }
}

/// An incremental decoder; how the bytes are split between calls makes no difference.
#[derive(Debug)]
pub struct Decoder {
    rules: Rules,
    header: Gather<HEADER_BYTES>,
    /// The kind and the length of the message under way.
    current: Option<(u32, usize)>,
    body: Vec<u8>,
    broken: Option<WireError>,
}

impl Default for Decoder {
    fn default() -> Self {
        Self::new()
    }
}

impl Decoder {
    /// A decoder of a new channel, which must begin with a `Hello`.
    pub fn new() -> Self {
        Self { rules: Rules::Hello, header: Gather::default(), current: None, body: Vec::new(), broken: None }
    }

    /// What may come from the next message on. To call once the `Hello` has come, before the next [`next`](Self::next).
    pub fn expect(&mut self, rules: Rules) {
        self.rules = rules;
    }

    /// Takes bytes off the front of `input`, up to the end of one message. `None`: all of `input` is taken, more is needed.
    pub fn next(&mut self, input: &mut &[u8]) -> Result<Option<RawMessage>, WireError> {
        if let Some(error) = &self.broken {
            return Err(error.clone());
        }
        let Some((kind, length)) = self.take_header(input)? else { return Ok(None) };
        let piece = take(input, length - self.body.len());
        grow(&mut self.body, piece.len(), length);
        self.body.extend_from_slice(piece);
        if self.body.len() < length {
            return Ok(None);
        }
        self.current = None;
        Ok(Some(RawMessage { kind, body: std::mem::take(&mut self.body) }))
    }

    /// Whether the bytes so far end with a whole message: whether a channel that ends here ends in order.
    pub fn at_boundary(&self) -> bool {
        self.header.is_empty() && self.current.is_none()
    }

    fn take_header(&mut self, input: &mut &[u8]) -> Result<Option<(u32, usize)>, WireError> {
        if self.current.is_none() {
            let Some(bytes) = self.header.take(input) else { return Ok(None) };
            let header = Header::parse(bytes);
            let length = self.rules.check(header).inspect_err(|error| self.broken = Some(error.clone()))?;
            self.current = Some((header.kind, length));
        }
        Ok(self.current)
    }
}

/// Makes room for `more` bytes by doubling, so that pieces cost little, but never beyond `length`.
fn grow(body: &mut Vec<u8>, more: usize, length: usize) {
    let needed = body.len() + more;
    if needed > body.capacity() {
        let target = needed.max(2 * body.capacity()).min(length);
        body.reserve_exact(target - body.len());
    }
}

/// Fixed bytes that come in pieces.
#[derive(Debug)]
pub(super) struct Gather<const N: usize> {
    bytes: [u8; N],
    len: usize,
}

impl<const N: usize> Default for Gather<N> {
    fn default() -> Self {
        Self { bytes: [0; N], len: 0 }
    }
}

impl<const N: usize> Gather<N> {
    /// All `N` bytes, once they are there; the next ones begin anew.
    pub fn take(&mut self, input: &mut &[u8]) -> Option<[u8; N]> {
        for byte in take(input, N - self.len) {
            self.bytes[self.len] = *byte;
            self.len += 1;
        }
        if self.len < N {
            return None;
        }
        self.len = 0;
        Some(self.bytes)
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// Splits up to `count` bytes off the front of `input`.
pub(super) fn take<'a>(input: &mut &'a [u8], count: usize) -> &'a [u8] {
    let (taken, rest) = input.split_at(count.min(input.len()));
    *input = rest;
    taken
}
