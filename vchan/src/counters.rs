//! How much can be read and written, and where: free-running 32-bit counters over a ring whose size is a power of two.
//!
//! Invariant: the producer's counter is ahead of the consumer's by at most the ring's size, modulo 2^32. What the peer's
//! counter says otherwise is a lie.

use std::ops::Range;

/// A counter that cannot be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the other end of the vchan claims {claimed} bytes in a ring of {size}")]
pub struct Lie {
    /// Bytes between the counters.
    pub claimed: u32,
    /// Bytes of the ring.
    pub size: u32,
}

/// Bytes that wait between the counters.
pub fn filled(prod: u32, cons: u32, size: u32) -> Result<u32, Lie> {
    let claimed = prod.wrapping_sub(cons);
    if claimed > size {
        return Err(Lie { claimed, size });
    }
    Ok(claimed)
}

/// Bytes that there is room for.
pub fn room(prod: u32, cons: u32, size: u32) -> Result<u32, Lie> {
    filled(prod, cons, size).map(|filled| size - filled)
}

/// The places in the ring of `count` bytes from `counter` on: up to its end, and the rest from its start. `count` is at most the
/// size, a power of two.
pub fn spans(counter: u32, count: u32, size: u32) -> [Range<usize>; 2] {
    let start = (counter & (size - 1)) as usize;
    let (count, size) = (count.min(size) as usize, size as usize);
    let first = count.min(size - start);
    [start..start + first, 0..count - first]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn filled_and_room_make_the_size(cons: u32, count in 0u32..=65536, order in 10u32..=16) {
            let size = 1 << order;
            let prod = cons.wrapping_add(count);
            if count <= size {
                prop_assert_eq!(filled(prod, cons, size), Ok(count));
                prop_assert_eq!(room(prod, cons, size), Ok(size - count));
            } else {
                prop_assert_eq!(filled(prod, cons, size), Err(Lie { claimed: count, size }));
            }
        }

        #[test]
        fn any_two_counters_stay_inside(prod: u32, cons: u32, order in 10u32..=16) {
            let size = 1u32 << order;
            if let Ok(count) = filled(prod, cons, size) {
                let [first, rest] = spans(cons, count, size);
                prop_assert!(first.end <= size as usize && rest.end <= first.start);
                prop_assert_eq!(first.len() + rest.len(), count as usize);
            }
        }

        #[test]
        fn spans_are_the_bytes_one_by_one(counter: u32, count in 0u32..=1024) {
            let [first, rest] = spans(counter, count, 1024);
            let places: Vec<usize> = first.chain(rest).collect();
            let one_by_one: Vec<usize> =
                (0..count).map(|i| (counter.wrapping_add(i) % 1024) as usize).collect();
            prop_assert_eq!(places, one_by_one);
        }
    }
}
