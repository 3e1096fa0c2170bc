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

/// Bytes of a stream: a data frame's, or a part of them. The stream is a command's or a call's, as the kind wants it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece<'a> {
    /// Of [`kind`](crate::kind), one that carries data.
    pub kind: u16,
    /// The command or call.
    pub stream: u32,
    /// At most [`PAYLOAD_BYTES_MAX`](crate::PAYLOAD_BYTES_MAX).
    pub bytes: &'a [u8],
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

    /// Takes bytes off the front of `input` if they are of a data frame of the host's, as many as have come of it: who hands them on need not wait for the
    /// rest, nor copy them. `None`: what comes next is for [`next`](Self::next).
    pub fn next_piece<'a>(&mut self, input: &mut &'a [u8]) -> Result<Option<Piece<'a>>, ProtocolError> {
        if let Some(error) = &self.broken {
            return Err(error.clone());
        }
        let Some(header) = self.take_header(input)? else { return Ok(None) };
        let Some((frame, streams)) = header.host_data().filter(|_| self.payload.is_empty()) else {
            return Ok(None);
        };
        streams.check(frame, header.stream)?;
        let bytes = take(input, header.length);
        if bytes.is_empty() && header.length > 0 {
            return Ok(None);
        }
        let left = header.length - bytes.len();
        self.current = (left > 0).then_some(Header { length: left, ..header });
        Ok(Some(Piece { kind: header.kind, stream: header.stream, bytes }))
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
