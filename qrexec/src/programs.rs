//! What runs in a guest when a service of it is called, or a command line of qrexec's.
//!
//! A service is the executable /etc/qubes-rpc/NAME, with the argument as its one argument if there is one. What it finds in its environment is
//! as in QubesOS/qubes-core-qrexec (doc/qrexec-services.rst, lib/qubes-rpc-multiplexer, R4.2): outside dom0 it is not told whom the
//! caller asked for.

use crate::service::{Command, QubeName, Service};
use crate::{Exec, User};

/// A service, called by `source`; run by `user`, or by whom it says.
pub fn exec(service: &Service, source: &QubeName, user: Option<User>) -> Exec {
    let argument = service.argument().unwrap_or_default();
    let mut exec = Exec::user([format!("/etc/qubes-rpc/{}", service.name())]);
    exec.user = user.unwrap_or(match service.name() {
        // As the configuration says that Qubes ships beside it.
        "qubes.VMRootShell" => User::Root,
        _ => User::User,
    });
    if !argument.is_empty() {
        exec.argv.push(argument.as_bytes().to_vec());
    }
    let full_name = service.to_string();
    let variables = [
        ("QREXEC_SERVICE_FULL_NAME", full_name.as_str()),
        ("QREXEC_SERVICE_ARGUMENT", argument),
        ("QREXEC_REMOTE_DOMAIN", source.as_str()),
        ("QREXEC_REQUESTED_TARGET_TYPE", ""),
    ];
    exec.env = variables.map(|(name, value)| (name.as_bytes().to_vec(), value.as_bytes().to_vec())).to_vec();
    exec
}

/// A line for the login shell of whoever runs it.
pub fn shell(line: &[u8], user: Option<User>) -> Exec {
    let login_shell: [&[u8]; 4] = [b"/bin/sh", b"-c", b"exec \"${SHELL:-/bin/sh}\" -lc \"$0\"", line];
    let mut exec = Exec::user(login_shell);
    exec.user = user.unwrap_or(User::User);
    exec
}

/// What follows the user in a command line.
pub fn command(command: &Command, user: Option<User>) -> Exec {
    match command {
        Command::Rpc { service, source, .. } => exec(service, source, user),
        Command::Shell(line) => shell(line.strip_prefix(b"nogui:").unwrap_or(line), user),
    }
}
