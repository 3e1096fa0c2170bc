//! `qvm-firewall`: the rules of a qube's firewall. The API knows only the whole list, which is read, changed and set.

mod rule;

use clap::{Parser, Subcommand};

use crate::api::{Api, Common};
use crate::names;
use crate::outcome::{print, Failure, Outcome};
use crate::table;
use rule::Rule;

/// The rule a qube has that nobody gave any.
const ACCEPT_ALL: &str = "action=accept";

/// Shows and changes the rules of a qube's firewall.
///
/// A rule is ACTION [DSTHOST [PROTO [DSTPORTS|ICMPTYPE]]], each of which may be given as NAME=VALUE too, as must be specialtarget
/// (dns), expire (seconds since 1970, or +SECONDS from now) and comment.
#[derive(Parser)]
#[command(version, disable_help_subcommand = true)]
pub struct Options {
    #[command(flatten)]
    common: Common,
    /// Have the rules applied again even if they did not change
    #[arg(long, short, global = true)]
    reload: bool,
    /// Print the rules as they are said to the API
    #[arg(long, global = true)]
    raw: bool,
    /// A qube's name
    #[arg(value_name = "VMNAME")]
    qube: String,
    #[command(subcommand)]
    what: Option<What>,
}

#[derive(Subcommand)]
enum What {
    /// List the rules
    List,
    /// Add a rule
    Add {
        /// In front of the rule with this number, instead of at the end
        #[arg(long, value_name = "NUMBER")]
        before: Option<usize>,
        /// The rule
        #[arg(value_name = "RULE", required = true)]
        rule: Vec<String>,
    },
    /// Remove a rule
    Del {
        /// The rule's number
        #[arg(long, value_name = "NUMBER", required_unless_present = "rule", conflicts_with = "rule")]
        rule_no: Option<usize>,
        /// The rule
        #[arg(value_name = "RULE")]
        rule: Vec<String>,
    },
    /// Remove all rules: everything is accepted
    Reset,
}

/// Runs `qvm-firewall`.
pub fn run(options: Options) -> Outcome {
    let api = options.common.api();
    let qube = &options.qube;
    names::one(&api.qubes()?, qube)?;
    match options.what.as_ref().unwrap_or(&What::List) {
        What::List => list(&options, &api)?,
        What::Add { before, rule } => {
            let rule = Rule::of_words(rule).map_err(Failure::Usage)?;
            let mut rules = rules(&api, qube)?;
            rules.insert(before.unwrap_or(rules.len()).min(rules.len()), rule.to_string());
            set(&api, qube, &rules)?;
        }
        What::Del { rule_no, rule } => {
            let mut rules = rules(&api, qube)?;
            let at = match rule_no {
                Some(number) => Some(*number).filter(|&number| number < rules.len()),
                None => {
                    let rule = Rule::of_words(rule).map_err(Failure::Usage)?.to_string();
                    rules
                        .iter()
                        .position(|line| Rule::parse(line).is_ok_and(|known| known.to_string() == rule))
                }
            };
            let at = at.ok_or_else(|| {
                Failure::error(format!("no such rule. `qvm-firewall {qube} list` shows those there are"))
            })?;
            rules.remove(at);
            set(&api, qube, &rules)?;
        }
        What::Reset => set(&api, qube, &[ACCEPT_ALL.to_owned()])?,
    }
    if options.reload {
        api.tell("admin.vm.firewall.Reload", qube).map_err(Failure::error)?;
    }
    Ok(0)
}

fn list(options: &Options, api: &Api) -> Outcome<()> {
    let rules = rules(api, &options.qube)?;
    if options.raw {
        // In the order of the stock client, whatever order they are kept in.
        let said = |line: &String| Rule::parse(line).map_or_else(|_| line.clone(), |rule| rule.to_string());
        return print(&rules.iter().map(|line| said(line) + "\n").collect::<String>());
    }
    let heads =
        ["NO", "ACTION", "HOST", "PROTOCOL", "PORT(S)", "SPECIAL TARGET", "ICMP TYPE", "EXPIRE", "COMMENT"];
    let mut rows = vec![heads.map(str::to_owned).to_vec()];
    for (number, line) in rules.iter().enumerate() {
        let rule =
            Rule::parse(line).map_err(|wrong| Failure::error(format!("rule {number} ({line}): {wrong}")))?;
        rows.push([vec![number.to_string()], rule.cells().to_vec()].concat());
    }
    print(&table::draw(&rows))
}

fn rules(api: &Api, qube: &str) -> Outcome<Vec<String>> {
    api.names("admin.vm.firewall.Get", qube, "").map_err(Failure::error)
}

fn set(api: &Api, qube: &str, rules: &[String]) -> Outcome<()> {
    let payload: String = rules.iter().map(|rule| format!("{rule}\n")).collect();
    api.call("admin.vm.firewall.Set", qube, "", &payload).map(drop).map_err(Failure::error)
}
