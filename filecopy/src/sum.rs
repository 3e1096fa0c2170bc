//! A stream whose checksum is taken as it passes.

use std::io::{self, Read, Write};

/// A reader or writer, and the CRC-32 of what went through it.
pub(crate) struct Summed<S> {
    stream: S,
    sum: crc32fast::Hasher,
}

impl<S> Summed<S> {
    pub(crate) fn new(stream: S) -> Summed<S> {
        Summed { stream, sum: crc32fast::Hasher::new() }
    }

    pub(crate) fn crc32(&self) -> u32 {
        self.sum.clone().finalize()
    }
}

impl<S: Read> Read for Summed<S> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let len = self.stream.read(bytes)?;
        self.sum.update(bytes.get(..len).unwrap_or_default());
        Ok(len)
    }
}

impl<S: Write> Write for Summed<S> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let len = self.stream.write(bytes)?;
        self.sum.update(bytes.get(..len).unwrap_or_default());
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}
