//! Reads through io_uring: the engine's only unsafe code.
//!
//! Invariants:
//! - a buffer is either the caller's or the kernel's. [`ReadRing::submit`] takes it by value, [`ReadRing::wait`] gives it back
//!   once the kernel has answered for it: no safe code can touch a buffer that the kernel may write;
//! - there are never more reads in flight than the ring has entries, so the submission queue cannot be full;
//! - a ring that is dropped first waits for every read in flight; if it cannot, their buffers are leaked rather than freed;
//! - a short read is continued until the length asked for is there; the file's end before that is `UnexpectedEof`.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::mem;
use std::os::fd::AsRawFd;

use io_uring::{opcode, types, IoUring};
use memmap2::MmapMut;
use nix::libc;

use crate::units::ByteOffset;

/// Memory that the kernel reads into.
#[derive(Debug)]
pub struct Buffer {
    index: u16,
    memory: MmapMut,
}

impl Buffer {
    /// What is in it.
    pub fn bytes(&self) -> &[u8] {
        &self.memory
    }
}

/// A queue of reads from one file.
pub struct ReadRing<'f> {
    ring: IoUring,
    file: &'f File,
    /// By the buffer's index: the reads that the kernel has.
    reads: Vec<Option<Read>>,
    in_flight: usize,
    /// Completions reaped but not yet looked at: buffer index and result.
    reaped: VecDeque<(u16, i32)>,
    registered: bool,
}

struct Read {
    buffer: Buffer,
    tag: usize,
    offset: ByteOffset,
    wanted: usize,
    done: usize,
}

impl<'f> ReadRing<'f> {
    /// A ring for at most `depth` reads of at most `len` bytes, with its buffers. Where the buffers may not be pinned
    /// (RLIMIT_MEMLOCK), they serve unregistered.
    ///
    /// Errors: the kernel has no io_uring or forbids it (`ENOSYS`, `EPERM`); too little memory.
    pub fn new(file: &'f File, depth: usize, len: usize) -> io::Result<(ReadRing<'f>, Vec<Buffer>)> {
        let depth = u16::try_from(depth.max(1)).map_err(|_| io::ErrorKind::InvalidInput)?;
        let ring = IoUring::new(depth.into())?;
        let mut buffers = (0..depth)
            .map(|index| Ok(Buffer { index, memory: MmapMut::map_anon(len.max(1))? }))
            .collect::<io::Result<Vec<_>>>()?;
        let registered = register(&ring, &mut buffers).is_ok();
        let reads = buffers.iter().map(|_| None).collect();
        Ok((ReadRing { ring, file, reads, in_flight: 0, reaped: VecDeque::new(), registered }, buffers))
    }

    /// Reads that have been submitted and not been waited for.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Begins to read `len` bytes at `offset` into `buffer`; [`ReadRing::wait`] answers with the same tag.
    ///
    /// Errors: `len` is longer than the buffer; the ring takes no more. The buffer is then dropped.
    pub fn submit(&mut self, buffer: Buffer, tag: usize, offset: ByteOffset, len: usize) -> io::Result<()> {
        if len > buffer.memory.len() || self.reads.get(usize::from(buffer.index)).is_none_or(Option::is_some)
        {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.start(Read { buffer, tag, offset, wanted: len, done: 0 })
    }

    /// Waits for any read to end; answers its tag, its buffer, and whether it has all its bytes.
    ///
    /// Errors: nothing is in flight; the ring itself fails.
    pub fn wait(&mut self) -> io::Result<(usize, Buffer, io::Result<()>)> {
        loop {
            let (index, result) = self.next_completion()?;
            let Some(mut read) = self.reads.get_mut(usize::from(index)).and_then(Option::take) else {
                continue;
            };
            self.in_flight -= 1;
            let outcome = match result {
                0 if read.done < read.wanted => Err(io::ErrorKind::UnexpectedEof.into()),
                0.. => {
                    read.done += result as usize;
                    Ok(())
                }
                _ => Err(io::Error::from_raw_os_error(-result)),
            };
            let again = match &outcome {
                Ok(()) => read.done < read.wanted,
                Err(err) => matches!(err.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)),
            };
            if !again {
                return Ok((read.tag, read.buffer, outcome));
            }
            self.start(read)?;
        }
    }

    /// Hands what is left of a read to the kernel.
    fn start(&mut self, mut read: Read) -> io::Result<()> {
        let index = read.buffer.index;
        let rest = &mut read.buffer.memory[read.done..read.wanted];
        let (at, len) = (read.offset.0 + read.done as u64, rest.len() as u32);
        let fd = types::Fd(self.file.as_raw_fd());
        let entry = if self.registered {
            opcode::ReadFixed::new(fd, rest.as_mut_ptr(), len, index).offset(at).build()
        } else {
            opcode::Read::new(fd, rest.as_mut_ptr(), len).offset(at).build()
        };
        // Moving `read` moves the handle of its mapping, not the mapped memory the entry points to.
        self.reads[usize::from(index)] = Some(read);
        self.in_flight += 1;
        // SAFETY: the entry points into `read.buffer`'s mapping, at `done..wanted`, which the slice above has checked to be within it.
        // The buffer now lies in `self.reads`, from where only `wait` takes it, after the kernel's completion for this very
        // index; `drop` waits for that completion or leaks the buffer. So the memory stays mapped, and nobody else has a
        // reference to it, for as long as the kernel may write. `file` is borrowed for 'f, so its descriptor stays open.
        let pushed = unsafe { self.ring.submission().push(&entry.user_data(index.into())) };
        if pushed.is_err() {
            self.reads[usize::from(index)] = None;
            self.in_flight -= 1;
            return Err(io::Error::other("the ring's submission queue is full"));
        }
        retry_interrupted(|| self.ring.submit()).map(drop)
    }

    fn next_completion(&mut self) -> io::Result<(u16, i32)> {
        loop {
            if let Some(completion) = self.reaped.pop_front() {
                return Ok(completion);
            }
            let completed = self.ring.completion().map(|entry| (entry.user_data() as u16, entry.result()));
            self.reaped.extend(completed);
            if self.reaped.is_empty() {
                if self.in_flight == 0 {
                    return Err(io::ErrorKind::NotFound.into());
                }
                retry_interrupted(|| self.ring.submit_and_wait(1))?;
            }
        }
    }
}

impl Drop for ReadRing<'_> {
    fn drop(&mut self) {
        while self.in_flight > 0 {
            match self.next_completion() {
                Ok((index, _)) => {
                    if self.reads.get_mut(usize::from(index)).and_then(Option::take).is_some() {
                        self.in_flight -= 1;
                    }
                }
                Err(_) => {
                    mem::forget(mem::take(&mut self.reads));
                    return;
                }
            }
        }
    }
}

/// Pins the buffers, so that the kernel need not look their pages up for every read.
fn register(ring: &IoUring, buffers: &mut [Buffer]) -> io::Result<()> {
    let vectors: Vec<libc::iovec> = buffers
        .iter_mut()
        .map(|buffer| libc::iovec {
            iov_base: buffer.memory.as_mut_ptr().cast(),
            iov_len: buffer.memory.len(),
        })
        .collect();
    // SAFETY: every vector covers exactly one live anonymous mapping. Registration makes the kernel take its own reference to
    // those pages, so a buffer dropped before the ring unmaps them here but does not free them under the kernel; and the kernel
    // writes to a registered buffer only for a read in flight, for which `start` gives the argument.
    unsafe { ring.submitter().register_buffers(&vectors) }
}

fn retry_interrupted(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn file_of(len: usize) -> (File, Vec<u8>) {
        let bytes: Vec<u8> = (0..len).map(|at| (at * 31 % 251) as u8).collect();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        (file, bytes)
    }

    /// `None`, said aloud, where io_uring is forbidden.
    fn ring_for(file: &File, depth: usize, len: usize) -> Option<(ReadRing<'_>, Vec<Buffer>)> {
        ReadRing::new(file, depth, len).inspect_err(|err| eprintln!("skipped: no io_uring here: {err}")).ok()
    }

    #[test]
    fn reads_come_back_whole_under_their_tag() {
        let (file, bytes) = file_of(100_000);
        let Some((mut ring, buffers)) = ring_for(&file, 4, 10_000) else { return };
        for (tag, buffer) in buffers.into_iter().enumerate() {
            ring.submit(buffer, tag, ByteOffset(tag as u64 * 20_000), 10_000).unwrap();
        }
        for _ in 0..4 {
            let (tag, buffer, outcome) = ring.wait().unwrap();
            outcome.unwrap();
            assert_eq!(buffer.bytes(), &bytes[tag * 20_000..][..10_000]);
        }
        assert!(ring.wait().is_err(), "nothing is in flight any more");
    }

    #[test]
    fn the_files_end_is_an_error_of_that_read() {
        let (file, _) = file_of(5_000);
        let Some((mut ring, mut buffers)) = ring_for(&file, 1, 4_096) else { return };
        ring.submit(buffers.pop().unwrap(), 7, ByteOffset(4_096), 4_096).unwrap();
        let (tag, _, outcome) = ring.wait().unwrap();
        assert_eq!((tag, outcome.unwrap_err().kind()), (7, io::ErrorKind::UnexpectedEof));
    }

    #[test]
    fn a_read_longer_than_its_buffer_is_refused_and_a_dropped_ring_waits() {
        let (file, _) = file_of(50_000);
        let Some((mut ring, mut buffers)) = ring_for(&file, 2, 4_096) else { return };
        assert!(ring.submit(buffers.pop().unwrap(), 0, ByteOffset(0), 4_097).is_err());
        ring.submit(buffers.pop().unwrap(), 0, ByteOffset(0), 4_096).unwrap();
        drop(ring);
    }
}
