//! `qvm-create`: a new qube.

use clap::Parser;

use crate::api::{Api, Common, SYSTEM};
use crate::outcome::{no_import, print, quoted, Failure, Outcome, FAILED};

/// Status when the qube is there, but not all of its properties are.
const PROPERTY_FAILED: u8 = 2;

/// Creates a qube.
#[derive(Parser)]
#[command(version)]
pub struct Options {
    #[command(flatten)]
    common: Common,
    /// Class of the new qube
    #[arg(long, short = 'C', default_value = "AppVM")]
    class: String,
    /// Set a property of it
    #[arg(long, visible_alias = "prop", value_name = "NAME=VALUE", value_parser = pair)]
    property: Vec<(String, String)>,
    /// Pool of one of its volumes
    #[arg(long, short, value_name = "VOLUME_NAME=POOL_NAME", value_parser = pair)]
    pool: Vec<(String, String)>,
    /// Pool of all of its volumes
    #[arg(short = 'P', value_name = "POOL_NAME", conflicts_with = "pool")]
    one_pool: Option<String>,
    /// Template to use
    #[arg(long, short)]
    template: Option<String>,
    /// Label: red, yellow, green …
    #[arg(long, short)]
    label: Option<String>,
    /// Not possible: a qube has the root volume of its template
    #[arg(long, short = 'r', value_name = "FILENAME", conflicts_with = "root_move_from")]
    root_copy_from: Option<String>,
    /// Not possible, as --root-copy-from
    #[arg(long, short = 'R', value_name = "FILENAME")]
    root_move_from: Option<String>,
    /// List available classes, and exit
    #[arg(long)]
    help_classes: bool,
    /// Its name
    #[arg(value_name = "VMNAME")]
    name: Option<String>,
}

/// `NAME=VALUE`.
pub fn pair(text: &str) -> Result<(String, String), String> {
    let pair = text.split_once('=').ok_or_else(|| format!("invalid property token: {}", quoted(text)))?;
    Ok((pair.0.into(), pair.1.into()))
}

/// Runs `qvm-create`.
pub fn run(mut options: Options) -> Outcome {
    let api = options.common.api();
    if options.help_classes {
        let mut classes = api.names("admin.vmclass.List", SYSTEM, "")?;
        classes.sort();
        return print(&format!("{}\n", classes.join("\n"))).map(|()| 0);
    }
    if let Some(file) = options.root_copy_from.as_ref().or(options.root_move_from.as_ref()) {
        return Err(Failure::Runtime(no_import(file), FAILED));
    }
    // These may be given as properties too.
    let mut take = |name: &str, given: Option<String>| {
        let at = options.property.iter().position(|(key, _)| key == name);
        at.map(|at| options.property.remove(at).1).filter(|_| given.is_none()).or(given)
    };
    let label = take("label", options.label);
    let name = take("name", options.name);
    let template = take("template", options.template).unwrap_or_default();
    let label = label.ok_or_else(|| Failure::Usage("--label option is mandatory".into()))?;
    let name = name.ok_or_else(|| Failure::Usage("VMNAME is mandatory".into()))?;
    check_label(&api, &label)?;

    let mut payload = format!("name={name} label={label}");
    let pools = options.pool.iter().map(|(volume, pool)| format!(" pool:{volume}={pool}"));
    payload.extend(options.one_pool.iter().map(|pool| format!(" pool={pool}")).chain(pools));
    let verb = if options.pool.is_empty() && options.one_pool.is_none() { "Create" } else { "CreateInPool" };
    if let Err(error) = api.call(&format!("admin.vm.{verb}.{}", options.class), SYSTEM, &template, &payload) {
        eprintln!("Error creating VM: {error}");
        return Ok(FAILED);
    }
    let mut status = 0;
    for (property, value) in options.property {
        if let Err(error) = api.call("admin.vm.property.Set", &name, &property, &value) {
            eprintln!("Error setting property {property} (but VM created): {error}");
            status = PROPERTY_FAILED;
        }
    }
    Ok(status)
}

fn check_label(api: &Api, label: &str) -> Outcome<()> {
    let labels = api.names("admin.label.List", SYSTEM, "")?;
    if labels.iter().any(|known| known == label) {
        return Ok(());
    }
    let available: Vec<String> = labels.iter().map(|label| quoted(label)).collect();
    Err(Failure::Usage(format!("no such label: {}; available: {}", quoted(label), available.join(", "))))
}
