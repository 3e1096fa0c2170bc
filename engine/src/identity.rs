//! What makes a clone one of its own: name, machine-id, MAC, address, entropy. All clones of a savefile wake up as
//! the same machine; the agent applies an [`Identity`] before any other program of the guest runs.
//!
//! Name, MAC and address follow from one number below 10,000, so they are as unique as the name is. Machine-id and
//! entropy are random.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::net::Ipv4Addr;

/// How many names there are: `disp0` to `disp9999`.
pub const CLONE_NUMBERS: u32 = 10_000;

/// Bytes of fresh entropy given to each clone: twice what the kernel's generator holds.
pub const ENTROPY_BYTES: usize = 64;

/// The network all clones' addresses lie in (Qubes gives DispVMs 10.138.x.y).
pub const NETWORK: (Ipv4Addr, u8) = (Ipv4Addr::new(10, 138, 0, 0), 16);
/// The gateway every clone is told.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 138, 255, 254);
/// The name server every clone is told.
pub const NAME_SERVER: Ipv4Addr = Ipv4Addr::new(10, 138, 255, 253);

/// The number in a clone's name, below [`CLONE_NUMBERS`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CloneNumber(u32);

impl CloneNumber {
    /// `None` when `number` is no clone's.
    pub fn new(number: u32) -> Option<Self> {
        (number < CLONE_NUMBERS).then_some(CloneNumber(number))
    }

    /// As an integer.
    pub fn get(self) -> u32 {
        self.0
    }

    /// Its MAC address, in the block Xen gives to guests and with Qubes' prefix.
    pub fn mac(self) -> [u8; 6] {
        let [.., high, low] = self.0.to_be_bytes();
        [0x00, 0x16, 0x3e, 0x5e, high, low]
    }

    /// Its address in [`NETWORK`]; never .0.0, which is why it counts from 1.
    pub fn address(self) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(NETWORK.0) + self.0 + 1)
    }
}

impl fmt::Display for CloneNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "disp{}", self.0)
    }
}

/// Everything unique that a clone is given.
#[derive(Clone)]
pub struct Identity {
    /// The clone's number, from which name, MAC and address follow.
    pub number: CloneNumber,
    /// A version 4 UUID, as systemd wants it.
    pub machine_id: [u8; 16],
    /// For the guest kernel's generator.
    pub entropy: [u8; ENTROPY_BYTES],
}

impl Identity {
    /// A fresh identity for the clone of this number, from the host's generator.
    pub fn fresh(number: CloneNumber) -> io::Result<Self> {
        let mut machine_id = [0u8; 16];
        File::open("/dev/urandom")?.read_exact(&mut machine_id)?;
        machine_id[6] = (machine_id[6] & 0x0f) | 0x40;
        machine_id[8] = (machine_id[8] & 0x3f) | 0x80;
        Identity::again(number, machine_id)
    }

    /// The identity of a clone that has its names already: with fresh entropy.
    pub fn again(number: CloneNumber, machine_id: [u8; 16]) -> io::Result<Self> {
        let mut entropy = [0u8; ENTROPY_BYTES];
        File::open("/dev/urandom")?.read_exact(&mut entropy)?;
        Ok(Identity { number, machine_id, entropy })
    }
}

// The entropy is the clone's secret: it is not printed.
impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity")
            .field("number", &self.number)
            .field("machine_id", &self.machine_id)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_has_its_own_mac_and_address_inside_the_network() {
        let mut seen = std::collections::HashSet::new();
        for number in (0..CLONE_NUMBERS).map(|n| CloneNumber::new(n).unwrap()) {
            assert!(seen.insert(number.mac()));
            assert_eq!(number.address().octets()[..2], [10, 138]);
            assert!(number.address() < NAME_SERVER && number.address() > NETWORK.0);
        }
        assert!(CloneNumber::new(CLONE_NUMBERS).is_none());
    }

    #[test]
    fn identities_differ_and_do_not_print_their_entropy() {
        let number = CloneNumber::new(7).unwrap();
        let (a, b) = (Identity::fresh(number).unwrap(), Identity::fresh(number).unwrap());
        assert_ne!(a.machine_id, b.machine_id);
        assert_ne!(a.entropy, b.entropy);
        assert_eq!((a.machine_id[6] >> 4, a.machine_id[8] >> 6), (4, 2));
        assert!(!format!("{a:?}").contains("entropy"));
    }
}
