//! What keeps a service's output from steering the caller's terminal: bytes that are neither printable ASCII nor harmless become `_`
//! (QubesOS/qubes-core-qrexec, libqrexec/replace.c 26376b30).

use std::io::{self, IsTerminal, Read, Write};

/// Bytes read at once: a pipe's worth.
const COPY_BYTES: usize = 64 << 10;

/// Whether a stream is filtered: as asked for, else if it is a terminal.
pub fn wanted(asked: Option<bool>, stream: &impl IsTerminal) -> bool {
    asked.unwrap_or_else(|| stream.is_terminal())
}

/// Copies all there is, as it comes.
pub fn copy(mut from: impl Read, mut to: impl Write, filtered: bool) -> io::Result<()> {
    let mut buffer = vec![0; COPY_BYTES];
    loop {
        let count = match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            read => read?,
        };
        let Some(bytes) = buffer.get_mut(..count) else { return Ok(()) };
        if filtered {
            bytes.iter_mut().filter(|byte| !is_harmless(**byte)).for_each(|byte| *byte = b'_');
        }
        to.write_all(bytes)?;
        to.flush()?;
    }
}

fn is_harmless(byte: u8) -> bool {
    const BELL: u8 = 7;
    const BACKSPACE: u8 = 8;
    matches!(byte, b' '..=b'~' | b'\t' | b'\n' | b'\r' | BELL | BACKSPACE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_harmless_passes_the_filter() {
        let mut out = Vec::new();
        copy(&b"a\x1b[2J\x9b~\x7f\xc3\xa4\t\n\r\x07\x08\0"[..], &mut out, true).expect("copies");
        assert_eq!(out, b"a_[2J_~___\t\n\r\x07\x08_");
        let all: Vec<u8> = (0..=255).collect();
        out.clear();
        copy(&all[..], &mut out, false).expect("copies");
        assert_eq!(out, all);
    }
}
