//! `qvm-features`: features of a qube.

use admin_api::Kind;
use clap::Parser;

use crate::api::{is, Common};
use crate::names;
use crate::outcome::{print, Failure, Outcome, FAILED};
use crate::table;

/// Manages a qube's features.
#[derive(Parser)]
#[command(version)]
pub struct Options {
    #[command(flatten)]
    common: Common,
    /// Unset the feature
    #[arg(long = "unset", short = 'D', visible_aliases = ["default", "delete"])]
    unset: bool,
    /// A qube's name
    #[arg(value_name = "VMNAME")]
    qube: String,
    /// The feature to show or change
    #[arg(value_name = "FEATURE")]
    feature: Option<String>,
    /// Its new value
    #[arg(value_name = "VALUE", allow_hyphen_values = true)]
    value: Option<String>,
}

/// Runs `qvm-features`. The status is 1 if the feature to be shown is not set.
pub fn run(options: Options) -> Outcome {
    let api = options.common.api();
    let Options { unset, qube, feature, value, .. } = options;
    names::one(&api.qubes()?, &qube)?;
    match (feature, value) {
        (None, _) if unset => Err(Failure::Usage("--unset requires a feature".into())),
        (None, _) => {
            let mut rows = Vec::new();
            for name in api.names("admin.vm.feature.List", &qube, "")? {
                let value = api.feature(&qube, &name)?;
                rows.extend(value.map(|value| [name, value]));
            }
            print(&table::draw(&rows))?;
            Ok(0)
        }
        (Some(_), Some(_)) if unset => Err(Failure::Usage("cannot both set and unset a value".into())),
        (Some(name), Some(value)) => {
            api.call("admin.vm.feature.Set", &qube, &name, &value)?;
            Ok(0)
        }
        (Some(name), None) if unset => match api.call("admin.vm.feature.Remove", &qube, &name, "") {
            Err(error) if !is(&error, Kind::FeatureNotFound) => Err(error.into()),
            _ => Ok(0),
        },
        (Some(name), None) => match api.feature(&qube, &name)? {
            Some(value) => print(&format!("{value}\n")).map(|()| 0),
            None => Ok(FAILED),
        },
    }
}
