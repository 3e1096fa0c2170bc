//! `qrexec-policy-exec` as a process: what it decides from a policy folder and the records, and what it becomes.

mod common;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::{symlink, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use common::{program, qubes, LIMIT};
use control_plane::calls::carry_out::CLONES_MAX;
use control_plane::clones::{Keeping, Lease};
use control_plane::daemon::channel::Listener;
use control_plane::state::State;
use nix::sys::signal::{kill, killpg, Signal};
use nix::unistd::Pid;

const POLICY: &str = "
test.Env      *    work        dom0    allow
test.Env      *    work        vault   allow target=dom0
test.Env      *    work        @default allow target=dom0
test.Socket   *    work        dom0    allow
test.None     *    work        dom0    allow
test.Args     *    @anyvm      dom0    allow
test.Gone     *    @anyvm      dom0    allow
test.User     *    work        dom0    allow user=nobody-there
qubes.VMShell *    work        vault   allow user=root
qubes.VMExec  *    work        vault   allow autostart=no
qubes.Alice   *    work        vault   allow user=alice
qubes.VMShell *    @anyvm      @dispvm allow
qubes.VMShell *    work        @dispvm:debian-dvm allow
qubes.OpenURL *    @anyvm      @dispvm ask default_target=@dispvm
qubes.OpenURL *    @anyvm      vault   ask
qubes.GetDate *    @anyvm      @default allow target=dom0
";

struct Setup {
    folder: tempfile::TempDir,
    state: State,
}

impl Setup {
    /// Qubes, a policy, services of dom0's, and programs that say how they were run in the place of ours.
    fn new() -> Setup {
        let folder = tempfile::tempdir().unwrap();
        let state = State::open(&folder.path().join("state")).unwrap();
        qubes(&state);
        for name in ["bin", "policy", "rpc", "config"] {
            fs::create_dir(folder.path().join(name)).unwrap();
        }
        let made = Setup { folder, state };
        fs::write(made.path("policy/50-test.policy"), POLICY).unwrap();
        let own = made.path("bin/qrexec-policy-exec");
        fs::hard_link(program("qrexec-policy-exec"), &own)
            .or_else(|_| fs::copy(program("qrexec-policy-exec"), &own).map(drop))
            .unwrap();
        for name in ["bin/qrexec-client", "bin/dispvm-launch"] {
            made.script(name, "echo \"$(basename \"$0\") $*\"");
        }
        made.script("rpc/test.Env", "env | grep '^QREXEC' | sort; echo \"args: $*\"; cat; exit 7");
        made.script("rpc/test.Args", "echo plain \"$@\"");
        made.script("rpc/test.Args+special", "echo special \"$@\"");
        made.script("rpc/qubes.GetDate", "echo today");
        made.script("rpc/test.User", "echo ran");
        fs::write(made.path("rpc/test.Gone"), "not executable").unwrap();
        made
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join(name)
    }

    fn script(&self, name: &str, text: &str) {
        fs::write(self.path(name), format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(self.path(name), fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn command(&self, [source, target, service]: [&str; 3]) -> Command {
        let mut command = Command::new(self.path("bin/qrexec-policy-exec"));
        command.arg("--root").arg(self.state.root()).args(["--", source, target, service]);
        command.env("DISPVM_POLICY_DIR", self.path("policy"));
        command.env("DISPVM_RPC_DIR", self.path("rpc"));
        command.env("DISPVM_RPC_CONFIG_DIR", self.path("config"));
        command.env("DISPVM_ASK_PROMPT", self.path("no-prompt"));
        command.env("QREXEC_STRAY", "1");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Exit status and output. On stderr nothing may be said: the caller would hear it.
    fn call(&self, call: [&str; 3]) -> (i32, String) {
        said(self.command(call).output().unwrap())
    }
}

fn said(output: Output) -> (i32, String) {
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    (output.status.code().unwrap(), String::from_utf8(output.stdout).unwrap())
}

fn launched(dvm: &str, source: &str) -> String {
    format!("--quiet --dvm {dvm} --source {source} --user DEFAULT --service qubes.VMShell+\n")
}

#[test]
fn a_service_of_dom0s_is_told_who_calls_and_whom_it_asked_for() {
    let qubes = Setup::new();
    let (status, out) = qubes.call(["work", "dom0", "test.Env+a+b"]);
    let expected =
        "QREXEC_REMOTE_DOMAIN=work\nQREXEC_REQUESTED_TARGET_KEYWORD=adminvm\nQREXEC_REQUESTED_TARGET_TYPE=keyword\n\
                    QREXEC_SERVICE_ARGUMENT=a+b\nQREXEC_SERVICE_FULL_NAME=test.Env+a+b\nargs: a+b\n";
    assert_eq!((status, out.as_str()), (7, expected));
    assert_eq!(qubes.call(["work", "@adminvm", "test.Env+a+b"]).1, expected);
    let (_, out) = qubes.call(["work", "vault", "test.Env"]);
    assert!(out.contains("REQUESTED_TARGET=vault\n") && out.contains("TARGET_TYPE=name\n"), "{out}");
    assert!(out.contains("FULL_NAME=test.Env+\n") && out.ends_with("args: \n"), "{out}");
    let (_, out) = qubes.call(["work", "not-there", "test.Env"]);
    assert!(out.contains("TARGET_KEYWORD=default\n"), "{out}");
    assert_eq!(qubes.call(["work", "@adminvm", "test.Args+special"]), (0, "special special\n".into()));
    assert_eq!(qubes.call(["work", "dom0", "test.Args+other"]), (0, "plain other\n".into()));
    assert_eq!(qubes.call(["work", "@default", "qubes.GetDate"]), (0, "today\n".into()));
    assert_eq!(qubes.call(["work", "dom0", "test.None"]), (127, String::new()));
    assert_eq!(qubes.call(["work", "dom0", "test.Gone"]), (125, String::new()));
}

#[test]
fn what_policy_does_not_allow_is_refused() {
    let qubes = Setup::new();
    for call in [
        ["vault", "dom0", "test.Env"],
        ["work", "dom0", "test.Other"],
        ["work", "work", "qubes.VMShell"],
        ["nobody", "dom0", "test.Args"],
        ["work", "dom0", "../../bin/sh"],
        ["work", "@dispvm:work", "qubes.VMShell"],
        // It does not run; it cannot be started; nobody can be asked; nobody can be that user.
        ["work", "vault", "qubes.VMExec"],
        ["work", "vault", "qubes.VMShell"],
        ["work", "@dispvm", "qubes.OpenURL"],
        ["work", "vault", "qubes.Alice"],
    ] {
        assert_eq!(qubes.call(call), (126, String::new()), "{call:?}");
    }
}

#[test]
fn a_service_never_runs_as_us_because_the_environment_has_the_users_name() {
    let qubes = Setup::new();
    let mut command = qubes.command(["work", "dom0", "test.User"]);
    let output = command.env("USER", "nobody-there").output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "");
    assert!(!output.status.success());
}

#[test]
fn a_bad_file_refuses_all_and_is_named_with_its_line() {
    let qubes = Setup::new();
    fs::write(qubes.path("policy/60-bad.policy"), "\n* * work dom0 maybe\n").unwrap();
    let verdict = qubes.path("verdict");
    let mut command = Command::new("sh");
    command.args(["-c", "exec 9>\"$1\"; shift; DISPVM_CALL_VERDICT=9 exec \"$@\"", "sh"]).arg(&verdict);
    let call = qubes.command(["work", "dom0", "test.Args"]);
    command.arg(call.get_program()).args(call.get_args());
    command.envs(call.get_envs().filter_map(|(name, value)| Some((name, value?))));
    assert_eq!(said(command.output().unwrap()), (126, String::new()));
    let verdict = fs::read_to_string(verdict).unwrap();
    assert!(verdict.starts_with("-work calls test.Args in dom0"), "{verdict}");
    assert!(verdict.contains("60-bad.policy:2: "), "{verdict}");
}

#[test]
fn a_call_into_a_qube_that_runs_goes_to_its_call_socket_as_the_user_of_the_rule() {
    let qubes = Setup::new();
    let _holder = Listener::bind(&qubes.state.call_socket("vault")).unwrap();
    let root = qubes.state.root().display();
    let expected =
        format!("qrexec-client --root {root} --quiet -d vault -- root:QUBESRPC qubes.VMShell+ work\n");
    assert_eq!(qubes.call(["work", "vault", "qubes.VMShell"]), (0, expected));
}

#[test]
fn t4_t5_t6_t7_dispvm_is_the_callers_own_default_then_the_systems() {
    let qubes = Setup::new();
    let root = format!("dispvm-launch --root {} ", qubes.state.root().display());
    let ran = |dvm: &str, source: &str| (0, root.clone() + &launched(dvm, source));
    assert_eq!(qubes.call(["work", "@dispvm", "qubes.VMShell"]), ran("debian-dvm", "work"));
    assert_eq!(qubes.call(["work", "$dispvm", "qubes.VMShell"]), ran("debian-dvm", "work"));
    assert_eq!(qubes.call(["anon-whonix", "@dispvm", "qubes.VMShell"]), ran("whonix-ws-dvm", "anon-whonix"));
    // A disposable's is what its template has, which names itself.
    let template = ("debian-12".to_owned(), 1);
    let lease = Lease::take(&qubes.state, "whonix-ws-dvm", "x", template, Keeping::Launcher, None).unwrap();
    let name = lease.number().to_string();
    assert_eq!(qubes.call([&name, "@dispvm", "qubes.VMShell"]), ran("whonix-ws-dvm", &name));
    assert_eq!(qubes.call(["work", "@dispvm:debian-dvm", "qubes.VMShell"]), ran("debian-dvm", "work"));
    // A rule about the caller's default is not about one that is named.
    assert_eq!(qubes.call(["work", "@dispvm:whonix-ws-dvm", "qubes.VMShell"]).0, 126);
    drop(lease);
    assert_eq!(qubes.call([&name, "@dispvm", "qubes.VMShell"]).0, 126);
}

#[test]
fn disposables_that_call_for_disposables_come_to_an_end() {
    let qubes = Setup::new();
    let take = || {
        let template = ("debian-12".to_owned(), 1);
        Lease::take(&qubes.state, "debian-dvm", "x", template, Keeping::Launcher, None).unwrap()
    };
    let mut living: Vec<Lease> = (0..CLONES_MAX).map(|_| take()).collect();
    let last = living[CLONES_MAX - 1].number().to_string();
    assert_eq!(qubes.call([&last, "@dispvm", "qubes.VMShell"]), (126, String::new()));
    drop(living.remove(0));
    assert_eq!(qubes.call([&last, "@dispvm", "qubes.VMShell"]).0, 0);
}

#[test]
fn a_prompt_chooses_among_what_is_offered_and_nothing_else() {
    let qubes = Setup::new();
    let ask = |answer: &str| {
        qubes.script("prompt", &format!("echo \"$*\" >> {}; {answer}", qubes.path("asked").display()));
        let mut command = qubes.command(["work", "@dispvm", "qubes.OpenURL"]);
        said(command.env("DISPVM_ASK_PROMPT", qubes.path("prompt")).output().unwrap())
    };
    assert!(ask("echo @dispvm:debian-dvm").1.starts_with("dispvm-launch "));
    let asked = fs::read_to_string(qubes.path("asked")).unwrap();
    assert_eq!(asked, "work qubes.OpenURL @dispvm:debian-dvm vault @dispvm:debian-dvm\n");
    for no in ["echo dom0", "echo @dispvm:debian-dvm; exit 1", "true", "yes | head -c 100000"] {
        assert_eq!(ask(no).0, 126, "{no}");
    }
}

#[test]
fn without_policy_d_the_files_of_r4_0_are_the_policy() {
    let qubes = Setup::new();
    let legacy = qubes.path("legacy");
    fs::create_dir(&legacy).unwrap();
    fs::write(legacy.join("test.Args"), "$anyvm dom0 allow\n").unwrap();
    let call = |call: [&str; 3]| {
        let mut command = qubes.command(call);
        command.env("DISPVM_POLICY_DIR", qubes.path("none")).env("DISPVM_LEGACY_POLICY_DIR", &legacy);
        said(command.output().unwrap())
    };
    assert_eq!(call(["work", "dom0", "test.Args"]), (0, "plain\n".into()));
    assert_eq!(call(["work", "dom0", "test.Env"]).0, 126);
    fs::remove_dir_all(&legacy).unwrap();
    assert_eq!(call(["work", "dom0", "test.Args"]).0, 126);
}

/// Whoever the environment says we are.
#[test]
fn the_user_of_a_rule_is_who_runs_dom0s_service() {
    let qubes = Setup::new();
    qubes.script("rpc/test.Who", "id -un");
    for folder in ["", "rpc"] {
        fs::set_permissions(qubes.path(folder), fs::Permissions::from_mode(0o755)).unwrap();
    }
    let forced = |forced: &str| fs::write(qubes.path("config/test.Who"), forced).unwrap();
    let who = |user: &str| {
        fs::write(qubes.path("policy/10-user.policy"), format!("test.Who * work dom0 allow user={user}\n"))
            .unwrap();
        said(qubes.command(["work", "dom0", "test.Who"]).env("USER", user).output().unwrap())
    };
    let own = String::from_utf8(Command::new("id").arg("-un").output().unwrap().stdout).unwrap();
    assert_eq!(who(own.trim()), (0, own.clone()));
    let (status, name) = who("nobody");
    match own.trim() {
        "root" => assert_eq!((status, name.as_str()), (0, "nobody\n")),
        _ => assert_eq!((status, name.as_str()), (126, "")),
    }
    // The service's own configuration counts more.
    forced(&format!("force-user = '{}'\n", own.trim()));
    assert_eq!(who("nobody"), (0, own));
}

/// What a socket hears, before it answers.
fn serve_once(listener: UnixListener) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let (mut caller, _) = listener.accept().unwrap();
        let mut heard = String::new();
        caller.read_to_string(&mut heard).unwrap();
        // Whom the end of its own bytes was enough is gone by then.
        let _ = caller.write_all(b"served\n");
        heard
    })
}

#[test]
fn a_socket_is_told_who_calls_and_has_the_calls_bytes() {
    let qubes = Setup::new();
    let call = |config: &str, service: &str| {
        let socket = qubes.path("rpc/test.Socket");
        let _ = fs::remove_file(&socket);
        let serving = serve_once(UnixListener::bind(&socket).unwrap());
        fs::write(qubes.path("config/test.Socket"), config).unwrap();
        let mut call = qubes.command(["work", "dom0", service]).stdin(Stdio::piped()).spawn().unwrap();
        call.stdin.take().unwrap().write_all(b"data").unwrap();
        let ended = said(call.wait_with_output().unwrap());
        (ended, serving.join().unwrap())
    };
    let served = || (0, "served\n".to_owned());
    let heard = call("unknown.key = 1\n", "test.Socket+a+b");
    assert_eq!(heard, (served(), "test.Socket+a+b work keyword adminvm\0data".into()));
    assert_eq!(call("", "test.Socket").1, "test.Socket+ work keyword adminvm\0data");
    assert_eq!(call("skip-service-descriptor=true\n", "test.Socket"), (served(), "data".into()));
    assert_eq!(call("skip-service-descriptor=true\nexit-on-client-eof=true\n", "test.Socket").0 .0, 0);
}

#[test]
fn what_is_wrong_with_a_service_or_its_configuration_fails_the_call_and_says_so_in_the_log_alone() {
    let qubes = Setup::new();
    let listener = UnixListener::bind(qubes.path("rpc/test.Socket")).unwrap();
    for config in [
        "force-user=root\n",
        "skip-service-descriptor=1\n",
        "skip-service-descriptor=true\nforce-user='root'\n",
    ] {
        fs::write(qubes.path("config/test.Socket"), config).unwrap();
        assert_eq!(qubes.call(["work", "dom0", "test.Socket"]), (125, String::new()), "{config}");
    }
    fs::remove_file(qubes.path("config/test.Socket")).unwrap();
    drop(listener);
    assert_eq!(qubes.call(["work", "dom0", "test.Socket"]), (125, String::new()), "nobody listens");
    symlink("/dev/tcp/127.0.0.1/80", qubes.path("rpc/test.Socket+x")).unwrap();
    assert_eq!(
        qubes.call(["work", "dom0", "test.Socket+x"]),
        (125, String::new()),
        "there is no argument to it"
    );
}

#[test]
fn a_place_behind_tcp_serves() {
    let qubes = Setup::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    symlink("/dev/tcp/127.0.0.1", qubes.path("rpc/test.Socket")).unwrap();
    let serving = std::thread::spawn(move || {
        let (mut caller, _) = listener.accept().unwrap();
        let mut heard = String::new();
        caller.read_to_string(&mut heard).unwrap();
        caller.write_all(heard.replace('\0', "!").as_bytes()).unwrap();
    });
    let answer = format!("test.Socket+{port} work keyword adminvm!");
    assert_eq!(qubes.call(["work", "dom0", &format!("test.Socket+{port}")]), (0, answer));
    serving.join().unwrap();
}

#[test]
fn a_service_that_needs_a_session_waits_for_one_and_is_served_whatever_comes_of_it() {
    let qubes = Setup::new();
    fs::write(qubes.path("config/test.Args"), "wait-for-session=1\n").unwrap();
    assert_eq!(qubes.call(["work", "dom0", "test.Args"]), (0, "plain\n".into()), "nothing waits for one");
    let log = qubes.path("waited");
    qubes.script(
        "rpc/qubes.WaitForSession",
        &format!("echo for $QREXEC_REMOTE_DOMAIN | tee {}; exit 1", log.display()),
    );
    assert_eq!(qubes.call(["work", "dom0", "test.Args"]), (0, "plain\n".into()));
    assert_eq!(fs::read_to_string(log).unwrap(), "for work\n");
}

#[test]
fn a_service_that_is_a_link_is_followed() {
    let qubes = Setup::new();
    fs::remove_file(qubes.path("rpc/test.Args")).unwrap();
    symlink(Path::new("/bin/echo"), qubes.path("rpc/test.Args")).unwrap();
    assert_eq!(qubes.call(["work", "dom0", "test.Args+x"]), (0, "x\n".into()));
}

/// How many processes have this in their command line.
fn count(marker: &str) -> usize {
    let output = Command::new("pgrep").args(["-f", marker]).output().unwrap();
    output.stdout.iter().filter(|byte| **byte == b'\n').count()
}

/// Has a holder make the call, whose program at `script` starts three processes and waits; once they are there, the holder is killed, or else the call
/// is told to end as a holder tells it. All three end.
fn ends_with_its_holder(qubes: &Setup, script: &str, call: [&str; 3], is_killed: bool) {
    // Its first process is told and ends, another is told in vain; and one has its own children.
    let marker = format!("4242.{}{}", std::process::id(), script.len());
    qubes.script(
        script,
        &format!("(trap '' TERM; exec sleep {marker}1) & (sleep {marker}2; true) & exec sleep {marker}3"),
    );
    let mut call = qubes.command(call);
    call.env("DISPVM_ASK_PROMPT", qubes.path("prompt"));
    let mut holder = Command::new("sh");
    holder.args(["-c", "setsid \"$@\" & echo $!; wait", "sh"]).arg(call.get_program()).args(call.get_args());
    holder.envs(call.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let mut holder =
        holder.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut out = BufReader::new(holder.stdout.take().unwrap());
    let mut line = String::new();
    out.read_line(&mut line).unwrap();
    let first: i32 = line.trim().parse().unwrap();
    let all = format!("sleep {marker}");
    let start = Instant::now();
    while count(&all) < 3 {
        assert!(start.elapsed() < LIMIT, "{script}: {} of 3 started", count(&all));
    }
    let group = Pid::from_raw(first);
    if is_killed {
        holder.kill().unwrap();
    } else {
        // The first process alone: it tells the others.
        kill(group, Signal::SIGTERM).unwrap();
        let stubborn = format!("{all}1");
        while count(&all) > count(&stubborn) {
            assert!(start.elapsed() < LIMIT, "{script}: {} are still there", count(&all));
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    while holder.try_wait().unwrap().is_none() {
        assert!(start.elapsed() < LIMIT, "{script}: the first process has not ended");
        std::thread::sleep(Duration::from_millis(20));
    }
    if !is_killed {
        // As the holder does when the first process has ended.
        killpg(group, Signal::SIGKILL).unwrap();
    }
    while count(&all) > 0 {
        assert!(start.elapsed() < LIMIT, "{script}: {} are still there", count(&all));
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A holder that is killed can end nothing: the first process of the call does, and has its group killed where it does not heed that.
#[test]
fn all_processes_of_a_service_end_with_a_holder_that_is_killed() {
    ends_with_its_holder(&Setup::new(), "rpc/test.Args", ["work", "dom0", "test.Args"], true);
}

#[test]
fn what_runs_before_a_service_ends_with_the_holder_too_and_the_service_is_not_run() {
    for is_killed in [true, false] {
        let qubes = Setup::new();
        fs::write(qubes.path("config/test.Args"), "wait-for-session=1\n").unwrap();
        let ran = qubes.path("ran");
        qubes.script("rpc/test.Args", &format!("touch {}", ran.display()));
        let call = ["work", "dom0", "test.Args"];
        ends_with_its_holder(&qubes, "rpc/qubes.WaitForSession", call, is_killed);
        assert!(!ran.exists(), "the service was run");
        ends_with_its_holder(&qubes, "prompt", ["work", "vault", "qubes.OpenURL"], is_killed);
    }
}

#[test]
fn a_service_that_a_signal_ended_is_told_apart_and_its_caller_sees_its_end_of_output_at_once() {
    let qubes = Setup::new();
    qubes.script("rpc/test.Args", "echo said; exec >&-; read go; kill -TERM $$");
    let mut call = qubes.command(["work", "dom0", "test.Args"]).stdin(Stdio::piped()).spawn().unwrap();
    let mut said = String::new();
    call.stdout.take().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!((said.as_str(), call.try_wait().unwrap()), ("said\n", None));
    call.stdin.take().unwrap().write_all(b"go\n").unwrap();
    assert_eq!(call.wait().unwrap().signal(), Some(15));
}
