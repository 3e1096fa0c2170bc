//! The programs that the tools run: those of this project stand beside this one, or in PATH.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};

use std::os::unix::process::ExitStatusExt;

use crate::outcome::{Failure, FAILED};

/// Launches disposables.
pub const LAUNCHER: &str = "dispvm-launch";
/// Fills volumes.
pub const DAEMON: &str = "dispvmd";
/// Makes savefiles.
pub const SAVEFILE_TOOL: &str = "dispvm-savefile";
/// Calls services of qubes.
const QREXEC_CLIENT: &str = "qrexec-client";
/// Where the stock client looks for it.
const QREXEC_CLIENT_PATH: &str = "/usr/lib/qubes/qrexec-client";
/// Who runs a service unless the user says so: the qube's default user.
pub const DEFAULT_USER: &str = "DEFAULT";

/// A program of this project.
pub fn own(name: &str) -> Command {
    Command::new(beside(name).unwrap_or_else(|| name.into()))
}

/// `qrexec-client` with a service in a qube: the one DISPVM_QREXEC_CLIENT names, the one beside this program, or the stock one.
pub fn service(qube: &str, flags: &[impl AsRef<std::ffi::OsStr>], user: &str, service: &str) -> Command {
    let named = std::env::var_os("DISPVM_QREXEC_CLIENT").filter(|path| !path.is_empty()).map(PathBuf::from);
    let path = named.or_else(|| beside(QREXEC_CLIENT)).unwrap_or_else(|| QREXEC_CLIENT_PATH.into());
    let mut command = Command::new(path);
    command.args(["-d", qube]).args(flags).arg(format!("{user}:QUBESRPC {service} dom0"));
    command
}

fn beside(name: &str) -> Option<PathBuf> {
    std::env::current_exe().ok().map(|own| own.with_file_name(name)).filter(|path| path.exists())
}

/// The status of a shell for a program's end.
pub fn status_of(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(FAILED)
}

/// Says that a program does not run.
pub fn not_started(command: &Command, error: &io::Error) -> Failure {
    let name = Path::new(command.get_program()).display();
    let hint = match command.get_program().to_string_lossy().contains(QREXEC_CLIENT) {
        true => format!("DISPVM_QREXEC_CLIENT names another than {QREXEC_CLIENT_PATH}"),
        false => "it belongs beside qvm, or into PATH".into(),
    };
    Failure::Runtime(format!("cannot run {name}: {error}. Hint: {hint}"), FAILED)
}
