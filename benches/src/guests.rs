//! The guests the benches measure, in a state folder of their own, with savefiles built when they are not fresh.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use control_plane::inputs::Guest;
use control_plane::state::State;
use qemu_glue::probe::Accel;

/// A DVM template under test.
#[derive(Debug, Clone, Copy)]
pub struct Subject {
    /// Its name.
    pub dvm: &'static str,
    /// Its TemplateVM.
    pub template: &'static str,
    /// Its guest in target/guests.
    pub guest: &'static str,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// vCPUs.
    pub vcpus: u32,
}

/// The busybox guest.
pub const TEST: Subject =
    Subject { dvm: "test-256", template: "busybox", guest: "test", memory_mib: 256, vcpus: 1 };
/// The same with 4 GiB.
pub const TEST_4G: Subject = Subject { dvm: "test-4096", memory_mib: 4096, ..TEST };
/// The Debian guest.
pub const DEBIAN: Subject =
    Subject { dvm: "debian-dvm", template: "debian-12", guest: "debian", memory_mib: 1024, vcpus: 2 };

/// Where everything is.
pub struct Bench {
    target: PathBuf,
    root: PathBuf,
    qemu: PathBuf,
}

impl Bench {
    /// In target/bench, with QEMU 10 (the fastest launch; the tests run on 7.2 as well).
    pub fn open() -> Bench {
        Bench::in_folder("bench")
    }

    /// In another folder of target.
    pub fn in_folder(name: &str) -> Bench {
        let exe = std::env::current_exe().expect("a program knows its own path");
        let target = exe.ancestors().nth(2).expect("it lies in target/release").to_owned();
        let root = target.join(name);
        fs::create_dir_all(&root).expect("target can be written");
        Bench { qemu: target.join("qemu/10/qemu-system-x86_64"), root, target }
    }

    /// Makes sure that the subject has a fresh savefile.
    pub fn prepare(&self, subject: &Subject) {
        self.add_template(subject);
        let mut add = self.command("dispvm-qube");
        add.args(["add-dvm", subject.dvm, "--template", subject.template]);
        add.args(["--memory", &subject.memory_mib.to_string(), "--vcpus", &subject.vcpus.to_string()]);
        must(&mut add);
        let fresh = self.command("dispvm-savefile").args(["status", subject.dvm]).output();
        if !fresh.is_ok_and(|output| output.status.success()) {
            eprintln!("building the savefile of {}", subject.dvm);
            must(self.command("dispvm-savefile").args(["build", subject.dvm]));
        }
        // Admits the image and brings it into the page cache.
        must(self.command("dispvm-launch").args(["--dvm", subject.dvm, "--", "true"]));
    }

    /// Makes the subject's TemplateVM.
    pub fn add_template(&self, subject: &Subject) {
        let guests = self.target.join("guests");
        let cmdline = fs::read_to_string(guests.join(format!("{}-root.cmdline", subject.guest)))
            .expect("`make guests`");
        let mut add = self.command("dispvm-qube");
        add.args(["add-template", subject.template, "--cmdline", cmdline.trim()]);
        add.arg("--root-image").arg(guests.join(format!("{}-root.img", subject.guest)));
        add.arg("--kernel").arg(guests.join("kernel/vmlinuz")).arg("--initrd").arg(guests.join("initrd"));
        must(&mut add);
    }

    /// One of the binaries on this state.
    pub fn command(&self, name: &str) -> Command {
        let mut command = Command::new(self.target.join("release").join(name));
        command.env("DISPVM_ROOT", &self.root).env("DISPVM_QEMU", &self.qemu).stdin(Stdio::null());
        command
    }

    /// Our launch of `command` in a clone.
    pub fn ours(&self, subject: &Subject, command: &[&str]) -> Command {
        let mut launch = self.command("dispvm-launch");
        launch.args(["--dvm", subject.dvm, "--"]).args(command);
        launch
    }

    /// The hand-driven peer's launch of the same, restored or booted cold.
    pub fn by_hand(&self, subject: &Subject, cold: bool, command: &[&str]) -> Command {
        self.driven(subject, cold, Accel::Tcg.cpu_model(), command)
    }

    fn driven(&self, subject: &Subject, cold: bool, cpu: &str, command: &[&str]) -> Command {
        let guest = self.guest(subject);
        let hot = self.hot(subject);
        let mut peer = Command::new(self.target.join("release/hand-driven"));
        peer.arg("--qemu").arg(&self.qemu).args(["--cpu", cpu]);
        peer.args(["--memory", &subject.memory_mib.to_string(), "--vcpus", &subject.vcpus.to_string()]);
        if cold {
            peer.arg("--kernel").arg(&guest.spec.kernel).arg("--initrd").arg(&guest.spec.initrd);
            peer.args(["--cmdline", &guest.spec.cmdline]);
        } else {
            peer.arg("--image").arg(hot.join("memory.img")).arg("--state").arg(hot.join("device-state"));
        }
        for volume in &guest.spec.volumes {
            let prepared = self.prepared_overlay(volume.size.0);
            let delta = if cold { "-".into() } else { hot.join(format!("{}.qcow2", volume.name)) };
            let base = volume.base.path().map_or("-".into(), Path::to_owned);
            let files = [&prepared, &delta, &base].map(|path| path.display().to_string()).join(",");
            peer.args(["--volume", &format!("{},{files}", volume.name)]);
        }
        peer.arg("--").args(command).stdin(Stdio::null()).stderr(Stdio::null());
        peer
    }

    /// The hand-driven peer that runs the command whenever it gets a line, and says how long that took.
    pub fn repeated_by_hand(&self, subject: &Subject, command: &[&str]) -> Command {
        let mut peer = with_option(&self.by_hand(subject, false, command), "--repeat");
        peer.stdin(Stdio::piped());
        peer
    }

    /// The hand-driven peer that moves so many bytes through a bare port of a booted guest, with a CPU of its own.
    pub fn bare_port_by_hand(&self, subject: &Subject, cpu: &str, bytes: u64) -> Command {
        let booted = self.driven(subject, true, cpu, &[]);
        with_option(&booted, &format!("--bare-port={bytes}"))
    }

    /// The hand-driven peer as a spare: says a line when it is ready, and goes on when it gets one.
    pub fn spare_by_hand(&self, subject: &Subject, command: &[&str]) -> Command {
        let mut peer = with_option(&self.by_hand(subject, false, command), "--spare");
        peer.stdin(Stdio::piped());
        peer
    }

    /// The keeper of a spare of the subject.
    pub fn keeper(&self, subject: &Subject) -> u32 {
        let clones = control_plane::clones::list(&self.state()).expect("the clones' records");
        clones.iter().find(|clone| clone.dvm == subject.dvm).expect("a spare").pid
    }

    /// The folder of the subject's hot image.
    pub fn hot(&self, subject: &Subject) -> PathBuf {
        let guest = self.guest(subject);
        let pin = guest.dvm.savefile.as_ref().expect("a savefile");
        find_hot(&self.state().hot(), &pin.root_hash)
    }

    /// Its state folder.
    pub fn state(&self) -> State {
        State::open(&self.root).expect("the state folder")
    }

    fn guest(&self, subject: &Subject) -> Guest {
        Guest::load(&self.state(), subject.dvm).expect("the record")
    }

    /// An empty overlay of a volume of `size` bytes, made once by qemu-glue's own writer.
    fn prepared_overlay(&self, size: u64) -> PathBuf {
        let path = self.root.join(format!("prepared-{size}.qcow2"));
        if !path.exists() {
            let file = fs::File::create(&path).expect("target can be written");
            qemu_glue::qcow2::write_empty(&file, engine::units::ByteCount(size)).expect("an overlay");
        }
        path
    }
}

/// The same, with an option more.
fn with_option(peer: &Command, option: &str) -> Command {
    let mut with = Command::new(peer.get_program());
    with.arg(option).args(peer.get_args()).stdin(Stdio::null()).stderr(Stdio::null());
    with
}

fn find_hot(hot: &Path, root_hash: &str) -> PathBuf {
    let entries = fs::read_dir(hot).expect("the hot images").flatten();
    let found = entries.map(|entry| entry.path()).find(|path| {
        path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(root_hash))
    });
    found.expect("the savefile is admitted")
}

fn must(command: &mut Command) {
    let output = command.output().expect("it starts");
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}
