//! The stream between host and agent, in either direction. Input: a seed u16 for how it is cut into pieces, then the stream.

use qrexec::{
    kind, Decoder, GuestFrame, HostFrame, Piece, ProtocolError, RawFrame, ReceiveWindow, SendWindow,
    HEADER_BYTES, PAYLOAD_BYTES_MAX, WINDOW_MAX,
};

use crate::take;

/// What a guest says, read by the host.
pub fn from_guest(data: &[u8]) {
    let mut windows = (SendWindow::default(), ReceiveWindow::default());
    for raw in frames(data) {
        let Ok(frame) = GuestFrame::parse(raw) else { continue };
        keep_windows(&mut windows, &frame);
        let mut again = Vec::new();
        frame.encode(&mut again);
        let said_nothing = match &frame {
            GuestFrame::Stdout { bytes, .. }
            | GuestFrame::Stderr { bytes, .. }
            | GuestFrame::CallStdin { bytes, .. } => bytes.is_empty(),
            _ => false,
        };
        let parsed: Vec<_> = decode(&[&again]).0.into_iter().map(GuestFrame::parse).collect();
        assert_eq!(parsed, if said_nothing { vec![] } else { vec![Ok(frame)] });
    }
}

/// What a host says, read by the agent.
pub fn from_host(data: &[u8]) {
    for raw in frames(data) {
        let Ok(frame) = HostFrame::parse(raw) else { continue };
        let mut again = Vec::new();
        frame.encode(&mut again).expect("what was parsed can be said again");
        let said_nothing = match &frame {
            HostFrame::Stdin { bytes, .. }
            | HostFrame::CallStdout { bytes, .. }
            | HostFrame::CallStderr { bytes, .. } => bytes.is_empty(),
            _ => false,
        };
        let parsed: Vec<_> = decode(&[&again]).0.into_iter().map(HostFrame::parse).collect();
        assert_eq!(parsed, if said_nothing { vec![] } else { vec![Ok(frame)] });
    }
}

/// The frames of a stream; cut into pieces it gives the same ones, and ends in the same error.
fn frames(mut data: &[u8]) -> Vec<RawFrame> {
    let mut state = u32::from(u16::from_le_bytes(take(&mut data))) | 1 << 16;
    let mut pieces = Vec::new();
    let mut rest = data;
    while !rest.is_empty() {
        state = state.wrapping_mul(747_796_405).wrapping_add(2_891_336_453);
        // Mostly pieces around a header's length, now and then a long one.
        let len = if state >> 29 == 0 { state >> 16 & 0xfff } else { state >> 24 & 31 } as usize;
        let (piece, left) = rest.split_at(len.min(rest.len()));
        pieces.push(piece);
        rest = left;
    }
    let (whole, error) = decode(&[data]);
    assert_eq!(decode(&pieces), (whole.clone(), error.clone()), "the pieces make a difference");
    assert_handed_on(&pieces, &whole, error.as_ref());
    let carried: usize = whole.iter().map(|frame| HEADER_BYTES + frame.payload.len()).sum();
    assert!(carried <= data.len());
    whole
}

fn decode(pieces: &[&[u8]]) -> (Vec<RawFrame>, Option<ProtocolError>) {
    let mut decoder = Decoder::new();
    let mut frames = Vec::new();
    for piece in pieces {
        let mut input = *piece;
        loop {
            match decoder.next(&mut input) {
                Ok(Some(frame)) => {
                    assert!(frame.payload.len() <= PAYLOAD_BYTES_MAX);
                    assert!(frame.payload.capacity() <= 2 * PAYLOAD_BYTES_MAX);
                    frames.push(frame);
                }
                Ok(None) => break assert!(input.is_empty()),
                Err(error) => return (frames, Some(error)),
            }
        }
    }
    (frames, None)
}

/// Data that is handed on as it comes is the same data, up to the first frame that is on the wrong stream.
fn assert_handed_on(pieces: &[&[u8]], whole: &[RawFrame], error: Option<&ProtocolError>) {
    let mut decoder = Decoder::new();
    let mut expected = Vec::new();
    whole.iter().for_each(|frame| expected.extend(data_or_frame(frame.kind, frame.stream, &frame.payload)));
    let mut heard = Vec::new();
    for piece in pieces {
        let mut input = *piece;
        loop {
            match decoder.next_piece(&mut input) {
                Ok(Some(Piece { kind, stream, bytes })) => heard.extend(data_or_frame(kind, stream, bytes)),
                Ok(None) => match decoder.next(&mut input) {
                    Ok(Some(frame)) => heard.extend(data_or_frame(frame.kind, frame.stream, &frame.payload)),
                    Ok(None) => break assert!(input.is_empty()),
                    Err(ended) => {
                        assert_eq!(Some(&ended), error);
                        return assert!(heard.starts_with(&expected));
                    }
                },
                Err(ProtocolError::Stream { .. }) => return assert!(expected.starts_with(&heard)),
                Err(ended) => {
                    assert_eq!(Some(&ended), error);
                    return assert!(heard.starts_with(&expected));
                }
            }
        }
    }
    // The rest of a frame that has not come whole.
    assert!(heard.starts_with(&expected));
}

/// Each byte of data with where it goes; of another frame, all at once.
fn data_or_frame(kind: u16, stream: u32, bytes: &[u8]) -> Vec<(u16, u32, Vec<u8>)> {
    match kind {
        kind::STDIN | kind::CALL_STDOUT | kind::CALL_STDERR => {
            bytes.iter().map(|byte| (kind, stream, vec![*byte])).collect()
        }
        _ => vec![(kind, stream, bytes.to_vec())],
    }
}

/// A hostile guest's credits and bytes leave the windows within their limits.
fn keep_windows((send, receive): &mut (SendWindow, ReceiveWindow), frame: &GuestFrame) {
    match frame {
        GuestFrame::StdinCredit { bytes, .. } => {
            let before = send.left();
            let refused = send.credit(*bytes).is_err();
            assert_eq!(send.left(), if refused { before } else { before + *bytes as usize });
            assert!(send.left() <= WINDOW_MAX as usize);
        }
        GuestFrame::Stdout { bytes, .. } | GuestFrame::Stderr { bytes, .. }
            if receive.received(bytes.len()).is_ok() =>
        {
            receive.consumed(bytes.len());
        }
        _ => {}
    }
}
