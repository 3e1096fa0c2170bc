//! Qubes that run themselves: a TemplateVM or AppVM, whose one volume is kept, and a disposable with a record, of which nothing is.
//!
//! `subject` (what is run and what is kept), `prepare` (all that a boot needs), `impatient` (signals until it is up), [`command`] (a run for one command: `dispvm-qube start`),
//! [`runner`] (a run until it is ended: `qvm-start`), `off` (the guest's end), [`noted`] (its pauses, in its record).
//!
//! Invariants:
//! - The guest writes to a copy that has no name, so nothing is left of a run that is killed, however it is.
//! - The copy becomes the next generation only when the guest has switched itself off. However else a run ends, the generation
//!   it started from stays the current one.
//! - A qube runs itself once at a time ([`crate::qube::hold_running`]); launches and builds go on from the generation the record names.

use engine::host::HostError;
use engine::launch::LaunchError;

use crate::error::{Error, Kind, Result};
use crate::qube::Qube;
use crate::savefiles;
use crate::state::State;

pub mod command;
mod impatient;
pub mod noted;
mod off;
mod prepare;
pub mod runner;
mod subject;

pub use subject::Overrides;

/// A qube's name as a host name: what a host name cannot have becomes a hyphen.
fn hostname(name: &str) -> String {
    let legal = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
    name.chars().map(legal).collect::<String>().trim_end_matches('-').to_owned()
}

fn boot_error(error: LaunchError) -> Error {
    let kind = match &error {
        LaunchError::Host(HostError::Refused { .. }) => Kind::Refused,
        _ => Kind::Failed,
    };
    Error::new(kind, "cannot start the qube").because(error)
}

/// Says which savefiles are stale now that `name` has a new generation, and has them rebuilt if that is wanted.
fn tell_stale(state: &State, name: &str, rebuild: bool, say: &dyn Fn(&str)) -> Result<()> {
    for qube in Qube::all(state)? {
        let Ok(dvm) = qube.dvm() else { continue };
        if dvm.savefile.is_none() || (qube.name != name && dvm.template != name) {
            continue;
        }
        let stale = format!("the savefile of {} is stale", qube.name);
        if !rebuild {
            say(&format!("{stale}: `dispvm-savefile build {}`", qube.name));
            continue;
        }
        match savefiles::start_rebuild(state, &qube.name) {
            Ok(_) => say(&format!("{stale}, a new one is being built; launches boot cold until then")),
            Err(error) => say(&format!("{stale}, and the rebuild cannot be started: {error}")),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_qubes_become_host_names() {
        for (name, expected) in [("debian-12", "debian-12"), ("a_b.c", "a-b-c"), ("x._-", "x")] {
            assert_eq!(hostname(name), expected);
        }
    }
}
