//! Frames of a domain, or pages of a resource of its, mapped into this process.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr::{self, NonNull};

use engine::units::PAGE_BYTES;
use nix::errno::Errno;

use super::ioctl;
use crate::abi::privcmd::{MmapBatch, MmapResource, MMAPBATCH_V2, MMAP_RESOURCE};
use crate::hypercalls::Mapping;

/// A range of addresses of privcmd's, with something of a domain behind it.
pub struct Pages {
    start: NonNull<u8>,
    length: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread; it is accessed by copies only (see `copy_to`).
unsafe impl Send for Pages {}
// SAFETY: as above. Two threads that copy to the same bytes at once race as they would with the guest's own CPUs: the bytes
// are plain data that no Rust reference ever points to.
unsafe impl Sync for Pages {}

/// A frame that could not be mapped: its place in the list, and why.
pub struct BadFrame {
    /// Its place.
    pub index: usize,
    /// Why.
    pub errno: Errno,
}

impl Pages {
    /// Maps frames of a domain, in the order of `gfns`.
    pub fn of_frames(privcmd: &File, domid: u16, gfns: &[u64]) -> Result<Pages, BadFrame> {
        let whole = |errno| BadFrame { index: 0, errno };
        let count = u32::try_from(gfns.len()).map_err(|_| whole(Errno::E2BIG))?;
        let pages = Pages::reserve(privcmd, gfns.len()).map_err(whole)?;
        let mut errors = vec![0i32; gfns.len()];
        let mut batch = MmapBatch {
            count,
            domid,
            address: pages.start.as_ptr() as u64,
            frames: gfns.as_ptr(),
            errors: errors.as_mut_ptr(),
        };
        // SAFETY: `batch` is live and laid out as the request reads it; `frames` and `errors` have `count` elements each and
        // outlive the call; the addresses are those of a mapping of privcmd's of `count` pages, which is ours alone.
        let result = unsafe { ioctl(privcmd.as_fd(), MMAPBATCH_V2, &mut batch) };
        // A frame that fails tells its own error, whatever the call as a whole says.
        if let Some(index) = errors.iter().position(|error| *error != 0) {
            return Err(BadFrame { index, errno: Errno::from_raw(errors[index].saturating_neg()) });
        }
        result.map_err(whole)?;
        Ok(pages)
    }

    /// Maps `count` frames of a resource of a domain (XENMEM_acquire_resource) from its frame `index` on.
    pub fn of_resource(
        privcmd: &File,
        domid: u16,
        kind: u32,
        index: u32,
        count: usize,
    ) -> Result<Pages, Errno> {
        let pages = Pages::reserve(privcmd, count)?;
        let mut resource = MmapResource {
            domid,
            kind,
            id: 0,
            index,
            count: count as u64,
            address: pages.start.as_ptr() as u64,
        };
        // SAFETY: `resource` is live and laid out as the request reads it; the addresses are those of a mapping of privcmd's
        // of `count` pages, which is ours alone.
        unsafe { ioctl(privcmd.as_fd(), MMAP_RESOURCE, &mut resource) }?;
        Ok(pages)
    }

    /// Addresses for `count` pages, nothing behind them yet.
    fn reserve(privcmd: &File, count: usize) -> Result<Pages, Errno> {
        let length = count.checked_mul(PAGE_BYTES).filter(|length| *length > 0).ok_or(Errno::EINVAL)?;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory that is in use.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                privcmd.as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        let start = NonNull::new(start.cast()).ok_or(Errno::EFAULT)?;
        Ok(Pages { start, length })
    }

    /// Where a copy of `bytes` bytes at `offset` goes.
    ///
    /// Panics past the end, as slices do: a caller that asks for it has lost count of the frames it mapped.
    fn at(&self, offset: usize, bytes: usize) -> *mut u8 {
        let end = offset.checked_add(bytes);
        assert!(end.is_some_and(|end| end <= self.length), "a copy past the end of mapped frames");
        // SAFETY: `offset` is within the mapping, by the line above.
        unsafe { self.start.as_ptr().add(offset) }
    }
}

impl Mapping for Pages {
    fn copy_to(&self, offset: usize, to: &mut [u8]) {
        let from = self.at(offset, to.len());
        // SAFETY: `from` has `to.len()` bytes of a live mapping; `to` is Rust's own memory, which no guest's frame is, so
        // they do not overlap. That the guest may write meanwhile makes the bytes arbitrary, not invalid.
        unsafe { ptr::copy_nonoverlapping(from, to.as_mut_ptr(), to.len()) }
    }

    fn copy_from(&self, offset: usize, from: &[u8]) {
        let to = self.at(offset, from.len());
        // SAFETY: as in `copy_to`, the other way round.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) }
    }

    fn read_from(&self, offset: usize, file: &File, at: u64, length: usize) -> io::Result<()> {
        let to = self.at(offset, length);
        let mut done = 0;
        while done < length {
            let from = at.saturating_add(done as u64);
            // SAFETY: `to + done` has `length - done` bytes of a live mapping, to which the kernel may write as the guest
            // may; no Rust reference points to them.
            let read = unsafe {
                libc::pread(file.as_raw_fd(), to.add(done).cast(), length - done, from as libc::off_t)
            };
            match Errno::result(read) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => done += count as usize,
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    fn len(&self) -> usize {
        self.length
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nothing of it outlives these Pages.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.length) };
    }
}
