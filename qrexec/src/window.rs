//! Flow control, the same for both sides and all three of a command's streams.
//!
//! Invariants: a sender never has more than its window under way, so what a receiver buffers is bounded by what it granted. Credit is
//! given back in large pieces, as the bytes are really used up, so that a stalled reader stalls just its own stream.

use crate::ProtocolError;

/// Bytes that may be sent on each stream before any credit.
pub const INITIAL_WINDOW: u32 = 256 << 10;
/// No credit may lift a window over this: a sum that can't overflow and a buffer that fits any guest.
pub const WINDOW_MAX: u32 = 16 << 20;

/// Credit is given back once this much is owed.
const CREDIT_STEP: u32 = INITIAL_WINDOW / 4;

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
    granted: u32,
    owed: u32,
}

impl Default for ReceiveWindow {
    fn default() -> Self {
        Self { granted: INITIAL_WINDOW, owed: 0 }
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
        let room = INITIAL_WINDOW.saturating_sub(self.granted).saturating_sub(self.owed);
        self.owed += u32::try_from(count).unwrap_or(u32::MAX).min(room);
        if self.owed < CREDIT_STEP {
            return None;
        }
        self.granted += self.owed;
        Some(std::mem::take(&mut self.owed))
    }
}
