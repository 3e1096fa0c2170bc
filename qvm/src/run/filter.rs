//! Between a disposable and a terminal: no byte that a terminal obeys passes, as `qrexec-client -t -T` has it for qubes
//! (QubesOS/qubes-core-qrexec, libqrexec, do_replace_chars). Who reads it may be deceived no further than by words.

use std::io::{self, Read, Write};

/// What stands for a byte that does not pass.
const REPLACEMENT: u8 = b'_';

/// Whether the byte is printable ASCII, or moves the cursor no further than text does.
fn passes(byte: u8) -> bool {
    matches!(byte, b' '..=b'~' | b'\t' | b'\n' | b'\r' | 0x07 | 0x08)
}

/// Copies until the end, or until nobody takes it.
pub fn copy(mut from: impl Read, mut to: impl Write) -> io::Result<()> {
    let mut piece = [0; 4096];
    loop {
        let len = match from.read(&mut piece) {
            Ok(0) => return Ok(()),
            Ok(len) => len,
            Err(err) if err.kind() == io::ErrorKind::Interrupted => continue,
            Err(err) => return Err(err),
        };
        let piece = piece.get_mut(..len).unwrap_or_default();
        piece.iter_mut().filter(|byte| !passes(**byte)).for_each(|byte| *byte = REPLACEMENT);
        to.write_all(piece)?;
        to.flush()?;
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn no_byte_passes_that_a_terminal_obeys() {
        let all: Vec<u8> = (0..=255).collect();
        let mut out = Vec::new();
        super::copy(&all[..], &mut out).unwrap();
        assert_eq!(out.len(), 256);
        assert!(out.iter().all(|byte| !byte.is_ascii_control() || b"\x07\x08\t\n\r".contains(byte)));
        assert!(out.is_ascii());
        let mut text = Vec::new();
        super::copy(&b"a\x1b[31mb\xc2\x9bc\n"[..], &mut text).unwrap();
        assert_eq!(text, b"a_[31mb__c\n");
    }
}
