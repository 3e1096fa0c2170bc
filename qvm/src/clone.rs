//! `qvm-clone`: a qube like another, with its properties, tags, features, firewall and volumes.
//!
//! Calls and their order as in QubesOS/qubes-core-admin-client, `qubesadmin/app.py` (clone_vm). Menus, which that has made anew by
//! `qvm-appmenus`, are not.

use admin_api::lines::{pairs, Property};
use admin_api::ApiError;
use clap::Parser;

use crate::api::{Api, Common, SYSTEM};
use crate::create::pair;
use crate::names;
use crate::outcome::{Failure, Outcome, FAILED};

/// What the new one has from the call that makes it, or of its own.
const NOT_COPIED: [&str; 6] = ["name", "qid", "template", "label", "uuid", "installed_by_rpm"];
/// Tags of that kind say who has made a qube.
const CREATED_BY: &str = "created-by-";

/// Clones a qube.
#[derive(Parser)]
#[command(version)]
pub struct Options {
    #[command(flatten)]
    common: Common,
    /// Class of the new qube [default: the same]
    #[arg(long, short = 'C')]
    class: Option<String>,
    /// Go on if a property, tag, feature or the firewall cannot be copied
    #[arg(long)]
    ignore_errors: bool,
    /// Pool of one of its volumes
    #[arg(long, short, value_name = "VOLUME_NAME=POOL_NAME", value_parser = pair)]
    pool: Vec<(String, String)>,
    /// Pool of all of its volumes
    #[arg(short = 'P', value_name = "POOL_NAME", conflicts_with = "pool")]
    one_pool: Option<String>,
    /// The qube to clone
    #[arg(value_name = "VMNAME")]
    source: String,
    /// The name of the new one
    #[arg(value_name = "NEWVMNAME")]
    new: String,
}

/// Runs `qvm-clone`.
pub fn run(options: Options) -> Outcome {
    let api = options.common.api();
    let qubes = api.qubes()?;
    let class = names::one(&qubes, &options.source)?.class.clone();
    let properties = api.properties(&options.source)?;
    let value = |name: &str| {
        let found = properties.iter().find(|(known, _)| known == name);
        found.map_or(String::new(), |(_, property)| property.value.clone())
    };
    let mut payload = format!("name={} label={}", options.new, value("label"));
    let pools = options.pool.iter().map(|(volume, pool)| format!(" pool:{volume}={pool}"));
    payload.extend(options.one_pool.iter().map(|pool| format!(" pool={pool}")).chain(pools));
    let verb = if options.pool.is_empty() && options.one_pool.is_none() { "Create" } else { "CreateInPool" };
    let class = options.class.as_ref().unwrap_or(&class);
    api.call(&format!("admin.vm.{verb}.{class}"), SYSTEM, &value("template"), &payload).map_err(failed)?;

    let copy = Copy { api: &api, from: &options.source, to: &options.new, goes_on: options.ignore_errors };
    let copied = copy.settings(&properties).and_then(|()| copy.volumes());
    copied.map(|()| 0).inspect_err(|_| {
        // What is half a clone is none.
        if let Err(error) = api.tell("admin.vm.Remove", &options.new) {
            eprintln!("Error: {} cannot be removed: {error}", options.new);
        }
    })
}

fn failed(error: ApiError) -> Failure {
    Failure::Runtime(error.to_string(), FAILED)
}

/// What is being copied.
struct Copy<'a> {
    api: &'a Api,
    from: &'a str,
    to: &'a str,
    /// Whether settings that cannot be copied are told, and no more.
    goes_on: bool,
}

impl Copy<'_> {
    fn settings(&self, properties: &[(String, Property)]) -> Outcome<()> {
        for (name, property) in properties {
            if !property.is_default && !NOT_COPIED.contains(&name.as_str()) {
                let set = self.api.call("admin.vm.property.Set", self.to, name, &property.value);
                self.check(&format!("set {name} property"), set)?;
            }
        }
        for tag in self.api.names("admin.vm.tag.List", self.from, "")? {
            if !tag.starts_with(CREATED_BY) {
                self.check(&format!("add {tag} tag"), self.api.call("admin.vm.tag.Set", self.to, &tag, ""))?;
            }
        }
        for name in self.api.names("admin.vm.feature.List", self.from, "")? {
            let value = self.api.text("admin.vm.feature.Get", self.from, &name)?;
            let set = self.api.call("admin.vm.feature.Set", self.to, &name, &value);
            self.check(&format!("set {name} feature"), set)?;
        }
        let rules = self.api.text("admin.vm.firewall.Get", self.from, "")?;
        self.check("set firewall", self.api.call("admin.vm.firewall.Set", self.to, "", &rules))
    }

    fn check(&self, what: &str, done: Result<Vec<u8>, ApiError>) -> Outcome<()> {
        match done {
            Ok(_) => Ok(()),
            Err(error) if self.goes_on => {
                eprintln!("{}: Failed to {what}: {error}", self.to);
                Ok(())
            }
            Err(error) => Err(Failure::Runtime(format!("Failed to {what}: {error}"), FAILED)),
        }
    }

    /// Those that are kept; others begin anew in any qube.
    fn volumes(&self) -> Outcome<()> {
        for volume in self.api.names("admin.vm.volume.List", self.to, "")? {
            let info = self.api.text("admin.vm.volume.Info", self.to, &volume)?;
            if !pairs(&info, '\n').any(|pair| pair == ("save_on_stop", "True")) {
                continue;
            }
            let token = self.api.text("admin.vm.volume.CloneFrom", self.from, &volume).map_err(failed)?;
            self.api.call("admin.vm.volume.CloneTo", self.to, &volume, &token).map_err(failed)?;
        }
        Ok(())
    }
}
