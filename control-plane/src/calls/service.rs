//! What runs in a guest when a service of it is called, or a command line of qrexec's.
//!
//! A service is the executable /etc/qubes-rpc/NAME, with the argument as its one argument if there is one. What it finds in its environment is
//! as in QubesOS/qubes-core-qrexec (doc/qrexec-services.rst, lib/qubes-rpc-multiplexer, R4.2): outside dom0 it is not told whom the
//! caller asked for.

use qrexec::service::{Command, CommandLine, QubeName, Service};
use qrexec::{Exec, User};

use crate::error::{Error, Kind, Result};

/// Who runs a service in a guest, by name. `None`: whoever the service says.
pub fn user(name: &str) -> Result<Option<User>> {
    match name {
        "" | "DEFAULT" => Ok(None),
        "user" => Ok(Some(User::User)),
        "root" => Ok(Some(User::Root)),
        other => Err(Error::new(Kind::Refused, format!("nothing is run in a guest as {other:?}"))
            .hint("DEFAULT, user or root")),
    }
}

/// Reads `SERVICE[+ARG]`.
pub fn parse(text: &str) -> Result<Service> {
    Service::parse(text.as_bytes()).map_err(|error| {
        Error::new(Kind::Usage, format!("{text:?} is no service"))
            .because(error)
            .hint("SERVICE[+ARG], of letters, digits, '-', '.', '_' and, in ARG, '+'")
    })
}

/// Reads the name of a caller.
pub fn parse_source(text: &str) -> Result<QubeName> {
    QubeName::parse(text.as_bytes())
        .map_err(|error| Error::new(Kind::Usage, format!("{text:?} is no qube's name")).because(error))
}

/// A service, called by `source`.
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

/// `USER:COMMAND` or `USER:QUBESRPC SERVICE SOURCE`, either with `nogui:` after the user.
pub fn line(line: &CommandLine) -> Result<Exec> {
    let user = user(&line.user)?;
    Ok(match &line.command {
        Command::Rpc { service, source, .. } => exec(service, source, user),
        Command::Shell(line) => shell(line.strip_prefix(b"nogui:").unwrap_or(line), user),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Exec {
        line(&CommandLine::parse(text.as_bytes()).unwrap()).unwrap()
    }

    #[test]
    fn command_lines_become_commands_as_in_qubes() {
        let call = of("DEFAULT:nogui:QUBESRPC qubes.StartApp+firefox work");
        assert_eq!(call.argv, [&b"/etc/qubes-rpc/qubes.StartApp"[..], b"firefox"]);
        assert!(call.env.contains(&(b"QREXEC_REMOTE_DOMAIN".to_vec(), b"work".to_vec())));
        assert_eq!(call.user, User::User);
        assert_eq!(of("DEFAULT:QUBESRPC qubes.VMRootShell dom0").user, User::Root);
        assert_eq!(of("user:QUBESRPC qubes.VMRootShell dom0").user, User::User);
        let shell = of("root:nogui:id -u; exit");
        assert_eq!((shell.user, shell.argv[3].as_slice()), (User::Root, &b"id -u; exit"[..]));
        let other = line(&CommandLine::parse(b"alice:id").unwrap()).unwrap_err();
        assert!(other.kind == Kind::Refused && other.hint_text().is_some());
    }
}
