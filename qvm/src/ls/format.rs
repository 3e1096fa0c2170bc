//! Which columns there are, and the presets of them.

use clap::ValueEnum;

use crate::table;

/// The preset, and its short forms.
#[derive(clap::Args)]
pub struct Preset {
    /// Preset format
    #[arg(long, short = 'o', value_enum, default_value = "simple", conflicts_with_all = ["fields", "disk", "network", "kernel"])]
    format: Format,
    /// Same as --format disk
    #[arg(long, short, conflicts_with_all = ["fields", "network", "kernel"])]
    disk: bool,
    /// Same as --format network
    #[arg(long, short, conflicts_with_all = ["fields", "kernel"])]
    network: bool,
    /// Same as --format kernel
    #[arg(long, short, conflicts_with = "fields")]
    kernel: bool,
}

impl Preset {
    /// The columns to show.
    pub fn columns(&self) -> &'static [&'static str] {
        match self {
            Preset { disk: true, .. } => Format::Disk.columns(),
            Preset { network: true, .. } => Format::Network.columns(),
            Preset { kernel: true, .. } => Format::Kernel.columns(),
            Preset { format, .. } => format.columns(),
        }
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum Format {
    Simple,
    Network,
    Kernel,
    Full,
    Prefs,
    Disk,
}

impl Format {
    fn columns(self) -> &'static [&'static str] {
        match self {
            Format::Simple => &["name", "state", "class", "label", "template", "netvm"],
            Format::Network => &["name", "state", "netvm", "ip", "ipback", "gateway"],
            Format::Kernel => &["name", "state", "class", "template", "kernel", "kernelopts"],
            Format::Full => &["name", "state", "class", "label", "qid", "xid", "uuid"],
            Format::Prefs => {
                &["name", "label", "template", "netvm", "vcpus", "initialmem", "maxmem", "virt_mode"]
            }
            Format::Disk => &[
                "name",
                "state",
                "disk",
                "priv-curr",
                "priv-max",
                "priv-used",
                "root-curr",
                "root-max",
                "root-used",
            ],
        }
    }
}

/// The columns that are worked out, and what they say.
const COLUMNS: [(&str, &str); 14] = [
    ("CLASS", "Its class"),
    ("DISK", "MiB that its volumes take"),
    ("FLAGS", "Type, state, then: U updateable, N provides network, R installed by RPM, i internal, D debug, A autostart"),
    ("GATEWAY", "The address of its netvm"),
    ("MEMORY", "MiB of memory it has"),
    ("PRIV-CURR", "MiB that its private volume takes"),
    ("PRIV-MAX", "MiB that its private volume can have"),
    ("PRIV-POOL", "The pool of its private volume"),
    ("PRIV-USED", "The one of the other"),
    ("ROOT-CURR", "MiB that its root volume takes"),
    ("ROOT-MAX", "MiB that its root volume can have"),
    ("ROOT-POOL", "The pool of its root volume"),
    ("ROOT-USED", "The one of the other"),
    ("STATE", "Whether it runs"),
];

/// What `--help-columns` prints.
pub fn columns_text() -> String {
    let rows: Vec<_> = COLUMNS.iter().map(|(name, text)| [format!("  {name}"), text.to_string()]).collect();
    let end = "\nAny property may be a column, too: `qvm-prefs --help-properties` lists them\n";
    format!("Available columns:\n{}{end}", table::draw(&rows))
}

/// What `--help-formats` prints.
pub fn formats_text() -> String {
    let mut all: Vec<(String, String)> = Format::value_variants()
        .iter()
        .filter_map(|format| {
            let name = format.to_possible_value()?.get_name().to_owned();
            Some((name, format.columns().join(",").to_uppercase()))
        })
        .collect();
    all.sort();
    let rows: Vec<_> = all.into_iter().map(|(name, columns)| [format!("  {name}"), columns]).collect();
    format!("Available formats:\n{}", table::draw(&rows))
}
