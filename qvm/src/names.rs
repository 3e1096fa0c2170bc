//! Which qubes are meant: names, patterns, or all (VmNameAction and VmNameGroup of qubesadmin/tools/__init__.py).

use admin_api::lines::Qube;

use crate::api::{Api, Common};
use crate::outcome::{quoted, Failure, Outcome};

/// The qubes that a tool is to do something with, at least one.
#[derive(Debug, Clone, clap::Args)]
pub struct Qubes {
    #[command(flatten)]
    common: Common,
    /// Perform the action on all qubes but dom0
    #[arg(long = "all")]
    pub is_all: bool,
    /// Exclude the qube from --all
    #[arg(long, value_name = "VMNAME", requires = "is_all")]
    pub exclude: Vec<String>,
    /// Names of qubes, or patterns (*, ?, [abc], [!abc])
    #[arg(value_name = "VMNAME", required_unless_present = "is_all", conflicts_with = "is_all")]
    pub names: Vec<String>,
}

impl Qubes {
    /// The API they are in.
    pub fn api(&self) -> Api {
        self.common.api()
    }

    /// The qubes meant.
    pub fn select(&self, api: &Api) -> Outcome<Vec<Qube>> {
        let qubes = api.qubes()?;
        if self.is_all {
            let is_meant = |qube: &Qube| qube.class != "AdminVM" && !self.exclude.contains(&qube.name);
            return Ok(qubes.into_iter().filter(is_meant).collect());
        }
        by_name(&qubes, &self.names)
    }
}

/// The qubes with these names or patterns, each once, in the order they are named.
pub fn by_name(qubes: &[Qube], names: &[String]) -> Outcome<Vec<Qube>> {
    let mut meant: Vec<Qube> = Vec::new();
    for name in names {
        let is_pattern = name.contains(['*', '?', '[', '!', ']']);
        let found: Vec<&Qube> = match is_pattern {
            true => qubes.iter().filter(|qube| matches(name, &qube.name)).collect(),
            false => vec![one(qubes, name)?],
        };
        for qube in found {
            if !meant.contains(qube) {
                meant.push(qube.clone());
            }
        }
    }
    Ok(meant)
}

/// The qube with this name.
pub fn one<'a>(qubes: &'a [Qube], name: &str) -> Outcome<&'a Qube> {
    let found = qubes.iter().find(|qube| qube.name == name);
    found.ok_or_else(|| Failure::Usage(format!("no such domain: {}", quoted(name))))
}

/// Whether a shell's pattern fits a name. For each prefix of the pattern in turn it holds which prefixes of the name fit: no
/// pattern makes it slow.
fn matches(pattern: &str, name: &str) -> bool {
    let name: Vec<char> = name.chars().collect();
    let mut fits = vec![false; name.len() + 1];
    fits[0] = true;
    let mut rest = pattern.chars();
    while let Some(char) = rest.next() {
        if char == '*' {
            let first = fits.iter().position(|&fit| fit).unwrap_or(fits.len());
            fits.iter_mut().skip(first).for_each(|fit| *fit = true);
            continue;
        }
        let set = if char == '[' { Set::parse(rest.as_str()) } else { None };
        if let Some((_, after)) = &set {
            rest = after.chars();
        }
        let fits_one = |other: char| match &set {
            Some((set, _)) => set.has(other),
            None => char == '?' || char == other,
        };
        let next =
            std::iter::once(false).chain(fits.iter().zip(&name).map(|(&fit, &other)| fit && fits_one(other)));
        fits = next.collect();
    }
    fits.last() == Some(&true)
}

/// `[abc]`, `[a-c]`, `[!abc]`.
struct Set<'a> {
    members: &'a str,
    is_negated: bool,
}

impl<'a> Set<'a> {
    /// The set after a `[`, and what follows it; `None` if it is not closed, and so none.
    fn parse(text: &'a str) -> Option<(Set<'a>, &'a str)> {
        let (is_negated, text) = text.strip_prefix('!').map_or((false, text), |text| (true, text));
        let first = text.chars().next()?;
        let end = first.len_utf8() + text.get(first.len_utf8()..)?.find(']')?; // a `]` in front is a member
        Some((Set { members: text.get(..end)?, is_negated }, text.get(end + 1..)?))
    }

    fn has(&self, char: char) -> bool {
        let members: Vec<char> = self.members.chars().collect();
        let in_range =
            members.windows(3).any(|range| range[1] == '-' && (range[0]..=range[2]).contains(&char));
        (in_range || members.contains(&char)) != self.is_negated
    }
}

#[cfg(test)]
mod tests {
    use super::matches;

    #[test]
    fn patterns_are_those_of_the_shell() {
        for (pattern, name, fits) in [
            ("fedora*", "fedora-41", true),
            ("fedora*", "my-fedora", false),
            ("*minimal", "debian-13-minimal", true),
            ("????", "dom0", true),
            ("????", "dom01", false),
            ("??????-[rs]*", "debian-sid", true),
            ("??????-[!14s]*", "debian-sid", false),
            ("??????-[!14s]*", "fedora-rawhide", true),
            ("disp[0-9]", "disp7", true),
            ("a[b", "a[b", true),
            ("", "", true),
            ("*a*a*a*a*a*b", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", false),
        ] {
            assert_eq!(matches(pattern, name), fits, "{pattern} {name}");
        }
    }
}
