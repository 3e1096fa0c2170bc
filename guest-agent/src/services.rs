//! Which program a service is, and who runs it, as the guest itself is configured: the host names the service alone.
//!
//! Where and what is looked for is as in QubesOS/qubes-core-qrexec (libqrexec/exec.c, R4.1 and later): the file for the service with its
//! argument counts before the one for all arguments, and /usr/local before /etc. Of a configuration only `force-user` has an effect:
//! there is always a session by the time a host is heard, and services behind sockets are not served.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use qrexec::{Exec, User};

use crate::failure::{Failure, Step};

/// Services, below the root.
const PROGRAMS: [&str; 2] = ["usr/local/etc/qubes-rpc", "etc/qubes-rpc"];
/// Their configurations.
const CONFIGS: [&str; 2] = ["usr/local/etc/qubes/rpc-config", "etc/qubes/rpc-config"];
/// By this the host names a service: as the program it mostly is.
const NAMED_AS: &[u8] = b"/etc/qubes-rpc/";
/// And by this the service with its argument.
const FULL_NAME: &[u8] = b"QREXEC_SERVICE_FULL_NAME";
/// What is read of a configuration, as Qubes does.
const CONFIG_BYTES_MAX: u64 = 4096;

/// The guest's services.
pub struct Services {
    root: PathBuf,
    user: String,
}

impl Services {
    /// Those below `root`, for a session's user of this name.
    pub fn below(root: impl Into<PathBuf>, user: &str) -> Self {
        Self { root: root.into(), user: user.to_owned() }
    }

    /// Puts a service's own program and user in; other commands are as they are.
    pub fn resolve(&self, mut exec: Exec) -> Result<Exec, Failure> {
        let Some(names) = names(&exec) else { return Ok(exec) };
        let [full, name] = names.each_ref().map(|name| OsStr::from_bytes(name));
        if let Some(config) = self.find(&CONFIGS, [full, name]) {
            let forced = self.forced_user(&config).step(|| format!("read {}", config.display()))?;
            exec.user = forced.unwrap_or(exec.user);
        }
        if let (Some(program), Some(first)) = (self.find(&PROGRAMS, [full, name]), exec.argv.first_mut()) {
            *first = program.into_os_string().into_vec();
        }
        Ok(exec)
    }

    /// Looks every service up as a call would, so that what is there and what is not is in the kernel's caches.
    pub fn look_around(&self) {
        let entries =
            PROGRAMS.iter().filter_map(|folder| fs::read_dir(self.root.join(folder)).ok()).flatten();
        for entry in entries.flatten() {
            let named = [NAMED_AS, entry.file_name().as_bytes()].concat();
            let program =
                self.resolve(Exec::user([named])).ok().and_then(|exec| exec.argv.into_iter().next());
            // Its first page too: most are scripts, and that is all of them.
            let _ = program.map(|path| File::open(OsStr::from_bytes(&path)).and_then(read_limited));
        }
    }

    fn find(&self, folders: &[&str], names: [&OsStr; 2]) -> Option<PathBuf> {
        let paths = names
            .into_iter()
            .flat_map(|name| folders.iter().map(move |folder| self.root.join(folder).join(name)));
        paths.into_iter().find(|path| fs::metadata(path).is_ok())
    }

    fn forced_user(&self, config: &Path) -> io::Result<Option<User>> {
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(config)?;
        let text = read_limited(file)?;
        let value = text.lines().find_map(|line| {
            let (key, value) = line.split_once('=')?;
            (key.trim() == "force-user").then(|| value.trim().trim_matches(['"', '\'']))
        });
        match value {
            None => Ok(None),
            Some("root") => Ok(Some(User::Root)),
            Some(user) if user == self.user => Ok(Some(User::User)),
            Some(_) => Err(io::Error::other(format!("services run as root or as {}", self.user))),
        }
    }
}

/// The service's name with its argument and without; `None`: it is no service.
fn names(exec: &Exec) -> Option<[Vec<u8>; 2]> {
    let name = exec.argv.first()?.strip_prefix(NAMED_AS)?;
    let told = exec.env.iter().find(|(key, _)| key == FULL_NAME).map(|(_, value)| value.as_slice());
    let fits = |full: &&[u8]| full.strip_prefix(name).is_some_and(|rest| rest.starts_with(b"+"));
    let full = told.filter(fits).unwrap_or(name);
    let is_file_name = |name: &[u8]| !name.is_empty() && !name.starts_with(b".") && !name.contains(&b'/');
    (is_file_name(name) && is_file_name(full)).then(|| [full.to_vec(), name.to_vec()])
}

fn read_limited(file: File) -> io::Result<String> {
    let mut text = Vec::new();
    file.take(CONFIG_BYTES_MAX).read_to_end(&mut text)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guest(files: &[(&str, &str)]) -> (tempfile::TempDir, Services) {
        let root = tempfile::tempdir().expect("tempdir");
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().expect("has one")).expect("mkdir");
            fs::write(path, text).expect("write");
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
            ("etc/qubes/rpc-config/a", "# comment\nwait-for-session=1\nforce-user=root\n"),
            ("etc/qubes/rpc-config/a+x", "force-user = 'user'"),
            ("etc/qubes/rpc-config/b", "force-user=nobody\n"),
            ("usr/local/etc/qubes/rpc-config/c", "wait-for-session=1\n"),
            ("etc/qubes/rpc-config/c", "force-user=root\n"),
        ]);
        let user = |name: &str, full: &str| services.resolve(call(name, full)).map(|exec| exec.user);
        assert_eq!(user("a", "a").expect("resolves"), User::Root);
        assert_eq!(user("a", "a+y").expect("resolves"), User::Root);
        assert_eq!(user("a", "a+x").expect("resolves"), User::User);
        assert_eq!(user("c", "c").expect("resolves"), User::User, "the local one hides the other");
        let refused = user("b", "b").expect_err("there is no such choice").to_string();
        assert!(refused.contains("rpc-config/b") && refused.contains("as root or as user"), "{refused}");
        let rootly = Exec { user: User::Root, ..call("c", "c") };
        assert_eq!(services.resolve(rootly).expect("resolves").user, User::Root);
    }
}
