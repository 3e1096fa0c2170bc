//! Which qubes `qvm-ls` shows by what they are set to (qubesadmin/tools/qvm_ls.py, R4.2 and R4.3).

use clap::ValueEnum;

use crate::api::Api;
use crate::outcome::{Failure, Outcome};

use super::columns::Row;

/// What a shown qube must have; all of it.
#[derive(Debug, Default, clap::Args)]
pub struct Filter {
    /// Show those based on one of these templates; "" stands for none
    #[arg(long, value_name = "TEMPLATE", num_args = 1..)]
    template_source: Vec<String>,
    /// Show those with one of these netvms; "" stands for none
    #[arg(long, value_name = "NETVM", num_args = 1..)]
    netvm_is: Vec<String>,
    /// Show those with the feature `servicevm` only (y), or none of them (n)
    #[arg(long, value_enum)]
    servicevm: Option<Service>,
    /// Show those that have updates to install
    #[arg(long)]
    pending_update: bool,
    /// Show those with all these features; KEY= stands for one that is not set, KEY="" for an empty one
    #[arg(long, value_name = "KEY=VALUE", num_args = 1.., value_parser = pair)]
    features: Vec<(String, String)>,
    /// Show those with all these properties; KEY= stands for one without a value
    #[arg(long, value_name = "KEY=VALUE", num_args = 1.., value_parser = pair)]
    prefs: Vec<(String, String)>,
}

#[derive(Debug, Clone, Copy, PartialEq, ValueEnum)]
enum Service {
    #[value(alias = "yes")]
    Y,
    #[value(alias = "no")]
    N,
}

impl Filter {
    /// Whether a qube is to be shown.
    pub fn fits(&self, api: &Api, row: &Row) -> Outcome<bool> {
        let is_one_of = |property: &str, wanted: &[String]| {
            let value = row.property(property).map_or("", String::as_str);
            wanted.is_empty() || wanted.iter().any(|wanted| wanted == value)
        };
        let has = |(name, wanted): &(String, String)| {
            let wanted = unquoted(wanted).filter(|wanted| *wanted != "None");
            row.property(&name.replace('-', "_")).map(String::as_str)
                == wanted.filter(|wanted| !wanted.is_empty())
        };
        if !is_one_of("template", &self.template_source)
            || !is_one_of("netvm", &self.netvm_is)
            || !self.prefs.iter().all(has)
        {
            return Ok(false);
        }
        let feature = |name: &str| api.feature(&row.qube.name, name).map_err(Failure::from);
        if let Some(wanted) = self.servicevm {
            let is_service = matches!(feature("servicevm")?.as_deref(), Some("1" | "true" | "True"));
            if is_service != (wanted == Service::Y) {
                return Ok(false);
            }
        }
        if self.pending_update && feature("updates-available")?.is_none_or(|value| value.is_empty()) {
            return Ok(false);
        }
        for (name, wanted) in &self.features {
            if feature(name)?.as_deref() != unquoted(wanted) {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// What is wanted: nothing, an empty value, or a value.
fn unquoted(wanted: &str) -> Option<&str> {
    match wanted {
        "" => None,
        "''" | "\"\"" => Some(""),
        wanted => Some(wanted),
    }
}

fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("KEY=VALUE is wanted".to_owned()),
    }
}
