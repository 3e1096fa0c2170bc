//! What the process of a call becomes: a service of dom0's, a call into another qube, or the launch of a disposable.

use std::process::Command;

use policy::{Allow, Destination};
use qrexec::service::Service;
use rpc_service::NotServed;

use super::decide::Asked;
use super::in_dom0::{self, InDom0};
use super::{programs, service, verdict};
use crate::admin;
use crate::clones;
use crate::daemon::channel::Channel;
use crate::error::{Error, Kind, Result};
use crate::state::State;

/// Clones that live at a time, beyond which no call makes another: each new disposable could call for the next, and whether there is memory
/// is asked of each by itself.
pub const CLONES_MAX: usize = 64;
/// Who stands for the target's own user.
pub const DEFAULT_USER: &str = "DEFAULT";

/// What carries a call out.
pub enum Carrier {
    /// A program of ours.
    Program(Command),
    /// A service of dom0's.
    InDom0(InDom0),
    /// Nothing does: the call may happen, and fails.
    Nothing(NotServed),
}

/// What carries the call out; a qube that has to be started runs by then.
pub fn carrier(state: &State, asked: &Asked, allow: &Allow) -> Result<Carrier> {
    let user = allow.user.as_deref().unwrap_or(DEFAULT_USER);
    let source = asked.source.as_str();
    let mut command = match &allow.target {
        Destination::AdminVm => {
            return in_dom0::find(state, asked, user)
                .map(|found| found.map_or_else(Carrier::Nothing, Carrier::InDom0));
        }
        Destination::Qube(name) => {
            service::user(user)?;
            have_running(state, name)?;
            let mut client = programs::command("qrexec-client", state);
            client.args(["--quiet", "-d", name, "--"]);
            client.arg(format!("{user}:QUBESRPC {} {source}", called(&asked.service)));
            client
        }
        Destination::DispVmOf(dvm) => {
            service::user(user)?;
            check_room(state)?;
            let mut launch = programs::command("dispvm-launch", state);
            launch.args(["--quiet", "--dvm", dvm, "--source", source, "--user", user]);
            launch.args(["--service", &called(&asked.service)]);
            launch
        }
    };
    command.env_remove(verdict::VARIABLE);
    Ok(Carrier::Program(command))
}

/// A qube's call has an argument, if an empty one, as with Qubes.
pub fn called(service: &Service) -> String {
    format!("{}+{}", service.name(), service.argument().unwrap_or_default())
}

/// Has a qube started, if nobody takes calls into it.
fn have_running(state: &State, name: &str) -> Result<()> {
    if Channel::connect(&state.call_socket(name)).is_ok() {
        return Ok(());
    }
    admin::start(state, name)
}

fn check_room(state: &State) -> Result<()> {
    match clones::list(state)?.len() {
        ..CLONES_MAX => Ok(()),
        living => Err(Error::new(Kind::Refused, format!("{living} disposables and qubes run already"))
            .hint("`qvm-ls` shows them, `qvm-kill NAME` ends one")),
    }
}
