//! Services of dom0's: what serves a call of a qube's, and the carrying out of it, of which the caller hears the service's bytes and its status
//! alone.
//!
//! As in QubesOS/qubes-core-qrexec (daemon/qrexec-daemon.c and qrexec-daemon-common.c 0a5078be, R4.2 and R4.3), but that a rule's `user=`
//! counts here, and `force-user=` more than it.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use qrexec::service::{Service, Target};
use rpc_service::config::Config;
use rpc_service::find::{self, Served};
use rpc_service::relay::{take_standard_streams, Connection, Ends};
use rpc_service::NotServed;

use super::carry_out::{called, DEFAULT_USER};
use super::decide::Asked;
use super::supervise;
use crate::accounts::uid_of;
use crate::error::{Error, Kind, Result};
use crate::state::State;

/// Where services are.
const SERVICE_DIRS: [&str; 2] = ["/usr/local/etc/qubes-rpc", "/etc/qubes-rpc"];
/// And their configurations.
const CONFIG_DIRS: [&str; 2] = ["/usr/local/etc/qubes/rpc-config", "/etc/qubes/rpc-config"];
/// What waits for somebody to be logged in, where there is such a service.
const WAIT_FOR_SESSION: &[u8] = b"qubes.WaitForSession";

/// A service that is there.
pub struct InDom0 {
    work: Work,
    session: Option<Command>,
    notes: Vec<String>,
}

enum Work {
    Program(Box<Command>),
    Socket { served: Served, descriptor: Option<String>, ends: Ends },
}

/// What serves the call. The inner error is no refusal: the call may happen, and fails.
pub fn find(state: &State, asked: &Asked, user: &str) -> Result<std::result::Result<InDom0, NotServed>> {
    match look(asked) {
        Err(missing) => Ok(Err(missing)),
        Ok((served, config)) => prepare(state, asked, user, served, config),
    }
}

fn look(asked: &Asked) -> std::result::Result<(Served, Config), NotServed> {
    let config = find::config(&folders("DISPVM_RPC_CONFIG_DIR", CONFIG_DIRS), &asked.service)?;
    let served = find::service(&service_folders(), &asked.service)?;
    Ok((served, config.map(|(_, config)| config).unwrap_or_default()))
}

fn prepare(
    state: &State,
    asked: &Asked,
    user: &str,
    served: Served,
    config: Config,
) -> Result<std::result::Result<InDom0, NotServed>> {
    let mut notes: Vec<_> = config.unknown.iter().map(|key| format!("{key} means nothing")).collect();
    let session = if config.wait_for_session { wait_for_session(asked) } else { None };
    let work = match served {
        Served::Program(path) => {
            if config.is_for_a_socket() {
                notes.push("what is for sockets alone means nothing for a program".to_owned());
            }
            let user = config.force_user.as_deref().unwrap_or(user);
            Work::Program(Box::new(program(state, asked, user, &path)?))
        }
        _ if config.force_user.is_some() && config.is_for_a_socket() => {
            return Ok(Err(NotServed::Senseless("force-user= does not go with what is for sockets alone")))
        }
        served => Work::Socket {
            served,
            descriptor: (!config.skip_service_descriptor).then(|| descriptor(asked)),
            ends: Ends::of(&config),
        },
    };
    Ok(Ok(InDom0 { work, session, notes }))
}

impl InDom0 {
    /// What of its configuration means nothing.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Serves the call with this process's standard streams: runs the program, or carries bytes until the call is over. The status is the
    /// service's; an error says why the call has failed.
    pub fn serve(self) -> std::io::Result<u8> {
        if let Some(session) = self.session {
            // As with Qubes: whatever comes of it, the service is run.
            let _ = supervise::run_before(session);
        }
        match self.work {
            Work::Program(command) => supervise::run(*command),
            Work::Socket { served, descriptor, ends } => {
                let connection = Connection::open(&served, descriptor.as_deref(), ends)?;
                let (client_in, client_out) = take_standard_streams()?;
                connection.carry(client_in, client_out).map(|()| 0)
            }
        }
    }
}

/// What a command line of qrexec's says of the call.
fn descriptor(asked: &Asked) -> String {
    let (kind, target) = requested(&asked.target);
    format!("{} {} {kind} {target}", called(&asked.service), asked.source.as_str())
}

/// Whom the caller asked for.
fn requested(target: &Target) -> (&'static str, &str) {
    match target {
        Target::Keyword(keyword) => ("keyword", keyword),
        Target::Name(name) => ("name", name),
    }
}

fn program(state: &State, asked: &Asked, user: &str, path: &Path) -> Result<Command> {
    let mut command = as_user(user, path)?;
    // As with Qubes: what dom0's programs complain of is not for a guest.
    command.stderr(Stdio::null());
    let argument = asked.service.argument().unwrap_or_default();
    if !argument.is_empty() {
        command.arg(argument);
    }
    tell(&mut command, asked);
    // Tools of ours that it runs are for the qubes that the policy was asked about.
    command.env("DISPVM_ROOT", state.root());
    command.env("QREXEC_SERVICE_FULL_NAME", called(&asked.service));
    command.env("QREXEC_SERVICE_ARGUMENT", argument);
    let (kind, target) = requested(&asked.target);
    let variable = if kind == "name" { "QREXEC_REQUESTED_TARGET" } else { "QREXEC_REQUESTED_TARGET_KEYWORD" };
    command.env("QREXEC_REQUESTED_TARGET_TYPE", kind).env(variable, target);
    Ok(command)
}

/// Who calls, and nothing of what somebody told us.
fn tell(command: &mut Command, asked: &Asked) {
    command.env_remove(super::verdict::VARIABLE).env_remove(super::system_log::UNLOGGED);
    for (variable, _) in std::env::vars_os() {
        if variable.to_string_lossy().starts_with("QREXEC") {
            command.env_remove(variable);
        }
    }
    command.env("QREXEC_REMOTE_DOMAIN", asked.source.as_str());
}

fn wait_for_session(asked: &Asked) -> Option<Command> {
    let service = Service::parse(WAIT_FOR_SESSION).ok()?;
    let Ok(Served::Program(path)) = find::service(&service_folders(), &service) else { return None };
    let mut command = Command::new(path);
    tell(&mut command, asked);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    Some(command)
}

fn service_folders() -> Vec<PathBuf> {
    folders("DISPVM_RPC_DIR", SERVICE_DIRS)
}

fn folders(variable: &str, usual: [&str; 2]) -> Vec<PathBuf> {
    let named = std::env::var_os(variable).filter(|path| !path.is_empty()).map(PathBuf::from);
    named.map_or_else(|| usual.map(PathBuf::from).to_vec(), |folder| vec![folder])
}

/// Only root can be somebody else.
fn as_user(user: &str, program: &Path) -> Result<Command> {
    let uid = nix::unistd::geteuid();
    if user == DEFAULT_USER || uid_of(user) == Some(uid.as_raw()) {
        return Ok(Command::new(program));
    }
    if !uid.is_root() {
        let why = format!("it is to be run as {user}, which only root can do");
        return Err(Error::new(Kind::Refused, why)
            .hint("run what holds the qube as root, or leave user= and force-user= out"));
    }
    let mut command = Command::new("runuser");
    command.args(["-u", user, "--"]).arg(program);
    Ok(command)
}
