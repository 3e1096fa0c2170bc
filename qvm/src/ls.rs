//! `qvm-ls`: the qubes there are.
//!
//! As in R3.2 and R4, a qube that is internal (its feature or property `internal`) is not shown unless it is named, all are
//! asked for, or `--internal` says so.

mod columns;
mod filter;
mod format;
mod order;

use admin_api::lines::Qube;
use clap::{Parser, ValueEnum};

use crate::api::{Api, Common};
use crate::names;
use crate::outcome::{print, Failure, Outcome};
use crate::table;
use columns::Row;

/// Lists qubes and what there is to know of them.
#[derive(Parser)]
#[command(version)]
pub struct Options {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    preset: format::Preset,
    /// Columns to show; any property is one
    #[arg(long, short = 'O', value_name = "FIELD,...", value_delimiter = ',')]
    fields: Vec<String>,
    /// Show each qube below its netvm; without effect on raw data
    #[arg(long, short)]
    tree: bool,
    #[command(flatten)]
    sort: order::Sort,
    /// List the columns there are, and exit
    #[arg(long)]
    help_columns: bool,
    /// List the formats there are, and exit
    #[arg(long)]
    help_formats: bool,
    /// No heading, and columns divided by '|'
    #[arg(long)]
    raw_data: bool,
    /// Names only, one a line
    #[arg(long, conflicts_with_all = ["raw_data", "fields"])]
    raw_list: bool,
    /// Show those that have one of these tags
    #[arg(long, value_name = "TAG", num_args = 1..)]
    tags: Vec<String>,
    /// Do not show those that have one of these tags
    #[arg(long, value_name = "TAG", num_args = 1..)]
    exclude_tags: Vec<String>,
    /// Show those of these classes
    #[arg(long = "class", value_name = "CLASS,...", value_delimiter = ',')]
    classes: Vec<String>,
    /// Show those with these labels
    #[arg(long = "label", value_name = "LABEL,...", value_delimiter = ',')]
    labels: Vec<String>,
    /// Show internal qubes only (y), none of them (n), or both
    #[arg(long, value_enum)]
    internal: Option<Internal>,
    #[command(flatten)]
    filter: filter::Filter,
    #[command(flatten)]
    states: States,
    /// Ignored, for the sake of scripts
    #[arg(long, hide = true)]
    spinner: bool,
    /// Ignored, for the sake of scripts
    #[arg(long)]
    no_spinner: bool,
    /// Show all qubes, internal ones too
    #[arg(long = "all")]
    is_all: bool,
    /// Exclude the qube from --all
    #[arg(long, value_name = "VMNAME", requires = "is_all")]
    exclude: Vec<String>,
    /// Names of qubes, or patterns (*, ?, [abc], [!abc])
    #[arg(value_name = "VMNAME", conflicts_with = "is_all")]
    names: Vec<String>,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Internal {
    #[value(alias = "yes")]
    Y,
    #[value(alias = "no")]
    N,
    Both,
}

/// States to show; none for all.
#[derive(clap::Args)]
struct States {
    /// Show running qubes
    #[arg(long)]
    running: bool,
    /// Show halted qubes
    #[arg(long)]
    halted: bool,
    /// Show paused qubes
    #[arg(long)]
    paused: bool,
    /// Show qubes that are starting
    #[arg(long)]
    transient: bool,
    /// Show suspended qubes
    #[arg(long)]
    suspended: bool,
    /// Show qubes that are shutting down
    #[arg(long)]
    halting: bool,
    /// Show qubes that are being destroyed
    #[arg(long)]
    dying: bool,
    /// Show crashed qubes
    #[arg(long)]
    crashed: bool,
}

impl States {
    fn fits(&self, state: &str) -> bool {
        let all = [
            (self.running, "Running"),
            (self.halted, "Halted"),
            (self.paused, "Paused"),
            (self.transient, "Transient"),
            (self.suspended, "Suspended"),
            (self.halting, "Halting"),
            (self.dying, "Dying"),
            (self.crashed, "Crashed"),
        ];
        all.iter().all(|(asked, _)| !asked) || all.contains(&(true, state))
    }
}

/// Runs `qvm-ls`.
pub fn run(options: Options) -> Outcome {
    if options.help_columns || options.help_formats {
        let text = if options.help_columns { format::columns_text() } else { format::formats_text() };
        return print(&text).map(|()| 0);
    }
    let api = options.common.api();
    let failed = |failure| match failure {
        Failure::Runtime(message, _) => Failure::Error(message),
        other => other,
    };
    let text = text(&options, &api).map_err(failed)?;
    print(&text)?;
    Ok(0)
}

fn text(options: &Options, api: &Api) -> Outcome<String> {
    let shown = select(options, api)?;
    if options.raw_list {
        return Ok(shown.iter().map(|row| format!("{}\n", row.qube.name)).collect());
    }
    let columns: Vec<String> = match options.fields.is_empty() {
        true => options.preset.columns().iter().map(|column| column.to_string()).collect(),
        false => options.fields.iter().map(|field| field.trim().to_owned()).collect(),
    };
    let heads: Vec<String> = columns.iter().map(|column| column.replace('_', "-").to_uppercase()).collect();
    let is_tree = options.tree && !options.raw_data;
    let order = if is_tree { order::tree(&shown) } else { shown.iter().map(|row| (0, row)).collect() };
    let mut rows = Vec::new();
    for (depth, row) in order {
        let cell = |head: &String| match &head[..] {
            "NAME" => Ok(order::indented(depth, &row.qube.name)),
            head => row.cell(api, head),
        };
        rows.push(heads.iter().map(cell).collect::<Result<Vec<_>, _>>()?);
    }
    if options.raw_data {
        return Ok(rows.iter().map(|row| row.join("|") + "\n").collect());
    }
    if !is_tree {
        options.sort.apply(&heads, &mut rows);
    }
    rows.insert(0, heads);
    Ok(table::draw(&rows))
}

/// The qubes to show, with their properties.
fn select(options: &Options, api: &Api) -> Outcome<Vec<Row>> {
    let all = api.qubes()?;
    let mut named = match options.names.is_empty() {
        true => all,
        false => names::by_name(&all, &options.names)?,
    };
    named.sort_by(|one, other| one.name.cmp(&other.name));
    let is_asked = |qube: &Qube| {
        !options.exclude.contains(&qube.name)
            && options.states.fits(&qube.state)
            && (options.classes.is_empty() || options.classes.contains(&qube.class))
    };
    let internal = match options.internal {
        Some(internal) => internal,
        None if options.is_all || !options.names.is_empty() => Internal::Both,
        None => Internal::N,
    };
    let mut shown = Vec::new();
    for qube in named.into_iter().filter(is_asked) {
        if !has_tags(options, api, &qube)? {
            continue;
        }
        let row = Row { properties: api.properties(&qube.name)?, qube };
        let has_label = || options.labels.iter().any(|label| row.property("label") == Some(label));
        if !options.labels.is_empty() && !has_label() {
            continue;
        }
        if internal != Internal::Both && row.is_internal(api)? != (internal == Internal::Y) {
            continue;
        }
        if options.filter.fits(api, &row)? {
            shown.push(row);
        }
    }
    Ok(shown)
}

fn has_tags(options: &Options, api: &Api, qube: &Qube) -> Outcome<bool> {
    if options.tags.is_empty() && options.exclude_tags.is_empty() {
        return Ok(true);
    }
    let tags = api.names("admin.vm.tag.List", &qube.name, "")?;
    let has_one = |of: &[String]| of.iter().any(|tag| tags.contains(tag));
    Ok((options.tags.is_empty() || has_one(&options.tags)) && !has_one(&options.exclude_tags))
}
