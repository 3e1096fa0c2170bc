//! Memory that a hypercall may be told the address of: Xen cannot fault pages in, so they must be there and stay there.
//!
//! The kernel gives such pages by /dev/xen/hypercall; where that is missing (before Linux 4.18) they are locked, and kept out
//! of forked children, whose copy-on-write would move them.

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::ptr::NonNull;
use std::sync::Mutex;

use engine::units::PAGE_BYTES;
use nix::errno::Errno;

/// Most hypercalls fit into a buffer of this size.
const USUAL_BYTES: usize = 16 * PAGE_BYTES;
/// The most one hypercall passes: more is refused rather than locked.
const BYTES_MAX: usize = 64 << 20;

/// Makes buffers and keeps them for the next call: making one costs more than most hypercalls.
pub struct Buffers {
    device: Option<File>,
    free: Mutex<Vec<Buffer>>,
}

/// One buffer, zeroed when it is taken.
pub struct Buffer {
    start: NonNull<u8>,
    length: usize,
}

// SAFETY: a Buffer owns its mapping alone; nothing about it belongs to a thread.
unsafe impl Send for Buffer {}

impl Buffers {
    /// Over /dev/xen/hypercall, or over locked memory without it.
    pub fn open() -> Buffers {
        let device = File::options().read(true).write(true).open("/dev/xen/hypercall").ok();
        Buffers { device, free: Mutex::new(Vec::new()) }
    }

    /// A buffer of at least `bytes` bytes, all zero.
    pub fn take(&self, bytes: usize) -> Result<Buffer, Errno> {
        if bytes > BYTES_MAX {
            return Err(Errno::E2BIG);
        }
        if bytes <= USUAL_BYTES {
            let free = self.free.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).pop();
            if let Some(mut buffer) = free {
                buffer.bytes()[..bytes].fill(0);
                return Ok(buffer);
            }
        }
        let length = bytes.max(USUAL_BYTES).next_multiple_of(PAGE_BYTES);
        Buffer::map(length, self.device.as_ref().map(|device| device.as_raw_fd()))
    }

    /// Keeps a buffer for the next call.
    pub fn give_back(&self, buffer: Buffer) {
        if buffer.length == USUAL_BYTES {
            self.free.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(buffer);
        }
    }
}

impl Buffer {
    fn map(length: usize, device: Option<RawFd>) -> Result<Buffer, Errno> {
        let (flags, fd) = match device {
            Some(fd) => (libc::MAP_SHARED, fd),
            None => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1),
        };
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory that is in use.
        let start = unsafe {
            libc::mmap(std::ptr::null_mut(), length, libc::PROT_READ | libc::PROT_WRITE, flags, fd, 0)
        };
        if start == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        let start = NonNull::new(start.cast()).ok_or(Errno::EFAULT)?;
        // From here on dropping unmaps it.
        let buffer = Buffer { start, length };
        if device.is_none() {
            // SAFETY: both are about exactly the mapping just made.
            unsafe {
                Errno::result(libc::madvise(start.as_ptr().cast(), length, libc::MADV_DONTFORK))?;
                Errno::result(libc::mlock(start.as_ptr().cast(), length))?;
            }
        }
        Ok(buffer)
    }

    /// Its address, for a hypercall's argument.
    pub fn address(&self) -> u64 {
        self.start.as_ptr() as u64
    }

    /// Its bytes.
    pub fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: `start` is a live mapping of `length` readable and writable bytes, which this Buffer alone owns and which
        // the exclusive borrow keeps to the caller. Xen writes to it only within a hypercall that was given a pointer to it,
        // for which `privcmd` holds no slice.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.length) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and no slice of it outlives this Buffer.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.length) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_zero_and_large_enough_every_time() {
        let buffers = Buffers::open();
        for bytes in [8, USUAL_BYTES, USUAL_BYTES + 1] {
            for _ in 0..2 {
                let mut buffer = buffers.take(bytes).unwrap();
                assert!(buffer.bytes().len() >= bytes && buffer.address() != 0);
                assert!(buffer.bytes()[..bytes].iter().all(|byte| *byte == 0));
                buffer.bytes().fill(0xff);
                buffers.give_back(buffer);
            }
        }
        assert_eq!(buffers.free.lock().unwrap().len(), 1);
        assert_eq!(buffers.take(BYTES_MAX + 1).err(), Some(Errno::E2BIG));
    }
}
