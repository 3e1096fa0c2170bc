//! Qubes that run, over the Admin API's real socket, under the real daemon and real runners; only their guests are simulated.
//!
//! The bugs these are for: a qube that ends with the daemon, or that the next daemon does not know of; a runner, record, socket or
//! volume left behind by one that was killed; a run that keeps what it must not, or loses what it must keep.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use admin_api::client::{call_within, events};
use admin_api::{ApiError, Event, Request};
use control_plane::admin::settings::{Owner, Settings};
use control_plane::calls;
use control_plane::clones::{self, CloneRecord};
use control_plane::daemon::channel::Channel;
use control_plane::daemon::client;
use control_plane::daemon::protocol::RunnerSays;
use control_plane::qube::{Class, Qube};
use control_plane::state::State;
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use qrexec::{Exec, Exit};
use simulator::context;
use simulator::operate::notes;
use simulator::scenario::usual_folder;
use simulator::world::{Contents, World, DVM, OTHER, TEMPLATE};

/// The longest that anything here may take.
const LIMIT: Duration = Duration::from_secs(20);

fn program() -> PathBuf {
    std::env::current_exe().unwrap().ancestors().nth(2).unwrap().join("dispvm-simulator")
}

/// A world and its daemon.
struct Served {
    world: World,
    daemon: Option<Child>,
}

impl Served {
    fn new() -> Served {
        let contents =
            Contents { savefile: true, evicted: false, damaged: false, garbage: false, third: false };
        let world = World::new(&usual_folder(), &program(), 11, contents, false).unwrap();
        let mut served = Served { world, daemon: None };
        served.start_daemon();
        served
    }

    fn start_daemon(&mut self) {
        let mut daemon = Command::new(program());
        daemon.args(["daemon", "--world"]).arg(self.world.folder()).arg("--api-socket").arg(self.socket());
        self.daemon = Some(daemon.stdin(Stdio::null()).spawn().unwrap());
        wait_for("the daemon", || {
            self.send("admin.vm.List", "dom0", "", "").is_ok()
                && client::status(self.state()).unwrap().is_some()
        });
    }

    fn end_daemon(&mut self, signal: Signal) {
        let Some(mut daemon) = self.daemon.take() else { return };
        kill(Pid::from_raw(daemon.id() as i32), signal).unwrap();
        daemon.wait().unwrap();
    }

    fn socket(&self) -> PathBuf {
        self.world.folder().join("qubesd.sock")
    }

    fn state(&self) -> &State {
        &self.world.state
    }

    fn send(&self, method: &str, on: &str, argument: &str, payload: &str) -> Result<String, ApiError> {
        let request = Request::new(method, on).argument(argument).payload(payload);
        Ok(String::from_utf8(call_within(&self.socket(), &request, LIMIT)?).unwrap())
    }

    fn ok(&self, method: &str, on: &str, argument: &str, payload: &str) -> String {
        self.send(method, on, argument, payload).unwrap_or_else(|error| panic!("{method} {on}: {error}"))
    }

    /// The class of the exception and its message.
    fn refused(&self, method: &str, on: &str) -> String {
        match self.send(method, on, "", "") {
            Err(ApiError::Exception(exception)) => {
                format!("{}: {}", exception.kind.name(), exception.message())
            }
            other => panic!("{method} {on}: {other:?}"),
        }
    }

    fn start(&self, name: &str) {
        self.ok("admin.vm.Start", name, "", "");
    }

    fn power(&self, name: &str) -> String {
        let state = self.ok("admin.vm.CurrentState", name, "", "");
        state.rsplit_once('=').unwrap().1.to_owned()
    }

    /// What a command in a qube writes.
    fn run(&self, name: &str, command: &[&str]) -> String {
        let (mut output, writer) = std::io::pipe().unwrap();
        let nothing = std::fs::File::open("/dev/null").unwrap();
        let exec = Exec::user(command.iter().copied());
        let fds = [nothing.as_fd(), writer.as_fd(), writer.as_fd()];
        assert_eq!(calls::client::call(self.state(), name, exec, fds).unwrap(), Exit::Code(0), "{command:?}");
        drop(writer);
        let mut text = String::new();
        output.read_to_string(&mut text).unwrap();
        text
    }

    fn named(&self, name: &str) {
        self.ok("admin.vm.Create.DispVM", "dom0", DVM, &format!("name={name} label=orange"));
    }

    /// The record of a qube that runs.
    fn runner(&self, name: &str) -> Option<CloneRecord> {
        clones::list(self.state()).unwrap().into_iter().find(|clone| clone.qube.as_deref() == Some(name))
    }

    fn private_generation(&self, name: &str) -> u64 {
        let Class::AppVM(dvm) = Qube::load(self.state(), name).unwrap().class else { panic!() };
        dvm.private_generation
    }

    /// Nothing runs, and nothing is left of what has run.
    fn all_is_quiet(&self) {
        clones::sweep(self.state()).unwrap();
        for folder in ["clones", "calls"] {
            let left: Vec<_> = std::fs::read_dir(self.state().root().join(folder)).unwrap().collect();
            assert!(left.is_empty(), "{folder}: {left:?}");
        }
        let violations = context::violations(&notes(self.world.folder()));
        assert!(!violations.exists(), "{}", std::fs::read_to_string(violations).unwrap());
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        for clone in clones::list(self.state()).unwrap_or_default() {
            let _ = kill(Pid::from_raw(clone.pid as i32), Signal::SIGKILL);
        }
        self.end_daemon(Signal::SIGKILL);
    }
}

fn wait_for(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !holds() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn is_gone(pid: u32) -> bool {
    // A zombie is one that nobody has waited for yet.
    let status = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    status.is_empty() || status.contains(") Z ")
}

#[test]
fn a_named_disposable_is_started_paused_shut_down_and_started_again() {
    let served = Served::new();
    served.named("sys-usb");
    assert_eq!(served.power("sys-usb"), "Halted");
    assert!(served.refused("admin.vm.Shutdown", "sys-usb").starts_with("QubesVMNotStartedError"));
    served.start("sys-usb");
    assert_eq!(served.power("sys-usb"), "Running");
    assert_eq!(
        served.runner("sys-usb").unwrap().root_hash,
        served.world.pin(DVM).unwrap().unwrap().root_hash
    );
    assert!(served.run("sys-usb", &["name"]).starts_with("sys-usb "));
    assert!(served.refused("admin.vm.Start", "sys-usb").starts_with("QubesVMNotHaltedError"));
    assert!(served.refused("admin.vm.Remove", "sys-usb").starts_with("QubesVMNotHaltedError"));
    assert!(served.refused("admin.vm.Unpause", "sys-usb").starts_with("QubesVMNotPausedError"));
    served.ok("admin.vm.Pause", "sys-usb", "", "");
    assert_eq!(served.power("sys-usb"), "Paused");
    assert!(served.refused("admin.vm.Pause", "sys-usb").starts_with("QubesVMNotRunningError"));
    served.ok("admin.vm.Unpause", "sys-usb", "", "");
    assert_eq!(served.run("sys-usb", &["echo", "on"]), "on\n");
    served.ok("admin.vm.Shutdown", "sys-usb", "wait", "");
    assert_eq!(served.power("sys-usb"), "Halted");
    served.start("sys-usb");
    served.ok("admin.vm.Kill", "sys-usb", "", "");
    assert_eq!(served.power("sys-usb"), "Halted");
    served.ok("admin.vm.Remove", "sys-usb", "", "");
    served.all_is_quiet();
}

#[test]
fn l1_l3_a_disposable_of_the_api_has_a_clones_name_and_goes_when_it_ends() {
    let served = Served::new();
    for end in [("admin.vm.Kill", ""), ("admin.vm.Shutdown", "wait")] {
        let name = served.ok("admin.vm.CreateDisposable", DVM, "", "");
        served.start(&name);
        assert!(served.run(&name, &["name"]).starts_with(&format!("{name} ")));
        let list = served.ok("admin.vm.List", "dom0", "", "");
        assert_eq!(list.lines().filter(|line| line.starts_with("disp")).count(), 1, "{list}");
        served.ok(end.0, &name, end.1, "");
        // Nobody sees it halted.
        assert!(!served.state().qube(&name).exists());
        assert!(served.refused("admin.vm.Kill", &name).starts_with("QubesVMNotFoundError"));
    }
    served.all_is_quiet();
}

#[test]
fn a_qube_outlives_the_daemon_and_the_next_one_knows_it() {
    let mut served = Served::new();
    served.named("sys-usb");
    served.start("sys-usb");
    served.start(OTHER);
    let before = served.runner("sys-usb").unwrap();
    served.end_daemon(Signal::SIGKILL);
    assert_eq!(served.run("sys-usb", &["echo", "alone"]), "alone\n");
    std::fs::remove_file(served.socket()).unwrap();
    served.start_daemon();
    assert_eq!(served.runner("sys-usb"), Some(before));
    assert_eq!((&*served.power("sys-usb"), &*served.power(OTHER)), ("Running", "Running"));
    assert!(served.refused("admin.vm.Start", "sys-usb").starts_with("QubesVMNotHaltedError"));
    // Nor does one that ends in order take them along.
    served.end_daemon(Signal::SIGTERM);
    assert_eq!(served.run(OTHER, &["echo", "alone"]), "alone\n");
    served.start_daemon();
    served.ok("admin.vm.Kill", "sys-usb", "", "");
    served.ok("admin.vm.Shutdown", OTHER, "wait", "");
    served.all_is_quiet();
}

#[test]
fn of_a_runner_that_is_killed_nothing_is_left() {
    let served = Served::new();
    served.named("sys-usb");
    let unnamed = served.ok("admin.vm.CreateDisposable", DVM, "", "");
    let generation = served.private_generation(OTHER);
    for name in ["sys-usb", &unnamed, OTHER] {
        served.start(name);
        served.run(name, &["save", "3"]);
        let runner = served.runner(name).unwrap();
        kill(Pid::from_raw(runner.pid as i32), Signal::SIGKILL).unwrap();
        wait_for("its process has gone", || is_gone(runner.pid));
    }
    assert_eq!(served.power("sys-usb"), "Halted");
    let last = served.ok("admin.vm.CreateDisposable", DVM, "", "");
    served.start(&last);
    kill(Pid::from_raw(served.runner(&last).unwrap().pid as i32), Signal::SIGKILL).unwrap();
    for name in [&unnamed, &last] {
        wait_for("the daemon removes the record", || !served.state().qube(name).exists());
    }
    assert_eq!(served.private_generation(OTHER), generation, "a killed qube keeps nothing");
    served.all_is_quiet();
    // What it held is free again.
    served.start("sys-usb");
    served.start(OTHER);
    served.ok("admin.vm.Kill", "sys-usb", "", "");
    served.ok("admin.vm.Kill", OTHER, "", "");
    served.all_is_quiet();
}

#[test]
fn an_appvm_keeps_its_private_volume_and_a_template_its_root_when_they_shut_down() {
    let served = Served::new();
    let generation = served.private_generation(OTHER);
    let root = |served: &Served| Qube::load(served.state(), TEMPLATE).unwrap().template().unwrap().generation;
    served.start(OTHER);
    assert_eq!(served.run(OTHER, &["save", "3"]), "saved to 1\n");
    served.ok("admin.vm.Kill", OTHER, "", "");
    assert_eq!(served.private_generation(OTHER), generation, "killed, it keeps nothing");
    served.start(OTHER);
    served.run(OTHER, &["save", "3"]);
    served.ok("admin.vm.Shutdown", OTHER, "wait", "");
    assert_eq!(served.private_generation(OTHER), generation + 1);
    let before = root(&served);
    served.start(TEMPLATE);
    served.run(TEMPLATE, &["save", "3"]);
    served.ok("admin.vm.Shutdown", TEMPLATE, "wait", "");
    assert_eq!(root(&served), before + 1);
    // A disposable's go nowhere.
    served.named("sys-usb");
    served.start("sys-usb");
    assert_eq!(served.run("sys-usb", &["save", "3"]), "saved to 0\n");
    served.ok("admin.vm.Shutdown", "sys-usb", "wait", "");
    served.all_is_quiet();
}

#[test]
fn events_tell_of_a_life_also_where_it_ends_by_itself() {
    let served = Served::new();
    let mut told = events(&served.socket(), "dom0").unwrap();
    told.set_limit(Some(LIMIT)).unwrap();
    let mut next = |subject: &str| loop {
        let event: Event = told.next().unwrap().unwrap();
        if event.subject == subject && event.name.starts_with("domain-") && !event.name.contains("tag") {
            return event.name;
        }
    };
    served.named("sys-usb");
    served.start("sys-usb");
    assert_eq!((next("sys-usb"), next("sys-usb")), ("domain-pre-start".into(), "domain-start".into()));
    served.ok("admin.vm.Pause", "sys-usb", "", "");
    assert_eq!(next("sys-usb"), "domain-paused");
    served.ok("admin.vm.Unpause", "sys-usb", "", "");
    assert_eq!(next("sys-usb"), "domain-unpaused");
    served.ok("admin.vm.Shutdown", "sys-usb", "wait", "");
    assert_eq!((next("sys-usb"), next("sys-usb")), ("domain-pre-shutdown".into(), "domain-shutdown".into()));
    served.start("sys-usb");
    assert_eq!((next("sys-usb"), next("sys-usb")), ("domain-pre-start".into(), "domain-start".into()));
    let runner = served.runner("sys-usb").unwrap();
    kill(Pid::from_raw(runner.pid as i32), Signal::SIGKILL).unwrap();
    assert_eq!(next("sys-usb"), "domain-shutdown");
}

#[test]
fn one_that_cannot_be_started_says_why_and_an_unnamed_one_has_gone() {
    let served = Served::new();
    served.named("sys-usb");
    let unnamed = served.ok("admin.vm.CreateDisposable", OTHER, "", "");
    let kernel = served.state().root_generation(TEMPLATE, 1).join("vmlinuz");
    std::fs::remove_file(kernel).unwrap();
    let refused = served.refused("admin.vm.Start", &unnamed);
    assert!(refused.starts_with(&format!("QubesException: cannot start {unnamed}")), "{refused}");
    assert!(refused.contains("No such file"), "{refused}");
    assert!(!served.state().qube(&unnamed).exists());
    // Its savefile still serves the other.
    served.start("sys-usb");
    served.ok("admin.vm.Kill", "sys-usb", "", "");
    served.all_is_quiet();
}

#[test]
fn two_who_start_the_same_qube_get_one_and_the_daemon_hears_others_meanwhile() {
    let served = Served::new();
    served.named("sys-usb");
    let started: Vec<bool> = std::thread::scope(|scope| {
        let state = served.state();
        let start = move || client::start(state, "sys-usb").unwrap();
        let all: Vec<_> = (0..8).map(|_| scope.spawn(start)).collect();
        assert!(served.ok("admin.vm.List", "dom0", "", "").contains("sys-usb"));
        all.into_iter().map(|one| one.join().unwrap()).collect()
    });
    assert_eq!(started.iter().filter(|first| **first).count(), 1, "{started:?}");
    assert!(client::start(served.state(), "../x").is_err());
    assert!(client::start(served.state(), "nobody").unwrap_err().to_string().contains("cannot start nobody"));
    served.ok("admin.vm.Kill", "sys-usb", "", "");
    served.all_is_quiet();
}

#[test]
fn while_a_qube_starts_others_are_heard_and_it_can_be_killed_and_the_daemon_too() {
    let mut served = Served::new();
    served.named("sys-usb");
    let slow = notes(served.world.folder()).join(context::SLOW);
    let start = |served: &Served, on: &str| {
        let (socket, request) = (served.socket(), Request::new("admin.vm.Start", on));
        let starting = std::thread::spawn(move || call_within(&socket, &request, LIMIT));
        wait_for("it is being started", || served.power(on) == "Transient");
        starting
    };
    std::fs::write(&slow, "").unwrap();
    let starting = start(&served, "sys-usb");
    assert!(served.refused("admin.vm.Start", "sys-usb").starts_with("QubesVMNotHaltedError"));
    assert!(served.refused("admin.vm.Remove", "sys-usb").starts_with("QubesVMNotHaltedError"));
    assert!(served.refused("admin.vm.Pause", "sys-usb").starts_with("QubesVMNotRunningError"));
    assert!(!starting.is_finished());
    served.ok("admin.vm.Kill", "sys-usb", "", "");
    let error = starting.join().unwrap().unwrap_err();
    assert!(error.to_string().contains("ended before it was up"), "{error}");
    assert_eq!(served.power("sys-usb"), "Halted");
    // One of the API's goes altogether.
    let unnamed = served.ok("admin.vm.CreateDisposable", DVM, "", "");
    let starting = start(&served, &unnamed);
    served.ok("admin.vm.Kill", &unnamed, "", "");
    assert!(starting.join().unwrap().is_err());
    assert!(!served.state().qube(&unnamed).exists());
    // What was begun is done without the daemon that was asked.
    let starting = start(&served, OTHER);
    served.end_daemon(Signal::SIGKILL);
    assert!(starting.join().unwrap().is_err());
    std::fs::remove_file(&slow).unwrap();
    std::fs::remove_file(served.socket()).unwrap();
    served.start_daemon();
    wait_for("it is up", || served.power(OTHER) == "Running");
    served.ok("admin.vm.Shutdown", OTHER, "wait", "");
    served.all_is_quiet();
}

#[test]
fn who_gives_others_network_shuts_down_only_by_force() {
    let served = Served::new();
    served.named("sys-usb");
    served.ok("admin.vm.property.Set", OTHER, "provides_network", "True");
    served.ok("admin.vm.property.Set", "sys-usb", "netvm", OTHER);
    served.start(OTHER);
    served.start("sys-usb");
    assert!(served.refused("admin.vm.Shutdown", OTHER).starts_with("QubesVMError"));
    served.ok("admin.vm.Shutdown", OTHER, "force+wait", "");
    assert_eq!(served.power(OTHER), "Halted");
    assert!(matches!(served.send("admin.vm.Shutdown", "sys-usb", "now", ""), Err(ApiError::Empty)));
    served.ok("admin.vm.Kill", "sys-usb", "", "");
    served.all_is_quiet();
}

#[test]
fn a_daemon_that_is_stopped_is_not_waited_for() {
    let served = Served::new();
    served.named("sys-usb");
    let daemon = Pid::from_raw(served.daemon.as_ref().unwrap().id() as i32);
    kill(daemon, Signal::SIGSTOP).unwrap();
    let begun = Instant::now();
    // Beside this test there is no dispvmd to start instead.
    let error = client::start(served.state(), "sys-usb").unwrap_err();
    assert!(control_plane::output::error_text(&error).contains("No such file"), "{error:?}");
    assert!(begun.elapsed() < LIMIT / 2);
    kill(daemon, Signal::SIGCONT).unwrap();
    wait_for("what it was asked for is done in the end", || served.power("sys-usb") == "Running");
    served.ok("admin.vm.Kill", "sys-usb", "", "");
    served.all_is_quiet();
}

/// Beside the sweep of every step (`tests/sweep.rs`, `new-disposable`): the daemon itself, killed while it makes one after the other.
#[test]
fn a_daemon_killed_while_it_makes_disposables_leaves_whole_ones_and_no_halves() {
    let mut served = Served::new();
    let mut made = 0;
    for round in 0..12 {
        let socket = served.socket();
        let maker = std::thread::spawn(move || {
            let number = |at: usize| format!("name=made-{round}-{at} label=red");
            let make = |at: &usize| {
                let request =
                    Request::new("admin.vm.Create.DispVM", "dom0").argument(DVM).payload(number(*at));
                call_within(&socket, &request, LIMIT).is_ok()
            };
            (0..).take_while(make).count()
        });
        std::thread::sleep(Duration::from_micros(3_000 + 700 * round));
        served.end_daemon(Signal::SIGKILL);
        made += maker.join().unwrap();
        let (mut named, prefix) = (0, "made-");
        for name in Qube::names(served.state()).unwrap().iter().filter(|name| name.starts_with(prefix)) {
            if !served.state().qube(name).join("qube.toml").exists() {
                continue;
            }
            named += 1;
            let owner = Owner::Qube(name.clone());
            let settings = Settings::load(served.state(), &owner).unwrap();
            assert!(settings.uuid.is_some() && settings.tags.contains("created-by-dom0"), "{name}");
        }
        // The last one may have been made without its maker hearing of it.
        assert!((made..=made + round as usize + 1).contains(&named), "{named} of {made}");
        let _ = std::fs::remove_file(served.socket());
        served.start_daemon();
        let list = served.ok("admin.vm.List", "dom0", "", "");
        assert_eq!(list.lines().filter(|line| line.starts_with(prefix)).count(), named);
    }
    assert!(made > 0, "it was always killed too soon");
    control_plane::savefiles::collect(served.state()).unwrap();
    let halves = |name: &String| !served.state().qube(name).join("qube.toml").exists();
    assert!(!Qube::names(served.state()).unwrap().iter().any(halves));
    served.all_is_quiet();
}

/// As `client::start` does where there is no daemon.
#[test]
fn a_runner_needs_no_daemon() {
    let mut served = Served::new();
    served.named("sys-usb");
    served.end_daemon(Signal::SIGTERM);
    let (ours, theirs) = Channel::pair().unwrap();
    let mut runner = Command::new(program())
        .arg("--root")
        .arg(served.state().root())
        .args(["runner", "sys-usb"])
        .stdin(theirs.as_fd().try_clone_to_owned().unwrap())
        .spawn()
        .unwrap();
    drop(theirs);
    for says in [RunnerSays::Starting, RunnerSays::Up] {
        assert_eq!(ours.receive_within::<RunnerSays>(LIMIT).unwrap().map(|(heard, _)| heard), Some(says));
    }
    // Whoever had it started may go.
    drop(ours);
    assert_eq!(served.run("sys-usb", &["echo", "on"]), "on\n");
    kill(Pid::from_raw(runner.id() as i32), Signal::SIGTERM).unwrap();
    let status = runner.wait().unwrap();
    assert!(status.success(), "{status}");
    served.all_is_quiet();
}

/// A peer of the daemon's that wants a qube and goes, or says something else, keeps nobody.
#[test]
fn a_caller_that_vanishes_leaves_the_qube_it_wanted() {
    let served = Served::new();
    served.named("sys-usb");
    let mut caller = std::os::unix::net::UnixStream::connect(served.socket()).unwrap();
    caller.write_all(&Request::new("admin.vm.Start", "sys-usb").encode().unwrap()).unwrap();
    caller.shutdown(std::net::Shutdown::Both).unwrap();
    drop(caller);
    wait_for("it runs all the same", || served.power("sys-usb") == "Running");
    served.ok("admin.vm.Kill", "sys-usb", "", "");
    served.all_is_quiet();
    assert!(Path::new(&served.socket()).exists());
}
