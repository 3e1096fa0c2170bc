//! Where what is in the first page (`struct vchan_interface`), and where the rings are.
//!
//! ```text
//!   0  left.cons left.prod      u32 each; "left" is written by the client and read by the server
//!   8  right.cons right.prod    "right" the other way round
//!  16  left_order right_order   u16 each: 10 = 1 KiB at 1024 of this page, 11 = 2 KiB at 2048, 12 and more = pages of its own
//!  20  cli_live srv_live        u8 each
//!  22  cli_notify srv_notify    u8 each: of which of the client's doings the server wants to be told, and the other way round
//!  24  grants                   u32 each: those of left's pages, then of right's; up to the first ring in the page
//! ```

use std::ops::Range;

/// Bytes of a page.
pub const PAGE_BYTES: usize = 4096;
/// A ring of its own has at least a page.
pub const PAGE_ORDER: u16 = 12;
/// The largest ring: 64 KiB keep any channel busy, and the first page has room for the grants of two of them.
pub const ORDER_MAX: u16 = 16;

const GRANTS: usize = 24;

/// Places in the first page.
pub mod at {
    #![allow(missing_docs)]
    pub const LEFT_CONS: usize = 0;
    pub const LEFT_PROD: usize = 4;
    pub const RIGHT_CONS: usize = 8;
    pub const RIGHT_PROD: usize = 12;
    pub const LEFT_ORDER: usize = 16;
    pub const RIGHT_ORDER: usize = 18;
    pub const CLI_LIVE: usize = 20;
    pub const SRV_LIVE: usize = 21;
    pub const CLI_NOTIFY: usize = 22;
    pub const SRV_NOTIFY: usize = 23;
}

/// The sizes of the rings, as powers of two: not yet checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Orders {
    /// Of the one that the client writes.
    pub left: u16,
    /// Of the one that the server writes.
    pub right: u16,
}

/// Where a ring's bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// In the first page, from this offset.
    InPage(usize),
    /// In so many pages of its own.
    Pages(usize),
}

/// A layout that a page can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    orders: Orders,
}

/// Rings of these sizes cannot be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a vchan has no rings of 2^{} and 2^{} bytes", .0.left, .0.right)]
pub struct BadOrders(pub Orders);

impl Layout {
    /// Checks the sizes: each is 10 to [`ORDER_MAX`], and not both rings are at one place of the page.
    pub fn new(orders: Orders) -> Result<Layout, BadOrders> {
        let possible = |order| (10..=ORDER_MAX).contains(&order);
        let clash = orders.left == orders.right && orders.left < PAGE_ORDER;
        let layout = Layout { orders };
        if !possible(orders.left) || !possible(orders.right) || clash {
            return Err(BadOrders(orders));
        }
        if GRANTS + 4 * (layout.left_pages() + layout.right_pages()) > layout.grants_end() {
            return Err(BadOrders(orders));
        }
        Ok(layout)
    }

    /// The sizes.
    pub fn orders(&self) -> Orders {
        self.orders
    }

    /// Where the client writes.
    pub fn left(&self) -> Place {
        place(self.orders.left)
    }

    /// Where the server writes.
    pub fn right(&self) -> Place {
        place(self.orders.right)
    }

    /// Pages besides the first that the left ring has.
    pub fn left_pages(&self) -> usize {
        pages(self.orders.left)
    }

    /// Pages besides the first that the right ring has.
    pub fn right_pages(&self) -> usize {
        pages(self.orders.right)
    }

    /// Where in the first page the grants of left's pages are, four bytes each.
    pub fn left_grants(&self) -> Range<usize> {
        GRANTS..GRANTS + 4 * self.left_pages()
    }

    /// Where in the first page the grants of right's pages are, four bytes each.
    pub fn right_grants(&self) -> Range<usize> {
        let start = self.left_grants().end;
        start..start + 4 * self.right_pages()
    }

    fn grants_end(&self) -> usize {
        match self.orders.left.min(self.orders.right) {
            10 => 1024,
            11 => 2048,
            _ => PAGE_BYTES,
        }
    }
}

fn place(order: u16) -> Place {
    match order {
        10 => Place::InPage(1024),
        11 => Place::InPage(2048),
        _ => Place::Pages(pages(order)),
    }
}

fn pages(order: u16) -> usize {
    order.checked_sub(PAGE_ORDER).map_or(0, |above| 1 << above)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_small_rings_are_in_the_page() {
        let layout = Layout::new(Orders { left: 10, right: 11 }).expect("can be");
        assert_eq!((layout.left(), layout.right()), (Place::InPage(1024), Place::InPage(2048)));
        assert!(layout.left_grants().is_empty() && layout.right_grants().is_empty());
    }

    #[test]
    fn a_small_and_a_large_one_share_no_place() {
        let layout = Layout::new(Orders { left: 11, right: 16 }).expect("can be");
        assert_eq!((layout.left(), layout.right()), (Place::InPage(2048), Place::Pages(16)));
        assert_eq!(layout.right_grants(), 24..88);
    }

    proptest! {
        #[test]
        fn what_is_accepted_fits(left: u16, right: u16, narrow_left in 9u16..18, narrow_right in 9u16..18) {
            for orders in [Orders { left, right }, Orders { left: narrow_left, right: narrow_right }] {
                let Ok(layout) = Layout::new(orders) else { continue };
                let grants_end = layout.right_grants().end;
                let mut taken = vec![(0, grants_end)];
                for (place, order) in [(layout.left(), orders.left), (layout.right(), orders.right)] {
                    match place {
                        Place::InPage(start) => taken.push((start, start + (1 << order))),
                        Place::Pages(count) => prop_assert_eq!(count * PAGE_BYTES, 1 << order),
                    }
                }
                taken.sort_unstable();
                prop_assert!(taken.windows(2).all(|pair| pair[0].1 <= pair[1].0));
                prop_assert!(taken.last().is_some_and(|last| last.1 <= PAGE_BYTES));
            }
        }

        #[test]
        fn equal_small_rings_are_refused(order in 0u16..12) {
            let orders = Orders { left: order, right: order };
            prop_assert!(Layout::new(orders).is_err());
        }
    }
}
