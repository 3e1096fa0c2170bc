//! The network interface, configured with the classic ioctls: fixed structures and one socket, fewer lines and fewer instructions
//! than netlink messages.
//!
//! Invariants: an interface that is up is taken down first, which drops the template's addresses, routes and neighbours, whatever
//! they were; it comes up only with its new MAC and address, so nothing is ever sent from the template's.

use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::sys::socket::{socket, AddressFamily, SockFlag, SockType};
use qrexec::Network;

use crate::failure::{Failure, Step};
use crate::sys::{self, IfRequest, RouteRequest};

const SIOCADDRT: u32 = 0x890b;
const SIOCGIFFLAGS: u32 = 0x8913;
const SIOCSIFFLAGS: u32 = 0x8914;
const SIOCSIFADDR: u32 = 0x8916;
const SIOCSIFNETMASK: u32 = 0x891c;
const SIOCSIFHWADDR: u32 = 0x8924;
const SIOCGIFHWADDR: u32 = 0x8927;
const ARPHRD_ETHER: u16 = 1;
const RTF_UP: u16 = 1;
const RTF_GATEWAY: u16 = 2;
const RTF_HOST: u16 = 4;

/// An interface and the socket to ask for changes.
pub struct Nic {
    name: [u8; 16],
    socket: OwnedFd,
}

impl Nic {
    /// The first ethernet interface, real ones before virtual ones.
    pub fn find() -> Result<Option<Self>, Failure> {
        let Some(name) = first_ethernet(Path::new("/sys/class/net")) else { return Ok(None) };
        let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None);
        let socket = socket.step(|| "open a socket for the network interface")?;
        let mut padded = [0; 16];
        for (to, from) in padded[..15].iter_mut().zip(name.bytes()) {
            *to = from;
        }
        Ok(Some(Self { name: padded, socket }))
    }

    /// Gives it its MAC, address and default route, and brings it up.
    pub fn configure(&self, mac: [u8; 6], network: Option<&Network>) -> Result<(), Failure> {
        let up = libc::IFF_UP as u16;
        let flags = self.flags().step(|| "read the interface's flags")?;
        if flags & up != 0 {
            self.set_flags(flags & !up).step(|| "take the interface down")?;
        }
        self.request(SIOCSIFHWADDR, hardware_address(mac)).step(|| "set the MAC")?;
        if let Some(network) = network {
            self.request(SIOCSIFADDR, inet_address(network.address)).step(|| "set the address")?;
            self.request(SIOCSIFNETMASK, inet_address(netmask(network.prefix_len)))
                .step(|| "set the netmask")?;
        }
        self.set_flags(flags | up).step(|| "bring the interface up")?;
        match network {
            Some(network) => self.set_default_route(network),
            None => Ok(()),
        }
    }

    /// Asks for flags and MAC, and changes nothing.
    pub fn look(&self) -> Result<(), Failure> {
        self.flags().step(|| "read the interface's flags")?;
        self.request(SIOCGIFHWADDR, [0; 24]).step(|| "read the MAC")?;
        Ok(())
    }

    fn set_default_route(&self, network: &Network) -> Result<(), Failure> {
        let Some(gateway) = network.gateway else { return Ok(()) };
        let any = Ipv4Addr::UNSPECIFIED;
        if !is_near(network, gateway) {
            let route = self.add_route(gateway, any, Ipv4Addr::BROADCAST, RTF_UP | RTF_HOST);
            route.step(|| "add the route to the gateway")?;
        }
        self.add_route(any, gateway, any, RTF_UP | RTF_GATEWAY).step(|| "add the default route")
    }

    fn add_route(&self, target: Ipv4Addr, gateway: Ipv4Addr, mask: Ipv4Addr, flags: u16) -> io::Result<()> {
        let route = RouteRequest {
            pad1: 0,
            target: socket_address(target),
            gateway: socket_address(gateway),
            mask: socket_address(mask),
            flags,
            pad2: 0,
            pad3: 0,
            pad4: 0,
            metric: 0,
            device: 0,
            mtu: 0,
            window: 0,
            irtt: 0,
        };
        sys::route_ioctl(self.socket.as_fd(), SIOCADDRT, route, &self.name)
    }

    fn flags(&self) -> io::Result<u16> {
        let value = self.request(SIOCGIFFLAGS, [0; 24])?;
        Ok(u16::from_ne_bytes([value[0], value[1]]))
    }

    fn set_flags(&self, flags: u16) -> io::Result<()> {
        let mut value = [0; 24];
        value[..2].copy_from_slice(&flags.to_ne_bytes());
        self.request(SIOCSIFFLAGS, value).map(drop)
    }

    fn request(&self, request: u32, value: [u8; 24]) -> io::Result<[u8; 24]> {
        let mut argument = IfRequest { name: self.name, value };
        sys::interface_ioctl(self.socket.as_fd(), request, &mut argument)?;
        Ok(argument.value)
    }
}

fn first_ethernet(interfaces: &Path) -> Option<String> {
    let entries = fs::read_dir(interfaces).ok()?.flatten();
    let ethernet = entries.filter(|entry| {
        let kind = fs::read_to_string(entry.path().join("type")).unwrap_or_default();
        kind.trim_end() == ARPHRD_ETHER.to_string()
    });
    let ranked = ethernet.map(|entry| (!entry.path().join("device").exists(), entry.file_name()));
    ranked.min().map(|(_, name)| name.to_string_lossy().into_owned())
}

/// `struct sockaddr` with a MAC.
fn hardware_address(mac: [u8; 6]) -> [u8; 24] {
    let mut value = [0; 24];
    value[..2].copy_from_slice(&ARPHRD_ETHER.to_ne_bytes());
    value[2..8].copy_from_slice(&mac);
    value
}

/// `struct sockaddr_in`: family, port, address.
fn socket_address(address: Ipv4Addr) -> [u8; 16] {
    let mut value = [0; 16];
    value[..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
    value[4..8].copy_from_slice(&address.octets());
    value
}

fn inet_address(address: Ipv4Addr) -> [u8; 24] {
    let mut value = [0; 24];
    value[..16].copy_from_slice(&socket_address(address));
    value
}

fn netmask(prefix_len: u8) -> Ipv4Addr {
    Ipv4Addr::from(u32::MAX.checked_shl(32 - u32::from(prefix_len.min(32))).unwrap_or(0))
}

fn is_near(network: &Network, other: Ipv4Addr) -> bool {
    let mask = u32::from(netmask(network.prefix_len));
    u32::from(network.address) & mask == u32::from(other) & mask
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_and_neighbours() {
        assert_eq!(netmask(0), Ipv4Addr::UNSPECIFIED);
        assert_eq!(netmask(24), Ipv4Addr::new(255, 255, 255, 0));
        assert_eq!(netmask(32), Ipv4Addr::BROADCAST);
        let network = Network { address: [10, 1, 2, 3].into(), prefix_len: 32, gateway: None, dns: vec![] };
        assert!(!is_near(&network, [10, 1, 2, 4].into()));
        assert!(is_near(&Network { prefix_len: 24, ..network }, [10, 1, 2, 4].into()));
    }
}
