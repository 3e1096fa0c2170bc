//! One end of a vchan.
//!
//! Invariants: the module's counters are this end's own; those in the shared page are only ever shown (own) or checked (the peer's).
//! After a lie nothing is read or written any more: every call gives the error again.
//!
//! Nobody waits here. An end that wants to wait [asks](End::ask) to be told and looks again; the event channel, by which one tells
//! the other, is the caller's: what returns a [`Tell`] of `true` has the caller notify.

use crate::counters::{self, Lie};
use crate::layout::{at, BadOrders, Layout, Orders, Place, PAGE_BYTES};
use crate::shared::{fence, Shared};

/// Bits of the notify bytes.
const WRITTEN: u8 = 1;
const READ: u8 = 2;

/// Values of the live bytes.
const GONE: u8 = 0;
const LIVE: u8 = 1;
const AWAITED: u8 = 2;

/// Whether the peer wants to be told: the caller is to notify it.
pub type Tell = bool;

/// What there can be to wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Want {
    /// Bytes to read.
    Bytes,
    /// Room to write.
    Room,
}

/// How the other end is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// It has not come yet.
    Awaited,
    /// It is there.
    Live,
    /// It has gone. What it wrote before can still be read.
    Gone,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Server,
    Client,
}

/// The pages of a ring: none when it is in the first one.
pub type RingPages = Option<Shared>;

/// What keeps an end from being made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NoEnd {
    /// The sizes cannot be.
    #[error(transparent)]
    Orders(#[from] BadOrders),
    /// Not as many pages as the layout has.
    #[error("the rings' pages are not those of their layout")]
    Pages,
    /// The server does not wait for a client: another one has been here, or the server has gone.
    #[error("the vchan is no fresh offer")]
    Stale,
}

struct Ring {
    pages: RingPages,
    start: usize,
    size: u32,
    prod_at: usize,
    cons_at: usize,
    /// This end's counter.
    own: u32,
}

/// One end.
pub struct End {
    role: Role,
    incoming: Ring,
    outgoing: Ring,
    /// Last, so that it is unmapped last: that tells the peer that all is.
    page: Shared,
}

/// Reads the sizes that a server has put into its first page, and checks them.
pub fn read_layout(page: &Shared) -> Result<Layout, NoEnd> {
    let orders = Orders { left: page.half(at::LEFT_ORDER), right: page.half(at::RIGHT_ORDER) };
    Ok(Layout::new(orders)?)
}

/// Reads the grants of both rings' pages.
pub fn read_grants(page: &Shared, layout: &Layout) -> (Vec<u32>, Vec<u32>) {
    let list = |range: std::ops::Range<usize>| range.step_by(4).map(|at| page.counter(at)).collect();
    (list(layout.left_grants()), list(layout.right_grants()))
}

/// Writes the grants of both rings' pages, as many as fit. Legal before the first page is granted to anyone.
pub fn write_grants(page: &Shared, layout: &Layout, left: &[u32], right: &[u32]) {
    for (range, grants) in [(layout.left_grants(), left), (layout.right_grants(), right)] {
        range.step_by(4).zip(grants).for_each(|(at, grant)| page.set_counter(at, *grant));
    }
}

impl End {
    /// A server over fresh pages, which awaits its client. The grants are in the page already.
    pub fn serve(page: Shared, left: RingPages, right: RingPages, layout: Layout) -> Result<End, NoEnd> {
        let end = End::over(Role::Server, page, left, right, layout)?;
        let page = &end.page;
        for counter in [at::LEFT_CONS, at::LEFT_PROD, at::RIGHT_CONS, at::RIGHT_PROD] {
            page.set_counter(counter, 0);
        }
        page.set_half(at::LEFT_ORDER, layout.orders().left);
        page.set_half(at::RIGHT_ORDER, layout.orders().right);
        // The server wants to be told when the client comes, and that is told as if it had written.
        page.set_byte(at::CLI_NOTIFY, WRITTEN);
        page.set_byte(at::SRV_NOTIFY, 0);
        page.set_byte(at::CLI_LIVE, AWAITED);
        page.set_byte(at::SRV_LIVE, LIVE);
        Ok(end)
    }

    /// The client of a fresh offer, whose layout is [`read_layout`]'s. The caller notifies the server then.
    pub fn connect(page: Shared, left: RingPages, right: RingPages, layout: Layout) -> Result<End, NoEnd> {
        let end = End::over(Role::Client, page, left, right, layout)?;
        let fresh = end.peer() == Peer::Live && end.page.replace_byte(at::CLI_LIVE, AWAITED, LIVE);
        if !fresh {
            return Err(NoEnd::Stale);
        }
        end.page.set_byte(at::SRV_NOTIFY, WRITTEN);
        Ok(end)
    }

    fn over(
        role: Role,
        page: Shared,
        left: RingPages,
        right: RingPages,
        layout: Layout,
    ) -> Result<End, NoEnd> {
        if page.length() < PAGE_BYTES {
            return Err(NoEnd::Pages);
        }
        let left = Ring::new(left, layout.left(), layout.orders().left, at::LEFT_PROD, at::LEFT_CONS)?;
        let right = Ring::new(right, layout.right(), layout.orders().right, at::RIGHT_PROD, at::RIGHT_CONS)?;
        let (incoming, outgoing) = match role {
            Role::Server => (left, right),
            Role::Client => (right, left),
        };
        Ok(End { page, role, incoming, outgoing })
    }

    /// Bytes that can be read now.
    pub fn readable(&self) -> Result<usize, Lie> {
        let ring = &self.incoming;
        counters::filled(self.page.counter(ring.prod_at), ring.own, ring.size).map(|count| count as usize)
    }

    /// Bytes that can be written now.
    pub fn writable(&self) -> Result<usize, Lie> {
        let ring = &self.outgoing;
        counters::room(ring.own, self.page.counter(ring.cons_at), ring.size).map(|count| count as usize)
    }

    /// Bytes written that the peer has not read yet.
    pub fn unread(&self) -> Result<usize, Lie> {
        self.writable().map(|room| self.outgoing.size as usize - room)
    }

    /// Reads what there is, at most the buffer's length.
    pub fn read(&mut self, buffer: &mut [u8]) -> Result<(usize, Tell), Lie> {
        let count = self.readable()?.min(buffer.len());
        if count == 0 {
            return Ok((0, false));
        }
        let (page, ring) = (&self.page, &mut self.incoming);
        let [first, rest] = counters::spans(ring.own, count as u32, ring.size);
        let (head, tail) = buffer[..count].split_at_mut(first.len());
        ring.memory(page).copy_to(ring.start + first.start, head);
        ring.memory(page).copy_to(ring.start + rest.start, tail);
        ring.own = ring.own.wrapping_add(count as u32);
        page.set_counter(ring.cons_at, ring.own);
        Ok((count, self.tell(READ)))
    }

    /// Writes what fits.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(usize, Tell), Lie> {
        let count = self.writable()?.min(bytes.len());
        if count == 0 {
            return Ok((0, false));
        }
        let (page, ring) = (&self.page, &mut self.outgoing);
        let [first, rest] = counters::spans(ring.own, count as u32, ring.size);
        let (head, tail) = bytes[..count].split_at(first.len());
        ring.memory(page).copy_from(ring.start + first.start, head);
        ring.memory(page).copy_from(ring.start + rest.start, tail);
        ring.own = ring.own.wrapping_add(count as u32);
        page.set_counter(ring.prod_at, ring.own);
        Ok((count, self.tell(WRITTEN)))
    }

    /// Asks the peer to tell, and whether what is wanted is there already, so that no telling is to be waited for.
    pub fn ask(&self, want: Want) -> Result<bool, Lie> {
        let (bit, there): (_, fn(&End) -> _) = match want {
            Want::Bytes => (WRITTEN, End::readable),
            Want::Room => (READ, End::writable),
        };
        // Most often it is there, and a locked instruction in a line that the other end writes is spared.
        if there(self)? > 0 {
            return Ok(true);
        }
        self.page.set_bits(self.asked_of_peer(), bit);
        fence();
        Ok(there(self)? > 0)
    }

    /// How the other end is.
    pub fn peer(&self) -> Peer {
        let live = match self.role {
            Role::Server => at::CLI_LIVE,
            Role::Client => at::SRV_LIVE,
        };
        match self.page.byte(live) {
            LIVE => Peer::Live,
            AWAITED if self.role == Role::Server => Peer::Awaited,
            _ => Peer::Gone,
        }
    }

    /// Says that this end has gone. The caller notifies the peer.
    pub fn hang_up(&self) {
        self.page.set_byte(self.live_at(), GONE);
    }

    /// Where in the first page the byte is that is to become zero when this end's process dies.
    pub fn live_at(&self) -> usize {
        match self.role {
            Role::Server => at::SRV_LIVE,
            Role::Client => at::CLI_LIVE,
        }
    }

    /// Whether the peer wanted to be told of this.
    fn tell(&self, bit: u8) -> Tell {
        fence();
        let asked = match self.role {
            Role::Server => at::SRV_NOTIFY,
            Role::Client => at::CLI_NOTIFY,
        };
        self.page.take_bits(asked, bit) & bit != 0
    }

    fn asked_of_peer(&self) -> usize {
        match self.role {
            Role::Server => at::CLI_NOTIFY,
            Role::Client => at::SRV_NOTIFY,
        }
    }
}

impl Ring {
    fn new(
        pages: RingPages,
        place: Place,
        order: u16,
        prod_at: usize,
        cons_at: usize,
    ) -> Result<Ring, NoEnd> {
        let start = match (place, &pages) {
            (Place::InPage(start), None) => start,
            (Place::Pages(count), Some(pages)) if pages.length() >= count * PAGE_BYTES => 0,
            _ => return Err(NoEnd::Pages),
        };
        Ok(Ring { pages, start, size: 1 << order, prod_at, cons_at, own: 0 })
    }

    fn memory<'a>(&'a self, page: &'a Shared) -> &'a Shared {
        self.pages.as_ref().unwrap_or(page)
    }
}
