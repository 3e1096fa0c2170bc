//! What the process of a call becomes: a service of dom0's, a call into another qube, or the launch of a disposable.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use policy::{Allow, Destination};
use qrexec::service::Target;

use super::decide::Asked;
use super::{programs, service, verdict};
use crate::accounts::uid_of;
use crate::admin;
use crate::clones;
use crate::daemon::channel::Channel;

use crate::error::{Error, Kind, Result};
use crate::state::State;

/// Where dom0's services are.
const SERVICE_DIRS: [&str; 2] = ["/usr/local/etc/qubes-rpc", "/etc/qubes-rpc"];
/// Clones that live at a time, beyond which no call makes another: each new disposable could call for the next, and whether there is memory
/// is asked of each by itself.
pub const CLONES_MAX: usize = 64;
/// Who stands for the target's own user.
const DEFAULT_USER: &str = "DEFAULT";

/// The program that carries the call out; a qube that has to be started runs by then. `None`: there is no such service.
pub fn program(state: &State, asked: &Asked, allow: &Allow) -> Result<Option<Command>> {
    let command = choose(state, asked, allow)?;
    Ok(command.map(|mut command| {
        command.env_remove(verdict::VARIABLE);
        command
    }))
}

fn choose(state: &State, asked: &Asked, allow: &Allow) -> Result<Option<Command>> {
    let user = allow.user.as_deref().unwrap_or(DEFAULT_USER);
    let source = asked.source.as_str();
    match &allow.target {
        Destination::AdminVm => in_dom0(asked, user),
        Destination::Qube(name) => {
            service::user(user)?;
            have_running(state, name)?;
            let mut client = programs::command("qrexec-client", state);
            client.args(["--quiet", "-d", name, "--"]);
            client.arg(format!("{user}:QUBESRPC {} {source}", asked.service));
            Ok(Some(client))
        }
        Destination::DispVmOf(dvm) => {
            service::user(user)?;
            check_room(state)?;
            let mut launch = programs::command("dispvm-launch", state);
            launch.args(["--quiet", "--dvm", dvm, "--source", source, "--user", user]);
            launch.args(["--service", &asked.service.to_string()]);
            Ok(Some(launch))
        }
    }
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

/// The executable SERVICE+ARG or SERVICE of the first folder that has one.
fn in_dom0(asked: &Asked, user: &str) -> Result<Option<Command>> {
    let Some(path) = find(asked) else { return Ok(None) };
    let mut command = as_user(user, &path)?;
    // As with Qubes: what dom0's programs complain of is not for a guest.
    command.stderr(Stdio::null());
    for (variable, _) in std::env::vars_os() {
        if variable.to_string_lossy().starts_with("QREXEC") {
            command.env_remove(variable);
        }
    }
    let argument = asked.service.argument().unwrap_or_default();
    if !argument.is_empty() {
        command.arg(argument);
    }
    command.env("QREXEC_REMOTE_DOMAIN", asked.source.as_str());
    command.env("QREXEC_SERVICE_FULL_NAME", asked.service.to_string());
    command.env("QREXEC_SERVICE_ARGUMENT", argument);
    let (kind, variable, target) = match &asked.target {
        Target::Name(name) => ("name", "QREXEC_REQUESTED_TARGET", name),
        Target::Keyword(keyword) => ("keyword", "QREXEC_REQUESTED_TARGET_KEYWORD", keyword),
    };
    command.env("QREXEC_REQUESTED_TARGET_TYPE", kind).env(variable, target);
    Ok(Some(command))
}

fn find(asked: &Asked) -> Option<PathBuf> {
    let named = std::env::var_os("DISPVM_RPC_DIR").filter(|path| !path.is_empty()).map(PathBuf::from);
    let folders = named.map_or_else(|| SERVICE_DIRS.map(PathBuf::from).to_vec(), |folder| vec![folder]);
    let argument = asked.service.argument().unwrap_or_default();
    let full_name = format!("{}+{argument}", asked.service.name());
    let names = [full_name.as_str(), asked.service.name()];
    let paths = folders.iter().flat_map(|folder| names.map(|name| folder.join(name)));
    paths.into_iter().find(|path| is_executable(path))
}

fn is_executable(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|there| there.is_file() && there.permissions().mode() & 0o111 != 0)
}

/// Only root can be somebody else.
fn as_user(user: &str, program: &Path) -> Result<Command> {
    let uid = nix::unistd::geteuid();
    if user == DEFAULT_USER || uid_of(user) == Some(uid.as_raw()) {
        return Ok(Command::new(program));
    }
    if !uid.is_root() {
        let why = format!("policy wants it run as {user}, which only root can do");
        return Err(Error::new(Kind::Refused, why)
            .hint("run what holds the qube as root, or leave user= out of the rule"));
    }
    let mut command = Command::new("runuser");
    command.args(["-u", user, "--"]).arg(program);
    Ok(command)
}
