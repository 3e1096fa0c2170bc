//! `qvm-clone`: a qube like another, with its properties, tags, features, firewall and volumes.
//!
//! Calls as in QubesOS/qubes-core-admin-client, `qubesadmin/app.py` (clone_vm), but in the other order: what a clone that is cut short has is not
//! open to more than its original, and nothing is made from it before its volumes are there. Menus, which that has made anew by `qvm-appmenus`,
//! are not.
//!
//! A clone that fails, or is told to end by a signal, is removed. SIGKILL leaves it as far as it has come: `qvm-remove` removes it.

use admin_api::lines::{pairs, Property};
use admin_api::ApiError;
use clap::Parser;

use crate::api::{Api, Common, SYSTEM};
use crate::create::pair;
use crate::interrupt::Interrupts;
use crate::names;
use crate::outcome::{Failure, Outcome, FAILED};

/// What the new one has from the call that makes it, or of its own.
const NOT_COPIED: [&str; 7] =
    ["name", "qid", "template", "label", "uuid", "installed_by_rpm", "auto_cleanup"];
/// Tags of these kinds say who has made a qube.
const CREATED_BY: [&str; 2] = ["created-by-", "disp-created-by-"];

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
    let interrupts = Interrupts::watch().map_err(Failure::error)?;
    api.call(&format!("admin.vm.{verb}.{class}"), SYSTEM, &value("template"), &payload).map_err(failed)?;

    let (from, to) = (&options.source, &options.new);
    let copy = Copy { api: &api, from, to, goes_on: options.ignore_errors, interrupts };
    let copied = copy.volumes().and_then(|()| copy.settings(&properties));
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
    interrupts: Interrupts,
}

impl Copy<'_> {
    fn settings(&self, properties: &[(String, Property)]) -> Outcome<()> {
        let rules = self.api.text("admin.vm.firewall.Get", self.from, "")?;
        self.check("set firewall", self.api.call("admin.vm.firewall.Set", self.to, "", &rules))?;
        self.tags()?;
        self.features()?;
        for (name, property) in properties {
            if !property.is_default && !NOT_COPIED.contains(&name.as_str()) {
                let set = self.api.call("admin.vm.property.Set", self.to, name, &property.value);
                self.check(&format!("set {name} property"), set)?;
            }
        }
        Ok(())
    }

    /// One that has been made from a DVM template has that one's already.
    fn tags(&self) -> Outcome<()> {
        let of = |qube| self.api.names("admin.vm.tag.List", qube, "");
        let (wanted, there) = (of(self.from)?, of(self.to)?);
        let kept = |tag: &&String| !CREATED_BY.iter().any(|kind| tag.starts_with(kind));
        for tag in there.iter().filter(kept).filter(|tag| !wanted.contains(tag)) {
            self.check(&format!("remove {tag} tag"), self.api.call("admin.vm.tag.Remove", self.to, tag, ""))?;
        }
        for tag in wanted.iter().filter(kept).filter(|tag| !there.contains(tag)) {
            self.check(&format!("add {tag} tag"), self.api.call("admin.vm.tag.Set", self.to, tag, ""))?;
        }
        Ok(())
    }

    fn features(&self) -> Outcome<()> {
        let of = |qube| self.api.names("admin.vm.feature.List", qube, "");
        let wanted = of(self.from)?;
        for name in of(self.to)?.iter().filter(|name| !wanted.contains(name)) {
            let removed = self.api.call("admin.vm.feature.Remove", self.to, name, "");
            self.check(&format!("remove {name} feature"), removed)?;
        }
        for name in wanted {
            let value = self.api.text("admin.vm.feature.Get", self.from, &name)?;
            let set = self.api.call("admin.vm.feature.Set", self.to, &name, &value);
            self.check(&format!("set {name} feature"), set)?;
        }
        Ok(())
    }

    fn check(&self, what: &str, done: Result<Vec<u8>, ApiError>) -> Outcome<()> {
        self.interrupts.check()?;
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
            self.interrupts.check()?;
            let info = self.api.text("admin.vm.volume.Info", self.to, &volume)?;
            if !pairs(&info, '\n').any(|pair| pair == ("save_on_stop", "True")) {
                continue;
            }
            let token = self.api.text("admin.vm.volume.CloneFrom", self.from, &volume).map_err(failed)?;
            self.api.call("admin.vm.volume.CloneTo", self.to, &volume, &token).map_err(failed)?;
        }
        self.interrupts.check()
    }
}
