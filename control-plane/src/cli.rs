//! What the binaries share: where the state is, what the environment says, how an error ends a program.

use std::path::PathBuf;
use std::process::ExitCode;

pub use command_docs::generate_if_asked;

use crate::error::{Error, Kind, Result};
use crate::machine::ThisMachine;
use crate::output::error_text;
use crate::state::State;

/// What runs in a qube when no command is given: a login shell.
pub const LOGIN_SHELL: [&str; 3] = ["/bin/sh", "-c", "exec \"${SHELL:-/bin/sh}\" -l"];

/// Options every command has.
#[derive(Debug, clap::Args)]
pub struct Common {
    /// State folder [default: DISPVM_ROOT, else /var/lib/dispvm for root, $XDG_DATA_HOME/dispvm for others]
    #[arg(long, value_name = "DIR", global = true)]
    pub root: Option<PathBuf>,
}

impl Common {
    /// Opens the state folder.
    pub fn state(&self) -> Result<State> {
        State::open(&self.state_path()?)
    }

    fn state_path(&self) -> Result<PathBuf> {
        let variable =
            |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        if let Some(root) = self.root.clone().or_else(|| variable("DISPVM_ROOT")) {
            return Ok(root);
        }
        if nix::unistd::geteuid().is_root() {
            return Ok("/var/lib/dispvm".into());
        }
        variable("XDG_DATA_HOME")
            .or_else(|| variable("HOME").map(|home| home.join(".local/share")))
            .map(|data| data.join("dispvm"))
            .ok_or_else(|| {
                Error::new(Kind::Usage, "neither HOME nor XDG_DATA_HOME is set").hint("give --root DIR")
            })
    }
}

/// The machine, as the environment describes it.
pub fn machine() -> Result<ThisMachine> {
    let volume_memory_mib = match std::env::var("DISPVM_VOLUME_MEMORY_MIB") {
        Err(_) => None,
        Ok(text) => Some(text.parse().ok().filter(|mib| (1..=1 << 20).contains(mib)).ok_or_else(|| {
            Error::new(Kind::Usage, format!("DISPVM_VOLUME_MEMORY_MIB is {text:?}, not a number of MiB"))
        })?),
    };
    Ok(ThisMachine {
        qemu: std::env::var_os("DISPVM_QEMU").filter(|value| !value.is_empty()).map(PathBuf::from),
        path: std::env::var_os("PATH").unwrap_or_default(),
        volume_memory_mib,
    })
}

/// Has the log written to standard error: warnings, and with DISPVM_LOG=info or debug more.
pub fn start_log() {
    let level = match std::env::var("DISPVM_LOG").as_deref() {
        Ok("debug") => tracing::Level::DEBUG,
        Ok("info") => tracing::Level::INFO,
        _ => tracing::Level::WARN,
    };
    tracing_subscriber::fmt().with_max_level(level).with_writer(std::io::stderr).with_target(false).init();
}

/// Prints an error, once, and answers the status.
pub fn fail(program: &str, error: &Error, status: u8) -> ExitCode {
    eprintln!("{program}: {}", error_text(error));
    ExitCode::from(status)
}
