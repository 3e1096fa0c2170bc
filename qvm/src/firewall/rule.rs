//! One rule, as it is typed, shown, and said to the API: `action=accept proto=tcp dst4=10.0.0.0/8 dstports=443-443 comment=…`
//! (qubes-core-admin-client, qubesadmin/firewall.py, Rule; the comment is the last, as it may have spaces).

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::{SystemTime, UNIX_EPOCH};

/// A rule whose parts are what they must be.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Rule {
    action: String,
    proto: Option<String>,
    host: Option<Host>,
    ports: Option<(u32, u32)>,
    icmp_type: Option<u8>,
    special_target: Option<String>,
    expire: Option<i64>,
    comment: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Host {
    /// An address and its prefix's length.
    V4(Ipv4Addr, u8),
    V6(Ipv6Addr, u8),
    Name(String),
}

impl Rule {
    /// A rule as typed. What has no name is the first of those that were not given yet.
    pub fn of_words(words: &[String]) -> Result<Rule, String> {
        let mut order = vec!["action", "dsthost", "proto", "dstports", "icmptype"];
        let mut pairs = Vec::new();
        for word in words {
            let (name, value) = match word.split_once('=') {
                Some(("dst4" | "dst6", value)) => ("dsthost", value),
                Some(pair) => pair,
                None => {
                    (*order.first().ok_or_else(|| format!("invalid rule description: {word}"))?, &word[..])
                }
            };
            // What does not go with the protocol is not expected any more.
            let never = match (name, value) {
                ("proto", "tcp" | "udp") => "icmptype",
                ("proto", "icmp") => "dstports",
                _ => "",
            };
            order.retain(|next| *next != name && *next != never);
            let value = match (name, value.strip_prefix('+')) {
                ("expire", Some(after)) => now().saturating_add(number("expire", after)?).to_string(),
                _ => value.to_owned(),
            };
            pairs.push((name, value));
        }
        Rule::of_pairs(pairs.iter().map(|(name, value)| (*name, &value[..])))
    }

    /// A rule as the API says it.
    pub fn parse(line: &str) -> Result<Rule, String> {
        let (line, comment) = match line.split_once("comment=") {
            Some((line, comment)) => (line, Some(("comment", comment))),
            None => (line, None),
        };
        let words: Result<Vec<_>, _> = line
            .split(' ')
            .filter(|word| !word.is_empty())
            .map(|word| word.split_once('=').ok_or_else(|| format!("Invalid rule element: {word}")))
            .collect();
        Rule::of_pairs(words?.into_iter().chain(comment))
    }

    fn of_pairs<'a>(pairs: impl Iterator<Item = (&'a str, &'a str)>) -> Result<Rule, String> {
        let mut rule = Rule::default();
        for (name, value) in pairs {
            match name {
                "action" => rule.action = choice(name, value, &["accept", "drop", "forward"])?,
                "proto" => rule.proto = Some(choice(name, value, &["tcp", "udp", "icmp"])?),
                "dsthost" | "dst4" | "dst6" => rule.host = Some(Host::parse(value)?),
                "dstports" => rule.ports = Some(ports(value)?),
                "icmptype" => rule.icmp_type = Some(number(name, value)?),
                "specialtarget" => rule.special_target = Some(choice(name, value, &["dns"])?),
                "expire" => rule.expire = Some(number(name, value)?),
                "comment" if !value.contains('\n') => rule.comment = Some(value.to_owned()),
                _ => return Err(format!("Invalid rule element: {name}={value}")),
            }
        }
        let proto = rule.proto.as_deref();
        if rule.action.is_empty() {
            return Err("missing action=".into());
        }
        if rule.ports.is_some() && !matches!(proto, Some("tcp" | "udp")) {
            return Err("dstports valid only for 'tcp' and 'udp' protocols".into());
        }
        if rule.icmp_type.is_some() && proto != Some("icmp") {
            return Err("icmptype valid only for 'icmp' protocol".into());
        }
        Ok(rule)
    }

    /// What stands in the table's columns: all but the number, `-` for what is not given.
    pub fn cells(&self) -> [String; 8] {
        let ports = self
            .ports
            .map(|(first, last)| if first == last { first.to_string() } else { format!("{first}-{last}") });
        let cells = [
            Some(self.action.clone()),
            self.host.as_ref().map(Host::to_string),
            self.proto.clone(),
            ports,
            self.special_target.clone(),
            self.icmp_type.map(|number| number.to_string()),
            self.expire.map(|at| format!("{:+}s", at.saturating_sub(now()))),
            self.comment.clone(),
        ];
        cells.map(|cell| cell.unwrap_or_else(|| "-".into()))
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "action={}", self.action)?;
        self.proto.iter().try_for_each(|proto| write!(f, " proto={proto}"))?;
        match &self.host {
            None | Some(Host::V4(_, 0) | Host::V6(_, 0)) => {} // any host
            Some(host @ Host::V4(..)) => write!(f, " dst4={host}")?,
            Some(host @ Host::V6(..)) => write!(f, " dst6={host}")?,
            Some(Host::Name(name)) => write!(f, " dsthost={name}")?,
        }
        self.ports.iter().try_for_each(|(first, last)| write!(f, " dstports={first}-{last}"))?;
        self.icmp_type.iter().try_for_each(|number| write!(f, " icmptype={number}"))?;
        self.special_target.iter().try_for_each(|target| write!(f, " specialtarget={target}"))?;
        self.expire.iter().try_for_each(|at| write!(f, " expire={at}"))?;
        self.comment.iter().try_for_each(|comment| write!(f, " comment={comment}"))
    }
}

impl Host {
    fn parse(text: &str) -> Result<Host, String> {
        let (address, len) = match text.split_once('/') {
            Some((address, len)) => (address, Some(number::<u8>("dsthost", len)?)),
            None => (text, None),
        };
        let prefix = |most: u8| match len.unwrap_or(most) {
            len if len <= most => Ok(len),
            _ => Err(format!("netmask must be between 0 and {most}: {text}")),
        };
        if let Ok(address) = address.parse() {
            return Ok(Host::V6(address, prefix(128)?));
        }
        if let Ok(address) = address.parse() {
            return Ok(Host::V4(address, prefix(32)?));
        }
        let is_fine = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-._".contains(&byte);
        match len {
            Some(_) => Err(format!("Invalid IP address: {address}")),
            None if !text.is_empty() && text.bytes().all(is_fine) => Ok(Host::Name(text.to_owned())),
            None => Err(format!("Invalid hostname: {text}")),
        }
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Host::V4(address, len) => write!(f, "{address}/{len}"),
            Host::V6(address, len) => write!(f, "{address}/{len}"),
            Host::Name(name) => f.write_str(name),
        }
    }
}

fn choice(name: &str, value: &str, choices: &[&str]) -> Result<String, String> {
    let found = choices.contains(&value).then(|| value.to_owned());
    found.ok_or_else(|| format!("{name} must be {}, not {value:?}", choices.join(" or ")))
}

fn number<T: std::str::FromStr>(name: &str, text: &str) -> Result<T, String> {
    text.parse().map_err(|_| format!("{name}: {text:?} is no number, or too large a one"))
}

/// `443` or `1200-1400`.
fn ports(text: &str) -> Result<(u32, u32), String> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (number("dstports", first)?, number("dstports", last)?);
    match first <= last && last <= 65535 {
        true => Ok((first, last)),
        false => Err(format!("Invalid port range: {text}")),
    }
}

fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    i64::try_from(since).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed(text: &str) -> Result<String, String> {
        let words: Vec<String> = text.split(' ').map(str::to_owned).collect();
        Rule::of_words(&words).map(|rule| rule.to_string())
    }

    #[test]
    fn rules_are_said_as_the_api_has_them() {
        for (rule, said) in [
            ("accept", "action=accept"),
            ("drop 192.168.0.0/16", "action=drop dst4=192.168.0.0/16"),
            ("accept 1.1.1.1 tcp 443", "action=accept proto=tcp dst4=1.1.1.1/32 dstports=443-443"),
            (
                "accept www.example.com udp 1200-1400",
                "action=accept proto=udp dsthost=www.example.com dstports=1200-1400",
            ),
            ("accept fd00::/8 icmp 8", "action=accept proto=icmp dst6=fd00::/8 icmptype=8"),
            ("proto=tcp accept dstports=80", "action=accept proto=tcp dstports=80-80"),
            ("accept dst4=0.0.0.0/0", "action=accept"),
            (
                "drop specialtarget=dns expire=7 comment=a=b",
                "action=drop specialtarget=dns expire=7 comment=a=b",
            ),
        ] {
            assert_eq!(typed(rule).as_deref(), Ok(said));
            assert_eq!(Rule::parse(said).unwrap().to_string(), said);
        }
        let rule = Rule::parse("action=drop comment=with spaces, action=accept").unwrap();
        assert_eq!(rule.to_string(), "action=drop comment=with spaces, action=accept");
    }

    #[test]
    fn what_is_no_rule_is_refused() {
        for wrong in [
            "maybe",
            "accept 1.1.1.1/33",
            "accept a/8",
            "accept UPPER",
            "accept dstports=80",
            "accept proto=tcp dstports=2-1",
            "accept proto=tcp dstports=65536",
            "accept icmptype=8",
            "accept proto=icmp icmptype=256",
            "accept specialtarget=web",
            "accept colour=red",
            "proto=tcp dsthost=a",
            "accept a tcp 1 2 3",
            "accept a\nb",
            "accept expire=+x",
        ] {
            assert!(typed(wrong).is_err(), "{wrong}");
        }
    }
}
