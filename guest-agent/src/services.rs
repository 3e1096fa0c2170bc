//! Which program or socket a service is, and who runs it, as the guest itself is configured: the host names the service alone.
//!
//! What is looked for where, and what a configuration says, is the matter of `rpc_service`. Of a configuration `wait-for-session` has no effect:
//! there is always a session by the time a host is heard. A socket's bytes are carried by a process of the agent's own, as root: who may use
//! the service, the host's policy says.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::process::ExitCode;

use qrexec::service::{Service, EXIT_PROBLEM};
use qrexec::{Exec, User};
use rpc_service::config::Config;
use rpc_service::find::{self, Served};
use rpc_service::relay::{take_standard_streams, Connection, Ends};
use rpc_service::NotServed;

use crate::failure::{Failure, Step};

/// Services, below the root.
const PROGRAMS: [&str; 2] = ["usr/local/etc/qubes-rpc", "etc/qubes-rpc"];
/// Their configurations.
const CONFIGS: [&str; 2] = ["usr/local/etc/qubes/rpc-config", "etc/qubes/rpc-config"];
/// By this the host names a service: as the program it mostly is.
const NAMED_AS: &[u8] = b"/etc/qubes-rpc/";
/// By this the service with its argument.
const FULL_NAME: &[u8] = b"QREXEC_SERVICE_FULL_NAME";
/// And by this who calls.
const CALLER: &[u8] = b"QREXEC_REMOTE_DOMAIN";
/// What is read of a program that may be called.
const FIRST_PAGE_BYTES: u64 = 4096;
/// The agent's own program, and the word that has it carry bytes.
const AGENT: &[u8] = b"/proc/self/exe";
/// See [`connect`].
pub const CONNECT: &str = "connect-service";
/// Ends that end a call, as [`connect`] is told.
const ON_CLIENT_EOF: &str = "client-eof";
const ON_SERVICE_EOF: &str = "service-eof";

/// The guest's services.
pub struct Services {
    programs: Vec<PathBuf>,
    configs: Vec<PathBuf>,
    user: String,
}

impl Services {
    /// Those below `root`, for a session's user of this name.
    pub fn below(root: impl Into<PathBuf>, user: &str) -> Self {
        let root = root.into();
        let folders = |names: [&str; 2]| names.map(|name| root.join(name)).to_vec();
        Self { programs: folders(PROGRAMS), configs: folders(CONFIGS), user: user.to_owned() }
    }

    /// Puts a service's own program and user in; other commands are as they are, and what there is not stays to be not found.
    pub fn resolve(&self, mut exec: Exec) -> Result<Exec, Failure> {
        let Some(service) = service_of(&exec) else { return Ok(exec) };
        let failed =
            |error: NotServed| Failure::ours(format!("serve {service}"), libc::EIO, error.to_string());
        let config = find::config(&self.configs, &service).map_err(failed)?;
        let config = config.map(|(_, config)| config).unwrap_or_default();
        if let Some(user) = &config.force_user {
            exec.user = self.user(user).step(|| format!("serve {service}"))?;
        }
        match find::service(&self.programs, &service) {
            Ok(Served::Program(program)) => {
                if let Some(first) = exec.argv.first_mut() {
                    *first = program.into_os_string().into_vec();
                }
            }
            Ok(_) if config.force_user.is_some() && config.is_for_a_socket() => {
                let what = "force-user= does not go with what is for sockets alone";
                return Err(failed(NotServed::Senseless(what)));
            }
            Ok(served) => return Ok(connecting(&served, &exec, &config)),
            Err(NotServed::Missing) => {}
            Err(error) => return Err(failed(error)),
        }
        Ok(exec)
    }

    /// Looks every service up as a call would, so that what is there and what is not is in the kernel's caches.
    pub fn look_around(&self) {
        let entries = self.programs.iter().filter_map(|folder| fs::read_dir(folder).ok()).flatten();
        for entry in entries.flatten() {
            let named = [NAMED_AS, entry.file_name().as_bytes()].concat();
            let program =
                self.resolve(Exec::user([named])).ok().and_then(|exec| exec.argv.into_iter().next());
            // Its first page too: most are scripts, and that is all of them.
            let read = |file: File| file.take(FIRST_PAGE_BYTES).read_to_end(&mut Vec::new());
            let _ = program.map(|path| File::open(OsStr::from_bytes(&path)).and_then(read));
        }
    }

    fn user(&self, name: &str) -> io::Result<User> {
        match name {
            "root" => Ok(User::Root),
            user if user == self.user => Ok(User::User),
            _ => Err(io::Error::other(format!("services run as root or as {}", self.user))),
        }
    }
}

/// The service that is called; `None`: it is none, or nothing that a file could be named.
fn service_of(exec: &Exec) -> Option<Service> {
    let name = exec.argv.first()?.strip_prefix(NAMED_AS)?;
    let full = variable(exec, FULL_NAME)
        .filter(|full| full.strip_prefix(name).is_some_and(|rest| rest.starts_with(b"+")));
    Service::parse(full.unwrap_or(name)).ok().filter(|service| service.name().as_bytes() == name)
}

fn variable<'a>(exec: &'a Exec, name: &[u8]) -> Option<&'a [u8]> {
    exec.env.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_slice())
}

/// The command that carries a socket's bytes.
fn connecting(served: &Served, exec: &Exec, config: &Config) -> Exec {
    let place = match served {
        Served::Socket(path) | Served::Program(path) => path.as_os_str().as_bytes().to_vec(),
        Served::Tcp(place) => place.to_string().into_bytes(),
    };
    let descriptor = match config.skip_service_descriptor {
        true => Vec::new(),
        false => [FULL_NAME, CALLER].map(|name| variable(exec, name).unwrap_or_default()).join(&b' '),
    };
    let ends = [(config.exit_on_client_eof, ON_CLIENT_EOF), (config.exit_on_service_eof, ON_SERVICE_EOF)];
    let ends = ends.into_iter().filter(|(wanted, _)| *wanted).map(|(_, word)| word.as_bytes().to_vec());
    let words = [AGENT.to_vec(), CONNECT.into(), place, descriptor];
    Exec { user: User::Root, cwd: Some(b"/".to_vec()), ..Exec::user(words.into_iter().chain(ends)) }
}

/// Carries the bytes of a service behind a socket, with this process's standard streams: `PLACE DESCRIPTOR [client-eof] [service-eof]`, PLACE
/// being a path, or an address and port, and DESCRIPTOR empty where the service is told nothing. What goes wrong is for the guest's log, the caller hears of it by its
/// status.
pub fn connect(words: &[std::ffi::OsString]) -> ExitCode {
    match try_connect(words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let place = words.first().map(|place| place.to_string_lossy()).unwrap_or_default();
            let _ = fs::write("/dev/kmsg", format!("<3>dispvm-agent: reach {place}: {error}"));
            ExitCode::from(EXIT_PROBLEM)
        }
    }
}

fn try_connect(words: &[std::ffi::OsString]) -> io::Result<()> {
    let [place, descriptor, ends @ ..] = words else { return Err(io::ErrorKind::InvalidInput.into()) };
    let served = match place.to_str().and_then(|place| place.parse().ok()) {
        Some(address) => Served::Tcp(rpc_service::tcp::Place { address }),
        None => Served::Socket(place.into()),
    };
    let ends = Ends {
        on_client_eof: ends.iter().any(|word| word == ON_CLIENT_EOF),
        on_service_eof: ends.iter().any(|word| word == ON_SERVICE_EOF),
    };
    let descriptor = descriptor.to_str().filter(|descriptor| !descriptor.is_empty());
    let connection = Connection::open(&served, descriptor, ends)?;
    let (client_in, client_out) = take_standard_streams()?;
    connection.carry(client_in, client_out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    use std::path::Path;

    fn guest(files: &[(&str, &str)]) -> (tempfile::TempDir, Services) {
        let root = tempfile::tempdir().expect("tempdir");
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().expect("has one")).expect("mkdir");
            fs::write(&path, text).expect("write");
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("chmod");
        }
        let services = Services::below(root.path(), "user");
        (root, services)
    }

    fn call(name: &str, full: &str) -> Exec {
        let mut exec = Exec::user([format!("/etc/qubes-rpc/{name}")]);
        exec.env = vec![(FULL_NAME.to_vec(), full.into())];
        exec
    }

    #[test]
    fn the_file_for_the_argument_counts_before_and_local_ones_before_shipped_ones() {
        let files = ["usr/local/etc/qubes-rpc/a", "etc/qubes-rpc/a", "etc/qubes-rpc/a+x", "etc/qubes-rpc/b"];
        let (root, services) = guest(&files.map(|file| (file, "")));
        let found = |name: &str, full: &str| {
            let exec = services.resolve(call(name, full)).expect("resolves");
            let path = PathBuf::from(OsStr::from_bytes(&exec.argv[0]));
            path.strip_prefix(root.path()).map_or_else(|_| path.clone(), Path::to_path_buf)
        };
        assert_eq!(found("a", "a"), Path::new(files[0]));
        assert_eq!(found("a", "a+y"), Path::new(files[0]));
        assert_eq!(found("a", "a+x"), Path::new(files[2]));
        assert_eq!(found("b", "b+"), Path::new(files[3]));
        assert_eq!(found("b", "a+x"), Path::new(files[3]), "a name that is another's");
        let long = format!("b+{}", "x".repeat(400));
        assert_eq!(found("b", &long), Path::new(files[3]), "no file can have that name");
        assert_eq!(found("c", "c"), Path::new("/etc/qubes-rpc/c"), "there is none: as it was");
        for other in ["../c", "a/b", "", ".hidden"] {
            assert_eq!(found(other, other), Path::new("/etc/qubes-rpc").join(other));
        }
        services.look_around();
    }

    #[test]
    fn a_configuration_says_who_runs_a_service() {
        let (_root, services) = guest(&[
            ("etc/qubes/rpc-config/a", "# comment\nwait-for-session=1\nforce-user='root'\n"),
            ("etc/qubes/rpc-config/a+x", "force-user = 'user'"),
            ("etc/qubes/rpc-config/b", "force-user='nobody'\n"),
            ("etc/qubes/rpc-config/d", "force-user=root\n"),
            ("usr/local/etc/qubes/rpc-config/c", "wait-for-session=1\n"),
            ("etc/qubes/rpc-config/c", "force-user='root'\n"),
        ]);
        let user = |name: &str, full: &str| services.resolve(call(name, full)).map(|exec| exec.user);
        assert_eq!(user("a", "a").expect("resolves"), User::Root);
        assert_eq!(user("a", "a+y").expect("resolves"), User::Root);
        assert_eq!(user("a", "a+x").expect("resolves"), User::User);
        assert_eq!(user("c", "c").expect("resolves"), User::User, "the local one hides the other");
        let refused = user("b", "b").expect_err("there is no such choice").to_string();
        assert!(refused.contains("serve b") && refused.contains("as root or as user"), "{refused}");
        let refused = user("d", "d").expect_err("a text stands in quotes").to_string();
        assert!(refused.contains("rpc-config/d:1: "), "{refused}");
        let rootly = Exec { user: User::Root, ..call("c", "c") };
        assert_eq!(services.resolve(rootly).expect("resolves").user, User::Root);
    }

    #[test]
    fn a_socket_is_a_command_of_the_agents_own() {
        let (root, services) = guest(&[
            (
                "etc/qubes/rpc-config/b",
                "skip-service-descriptor=true\nexit-on-client-eof=true\nexit-on-service-eof=true\n",
            ),
            ("etc/qubes/rpc-config/c", "skip-service-descriptor=true\nforce-user='root'\n"),
            ("etc/qubes-rpc/plain", ""),
        ]);
        let folder = root.path().join("etc/qubes-rpc");
        let _listener = std::os::unix::net::UnixListener::bind(folder.join("a")).expect("bind");
        for (name, link) in [("b", "/dev/tcp"), ("c", "a")] {
            std::os::unix::fs::symlink(link, folder.join(name)).expect("link");
        }
        let resolved = |name: &str, full: &str| {
            let mut exec = call(name, full);
            exec.env.push((CALLER.to_vec(), b"work".to_vec()));
            services.resolve(exec).map(|exec| {
                assert_eq!(exec.user, User::Root);
                exec.argv.into_iter().map(|word| String::from_utf8(word).expect("text")).collect::<Vec<_>>()
            })
        };
        let a = folder.join("a").to_str().expect("text").to_owned();
        let agent = ["/proc/self/exe", "connect-service"].map(str::to_owned);
        let expected = |rest: &[&str]| -> Vec<String> {
            agent.iter().cloned().chain(rest.iter().map(|word| (*word).to_owned())).collect()
        };
        assert_eq!(resolved("a", "a+x").expect("resolves"), expected(&[&a, "a+x work"]));
        let tcp = resolved("b", "b+127.0.0.1+22").expect("resolves");
        assert_eq!(tcp, expected(&["127.0.0.1:22", "", "client-eof", "service-eof"]));
        for (name, why) in [("c", "force-user="), ("b", "HOST+PORT")] {
            let refused = resolved(name, name).expect_err(name).to_string();
            assert!(refused.contains(why), "{refused}");
        }
        fs::set_permissions(folder.join("plain"), fs::Permissions::from_mode(0o644)).expect("chmod");
        let refused = resolved("plain", "plain").expect_err("cannot be run").to_string();
        assert!(refused.contains("neither a program"), "{refused}");
        services.look_around();
    }
}
