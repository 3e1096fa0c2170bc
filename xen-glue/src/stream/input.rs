//! Bytes of a stream, counted.

use std::io::{self, Read};

use zerocopy::{FromBytes, IntoBytes};

use super::{Fault, Place, Result, StreamError};

/// Skipped and checked in pieces of this size.
const PIECE: usize = 64 << 10;

/// A stream being read: knows how far, and in which part of it.
pub struct Input<R> {
    from: R,
    offset: u64,
    place: Place,
    place_at: u64,
}

impl<R: Read> Input<R> {
    pub fn new(from: R) -> Input<R> {
        Input { from, offset: 0, place: Place::XlHeader, place_at: 0 }
    }

    /// From here on it is this part that is read.
    pub fn enter(&mut self, place: Place) {
        self.enter_at(place, self.offset);
    }

    /// The same for a part whose first bytes, from `at` on, are read already.
    pub fn enter_at(&mut self, place: Place, at: u64) {
        (self.place, self.place_at) = (place, at);
    }

    /// How far it is read, in bytes.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// An error about the part being read.
    pub fn fault(&self, fault: Fault) -> StreamError {
        StreamError { offset: self.place_at, place: self.place, fault }
    }

    pub fn fill(&mut self, bytes: &mut [u8]) -> Result<()> {
        self.from.read_exact(bytes).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => self.fault(Fault::Ends),
            _ => self.fault(Fault::Io(error)),
        })?;
        self.offset += bytes.len() as u64;
        Ok(())
    }

    /// A header.
    pub fn read<T: FromBytes + IntoBytes>(&mut self) -> Result<T> {
        let mut raw = T::new_zeroed();
        self.fill(raw.as_mut_bytes())?;
        Ok(raw)
    }

    /// So many bytes. Room is made as they come: a length alone allocates nothing.
    pub fn bytes(&mut self, length: u64) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let read = (&mut self.from).take(length).read_to_end(&mut bytes);
        read.map_err(|error| self.fault(Fault::Io(error)))?;
        self.offset += bytes.len() as u64;
        match bytes.len() as u64 == length {
            true => Ok(bytes),
            false => Err(self.fault(Fault::Ends)),
        }
    }

    /// Passes over so many bytes.
    pub fn skip(&mut self, mut length: u64) -> Result<()> {
        let mut piece = [0; PIECE];
        while length > 0 {
            let count = length.min(PIECE as u64) as usize;
            self.fill(&mut piece[..count])?;
            length -= count as u64;
        }
        Ok(())
    }

    /// Passes over what fills a body of `length` bytes up to a multiple of 8: zeros.
    pub fn padding(&mut self, length: u64) -> Result<()> {
        let mut zeros = [0; 8];
        let count = length.wrapping_neg() as usize % 8;
        self.fill(&mut zeros[..count])?;
        match zeros == [0; 8] {
            true => Ok(()),
            false => Err(self.fault(Fault::Reserved)),
        }
    }
}
