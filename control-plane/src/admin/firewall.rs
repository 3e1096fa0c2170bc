//! Firewall rules in Qubes' text form: `action=accept dst4=10.0.0.0/8 proto=tcp dstports=80-90 …`.
//!
//! Written from QubesOS/qubes-core-admin `qubes/firewall.py` (Rule.from_api_string, api_rule). A rule is kept as it is to be
//! read: the action first, the other options in the order of their names, the comment, which may have spaces, at the end.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};

/// What there is without any rule.
pub(super) const DEFAULT: &str = "action=accept";
/// One request has room for some thousand rules; what enforces them has not.
const RULES_MAX: usize = 1000;
const COMMENT_BYTES_MAX: usize = 255;

/// Reads the lines of `admin.vm.firewall.Set`.
pub(super) fn parse_all(payload: &[u8]) -> Result<Vec<String>, String> {
    let text = std::str::from_utf8(payload).ok().filter(|text| text.is_ascii());
    let text = text.ok_or("the rules are no ASCII text")?;
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    if lines.len() > RULES_MAX {
        return Err(format!("more than {RULES_MAX} rules"));
    }
    lines.into_iter().map(|line| parse(line).map_err(|why| format!("{why} in rule {line:?}"))).collect()
}

/// Reads a rule, and writes it as it is kept.
fn parse(line: &str) -> Result<String, String> {
    let (options, comment) = match line.split_once("comment=") {
        Some((options, comment)) => (options, Some(comment)),
        None => (line, None),
    };
    let mut found = BTreeMap::new();
    for option in options.split_whitespace() {
        let (name, value) = option.split_once('=').ok_or_else(|| format!("{option:?} is no option"))?;
        let name = if name == "dsthost" { kind_of_host(value) } else { name };
        check(name, value)?;
        if found.insert(name, value).is_some() {
            return Err(format!("{name} is there twice"));
        }
    }
    check_together(&found)?;
    let action = found.remove("action").ok_or("missing action")?;
    let mut rule = format!("action={action}");
    rule.extend(found.iter().map(|(name, value)| format!(" {name}={value}")));
    if let Some(comment) = comment.filter(|comment| !comment.is_empty()) {
        let fine = |byte: u8| byte == b' ' || byte.is_ascii_graphic();
        if comment.len() > COMMENT_BYTES_MAX || !comment.bytes().all(fine) {
            return Err("a comment that is no printable text, or too long".into());
        }
        rule.push_str(&format!(" comment={comment}"));
    }
    Ok(rule)
}

fn check(name: &str, value: &str) -> Result<(), String> {
    let fine = match name {
        "action" => matches!(value, "accept" | "drop"),
        "proto" => matches!(value, "tcp" | "udp" | "icmp"),
        "dst4" => is_network(value, 32, |address| address.parse::<Ipv4Addr>().is_ok()),
        "dst6" => is_network(value, 128, |address| address.parse::<Ipv6Addr>().is_ok()),
        "dsthost" => is_host_name(value),
        "dstports" => is_range(value),
        "icmptype" => number(value, 255).is_some(),
        "specialtarget" => value == "dns",
        "expire" => number(value.strip_prefix('+').unwrap_or(value), u64::MAX).is_some(),
        _ => return Err(format!("unknown option {name:?}")),
    };
    match fine {
        true => Ok(()),
        false => Err(format!("bad value {value:?} of {name}")),
    }
}

fn check_together(options: &BTreeMap<&str, &str>) -> Result<(), String> {
    let has = |name: &str| options.contains_key(name);
    let proto = options.get("proto").copied();
    if ["dst4", "dst6", "dsthost"].into_iter().filter(|name| has(name)).count() > 1 {
        return Err("more than one destination".into());
    }
    if has("dstports") && !matches!(proto, Some("tcp" | "udp")) {
        return Err("dstports without proto tcp or udp".into());
    }
    if has("icmptype") && proto != Some("icmp") {
        return Err("icmptype without proto icmp".into());
    }
    if has("specialtarget") && has("dstports") {
        return Err("dstports with a special target".into());
    }
    Ok(())
}

/// `dsthost` may have an address, which is kept under the name that says so.
fn kind_of_host(value: &str) -> &'static str {
    let address = value.split('/').next().unwrap_or_default();
    match (address.parse::<Ipv4Addr>(), address.parse::<Ipv6Addr>()) {
        (Ok(_), _) => "dst4",
        (_, Ok(_)) => "dst6",
        _ => "dsthost",
    }
}

fn is_network(value: &str, bits_max: u64, is_address: impl Fn(&str) -> bool) -> bool {
    match value.split_once('/') {
        Some((address, bits)) => is_address(address) && number(bits, bits_max).is_some(),
        None => is_address(value),
    }
}

fn is_host_name(value: &str) -> bool {
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
            && !label.starts_with('-')
    };
    value.len() <= 253 && value.split('.').all(is_label)
}

fn is_range(value: &str) -> bool {
    let (from, to) = value.split_once('-').unwrap_or((value, value));
    number(from, 65535).zip(number(to, 65535)).is_some_and(|(from, to)| from <= to)
}

fn number(text: &str, max: u64) -> Option<u64> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|number| digits && *number <= max)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_rule_is_kept_as_qubesd_says_it() {
        for (rule, kept) in [
            ("action=drop", "action=drop"),
            (
                "proto=tcp dsthost=10.0.0.0/8 dstports=80-90 action=accept",
                "action=accept dst4=10.0.0.0/8 dstports=80-90 proto=tcp",
            ),
            ("action=accept dsthost=2001:db8::/32", "action=accept dst6=2001:db8::/32"),
            ("action=accept specialtarget=dns", "action=accept specialtarget=dns"),
            (
                "action=accept dsthost=qubes-os.org expire=+60 comment=a = b",
                "action=accept dsthost=qubes-os.org expire=+60 comment=a = b",
            ),
        ] {
            assert_eq!(parse(rule).as_deref(), Ok(kept));
            assert_eq!(parse(kept).as_deref(), Ok(kept));
        }
    }

    #[test]
    fn what_is_no_rule_is_refused() {
        for (rule, why) in [
            ("proto=tcp", "missing action"),
            ("action=reject", "bad value"),
            ("action=accept dst4=10.0.0.0/33", "bad value"),
            ("action=accept dsthost=a/b", "bad value"),
            ("action=accept dstports=80", "without proto"),
            ("action=accept proto=tcp dstports=90-80", "bad value"),
            ("action=accept proto=tcp icmptype=1", "without proto"),
            ("action=accept dst4=1.1.1.1 dst6=::1", "more than one"),
            ("action=accept action=drop", "twice"),
            ("action=accept; rm", "bad value"),
            ("action=accept colour=red", "unknown option"),
            ("accept", "no option"),
        ] {
            assert!(parse(rule).unwrap_err().contains(why), "{rule}: {:?}", parse(rule));
        }
        assert!(parse_all(&b"action=drop\n".repeat(RULES_MAX + 1)).is_err());
        assert!(parse_all(b"action=drop comment=\xc3\xa9").is_err());
        assert_eq!(parse_all(b"action=drop\n\naction=accept").unwrap().len(), 2);
    }

    proptest! {
        #[test]
        fn what_is_kept_is_read_again_as_it_is(
            action in "accept|drop|x", proto in " proto=(tcp|udp|icmp)|", ports in " dstports=[0-9]{1,6}(-[0-9]{1,4})?|",
            host in " dsthost=[0-9a-z:./]{1,12}|", comment in " comment=[ -~]{0,9}|",
        ) {
            if let Ok(kept) = parse(&format!("action={action}{proto}{ports}{host}{comment}")) {
                prop_assert_eq!(parse(&kept), Ok(kept));
            }
        }

        #[test]
        fn no_bytes_panic(bytes: Vec<u8>, text in "[a-z0-9= ./:+-]{0,40}") {
            let _ = (parse_all(&bytes), parse_all(text.as_bytes()));
        }
    }
}
