//! What makes a clone itself. Payload: realtime_ns u64, entropy 64 bytes, machine-id 16 bytes, MAC 6 bytes, prefix length u8, number of
//! name servers u8, address, gateway (4 bytes each, 0 = none), the name servers, and the hostname to the end.
//!
//! Invariants: a parsed identity has a hostname that is safe in any file, a unicast MAC, a machine-id other than zero and, without
//! an address, nothing else about the network.

use std::fmt;
use std::net::Ipv4Addr;

use crate::ProtocolError;

/// Bytes of entropy: two seeds of the kernel's generator.
pub const ENTROPY_BYTES: usize = 64;
/// A label of DNS, and within what the kernel holds.
pub const HOSTNAME_BYTES_MAX: usize = 63;
/// As many as resolvers read.
pub const DNS_COUNT_MAX: usize = 3;

const FIXED_BYTES: usize = 104;
const FRAME: &str = "Identify";

/// What the guest gets before anything in it runs.
#[derive(Clone, PartialEq, Eq)]
pub struct Identity {
    /// Letters, digits and inner hyphens.
    pub hostname: String,
    /// The 128 bits of /etc/machine-id.
    pub machine_id: [u8; 16],
    /// Fresh random bytes for the kernel's generator, all credited.
    pub entropy: [u8; ENTROPY_BYTES],
    /// CLOCK_REALTIME to set, as of when the frame is written.
    pub realtime_ns: u64,
    /// The NIC's address.
    pub mac: [u8; 6],
    /// IPv4, or a NIC with a link and nothing else.
    pub network: Option<Network>,
}

/// The NIC's IPv4 configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Network {
    /// The guest's address.
    pub address: Ipv4Addr,
    /// At most 32.
    pub prefix_len: u8,
    /// Where the default route goes; may be outside the prefix.
    pub gateway: Option<Ipv4Addr>,
    /// For /etc/resolv.conf, at most [`DNS_COUNT_MAX`].
    pub dns: Vec<Ipv4Addr>,
}

impl fmt::Debug for Identity {
    /// Everything but the entropy, which is nobody's business.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity")
            .field("hostname", &self.hostname)
            .field("machine_id", &self.machine_id_hex())
            .field("realtime_ns", &self.realtime_ns)
            .field("mac", &self.mac)
            .field("network", &self.network)
            .finish_non_exhaustive()
    }
}

impl Identity {
    /// The machine-id as /etc/machine-id has it, without the newline.
    pub fn machine_id_hex(&self) -> String {
        let digit = |nibble: u8| char::from(b"0123456789abcdef"[usize::from(nibble & 15)]);
        self.machine_id.iter().flat_map(|byte| [digit(byte >> 4), digit(*byte)]).collect()
    }

    /// Whether a guest can take it on. Parsed identities always pass.
    pub fn validate(&self) -> Result<(), ProtocolError> {
        let malformed = |what| Err(ProtocolError::malformed(FRAME, what));
        if !is_hostname(self.hostname.as_bytes()) {
            return malformed("hostname must be 1 to 63 letters, digits and inner hyphens");
        }
        if self.machine_id == [0; 16] {
            return malformed("machine-id is zero");
        }
        if self.mac[0] & 1 == 1 || self.mac == [0; 6] {
            return malformed("MAC is zero or a group address");
        }
        let Some(network) = &self.network else { return Ok(()) };
        if network.prefix_len > 32 {
            return malformed("prefix length is over 32");
        }
        if network.dns.len() > DNS_COUNT_MAX {
            return malformed("more than 3 name servers");
        }
        let mut addresses = network.dns.iter().chain(&network.gateway).chain([&network.address]);
        if addresses.any(|address| !is_host(address)) {
            return malformed("an address is not a host's");
        }
        Ok(())
    }

    pub(crate) fn encode(&self) -> Result<Vec<u8>, ProtocolError> {
        self.validate()?;
        let none = Network { address: Ipv4Addr::UNSPECIFIED, prefix_len: 0, gateway: None, dns: Vec::new() };
        let network = self.network.as_ref().unwrap_or(&none);
        let mut out = Vec::with_capacity(FIXED_BYTES + 4 * network.dns.len() + self.hostname.len());
        out.extend_from_slice(&self.realtime_ns.to_le_bytes());
        out.extend_from_slice(&self.entropy);
        out.extend_from_slice(&self.machine_id);
        out.extend_from_slice(&self.mac);
        out.extend_from_slice(&[network.prefix_len, network.dns.len() as u8]);
        out.extend_from_slice(&network.address.octets());
        out.extend_from_slice(&network.gateway.unwrap_or(Ipv4Addr::UNSPECIFIED).octets());
        for server in &network.dns {
            out.extend_from_slice(&server.octets());
        }
        out.extend_from_slice(self.hostname.as_bytes());
        Ok(out)
    }

    pub(crate) fn parse(payload: &[u8]) -> Result<Self, ProtocolError> {
        let mut rest = payload;
        let realtime_ns = u64::from_le_bytes(take(&mut rest)?);
        let entropy = take(&mut rest)?;
        let machine_id = take(&mut rest)?;
        let mac = take(&mut rest)?;
        let [prefix_len, dns_count] = take(&mut rest)?;
        let address = Ipv4Addr::from(take::<4>(&mut rest)?);
        let gateway = Some(Ipv4Addr::from(take::<4>(&mut rest)?)).filter(|gateway| !gateway.is_unspecified());
        if usize::from(dns_count) > DNS_COUNT_MAX {
            return Err(ProtocolError::malformed(FRAME, "more than 3 name servers"));
        }
        let mut dns = Vec::new();
        for _ in 0..dns_count {
            dns.push(Ipv4Addr::from(take::<4>(&mut rest)?));
        }
        if !is_hostname(rest) {
            return Err(ProtocolError::malformed(
                FRAME,
                "hostname must be 1 to 63 letters, digits and inner hyphens",
            ));
        }
        let hostname = String::from_utf8_lossy(rest).into_owned();
        let network = match (address.is_unspecified(), prefix_len, gateway, dns.is_empty()) {
            (false, ..) => Some(Network { address, prefix_len, gateway, dns }),
            (true, 0, None, true) => None,
            _ => return Err(ProtocolError::malformed(FRAME, "a network without an address")),
        };
        let identity = Self { hostname, machine_id, entropy, realtime_ns, mac, network };
        identity.validate()?;
        Ok(identity)
    }
}

fn is_hostname(name: &[u8]) -> bool {
    let inner = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'-';
    (1..=HOSTNAME_BYTES_MAX).contains(&name.len())
        && name.iter().all(inner)
        && !name.starts_with(b"-")
        && !name.ends_with(b"-")
}

fn is_host(address: &Ipv4Addr) -> bool {
    !(address.is_unspecified() || address.is_multicast() || address.is_broadcast())
}

fn take<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N], ProtocolError> {
    let (taken, left) = rest.split_first_chunk().ok_or(ProtocolError::malformed(FRAME, "too short"))?;
    *rest = left;
    Ok(*taken)
}
