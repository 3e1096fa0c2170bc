//! The Admin API as the tools call it.

use std::path::PathBuf;

use admin_api::lines::{lines, Property, Qube};
use admin_api::{client, ApiError, Kind, Request, ADMIN_VM, SOCKET_PATH};
use clap::ArgAction;

/// What is asked of the system, not of a qube, is asked of dom0.
pub const SYSTEM: &str = ADMIN_VM;

/// Options that every tool has.
#[derive(Debug, Clone, clap::Args)]
pub struct Common {
    /// Say more
    #[arg(long, short, action = ArgAction::Count)]
    pub verbose: u8,
    /// Say less
    #[arg(long, short, action = ArgAction::Count)]
    pub quiet: u8,
    /// Ignored, for the sake of scripts
    #[arg(long, hide = true)]
    force_root: bool,
    /// The Admin API's socket [default: DISPVM_API_SOCKET, else /var/run/qubesd.sock]
    #[arg(long, value_name = "PATH")]
    api_socket: Option<PathBuf>,
}

impl Common {
    /// The API, at the socket that was named.
    pub fn api(&self) -> Api {
        let variable =
            || std::env::var_os("DISPVM_API_SOCKET").filter(|path| !path.is_empty()).map(PathBuf::from);
        Api { socket: self.api_socket.clone().or_else(variable).unwrap_or_else(|| SOCKET_PATH.into()) }
    }
}

/// Calls of the Admin API.
#[derive(Debug)]
pub struct Api {
    socket: PathBuf,
}

impl Api {
    /// A call with an argument and a payload, either of which may be empty.
    pub fn call(&self, method: &str, qube: &str, argument: &str, payload: &str) -> Result<Vec<u8>, ApiError> {
        client::call(&self.socket, &Request::new(method, qube).argument(argument).payload(payload))
    }

    /// A call that says what to do, and all with that.
    pub fn tell(&self, method: &str, qube: &str) -> Result<(), ApiError> {
        self.call(method, qube, "", "").map(drop)
    }

    /// A call that gives text.
    pub fn text(&self, method: &str, qube: &str, argument: &str) -> Result<String, ApiError> {
        Ok(String::from_utf8_lossy(&self.call(method, qube, argument, "")?).into_owned())
    }

    /// A call that gives lines, such as names.
    pub fn names(&self, method: &str, qube: &str, argument: &str) -> Result<Vec<String>, ApiError> {
        let answer = self.call(method, qube, argument, "")?;
        let names = lines("list of names", &answer)?.map(str::to_owned).collect();
        Ok(names)
    }

    /// All qubes, by name.
    pub fn qubes(&self) -> Result<Vec<Qube>, ApiError> {
        let mut qubes = Qube::parse_all(&self.call("admin.vm.List", SYSTEM, "", "")?)?;
        qubes.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(qubes)
    }

    /// A feature's value; `None` if it is not set.
    pub fn feature(&self, qube: &str, name: &str) -> Result<Option<String>, ApiError> {
        match self.text("admin.vm.feature.Get", qube, name) {
            Err(error) if is(&error, Kind::FeatureNotFound) => Ok(None),
            value => value.map(Some),
        }
    }

    /// All properties of a qube, by name.
    pub fn properties(&self, qube: &str) -> Result<Vec<(String, Property)>, ApiError> {
        let mut all = Property::decode_lines(&self.call("admin.vm.property.GetAll", qube, "", "")?)?;
        all.sort_by(|one, other| one.0.cmp(&other.0));
        Ok(all)
    }
}

/// Starts the qube, if it does not run.
pub fn start(api: &Api, qube: &str) -> Result<(), ApiError> {
    match api.tell("admin.vm.Start", qube) {
        Err(error) if is(&error, Kind::VmNotHalted) => Ok(()),
        started => started,
    }
}

/// Whether a qube in this state runs (QubesVM.is_running of the stock client).
pub fn is_running(state: &str) -> bool {
    !matches!(state, "Halted" | "NA")
}

/// Whether the error is this exception.
pub fn is(error: &ApiError, kind: Kind) -> bool {
    error.exception().is_some_and(|exception| exception.kind == kind)
}
