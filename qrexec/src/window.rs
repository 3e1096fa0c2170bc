//! Flow control, the same for both sides and all three of a command's streams.
//!
//! Invariants: a sender never has more than its window under way, so what a receiver buffers is bounded by what it granted. Credit is
//! given back in large pieces, as the bytes are really used up, so that a stalled reader stalls just its own stream. A reader that takes
//! its bytes gets a larger window for it: more goes at once, and both sides wake up for it less often.

use crate::ProtocolError;

/// Bytes that may be sent on each stream before any credit.
pub const INITIAL_WINDOW: u32 = 256 << 10;
/// No credit may lift a window over this: a sum that can't overflow and a buffer that fits any guest.
pub const WINDOW_MAX: u32 = 16 << 20;

/// How far the window of a reader grows that takes what comes. It begins to once a first window is used up: a new pipe that nobody reads does
/// not hold as much.
pub const GROWN_WINDOW: u32 = 1 << 20;

/// Credit is given back once this part of the window is owed.
const CREDIT_PARTS: u32 = 4;

/// The sender's view.
#[derive(Debug, Clone)]
pub struct SendWindow {
    left: u32,
}

impl Default for SendWindow {
    fn default() -> Self {
        Self { left: INITIAL_WINDOW }
    }
}

impl SendWindow {
    /// Bytes that may be sent now.
    pub fn left(&self) -> usize {
        self.left as usize
    }

    /// Notes `count` bytes as sent; at most [`left`](Self::left).
    pub fn sent(&mut self, count: usize) {
        debug_assert!(count <= self.left());
        self.left = self.left.saturating_sub(u32::try_from(count).unwrap_or(u32::MAX));
    }

    /// Takes credit from the other side.
    pub fn credit(&mut self, bytes: u32) -> Result<(), ProtocolError> {
        match self.left.checked_add(bytes) {
            Some(left) if left <= WINDOW_MAX => self.left = left,
            _ => return Err(ProtocolError::CreditTooLarge(bytes)),
        }
        Ok(())
    }
}

/// The receiver's view.
#[derive(Debug, Clone)]
pub struct ReceiveWindow {
    size: u32,
    granted: u32,
    owed: u32,
    /// Used up of the first window.
    used: u32,
}

impl Default for ReceiveWindow {
    fn default() -> Self {
        Self { size: INITIAL_WINDOW, granted: INITIAL_WINDOW, owed: 0, used: 0 }
    }
}

impl ReceiveWindow {
    /// Notes `count` bytes as received; an error when they were not granted.
    pub fn received(&mut self, count: usize) -> Result<(), ProtocolError> {
        let exceeded = ProtocolError::WindowExceeded { sent: count, window: self.granted };
        let count = u32::try_from(count).map_err(|_| exceeded.clone())?;
        self.granted = self.granted.checked_sub(count).ok_or(exceeded)?;
        Ok(())
    }

    /// Notes `count` received bytes as used up. `Some`: the credit to send now.
    pub fn consumed(&mut self, count: usize) -> Option<u32> {
        let room = self.size.saturating_sub(self.granted).saturating_sub(self.owed);
        let count = u32::try_from(count).unwrap_or(u32::MAX).min(room);
        self.owed += count;
        self.used = self.used.saturating_add(count).min(INITIAL_WINDOW);
        if self.owed < self.size / CREDIT_PARTS {
            return None;
        }
        let credit = std::mem::take(&mut self.owed) + self.grow();
        self.granted += credit;
        Some(credit)
    }

    /// How much larger the window is now.
    fn grow(&mut self) -> u32 {
        let growth = if self.used < INITIAL_WINDOW { 0 } else { self.size.min(GROWN_WINDOW - self.size) };
        self.size += growth;
        growth
    }

    /// Bytes that may be under way or wait here.
    pub fn size(&self) -> usize {
        self.size as usize
    }
}
