//! What runs in a guest when a service of it is called, or a command line of qrexec's, and who runs it.

use qrexec::service::{CommandLine, QubeName, Service};
use qrexec::{programs, Exec, User};

pub use qrexec::programs::exec;

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

/// `USER:COMMAND` or `USER:QUBESRPC SERVICE SOURCE`, either with `nogui:` after the user.
pub fn line(line: &CommandLine) -> Result<Exec> {
    let user = user(&line.user)?;
    Ok(programs::command(&line.command, user))
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
