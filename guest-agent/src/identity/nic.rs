//! The network interface.
//!
//! Invariants: nothing is ever sent from the template's addresses. Before a capture the interface is parked: taken down, which drops
//! addresses, routes and neighbours whatever they were, then up again without any, so that its driver's buffers are in the image
//! and bringing it up costs a clone nothing. IPv6, with which a kernel speaks up on its own, is off on it: guests get IPv4 only.
//! An interface that was not parked is down while it gets its MAC and address.
//!
//! A Xen card's MAC is its backend's to say: the driver reads it from xenstore whenever it connects, which it does in the background after
//! a restore, and until then its carrier is off and nothing is sent. So it is given its address at once, without a MAC and without
//! waiting for the backend.
//!
//! Classic ioctls where they do one thing; the address by one netlink message, because the ioctls set it with a wrong prefix
//! first and then move it, which is three times the work.

use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::socket::{bind, socket, AddressFamily, NetlinkAddr, SockFlag, SockProtocol, SockType};
use qrexec::Network;

use crate::failure::{Failure, Step};
use crate::sys::{self, IfRequest, RouteRequest};

const SIOCADDRT: u32 = 0x890b;
const SIOCGIFFLAGS: u32 = 0x8913;
const SIOCSIFFLAGS: u32 = 0x8914;
const SIOCSIFHWADDR: u32 = 0x8924;
const SIOCGIFHWADDR: u32 = 0x8927;
const UP: u16 = libc::IFF_UP as u16;
const ARPHRD_ETHER: u16 = 1;
const RTF_UP: u16 = 1;
const RTF_GATEWAY: u16 = 2;
const RTF_HOST: u16 = 4;
/// How long a Xen card's driver may take to meet its back end after a restore.
const RECONNECT_LIMIT: Duration = Duration::from_secs(5);

/// An interface and the socket to ask for changes.
pub struct Nic {
    name: [u8; 16],
    index: u32,
    socket: OwnedFd,
    netlink: OwnedFd,
    parked: bool,
    /// Xen's, or one that takes the MAC it is told.
    xen: bool,
}

impl Nic {
    /// The first ethernet interface, real ones before virtual ones.
    pub fn find() -> Result<Option<Self>, Failure> {
        let interfaces = Path::new("/sys/class/net");
        let Some(name) = first_ethernet(interfaces) else { return Ok(None) };
        let index = fs::read_to_string(interfaces.join(&name).join("ifindex"))
            .step(|| "read the interface's index")?;
        let step = || "open a socket for the network interface";
        let cloexec = SockFlag::SOCK_CLOEXEC;
        let socket_inet = socket(AddressFamily::Inet, SockType::Datagram, cloexec, None).step(step)?;
        let route = Some(SockProtocol::NetlinkRoute);
        let netlink = socket(AddressFamily::Netlink, SockType::Raw, cloexec, route).step(step)?;
        bind(netlink.as_raw_fd(), &NetlinkAddr::new(0, 0)).step(step)?; // or the first message does it
        let mut padded = [0; 16];
        for (to, from) in padded[..15].iter_mut().zip(name.bytes()) {
            *to = from;
        }
        let index = index.trim_end().parse().unwrap_or(0);
        let xen = is_xens(&interfaces.join(&name));
        Ok(Some(Self { name: padded, index, socket: socket_inet, netlink, parked: false, xen }))
    }

    /// Takes everything from it that is the template's, and leaves it up and silent.
    pub fn park(&mut self) -> Result<(), Failure> {
        let name = String::from_utf8_lossy(&self.name);
        let knob = format!("/proc/sys/net/ipv6/conf/{}/disable_ipv6", name.trim_end_matches('\0'));
        if Path::new(&knob).exists() {
            fs::write(&knob, "1").step(|| format!("write {knob}"))?;
        }
        self.take_down()?;
        self.bring_up()?;
        self.parked = true;
        Ok(())
    }

    /// Gives it its MAC, address and default route, and brings it up.
    pub fn configure(&self, mac: [u8; 6], network: Option<&Network>) -> Result<(), Failure> {
        let live = self.parked && (self.xen || self.request(SIOCSIFHWADDR, hardware_address(mac)).is_ok());
        if !live {
            self.take_down()?;
        }
        if !live && !self.xen {
            self.request(SIOCSIFHWADDR, hardware_address(mac)).step(|| "set the MAC")?;
        }
        if let Some(network) = network {
            self.add_address(network).step(|| "set the address")?;
        }
        if !live {
            match self.bring_up() {
                // netfront, before its back end has connected (`xennet_open`): the card leads nowhere yet, and keeps its address.
                Err(failure) if self.xen && failure.errno() == libc::ENODEV => return Ok(()),
                other => other?,
            }
        }
        network.map_or(Ok(()), |network| self.set_default_route(network))
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

    fn take_down(&self) -> Result<(), Failure> {
        let flags = self.flags().step(|| "read the interface's flags")?;
        self.set_flags(flags & !UP).step(|| "take the interface down")
    }

    fn bring_up(&self) -> Result<(), Failure> {
        let flags = self.flags().step(|| "read the interface's flags")?;
        // A restored Xen card has no queues until its driver has met the back end again, and cannot be brought up before.
        let deadline = Instant::now() + RECONNECT_LIMIT;
        loop {
            match self.set_flags(flags | UP) {
                Err(error)
                    if self.xen
                        && error.raw_os_error() == Some(libc::ENODEV)
                        && Instant::now() < deadline =>
                {
                    thread::sleep(Duration::from_millis(5));
                }
                done => return done.step(|| "bring the interface up"),
            }
        }
    }

    fn add_address(&self, network: &Network) -> io::Result<()> {
        let message = address_message(self.index, network);
        nix::unistd::write(&self.netlink, &message)?;
        // The kernel has done it when write returns, and answers only if it failed.
        let mut answer = [sys::slot(Some(self.netlink.as_fd()), libc::POLLIN)];
        sys::poll(&mut answer, Some(0))?;
        if answer[0].revents == 0 {
            return Ok(());
        }
        let mut answer = [0; 256];
        let length = nix::unistd::read(self.netlink.as_raw_fd(), &mut answer)?;
        match answer[..length].get(16..20).map(<[u8; 4]>::try_from) {
            Some(Ok(error)) => Err(io::Error::from_raw_os_error(i32::from_ne_bytes(error).saturating_neg())),
            _ => Err(io::Error::other("the kernel's answer is too short")),
        }
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

/// `RTM_NEWADDR`: struct nlmsghdr, struct ifaddrmsg, and three attributes of four bytes.
fn address_message(index: u32, network: &Network) -> Vec<u8> {
    const LENGTH: u32 = 16 + 8 + 3 * 8;
    const RTM_NEWADDR: u16 = 20;
    const REQUEST_CREATE_REPLACE: u16 = 0x1 | 0x400 | 0x100;
    const ADDRESS: u16 = 1;
    const LOCAL: u16 = 2;
    const BROADCAST: u16 = 4;
    let broadcast = u32::from(network.address) | !u32::from(netmask(network.prefix_len));
    let mut message = Vec::with_capacity(LENGTH as usize);
    message.extend_from_slice(&LENGTH.to_ne_bytes());
    message.extend_from_slice(&RTM_NEWADDR.to_ne_bytes());
    message.extend_from_slice(&REQUEST_CREATE_REPLACE.to_ne_bytes());
    message.extend_from_slice(&[0; 8]); // sequence, port: one question at a time
    message.extend_from_slice(&[libc::AF_INET as u8, network.prefix_len, 0, 0]);
    message.extend_from_slice(&index.to_ne_bytes());
    let attributes =
        [(LOCAL, network.address), (ADDRESS, network.address), (BROADCAST, Ipv4Addr::from(broadcast))];
    for (kind, address) in attributes {
        message.extend_from_slice(&8u16.to_ne_bytes());
        message.extend_from_slice(&kind.to_ne_bytes());
        message.extend_from_slice(&address.octets());
    }
    message
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

fn is_xens(interface: &Path) -> bool {
    fs::read_to_string(interface.join("device/modalias")).is_ok_and(|alias| alias.trim_end() == "xen:vif")
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
