//! What QEMU is told on its command line. Pure: plans from values, does no I/O.
//!
//! Invariants:
//! - The guest-visible machine is the same for a capture, a clone and a cold boot: only where memory, disks and the
//!   network card lead to differs. The device state of one therefore loads into the other.
//! - Every file is named by a descriptor. QEMU is given no path it could open again.

use std::ffi::OsString;
use std::os::fd::RawFd;

use engine::host::GuestSpec;
use engine::identity;
use serde_json::json;

use crate::probe::Accel;

/// A versioned machine type that QEMU 7.2 and all later ones have.
const MACHINE: &str = "pc-q35-7.2";

/// The machine as a savefile has it on record. Its device state loads into the same devices alone: counted up when they change, so that older
/// savefiles are stale.
pub const MACHINE_ON_RECORD: &str = "pc-q35-7.2 devices-2";

/// Ports that the agent's bus has room for: the console's, which is never taken, and the agent's. QEMU makes room for 31 by itself, each with two
/// queues; their eventfds cost start-up time, and its main loop polls every one of them for each 4 KiB that it moves.
const PORTS: usize = 2;

/// The id of the balloon, of each volume's device, and the prefix of node names.
pub const BALLOON: &str = "balloon";

/// The name of the agent's port inside the guest.
pub const AGENT_PORT: &str = "dispvm.agent";

/// Everything of q35 a clone does without costs start-up time.
const MACHINE_OPTIONS: &str =
    "smbus=off,sata=off,usb=off,vmport=off,hpet=off,dump-guest-core=off,memory-backend=mem";

/// How QEMU gets at guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Memory {
    /// A memfd shared with us, so that it can be captured.
    Shared,
    /// Copy-on-write over a read-only image: `readonly=on,rom=off`, QEMU 8.2 and later.
    PrivateReadOnly,
    /// Copy-on-write over a read-only image, whose opening for writing [`crate::process`] catches and answers with a
    /// read-only descriptor: QEMU before 8.2.
    PrivateCaught,
}

/// The descriptors of one volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeFds {
    /// The volume's name.
    pub name: String,
    /// What it consists of.
    pub chain: Chain,
}

/// What a volume consists of, top first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Chain {
    /// What the guest writes is gone with it.
    Overlay {
        /// An empty qcow2 overlay, in memory.
        overlay: RawFd,
        /// The savefile's delta, a read-only qcow2.
        delta: Option<RawFd>,
        /// The immutable base, a read-only raw file.
        base: Option<RawFd>,
    },
    /// A raw file that is written to and kept.
    Persistent(RawFd),
}

impl Chain {
    /// All descriptors in it.
    pub fn fds(&self) -> impl Iterator<Item = RawFd> {
        match *self {
            Chain::Overlay { overlay, delta, base } => [Some(overlay), delta, base],
            Chain::Persistent(file) => [Some(file), None, None],
        }
        .into_iter()
        .flatten()
    }
}

/// Where the network card leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    /// To a hub without other ports: no state, so any other link can take its place after a restore.
    Nowhere,
    /// To QEMU's user-mode network.
    User,
    /// To a tap interface's descriptor.
    Tap(RawFd),
}

/// How the guest comes to life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Start {
    /// From these kernel and initrd descriptors.
    Boot {
        /// The kernel.
        kernel: RawFd,
        /// The initrd.
        initrd: RawFd,
    },
    /// From a device state that QMP will name.
    Incoming,
}

/// One QEMU to start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan<'a> {
    /// The guest.
    pub spec: &'a GuestSpec,
    /// How guest code runs.
    pub accel: Accel,
    /// The CPU model.
    pub cpu_model: &'a str,
    /// How memory is mapped.
    pub memory: Memory,
    /// The memory file.
    pub memory_fd: RawFd,
    /// Lock pages as they are touched (QEMU 10 and later).
    pub lock_on_fault: bool,
    /// The machine protocol's socket.
    pub qmp: RawFd,
    /// The agent's socket.
    pub agent: RawFd,
    /// Disks.
    pub volumes: &'a [VolumeFds],
    /// Network.
    pub link: Link,
    /// How it starts.
    pub start: Start,
}

/// QEMU's arguments, without the program.
pub fn arguments(plan: &Plan<'_>) -> Vec<OsString> {
    let mut args = Args::default();
    machine(plan, &mut args);
    volumes(plan.volumes, &mut args);
    devices(plan, &mut args);
    match &plan.start {
        Start::Incoming => args.push(["-incoming", "defer"]),
        Start::Boot { kernel, initrd } => {
            args.option("-kernel", format!("/proc/self/fd/{kernel}"));
            args.option("-initrd", format!("/proc/self/fd/{initrd}"));
            args.option("-append", plan.spec.cmdline.clone());
        }
    }
    args.0
}

fn machine(plan: &Plan<'_>, args: &mut Args) {
    let memory = plan.spec.memory.0;
    let access = match plan.memory {
        Memory::Shared => "share=on",
        Memory::PrivateReadOnly => "share=off,readonly=on,rom=off",
        Memory::PrivateCaught => "share=off",
    };
    args.push(["-name", "dispvm", "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]);
    args.push(["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]);
    args.option("-accel", plan.accel.argument().to_owned());
    args.option("-cpu", plan.cpu_model.to_owned());
    args.option("-machine", format!("{MACHINE},{MACHINE_OPTIONS}"));
    args.option(
        "-object",
        format!(
            "memory-backend-file,id=mem,size={memory},mem-path=/proc/self/fd/{},{access}",
            plan.memory_fd
        ),
    );
    args.option("-m", format!("{}M", memory >> 20));
    args.option("-smp", plan.spec.vcpus.to_string());
    if plan.lock_on_fault {
        args.push(["-overcommit", "mem-lock=on-fault"]);
    }
}

fn volumes(volumes: &[VolumeFds], args: &mut Args) {
    let mut set = 0;
    let mut file = |args: &mut Args, fd: RawFd, read_only: bool| {
        set += 1;
        args.option("-add-fd", format!("fd={fd},set={set}"));
        // Nobody else opens these files for writing: no locks. Overlays die with the guest, and a file that is kept is
        // synced by whoever keeps it when QEMU has ended: no flushes.
        json!({ "driver": "file", "filename": format!("/dev/fdset/{set}"), "locking": "off",
                "read-only": read_only, "auto-read-only": false, "cache": { "direct": false, "no-flush": true } })
    };
    for VolumeFds { name, chain } in volumes {
        let (overlay, delta, base) = match *chain {
            Chain::Overlay { overlay, delta, base } => (overlay, delta, base),
            Chain::Persistent(fd) => {
                // What the guest clears or discards becomes a hole again.
                let node = json!({ "driver": "raw", "node-name": name, "file": file(args, fd, false),
                                   "discard": "unmap", "detect-zeroes": "unmap" });
                args.option("-blockdev", node.to_string());
                continue;
            }
        };
        let mut backing = json!(null);
        if let Some(fd) = base {
            backing = json!({ "driver": "raw", "read-only": true, "file": file(args, fd, true) });
        }
        if let Some(fd) = delta {
            backing = json!({ "driver": "qcow2", "read-only": true, "file": file(args, fd, true), "backing": backing });
        }
        let node = json!({ "driver": "qcow2", "node-name": name, "file": file(args, overlay, false),
                           "backing": backing, "discard": "unmap", "detect-zeroes": "on" });
        args.option("-blockdev", node.to_string());
    }
}

fn devices(plan: &Plan<'_>, args: &mut Args) {
    for volume in plan.volumes {
        let name = &volume.name;
        // A write that fails stops the guest: the overlay is full and another is put on top (domain::spill).
        args.option(
            "-device",
            format!("virtio-blk-pci,id=disk-{name},drive={name},serial={name},werror=stop,rerror=report"),
        );
    }
    args.option("-chardev", format!("socket,id=qmp,fd={}", plan.qmp));
    args.push(["-mon", "chardev=qmp,mode=control"]);
    args.option("-chardev", format!("socket,id=agent,fd={}", plan.agent));
    args.option("-device", format!("virtio-serial-pci,id=ports,max_ports={PORTS}"));
    args.option("-device", format!("virtserialport,chardev=agent,name={AGENT_PORT}"));
    args.push(["-chardev", "ringbuf,id=console,size=65536", "-serial", "chardev:console"]);
    args.option("-device", format!("virtio-balloon-pci,id={BALLOON}"));
    args.option("-netdev", netdev(plan.link));
    // The card keeps the MAC of the capture; the agent changes it inside the guest. Nothing is to be announced on the
    // restored link before that, least of all the MAC that all clones share.
    args.push(["-device", "virtio-net-pci,netdev=net,mac=00:16:3e:5e:ff:ff,romfile=,guest_announce=off"]);
}

fn netdev(link: Link) -> String {
    match link {
        Link::Nowhere => "hubport,id=net,hubid=0".to_owned(),
        Link::Tap(fd) => format!("tap,id=net,fd={fd}"),
        Link::User => {
            let (network, prefix) = identity::NETWORK;
            format!(
                "user,id=net,net={network}/{prefix},host={},dns={},ipv6=off",
                identity::GATEWAY,
                identity::NAME_SERVER
            )
        }
    }
}

#[derive(Default)]
struct Args(Vec<OsString>);

impl Args {
    fn push<const N: usize>(&mut self, words: [&str; N]) {
        self.0.extend(words.map(OsString::from));
    }

    fn option(&mut self, name: &str, value: String) {
        self.0.push(name.into());
        self.0.push(value.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::host::Nic;
    use engine::units::ByteCount;

    fn spec() -> GuestSpec {
        GuestSpec {
            memory: ByteCount(256 << 20),
            vcpus: 2,
            kernel: "k".into(),
            initrd: "i".into(),
            cmdline: "quiet".into(),
            volumes: vec![],
            nic: Nic::None,
        }
    }

    #[test]
    fn the_bus_has_room_for_its_ports_and_no_more() {
        let line = line(Memory::Shared, Link::Nowhere, Start::Incoming);
        let ports = 1 + line.matches("virtserialport,").count(); // the console's comes first, always
        assert!(line.contains(&format!("virtio-serial-pci,id=ports,max_ports={ports} ")), "{line}");
    }

    fn line(memory: Memory, link: Link, start: Start) -> String {
        let chain = Chain::Overlay { overlay: 9, delta: Some(8), base: Some(7) };
        line_with(chain, memory, link, start)
    }

    fn line_with(chain: Chain, memory: Memory, link: Link, start: Start) -> String {
        let spec = spec();
        let volumes = [VolumeFds { name: "root".into(), chain }];
        let plan = Plan {
            spec: &spec,
            accel: Accel::Tcg,
            cpu_model: "max",
            memory,
            memory_fd: 3,
            lock_on_fault: false,
            qmp: 4,
            agent: 5,
            volumes: &volumes,
            link,
            start,
        };
        arguments(&plan).iter().map(|word| word.to_str().unwrap().to_owned()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn capture_and_clone_show_the_guest_the_same_devices() {
        let capture = line(Memory::Shared, Link::Nowhere, Start::Boot { kernel: 10, initrd: 11 });
        let clone = line(Memory::PrivateReadOnly, Link::User, Start::Incoming);
        let devices = |line: &str| {
            let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
            words.windows(2).filter(|w| w[0] == "-device").map(|w| w[1].clone()).collect::<Vec<_>>()
        };
        assert_eq!(devices(&capture), devices(&clone));
        assert_eq!(devices(&clone).len(), 5);
    }

    #[test]
    fn bases_and_deltas_are_read_only_and_the_sandbox_is_on() {
        let clone = line(Memory::PrivateReadOnly, Link::Nowhere, Start::Incoming);
        assert_eq!(clone.matches("\"filename\"").count(), 3);
        assert_eq!(clone.matches("\"read-only\":false").count(), 1);
        assert!(clone.contains("-sandbox on,"));
        assert!(clone.contains("share=off,readonly=on,rom=off"));
        assert!(clone.contains("dump-guest-core=off"));
    }

    #[test]
    fn a_volume_that_is_kept_is_the_same_disk_written_to_directly() {
        let boot = || Start::Boot { kernel: 10, initrd: 11 };
        let overlaid = line(Memory::Shared, Link::Nowhere, boot());
        let kept = line_with(Chain::Persistent(9), Memory::Shared, Link::Nowhere, boot());
        let disk = "virtio-blk-pci,id=disk-root,drive=root,serial=root,werror=stop,rerror=report";
        assert!(kept.contains(disk) && overlaid.contains(disk));
        assert!(kept.contains("-add-fd fd=9,set=1") && !kept.contains("set=2"));
        assert_eq!((kept.matches("\"filename\"").count(), kept.matches("qcow2").count()), (1, 0));
        assert!(kept.contains("\"driver\":\"raw\"") && kept.contains("\"read-only\":false"));
    }
}
