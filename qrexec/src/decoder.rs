//! Bytes in, frames out.
//!
//! Invariants: the decoder holds at most one incomplete frame. Its buffer grows with the bytes that came, not with the length that
//! was announced. After an error it gives the same error for ever: a stream out of step has no next frame.

use crate::frame::Header;
use crate::{ProtocolError, RawFrame, HEADER_BYTES};

/// An incremental decoder; how the bytes are split between calls makes no difference.
#[derive(Debug, Default)]
pub struct Decoder {
    header: [u8; HEADER_BYTES],
    header_len: usize,
    current: Option<Header>,
    payload: Vec<u8>,
    broken: Option<ProtocolError>,
}

impl Decoder {
    /// A decoder at a frame's boundary.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes bytes off the front of `input`, up to the end of one frame. `None`: all of `input` is taken, more is needed.
    ///
    /// ```
    /// # let mut decoder = qrexec::Decoder::new();
    /// # let bytes = Vec::new();
    /// let mut input = &bytes[..];
    /// while let Some(raw) = decoder.next(&mut input)? {
    ///     let frame = qrexec::HostFrame::parse(raw)?;
    /// }
    /// # Ok::<(), qrexec::ProtocolError>(())
    /// ```
    pub fn next(&mut self, input: &mut &[u8]) -> Result<Option<RawFrame>, ProtocolError> {
        if let Some(error) = &self.broken {
            return Err(error.clone());
        }
        let Some(header) = self.take_header(input)? else { return Ok(None) };
        let missing = header.length - self.payload.len();
        self.payload.extend_from_slice(take(input, missing));
        if self.payload.len() < header.length {
            return Ok(None);
        }
        self.current = None;
        Ok(Some(RawFrame {
            kind: header.kind,
            stream: header.stream,
            payload: std::mem::take(&mut self.payload),
        }))
    }

    /// Whether the bytes so far end with a whole frame.
    pub fn at_boundary(&self) -> bool {
        self.header_len == 0 && self.current.is_none()
    }

    fn take_header(&mut self, input: &mut &[u8]) -> Result<Option<Header>, ProtocolError> {
        if let Some(header) = self.current {
            return Ok(Some(header));
        }
        let bytes = take(input, HEADER_BYTES - self.header_len);
        self.header[self.header_len..self.header_len + bytes.len()].copy_from_slice(bytes);
        self.header_len += bytes.len();
        if self.header_len < HEADER_BYTES {
            return Ok(None);
        }
        self.header_len = 0;
        let header = Header::parse(&self.header).inspect_err(|error| self.broken = Some(error.clone()))?;
        self.current = Some(header);
        Ok(Some(header))
    }
}

/// Splits up to `count` bytes off the front of `input`.
fn take<'a>(input: &mut &'a [u8], count: usize) -> &'a [u8] {
    let (taken, rest) = input.split_at(count.min(input.len()));
    *input = rest;
    taken
}
