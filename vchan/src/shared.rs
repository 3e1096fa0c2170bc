//! Shared pages: loads, stores and copies.
//!
//! Invariants:
//! - no Rust reference ever points into them, but to atomics: what another domain writes meanwhile makes bytes arbitrary, not invalid;
//! - nothing outside of the mapping is touched, whatever is asked for: an offset past the end panics, as with slices. Offsets are
//!   this crate's constants and what [`crate::layout`] and [`crate::counters`] have checked, so none does.
//!
//! Barriers. A counter tells the peer which bytes are its to touch:
//! - a counter is *loaded with acquire* before the bytes it speaks of are copied: they are not touched before they are ours;
//! - it is *stored with release* after they were copied: they are not touched any more once they are the peer's.
//!
//! A request to be told, and the look at the peer's requests, are each about two places at once (my bit and your counter, my counter
//! and your bit) and need the full order of x86's locked instructions: whoever asks sets its bit and then looks at the counter once more; whoever
//! moves a counter then looks at the bit. With [`fence`] and sequentially consistent operations on the bits one of both sees the other's doing.

use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU8, Ordering};

use memmap2::MmapRaw;

/// Pages shared with another domain; dropping unmaps them.
#[derive(Debug)]
pub struct Shared(MmapRaw);

impl Shared {
    /// Over a mapping: page-aligned, readable, writable.
    pub fn new(mapping: impl Into<MmapRaw>) -> Shared {
        Shared(mapping.into())
    }

    /// Bytes of it.
    pub fn length(&self) -> usize {
        self.0.len()
    }

    /// Loads a counter before the bytes it speaks of are touched.
    pub fn counter(&self, at: usize) -> u32 {
        self.u32_at(at).load(Ordering::Acquire)
    }

    /// Stores a counter after the bytes it speaks of were touched.
    pub fn set_counter(&self, at: usize, value: u32) {
        self.u32_at(at).store(value, Ordering::Release);
    }

    /// Loads two bytes.
    pub fn half(&self, at: usize) -> u16 {
        self.u16_at(at).load(Ordering::Acquire)
    }

    /// Stores two bytes.
    pub fn set_half(&self, at: usize, value: u16) {
        self.u16_at(at).store(value, Ordering::Release);
    }

    /// Loads a byte.
    pub fn byte(&self, at: usize) -> u8 {
        self.u8_at(at).load(Ordering::SeqCst)
    }

    /// Stores a byte.
    pub fn set_byte(&self, at: usize, value: u8) {
        self.u8_at(at).store(value, Ordering::SeqCst);
    }

    /// Stores a byte if it is what is expected; whether it was.
    pub fn replace_byte(&self, at: usize, expected: u8, value: u8) -> bool {
        self.u8_at(at).compare_exchange(expected, value, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }

    /// Sets bits of a byte.
    pub fn set_bits(&self, at: usize, bits: u8) {
        self.u8_at(at).fetch_or(bits, Ordering::SeqCst);
    }

    /// Clears bits of a byte and tells what it was.
    pub fn take_bits(&self, at: usize, bits: u8) -> u8 {
        self.u8_at(at).fetch_and(!bits, Ordering::SeqCst)
    }

    /// Copies out.
    pub fn copy_to(&self, at: usize, to: &mut [u8]) {
        let from = self.place(at, to.len(), 1);
        // SAFETY: `from` has `to.len()` bytes of a live mapping, by `place`; `to` is Rust's own memory, which no mapping of shared
        // pages is, so they do not overlap. What the peer writes meanwhile makes the bytes arbitrary; any byte is a u8.
        unsafe { std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), to.len()) }
    }

    /// Copies in.
    pub fn copy_from(&self, at: usize, from: &[u8]) {
        let to = self.place(at, from.len(), 1);
        // SAFETY: as in `copy_to`, the other way round; the mapping is writable by `new`'s contract with the kernel (a page that
        // is not faults, it does not corrupt).
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) }
    }

    fn u32_at(&self, at: usize) -> &AtomicU32 {
        // SAFETY: `place` gives four live bytes, aligned to four, for as long as `self` is borrowed; atomics may be shared with anyone.
        unsafe { AtomicU32::from_ptr(self.place(at, 4, 4).cast()) }
    }

    fn u16_at(&self, at: usize) -> &AtomicU16 {
        // SAFETY: as in `u32_at`, with two bytes.
        unsafe { AtomicU16::from_ptr(self.place(at, 2, 2).cast()) }
    }

    fn u8_at(&self, at: usize) -> &AtomicU8 {
        // SAFETY: as in `u32_at`, with one byte.
        unsafe { AtomicU8::from_ptr(self.place(at, 1, 1)) }
    }

    fn place(&self, at: usize, bytes: usize, align: usize) -> *mut u8 {
        let end = at.checked_add(bytes);
        let inside = end.is_some_and(|end| end <= self.0.len()) && at.is_multiple_of(align);
        assert!(inside, "{bytes} bytes at {at} are not in {} shared bytes", self.0.len());
        // SAFETY: `at` is within the mapping, by the line above.
        unsafe { self.0.as_mut_ptr().add(at) }
    }
}

/// Between moving a counter and looking at the peer's requests; see the module.
pub fn fence() {
    std::sync::atomic::fence(Ordering::SeqCst);
}
