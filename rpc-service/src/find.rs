//! Which file serves a service, and which one configures it.
//!
//! Invariant: SERVICE+ARGUMENT counts before SERVICE, in whatever folder, and without an argument SERVICE+ does; among folders the first
//! that has it. What is there and cannot serve is an error: nothing that comes later is taken instead.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use qrexec::service::{Service, SERVICE_NAME_BYTES_MAX};

use crate::config::{Config, CONFIG_BYTES_MAX};
use crate::tcp::{self, Place};
use crate::NotServed;

/// What serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Served {
    /// A program, which gets the argument as its own.
    Program(PathBuf),
    /// A socket.
    Socket(PathBuf),
    /// A place behind TCP.
    Tcp(Place),
}

/// What serves a service, of the first of `folders` that has it.
pub fn service(folders: &[PathBuf], service: &Service) -> Result<Served, NotServed> {
    for path in candidates(folders, service) {
        if let Ok(link) = fs::read_link(&path) {
            if let Some(place) = tcp::of_link(&link, service.argument().unwrap_or_default())? {
                return Ok(Served::Tcp(place));
            }
        }
        match look(&path)? {
            None => {}
            Some(there) if there.file_type().is_socket() => return Ok(Served::Socket(path)),
            Some(there) if there.is_file() && there.permissions().mode() & 0o111 != 0 => {
                return Ok(Served::Program(path));
            }
            Some(_) => return Err(NotServed::Kind(path)),
        }
    }
    Err(NotServed::Missing)
}

/// The configuration of a service, of the first of `folders` that has one, and where it is.
pub fn config(folders: &[PathBuf], service: &Service) -> Result<Option<(PathBuf, Config)>, NotServed> {
    for path in candidates(folders, service) {
        if look(&path)?.is_some() {
            let text = read(&path).map_err(|source| NotServed::File { path: path.clone(), source })?;
            let config = Config::parse(&text);
            return config
                .map(|config| Some((path.clone(), config)))
                .map_err(|error| NotServed::Config { path, error });
        }
    }
    Ok(None)
}

fn candidates<'a>(folders: &'a [PathBuf], service: &Service) -> impl Iterator<Item = PathBuf> + 'a {
    let full = format!("{}+{}", service.name(), service.argument().unwrap_or_default());
    let names =
        [Some(full).filter(|full| full.len() <= SERVICE_NAME_BYTES_MAX), Some(service.name().to_owned())];
    names.into_iter().flatten().flat_map(move |name| folders.iter().map(move |folder| folder.join(&name)))
}

/// What is there; `None`: nothing is.
fn look(path: &Path) -> Result<Option<Metadata>, NotServed> {
    match fs::metadata(path) {
        Ok(there) => Ok(Some(there)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(source) => Err(NotServed::File { path: path.to_owned(), source }),
    }
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    let file: File = OpenOptions::new().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path)?;
    let mut text = Vec::new();
    file.take(CONFIG_BYTES_MAX as u64 + 1).read_to_end(&mut text)?;
    match text.len() {
        ..=CONFIG_BYTES_MAX => Ok(text),
        _ => Err(io::Error::new(ErrorKind::FileTooLarge, format!("more than {CONFIG_BYTES_MAX} bytes"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    struct Folders(tempfile::TempDir, Vec<PathBuf>);

    impl Folders {
        fn new() -> Folders {
            let folder = tempfile::tempdir().unwrap();
            let folders = ["local", "etc"].map(|name| folder.path().join(name)).to_vec();
            folders.iter().for_each(|folder| fs::create_dir(folder).unwrap());
            Folders(folder, folders)
        }

        fn program(&self, path: &str) {
            fs::write(self.0.path().join(path), "").unwrap();
            fs::set_permissions(self.0.path().join(path), fs::Permissions::from_mode(0o755)).unwrap();
        }

        fn find(&self, name: &str) -> Result<String, String> {
            match service(&self.1, &Service::parse(name.as_bytes()).unwrap()) {
                Ok(Served::Program(path) | Served::Socket(path)) => {
                    Ok(path.strip_prefix(self.0.path()).unwrap().to_str().unwrap().to_owned())
                }
                Ok(Served::Tcp(place)) => Ok(place.to_string()),
                Err(error) => Err(format!("{} {error}", error.status())),
            }
        }
    }

    #[test]
    fn the_file_for_the_argument_counts_before_and_local_ones_before_shipped_ones() {
        let folders = Folders::new();
        for path in ["local/a", "etc/a", "etc/a+x", "etc/b", "etc/b+", "local/.c", "etc/c"] {
            folders.program(path);
        }
        let found = |name: &str| folders.find(name).unwrap();
        assert_eq!([found("a"), found("a+y"), found("a+x")], ["local/a", "local/a", "etc/a+x"]);
        assert_eq!([found("b"), found("b+"), found("b+x")], ["etc/b+", "etc/b+", "etc/b"]);
        assert_eq!(found(&format!("b+{}", "x".repeat(400))), "etc/b", "no file can have that name");
        assert_eq!(folders.find("d").unwrap_err(), "127 there is no such service");
        symlink("nowhere", folders.0.path().join("local/c")).unwrap();
        assert_eq!(found("c"), "etc/c", "a link to nothing is nothing");
    }

    #[test]
    fn what_is_there_and_cannot_serve_hides_what_comes_later() {
        let folders = Folders::new();
        folders.program("etc/a");
        fs::write(folders.0.path().join("local/a"), "").unwrap();
        assert!(folders.find("a").unwrap_err().starts_with("125 "));
        fs::remove_file(folders.0.path().join("local/a")).unwrap();
        symlink("/dev/null/nowhere", folders.0.path().join("local/a")).unwrap();
        assert!(folders.find("a").unwrap_err().starts_with("125 "));
        fs::remove_file(folders.0.path().join("local/a")).unwrap();
        let _listener = UnixListener::bind(folders.0.path().join("socket")).unwrap();
        symlink("../socket", folders.0.path().join("local/a")).unwrap();
        assert_eq!(folders.find("a").unwrap(), "local/a");
        symlink("/dev/tcp/::1", folders.0.path().join("local/a+80")).unwrap();
        assert_eq!(folders.find("a+80").unwrap(), "[::1]:80");
        symlink("/dev/tcp/", folders.0.path().join("local/t")).unwrap();
        assert!(folders.find("t+80").unwrap_err().starts_with("125 /dev/tcp/: "));
    }

    #[test]
    fn a_configuration_is_looked_for_as_a_service_is() {
        let folders = Folders::new();
        let read = |name: &str| {
            config(&folders.1, &Service::parse(name.as_bytes()).unwrap())
                .map(|found| found.map(|(_, config)| config))
        };
        let write = |path: &str, text: &[u8]| fs::write(folders.0.path().join(path), text).unwrap();
        write("etc/a", b"force-user='a'\n");
        write("etc/a+x", b"force-user='x'\n");
        write("local/a", b"wait-for-session=1\n");
        assert_eq!(read("a+x").unwrap().unwrap().force_user.as_deref(), Some("x"));
        assert!(read("a").unwrap().unwrap().wait_for_session);
        assert_eq!(read("b").unwrap(), None);
        write("local/a+x", b"\nforce-user=root\n");
        let refused = read("a+x").unwrap_err();
        assert!(refused.status() == 125 && refused.to_string().contains("local/a+x:2: "), "{refused}");
        write("local/b", &[b'#'; CONFIG_BYTES_MAX + 1]);
        assert!(matches!(read("b"), Err(NotServed::File { .. })));
        fs::remove_dir(&folders.1[1]).unwrap_err();
        symlink("/dev/null/nowhere", folders.0.path().join("local/c")).unwrap();
        assert!(matches!(read("c"), Err(NotServed::File { .. })));
    }
}
