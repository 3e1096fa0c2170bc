//! `qvm-volume list`.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal};

use crate::api::Api;
use crate::names;
use crate::outcome::{print, quoted, Failure, Outcome};
use crate::table;

use super::{value, Volume};

/// What to list.
#[derive(Debug, Default, clap::Args)]
pub struct Options {
    /// Volumes of this pool only
    #[arg(long = "pool", short = 'p', value_name = "POOL_NAME")]
    pools: Vec<String>,
    /// Print all of each line, on a terminal too
    #[arg(long)]
    full: bool,
    /// Volumes of all qubes but dom0
    #[arg(long = "all", conflicts_with = "names")]
    is_all: bool,
    /// Exclude the qube from --all
    #[arg(long, value_name = "VMNAME", requires = "is_all")]
    exclude: Vec<String>,
    /// Volumes of these qubes
    #[arg(value_name = "VMNAME")]
    names: Vec<String>,
}

/// Whose a volume is.
#[derive(Default)]
struct Users {
    /// Qubes, and what the volume is called there.
    of: Vec<(String, String)>,
    has_revisions: bool,
}

/// Lists volumes by pool and name, each with all qubes that have it.
pub fn run(options: &Options, api: &Api) -> Outcome<()> {
    let pools = if options.pools.is_empty() { Vec::new() } else { api.names("admin.pool.List", "dom0", "")? };
    if !options.pools.iter().all(|pool| pools.contains(pool)) {
        let named: Vec<String> = options.pools.iter().map(|pool| quoted(pool)).collect();
        return Err(Failure::Usage(format!("No such pools: [{}]", named.join(", "))));
    }
    let all = api.qubes()?;
    let qubes = match options.names.is_empty() {
        true => all,
        false => names::by_name(&all, &options.names)?,
    };
    let is_meant = |name: &String, class: &str| {
        !options.is_all || (class != "AdminVM" && !options.exclude.contains(name))
    };
    let mut volumes: BTreeMap<(String, String), Users> = BTreeMap::new();
    for qube in qubes.iter().filter(|qube| is_meant(&qube.name, &qube.class)) {
        for name in api.names("admin.vm.volume.List", &qube.name, "")? {
            let volume = Volume { api, qube: &qube.name, name: &name };
            let info = volume.fetch()?;
            let pool = value(&info, "pool");
            if !options.pools.is_empty() && !options.pools.iter().any(|known| known == pool) {
                continue;
            }
            let users = volumes.entry((pool.to_owned(), value(&info, "vid").to_owned())).or_default();
            users.has_revisions |= !volume.revisions()?.is_empty();
            users.of.push((qube.name.clone(), name));
        }
    }
    let repeats = options.full || !io::stdout().is_terminal();
    print(&table::draw(&rows(volumes, repeats)))
}

fn rows(volumes: BTreeMap<(String, String), Users>, repeats: bool) -> Vec<Vec<String>> {
    let mut rows =
        vec![["POOL:VOLUME", "VMNAME", "VOLUME_NAME", "REVERT_POSSIBLE"].map(str::to_owned).to_vec()];
    for ((pool, vid), mut users) in volumes {
        users.of.rotate_right(1); // the stock client begins with the last
        let can_revert = if users.has_revisions { "Yes" } else { "No" };
        for (at, (qube, name)) in users.of.into_iter().enumerate() {
            let volume = if at == 0 || repeats { format!("{pool}:{vid}") } else { String::new() };
            rows.push(vec![volume, qube, name, can_revert.to_owned()]);
        }
    }
    rows
}
