//! `qvm-volume`: the volumes of qubes.

mod import;
mod list;

use admin_api::lines::pairs;
use clap::{Parser, Subcommand};

use crate::api::{Api, Common};
use crate::outcome::{print, quoted, Failure, Outcome, FAILED};
use crate::table;

/// What `info` says, in its order.
const INFO: [&str; 10] = [
    "pool",
    "vid",
    "rw",
    "source",
    "save_on_stop",
    "snap_on_start",
    "size",
    "usage",
    "revisions_to_keep",
    "ephemeral",
];
/// What `config` can change.
const SETTABLE: [&str; 3] = ["rw", "revisions_to_keep", "ephemeral"];

/// Shows and changes volumes.
#[derive(Parser)]
#[command(version, disable_help_subcommand = true)]
pub struct Options {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    what: Option<What>,
}

#[derive(Subcommand)]
enum What {
    /// Show what there is to know of a volume
    #[command(visible_alias = "i")]
    Info {
        /// A volume
        #[arg(value_name = "VM:VOLUME")]
        volume: String,
        /// Show only this; `revisions` for a list of them
        property: Option<String>,
    },
    /// Change a setting of a volume
    #[command(visible_aliases = ["c", "set", "s"])]
    Config {
        /// A volume
        #[arg(value_name = "VM:VOLUME")]
        volume: String,
        /// rw, revisions_to_keep or ephemeral
        property: String,
        /// Its new value
        value: String,
    },
    /// Change a volume's size
    #[command(visible_alias = "extend")]
    Resize {
        /// Even if it shrinks
        #[arg(long, short)]
        force: bool,
        /// A volume
        #[arg(value_name = "VM:VOLUME")]
        volume: String,
        /// Bytes, or with a unit: 10GiB, 500MB
        size: String,
    },
    /// Fill a volume of a halted qube
    Import {
        /// Bytes that the volume is to have [default: as many as the file has]
        #[arg(long, conflicts_with = "no_resize")]
        size: Option<u64>,
        /// Leave its size as it is
        #[arg(long)]
        no_resize: bool,
        /// A volume
        #[arg(value_name = "VM:VOLUME")]
        volume: String,
        /// What to fill it with; - is standard input
        path: String,
    },
    /// List volumes
    #[command(visible_aliases = ["ls", "l"])]
    List(list::Options),
    /// Make a volume what it was in an earlier revision
    #[command(visible_aliases = ["rv", "r"])]
    Revert {
        /// A volume
        #[arg(value_name = "VM:VOLUME")]
        volume: String,
        /// The revision; the latest if there is none given
        revision: Option<String>,
    },
}

/// Runs `qvm-volume`.
pub fn run(options: Options) -> Outcome {
    let api = options.common.api();
    match options.what.unwrap_or_else(|| What::List(list::Options::default())) {
        What::Info { volume, property } => Volume::find(&api, &volume)?.info(property.as_deref())?,
        What::Config { volume, property, value } => {
            Volume::find(&api, &volume)?.configure(&property, &value)?
        }
        What::Resize { force, volume, size } => Volume::find(&api, &volume)?.resize(&size, force)?,
        What::Import { size, no_resize, volume, path } => {
            import::run(&Volume::find(&api, &volume)?, &path, size, no_resize)?
        }
        What::List(options) => list::run(&options, &api)?,
        What::Revert { volume, revision } => Volume::find(&api, &volume)?.revert(revision)?,
    }
    Ok(0)
}

/// A volume of a qube.
struct Volume<'a> {
    api: &'a Api,
    qube: &'a str,
    name: &'a str,
}

impl<'a> Volume<'a> {
    /// The volume of this name, `VM:VOLUME`.
    fn find(api: &'a Api, text: &'a str) -> Outcome<Volume<'a>> {
        let (qube, name) = text
            .split_once(':')
            .filter(|(_, name)| !name.contains(':'))
            .ok_or_else(|| Failure::Usage("expected a vm & volume combination like foo:bar".into()))?;
        let missing = |message| Failure::Runtime(message, FAILED);
        if !api.qubes()?.iter().any(|known| known.name == qube) {
            return Err(missing(format!("no vm {}", quoted(qube))));
        }
        if !api.names("admin.vm.volume.List", qube, "")?.iter().any(|known| known == name) {
            return Err(missing(format!("vm {} has no volume {}", quoted(qube), quoted(name))));
        }
        Ok(Volume { api, qube, name })
    }

    fn fetch(&self) -> Outcome<String> {
        self.api.text("admin.vm.volume.Info", self.qube, self.name).map_err(Failure::error)
    }

    fn revisions(&self) -> Outcome<Vec<String>> {
        self.api.names("admin.vm.volume.ListSnapshots", self.qube, self.name).map_err(Failure::error)
    }

    fn tell(&self, verb: &str, payload: &str) -> Outcome<()> {
        let called = self.api.call(&format!("admin.vm.volume.{verb}"), self.qube, self.name, payload);
        called.map(drop).map_err(Failure::error)
    }

    fn info(&self, property: Option<&str>) -> Outcome<()> {
        match property {
            Some("revisions") => {
                return print(
                    &self.revisions()?.iter().map(|revision| format!("{revision}\n")).collect::<String>(),
                )
            }
            Some(name) if name != "is_outdated" && !INFO.contains(&name) => {
                return Err(Failure::error(format!("No such property: {name}")))
            }
            _ => {}
        }
        let info = self.fetch()?;
        if let Some(name) = property {
            return print(&format!("{}\n", value(&info, name)));
        }
        let names = INFO.iter().chain(&["is_outdated"]);
        let rows: Vec<_> = names.map(|name| [name.to_string(), value(&info, name).to_owned()]).collect();
        let mut text = table::draw(&rows) + "List of available revisions (for revert):";
        let revisions = self.revisions()?;
        if revisions.is_empty() {
            text += " none";
        }
        revisions.iter().for_each(|revision| text += &format!("\n  {revision}"));
        print(&(text + "\n"))
    }

    fn configure(&self, property: &str, value: &str) -> Outcome<()> {
        match SETTABLE.contains(&property) {
            true => self.tell(&format!("Set.{property}"), value),
            false => Err(Failure::error(format!("Invalid property: {property}"))),
        }
    }

    /// In bytes.
    fn size(&self) -> Outcome<u64> {
        Ok(value(&self.fetch()?, "size").parse().unwrap_or(0))
    }

    fn resize(&self, size: &str, force: bool) -> Outcome<()> {
        let size = parse_size(size).ok_or_else(|| Failure::error(format!("Invalid size: {size}.")))?;
        let now = self.size()?;
        if size < now && !force {
            return Err(Failure::error(format!(
                "For your own safety, shrinking of {} is disabled ({size} < {now}). If you really know what you are doing, \
                 resize filesystem manually first, then use `-f` option.",
                self.name
            )));
        }
        self.tell("Resize", &size.to_string())
    }

    fn revert(&self, revision: Option<String>) -> Outcome<()> {
        let revision = match revision {
            Some(revision) => Some(revision),
            None => self.revisions()?.pop(), // they come from the oldest to the latest
        };
        self.tell("Revert", &revision.ok_or_else(|| Failure::error("No snapshots available"))?)
    }
}

/// A value of `admin.vm.volume.Info`. What a server does not say is empty, and a volume nobody calls outdated is not.
fn value<'a>(info: &'a str, name: &str) -> &'a str {
    let default = if matches!(name, "is_outdated" | "ephemeral") { "False" } else { "" };
    pairs(info, '\n').find(|(known, _)| *known == name).map_or(default, |(_, value)| value)
}

/// Bytes, or a number with a unit: K, KB and so on are powers of 1000, Ki, KiB of 1024.
fn parse_size(text: &str) -> Option<u64> {
    let text = text.trim().to_uppercase();
    let digits = text.len() - text.trim_start_matches(|char: char| char.is_ascii_digit()).len();
    let (number, unit) = text.split_at_checked(digits)?;
    let unit = unit.trim();
    let unit = unit.strip_suffix('B').filter(|unit| !unit.is_empty()).unwrap_or(unit);
    let (letter, base) = unit.strip_suffix('I').map_or((unit, 1000u64), |letter| (letter, 1024));
    let power = match (letter, base) {
        ("", 1000) => 0,
        ("K", _) => 1,
        ("M", _) => 2,
        ("G", _) => 3,
        ("T", _) => 4,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(base.pow(power))
}

#[cfg(test)]
mod tests {
    use super::parse_size;

    #[test]
    fn sizes_have_units() {
        for (text, bytes) in [
            ("1024", Some(1024)),
            ("10GiB", Some(10 << 30)),
            ("10 gi", Some(10 << 30)),
            ("500MB", Some(500_000_000)),
            ("2k", Some(2000)),
            ("", None),
            ("-1", None),
            ("x", None),
            ("1i", None),
            ("1PB", None),
            ("B", None),
            ("18446744073709551615k", None),
        ] {
            assert_eq!(parse_size(text), bytes, "{text}");
        }
    }
}
