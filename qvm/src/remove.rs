//! `qvm-remove`: removes qubes, and all that is theirs.

use std::io::{self, BufRead};

use admin_api::lines::{Property, Type};
use admin_api::{ApiError, Kind};
use clap::Parser;

use crate::api::{is, Api, SYSTEM};
use crate::names::Qubes;
use crate::outcome::{print, Outcome, FAILED};

/// Removes qubes from the system.
#[derive(Parser)]
#[command(version)]
pub struct Options {
    /// Do not ask for confirmation
    #[arg(long, short)]
    force: bool,
    #[command(flatten)]
    qubes: Qubes,
}

/// Runs `qvm-remove`.
pub fn run(options: Options) -> Outcome {
    let api = options.qubes.api();
    let qubes = options.qubes.select(&api)?;
    if qubes.iter().any(|qube| qube.class == "AdminVM") {
        eprintln!("Domain 'dom0' cannot be removed.");
        return Ok(FAILED);
    }
    let asks_twice = options.qubes.is_all && options.qubes.exclude.is_empty();
    if !options.force && asks_twice {
        eprintln!("WARNING!!! Removing all domains may leave your system in an unrecoverable state!");
        if ask("Are you certain? [N/IKNOWWHATIAMDOING]")? != "IKNOWWHATIAMDOING" {
            return cancelled();
        }
    }
    if !options.force {
        eprintln!("This will completely remove the selected VM(s)...");
        print(&qubes.iter().map(|qube| format!("  {}\n", qube.name)).collect::<String>())?;
        if !ask("Are you sure? [y/N] ")?.eq_ignore_ascii_case("y") {
            return cancelled();
        }
    }
    for qube in qubes {
        if let Err(error) = api.tell("admin.vm.Remove", &qube.name) {
            if is(&error, Kind::VmInUse) {
                tell_uses(&api, &qube.name)?;
            }
            return Err(error.into());
        }
    }
    Ok(0)
}

fn cancelled() -> Outcome {
    eprintln!("Remove cancelled.");
    Ok(FAILED)
}

/// The answer to a question; none is an answer too.
fn ask(question: &str) -> Outcome<String> {
    print(question)?;
    let mut answer = String::new();
    let _ = io::stdin().lock().read_line(&mut answer);
    Ok(answer.trim_end_matches('\n').to_owned())
}

/// Says what the qube is needed for.
fn tell_uses(api: &Api, name: &str) -> Outcome<()> {
    let is_use =
        |property: &Property| property.kind == Type::Vm && !property.is_default && property.value == name;
    let mut uses = Vec::new();
    let system = Property::decode_lines(&api.call("admin.property.GetAll", SYSTEM, "", "")?)
        .map_err(ApiError::from)?;
    for (property, value) in system {
        if is_use(&value) {
            uses.push(format!(" - global property {property}"));
        }
    }
    for qube in api.qubes()?.iter().filter(|qube| qube.name != name) {
        for (property, value) in api.properties(&qube.name)? {
            if is_use(&value) {
                uses.push(format!(" - {property} for {}", qube.name));
            }
        }
    }
    if !uses.is_empty() {
        eprintln!("VM {name} cannot be removed. It is in use as:\n{}", uses.join("\n"));
    }
    Ok(())
}
