//! `qvm-prefs` and `qubes-prefs`: properties of a qube, and of the system.

use admin_api::lines::{Property, Type};
use admin_api::{ApiError, Kind};
use clap::Parser;

use crate::api::{is, Api, Common, SYSTEM};
use crate::names;
use crate::outcome::{print, quoted, Failure, Outcome, FAILED};

/// Properties for which `none` stands for no qube.
const MAY_BE_NONE: [&str; 5] = ["default_dispvm", "netvm", "template", "guivm", "audiovm"];

/// Lists, shows and changes properties of a qube.
#[derive(Parser)]
#[command(version)]
pub struct OfQube {
    #[command(flatten)]
    what: What,
    /// A qube's name
    #[arg(value_name = "VMNAME")]
    qube: String,
    #[command(flatten)]
    property: Named,
}

/// Lists, shows and changes properties of the system.
#[derive(Parser)]
#[command(version)]
pub struct OfSystem {
    #[command(flatten)]
    what: What,
    #[command(flatten)]
    property: Named,
}

#[derive(clap::Args)]
struct What {
    #[command(flatten)]
    common: Common,
    /// List all available properties with short descriptions, and exit
    #[arg(long)]
    help_properties: bool,
    /// Do not show properties that are set to their default
    #[arg(long)]
    hide_default: bool,
    /// Ignored, for the sake of scripts
    #[arg(long, short)]
    get: bool,
    /// Ignored, for the sake of scripts
    #[arg(long, short)]
    set: bool,
    /// Reset the property to its default
    #[arg(long = "default", short = 'D', visible_aliases = ["unset", "delete"])]
    delete: bool,
}

#[derive(clap::Args)]
struct Named {
    /// The property to show or change
    #[arg(value_name = "PROPERTY")]
    property: Option<String>,
    /// Its new value
    #[arg(value_name = "VALUE", allow_hyphen_values = true)]
    value: Option<String>,
}

/// Runs `qvm-prefs`.
pub fn of_qube(options: OfQube) -> Outcome {
    let api = options.what.common.api();
    names::one(&api.qubes()?, &options.qube)?;
    Target { api, methods: "admin.vm.property.", qube: &options.qube }.run(&options.what, options.property)
}

/// Runs `qubes-prefs`.
pub fn of_system(options: OfSystem) -> Outcome {
    let api = options.what.common.api();
    Target { api, methods: "admin.property.", qube: SYSTEM }.run(&options.what, options.property)
}

/// Whose properties.
struct Target<'a> {
    api: Api,
    methods: &'static str,
    qube: &'a str,
}

impl Target<'_> {
    fn run(&self, what: &What, named: Named) -> Outcome {
        if what.help_properties {
            return self.help();
        }
        let Some(name) = named.property.map(|name| name.replace('-', "_")) else {
            return self.list(what.hide_default);
        };
        let done = match named.value {
            Some(value) if MAY_BE_NONE.contains(&&name[..]) && value.eq_ignore_ascii_case("none") => {
                self.call("Set", &name, "").map(drop)
            }
            Some(value) => self.call("Set", &name, &value).map(drop),
            None if what.delete => self.call("Reset", &name, "").map(drop),
            None => return self.show(&name, what.hide_default),
        };
        done.map(|()| 0).map_err(|error| failure(&name, error))
    }

    fn call(&self, verb: &str, name: &str, value: &str) -> Result<Vec<u8>, ApiError> {
        self.api.call(&format!("{}{verb}", self.methods), self.qube, name, value)
    }

    fn show(&self, name: &str, hide_default: bool) -> Outcome {
        let answer = self.call("Get", name, "").map_err(|error| failure(name, error))?;
        let property = Property::decode(&String::from_utf8_lossy(&answer)).map_err(ApiError::from)?;
        let is_none = property.value.is_empty() && property.kind != Type::Str;
        if is_none && matches!(property.kind, Type::Bool | Type::Int) {
            return Err(Failure::Runtime(format!("property {} has no value", quoted(name)), FAILED));
        }
        if is_none || (hide_default && property.is_default) {
            return Ok(0);
        }
        print(&format!("{}\n", property.value)).map(|()| 0)
    }

    fn list(&self, hide_default: bool) -> Outcome {
        let mut all = Property::decode_lines(&self.call("GetAll", "", "")?).map_err(ApiError::from)?;
        all.sort_by(|one, other| one.0.cmp(&other.0));
        let width = all.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
        let mut text = String::new();
        for (name, property) in all {
            let mark = if property.is_default { 'D' } else { '-' };
            let value = match property.kind {
                Type::Bool | Type::Int if property.value.is_empty() => {
                    text.push_str(&format!("{name:width$}  U\n"));
                    continue;
                }
                Type::Vm | Type::Label if property.value.is_empty() => "None",
                _ => &property.value,
            };
            if !(hide_default && property.is_default) {
                text.push_str(&format!("{name:width$}  {mark}  {value}\n"));
            }
        }
        print(&text)?;
        Ok(0)
    }

    fn help(&self) -> Outcome {
        let mut names = self.api.names(&format!("{}List", self.methods), self.qube, "")?;
        names.sort();
        let width = names.iter().map(String::len).max().unwrap_or(0);
        for name in names {
            let help = self.call("Help", &name, "")?;
            let text = format!("{name:width$}  {}", String::from_utf8_lossy(&help));
            print(&fill(&text, width + 6))?;
        }
        Ok(0)
    }
}

/// What is said of a property that cannot be had. A server that hangs up may have any reason, as far as its client can tell.
fn failure(name: &str, error: ApiError) -> Failure {
    match error {
        ApiError::Empty => Failure::Runtime(format!("Failed to access {} property", quoted(name)), FAILED),
        error if is(&error, Kind::NoSuchProperty) => {
            Failure::Usage(format!("no such property: {}", quoted(name)))
        }
        error => error.into(),
    }
}

/// Breaks a text into lines of 80 characters, indented by 2, and by `indent` from the second.
fn fill(text: &str, indent: usize) -> String {
    let mut filled = String::from("  ");
    let mut column = 2;
    for word in text.split_inclusive(' ').flat_map(|word| word.split('\n')) {
        if column + word.trim_end().chars().count() > 80 {
            filled.truncate(filled.trim_end().len());
            filled.push_str(&format!("\n{:indent$}", ""));
            column = indent;
        }
        filled.push_str(word);
        column += word.chars().count();
    }
    filled.truncate(filled.trim_end().len());
    filled + "\n"
}
