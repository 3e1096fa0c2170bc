//! Services behind TCP: links to `/dev/tcp/HOST/PORT`, `/dev/tcp/HOST` or `/dev/tcp`, where the caller's argument says what is missing.
//!
//! Invariants: HOST is an address, never a name that would have to be looked up; in an argument its `:` are written `+`, and it has no zone.
//! PORT is a decimal number from 1 to 65535 without needless zeros.

use std::fmt;
use std::fs;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::path::Path;

use crate::NotServed;

const LINK: &str = "/dev/tcp";

/// Where a service is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Address and port.
    pub address: SocketAddr,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.address.fmt(f)
    }
}

/// The place that a link and the caller's argument name; `None`: the link leads elsewhere.
pub fn of_link(link: &Path, argument: &str) -> Result<Option<Place>, NotServed> {
    let text = link.to_string_lossy();
    let wrong = |what| NotServed::Tcp { link: text.clone().into_owned(), what };
    let Some(rest) = text.strip_prefix(LINK) else { return Ok(None) };
    let (host, port) = match rest.strip_prefix('/') {
        None if rest.is_empty() => {
            let (host, port) =
                argument.rsplit_once('+').ok_or_else(|| wrong("the argument must be HOST+PORT"))?;
            if host.contains(['_', '%']) {
                return Err(wrong("the argument's host has a `_` or `%`"));
            }
            (host.replace('+', ":"), port)
        }
        None => return Ok(None),
        Some(place) => match place.split_once('/') {
            Some((host, port)) if argument.is_empty() => (host.to_owned(), port),
            Some(_) => return Err(wrong("there is no argument to it")),
            None => (place.to_owned(), argument),
        },
    };
    let ip = address(&host).ok_or_else(|| wrong("the host is no address"))?;
    let port = port_of(port).ok_or_else(|| wrong("the port is no number from 1 to 65535"))?;
    let address = match ip {
        (IpAddr::V6(ip), zone) => SocketAddr::V6(SocketAddrV6::new(ip, port, 0, zone)),
        (ip, _) => SocketAddr::new(ip, port),
    };
    Ok(Some(Place { address }))
}

/// An address and its zone's number, 0 for none.
fn address(host: &str) -> Option<(IpAddr, u32)> {
    let Some((ip, zone)) = host.split_once('%') else { return Some((host.parse().ok()?, 0)) };
    let ip: Ipv6Addr = ip.parse().ok()?;
    Some((ip.into(), zone.parse().ok().or_else(|| interface(zone))?))
}

/// The number of a network interface.
fn interface(name: &str) -> Option<u32> {
    let is_name = !name.is_empty() && !name.starts_with('.') && !name.contains('/');
    let number = is_name.then(|| fs::read_to_string(format!("/sys/class/net/{name}/ifindex")))?.ok()?;
    number.trim_end().parse().ok()
}

fn port_of(text: &str) -> Option<u16> {
    let is_plain = text.bytes().all(|byte| byte.is_ascii_digit()) && !text.starts_with('0');
    text.parse().ok().filter(|_| is_plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(link: &str, argument: &str) -> Option<String> {
        of_link(Path::new(link), argument).ok()?.map(|place| place.to_string())
    }

    #[test]
    fn link_and_argument_name_a_place_between_them() {
        for (link, argument, expected) in [
            ("/dev/tcp/127.0.0.1/80", "", "127.0.0.1:80"),
            ("/dev/tcp/127.0.0.1", "65535", "127.0.0.1:65535"),
            ("/dev/tcp", "127.0.0.1+22", "127.0.0.1:22"),
            ("/dev/tcp", "++1+22", "[::1]:22"),
            ("/dev/tcp/::1/22", "", "[::1]:22"),
            ("/dev/tcp/fe80::1%7", "22", "[fe80::1%7]:22"),
            ("/dev/tcp/fe80::1%lo", "22", "[fe80::1%1]:22"),
        ] {
            assert_eq!(place(link, argument).as_deref(), Some(expected), "{link} {argument}");
        }
    }

    #[test]
    fn what_names_no_place_is_an_error_and_other_links_are_not_for_here() {
        for (link, argument) in [
            ("/dev/tcp", ""),
            ("/dev/tcp", "127.0.0.1"),
            ("/dev/tcp", "a_b+1"),
            ("/dev/tcp", "fe80++1%lo+22"),
            ("/dev/tcp/", "80"),
            ("/dev/tcp//80", ""),
            ("/dev/tcp/127.0.0.1", ""),
            ("/dev/tcp/127.0.0.1", "127.0.0.1+80"),
            ("/dev/tcp/127.0.0.1/80", "80"),
            ("/dev/tcp/127.0.0.1/080", ""),
            ("/dev/tcp/127.0.0.1/+80", ""),
            ("/dev/tcp/127.0.0.1/0", ""),
            ("/dev/tcp/127.0.0.1/65536", ""),
            ("/dev/tcp/127.0.0.1/80/", ""),
            ("/dev/tcp/localhost/80", ""),
            ("/dev/tcp/127.0.0.1%lo/80", ""),
            ("/dev/tcp/fe80::1%../80", ""),
        ] {
            assert!(of_link(Path::new(link), argument).is_err(), "{link} {argument}");
        }
        for other in ["/dev/tcpx", "/dev/tc", "../socket", "/usr/bin/env"] {
            assert!(matches!(of_link(Path::new(other), "80"), Ok(None)), "{other}");
        }
    }
}
