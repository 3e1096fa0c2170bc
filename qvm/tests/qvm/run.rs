//! `qvm-run`: what it calls, and how.

use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::server::{Ended, Server};

/// Stands for what qvm-run calls: it tells how.
const ECHO: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/qvm/echo.sh");

pub struct Rig {
    pub server: Server,
    tool: &'static str,
    /// Where the tool stands: with the binary on one file system, and with nothing beside it that does not belong to the test.
    bin: tempfile::TempDir,
    log: PathBuf,
}

impl Rig {
    pub fn new(table: &[(&str, &str)]) -> Rig {
        Rig::of("qvm-run", table)
    }

    /// The same for another tool.
    pub fn of(tool: &'static str, table: &[(&str, &str)]) -> Rig {
        let server = Server::new(table);
        let folder = server.folder.path();
        for name in ["dispvm-launch", "dispvm-savefile", "qrexec-client"] {
            symlink(ECHO, folder.join(name)).unwrap();
        }
        let bin = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        fs::hard_link(env!("CARGO_BIN_EXE_qvm"), bin.path().join(tool)).unwrap();
        Rig { log: folder.join("log"), bin, server, tool }
    }

    pub fn folder(&self) -> &Path {
        self.server.folder.path()
    }

    pub fn run(&self, args: &[&str], input: &str) -> Ended {
        let path = format!("{}:{}", self.folder().display(), std::env::var("PATH").unwrap());
        let mut command = Command::new(self.bin.path().join(self.tool));
        command.args(args).env("PATH", path).env("LOG", &self.log);
        command.env("DISPVM_API_SOCKET", self.folder().join("api.sock"));
        command.env("DISPVM_QREXEC_CLIENT", self.folder().join("qrexec-client"));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
        Ended::of(child.wait_with_output().unwrap())
    }

    /// What was called since the last time.
    pub fn called(&self) -> String {
        let called = fs::read_to_string(&self.log).unwrap_or_default();
        let _ = fs::remove_file(&self.log);
        called
    }
}

#[test]
fn f6_a_service_or_a_command_runs_in_a_disposable_with_its_streams_and_status() {
    let rig = Rig::new(&[]);
    rig.run(&["--dispvm=debian-dvm", "-p", "--service", "qubes.StartApp+firefox"], "in")
        .is(7, "[--dvm][debian-dvm][--service][qubes.StartApp+firefox]\nin");
    rig.run(&["--dispvm", "-p", "--", "echo $HOME"], "in").is(7, "[--][sh][-c][echo $HOME]\nin");
    rig.run(&["--dispvm", "debian-dvm", "-p", "xterm"], "").is(7, "[--dvm][debian-dvm][--][sh][-c][xterm]\n");
    rig.run(&["-p", "--dispvm", "xterm"], "").is(7, "[--][sh][-c][xterm]\n");
    rig.run(&["-p", "--dispvm", "--", "ls", "-l", "a b"], "").is(7, "[--][ls][-l][a b]\n");
    rig.run(&["--dispvm=debian-dvm"], "").fails(2, "qvm-run: error: a command is required");
    rig.run(&["--dispvm", "-p", "-u", "root", "--", "id"], "").is(7, "[--user][root][--][sh][-c][id]\n");
}

#[test]
fn the_launcher_beside_it_comes_first() {
    let rig = Rig::new(&[]);
    symlink("/bin/true", rig.bin.path().join("dispvm-launch")).unwrap();
    rig.run(&["--dispvm", "-p", "--", "xterm"], "").is(0, "");
}

#[test]
fn what_a_terminal_obeys_is_filtered_and_marked() {
    let no_vmexec =
        ("admin.vm.feature.CheckWithTemplate+vmexec web", "!QubesFeatureNotFoundError Feature not set");
    let rig = Rig::new(&[LIST, ("admin.vm.Start web", ""), no_vmexec]);
    rig.run(&["--dispvm", "-p", "--filter-escape-chars", "--", "cat"], "\x1b[2Jx\n")
        .is(7, "\x1b[0;31m[--][sh][-c][cat]\n_[2Jx\n\x1b[0m");
    rig.run(&["--dispvm", "-p", "--filter-escape-chars", "--no-color-output", "--", "cat"], "\x1b\n")
        .is(7, "[--][sh][-c][cat]\n_\n");
    rig.run(&["-p", "--no-gui", "--filter-escape-chars", "--colour-output=32", "web", "ls"], "")
        .is(7, "\x1b[0;32m[-d][web][-t][-T][DEFAULT:QUBESRPC qubes.VMShell dom0]\nls; exit\n\x1b[0m");
    let marked = rig.run(&["-p", "--no-gui", "--no-color-output", "--color-stderr", "34", "web", "ls"], "");
    assert_eq!(marked.err, "\x1b[0;34m\x1b[0m");
    let marked = rig.run(&["-p", "--color-stderr", "34", "--dispvm", "--", "ls"], "");
    assert_eq!((marked.status, &marked.err[..]), (7, "\x1b[0;34m\x1b[0m"));
    rig.run(&["-p", "--no-gui", "--no-color-output", "--no-color-stderr", "web", "ls"], "")
        .is(7, "[-d][web][DEFAULT:QUBESRPC qubes.VMShell dom0]\nls; exit\n");
    rig.run(&["--color-output", "32", "web", "ls"], "")
        .fails(2, "qvm-run: error: --color-output must be used with --filter-escape-chars");
}

#[test]
fn without_pass_io_a_disposable_has_no_streams() {
    let rig = Rig::new(&[]);
    rig.run(&["-q", "--dispvm=debian-dvm", "xterm"], "in").is(7, "");
    assert_eq!(rig.called(), "[--dvm][debian-dvm][--][sh][-c][xterm]\n");
    let told = rig.run(&["--dispvm=debian-dvm", "xterm"], "");
    assert_eq!((told.status, &told.err[..]), (7, "Running 'xterm' on @dispvm:debian-dvm\n"));
}

#[test]
fn a_disposable_can_be_connected_with_a_local_program() {
    let rig = Rig::new(&[]);
    let to = rig.folder().join("answer");
    let local = format!("echo question; exec >&-; cat > {}", to.display());
    rig.run(&["--dispvm", "-p", "--localcmd", &local, "--", "cat"], "").is(7, "");
    assert_eq!(fs::read_to_string(to).unwrap(), "[--][sh][-c][cat]\nquestion\n");
}

const LIST: (&str, &str) = (
    "admin.vm.List dom0",
    "work class=AppVM state=Halted\ndom0 class=AdminVM state=Running\nweb class=AppVM state=Running\n",
);

#[test]
fn a_qube_is_started_and_called_as_the_stock_client_does() {
    let rig = Rig::new(&[
        LIST,
        ("admin.vm.Start work", ""),
        ("admin.vm.Start web", "!QubesVMNotHaltedError Domain is not powered off: 'web'"),
        ("admin.vm.property.Get+default_user web", "default=True type=str user"),
        ("admin.vm.feature.CheckWithTemplate+vmexec web", "1"),
        ("admin.vm.feature.CheckWithTemplate+vmexec work", "!QubesFeatureNotFoundError Feature not set"),
    ]);
    rig.run(&["-p", "--no-gui", "work", "ls /"], "in")
        .is(7, "[-d][work][DEFAULT:QUBESRPC qubes.VMShell dom0]\nls /; exit\nin");
    assert_eq!(rig.server.asked(), ["admin.vm.Start work", "admin.vm.feature.CheckWithTemplate+vmexec work"]);
    rig.called();
    rig.run(&["web", "xterm"], "").fails(7, "Running 'xterm' on web");
    assert_eq!(
        rig.called(),
        "[-d][web][DEFAULT:QUBESRPC qubes.WaitForSession dom0]\nuser\
         [-d][web][DEFAULT:QUBESRPC qubes.VMExec+-2Fbin-2Fsh+--c+xterm dom0]\n"
    );
    rig.run(&["-q", "--no-gui", "--service", "-u", "root", "web", "my.Service+x"], "").is(7, "");
    assert_eq!(rig.called(), "[-d][web][-e][root:QUBESRPC my.Service+x dom0]\n");
    rig.run(&["-p", "--no-gui", "web", "--", "ls", "-l", "a b"], "in")
        .is(7, "[-d][web][DEFAULT:QUBESRPC qubes.VMExec+ls+--l+a-20b dom0]\nin");
    rig.run(&["-p", "--no-gui", "work", "--", "ls", "a b"], "")
        .is(7, "[-d][work][DEFAULT:QUBESRPC qubes.VMShell dom0]\nls 'a b'; exit\n");
    rig.called();
    rig.run(&["-p", "--no-gui", "--localcmd", "tar c x", "web", "tar x"], "")
        .is(7, "[-d][web][-l][tar c x][DEFAULT:QUBESRPC qubes.VMExec+-2Fbin-2Fsh+--c+tar-20x dom0]\n");
    rig.called();
    rig.run(&["-p", "--no-gui", "--localcmd", "tar c x", "work", "tar x"], "").is(
        7,
        "[-d][work][-l][printf '%s\\n' 'tar x; exit'; tar c x][DEFAULT:QUBESRPC qubes.VMShell dom0]\n",
    );
}

#[test]
fn what_cannot_be_called_is_said() {
    let rig = Rig::new(&[
        LIST,
        ("admin.vm.Start work", "!QubesMemoryError Not enough memory to start domain 'work'"),
    ]);
    rig.run(&["-q", "work", "ls"], "").fails(255, "Not enough memory to start domain 'work'");
    rig.run(&["--no-autostart", "work", "ls"], "").fails(1, "Qube 'work' not started");
    rig.run(&["nobody", "ls"], "").fails(2, "qvm-run: error: no such domain: 'nobody'");
    rig.run(&["work"], "").fails(2, "qvm-run: error: a command is required");
    rig.run(&[], "").fails(2, "qvm-run: error: one of the arguments --all --dispvm VMNAME is required");
    let all = rig.run(&["-p", "--all", "ls"], "");
    all.fails(
        2,
        "qvm-run: error: --passio cannot be used when more than 1 qube is chosen and no --localcmd is used",
    );
    assert_eq!(rig.called(), "");
}
