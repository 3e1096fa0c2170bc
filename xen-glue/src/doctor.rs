//! What of this machine's Xen can be used, and what stands in the way.
//!
//! [`facts`] asks and looks, [`findings`] (pure) judges. Neither changes anything: no module is loaded, no device made.

use std::fs;
use std::path::Path;

use engine::units::ByteCount;

use crate::hypercalls::{Hypercalls, PhysInfo, XenVersion};

/// What the devices of a domain need in dom0: the backend's driver in sysfs, its module, and what it is for.
const BACKENDS: [(&str, &str, &str); 2] =
    [("vbd", "xen-blkback", "disks"), ("vif", "xen-netback", "network cards")];
/// What volumes are made of: the device-mapper target and its module.
const TARGETS: [(&str, &str); 3] = [("snapshot", "dm-snapshot"), ("crypt", "dm-crypt"), ("zero", "dm-zero")];
/// The devices of Xen's kernel drivers, below /dev.
const DEVICES: [&str; 5] = ["xen/privcmd", "xen/hypercall", "xen/evtchn", "xen/gntdev", "xen/xenbus"];
/// By what dom0 grants pages: calls have a channel each then.
const GNTALLOC: &str = "dev/xen/gntalloc";
/// Less is not enough for the smallest Debian guest and Xen's own tables of it.
const FREE_MIN: ByteCount = ByteCount(192 << 20);
/// The versions of Xen's domctl interface this engine speaks: Xen 4.17 to 4.22.
const DOMCTL: std::ops::RangeInclusive<u32> = 0x15..=0x18;

/// Something looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What it is.
    pub what: &'static str,
    /// How it was found.
    pub value: String,
    /// Whether it will do.
    pub usable: bool,
    /// What mends it, where something is to be mended and it is known what.
    pub hint: Option<String>,
}

/// What was found; an error is in the words of who met it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// What Xen says of itself.
    pub xen: Result<XenVersion, String>,
    /// Its memory and abilities.
    pub machine: Result<PhysInfo, String>,
    /// What kind of domain this is: `PV`, `PVH` or `HVM`; `None` where the kernel doesn't say.
    pub guest_type: Option<String>,
    /// Whether xenstored answered.
    pub xenstored: Result<(), String>,
    /// Those of Xen's devices, below /dev, which are missing.
    pub devices_missing: Vec<&'static str>,
    /// Whether dom0 can grant pages.
    pub grants: bool,
    /// The backend drivers that are loaded, by their device type.
    pub backends: Vec<String>,
    /// The device-mapper targets the kernel has.
    pub targets: Result<Vec<String>, String>,
    /// Whether loop devices can be had.
    pub loop_control: bool,
}

/// Gathers the facts of the machine whose root folder this is.
///
/// Three are for the caller to try: to open Xen, to ask xenstored, and to ask the device-mapper for its targets.
pub fn facts(
    root: &Path,
    xen: Result<&dyn Hypercalls, String>,
    xenstored: Result<(), String>,
    targets: Result<Vec<String>, String>,
) -> Facts {
    let drivers = fs::read_dir(root.join("sys/bus/xen-backend/drivers"));
    let names =
        drivers.into_iter().flatten().flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    let guest_type = fs::read_to_string(root.join("sys/hypervisor/guest_type")).ok();
    Facts {
        machine: xen.clone().and_then(|xen| xen.physinfo().map_err(|error| error.to_string())),
        xen: xen.map(|xen| xen.version().clone()),
        guest_type: guest_type.map(|text| text.trim().to_owned()),
        xenstored,
        devices_missing: DEVICES.into_iter().filter(|name| !root.join("dev").join(name).exists()).collect(),
        grants: root.join(GNTALLOC).exists(),
        backends: names.collect(),
        targets,
        loop_control: root.join("dev/loop-control").exists(),
    }
}

/// What the facts mean, in the order in which they are to be mended.
pub fn findings(facts: &Facts) -> Vec<Finding> {
    let mut findings = vec![xen(facts), dom0(facts), devices(facts)];
    findings.extend(machine(facts));
    findings.push(xenstored(facts));
    findings.extend(BACKENDS.map(|(kind, module, what)| backend(facts, kind, module, what)));
    findings.extend(TARGETS.map(|(target, module)| device_mapper(facts, target, module)));
    findings.push(loop_devices(facts));
    findings.push(grants(facts));
    findings
}

fn good(what: &'static str, value: impl Into<String>) -> Finding {
    Finding { what, value: value.into(), usable: true, hint: None }
}

fn bad(what: &'static str, value: impl Into<String>, hint: impl Into<String>) -> Finding {
    Finding { what, value: value.into(), usable: false, hint: Some(hint.into()) }
}

fn xen(facts: &Facts) -> Finding {
    const WHAT: &str = "xen";
    match &facts.xen {
        Err(error) => bad(WHAT, error, "boot this machine under Xen and run this in dom0, as root"),
        Ok(xen) => {
            let value = format!("{}.{}{}, domctl {:#x}", xen.major, xen.minor, xen.extra, xen.domctl);
            match DOMCTL.contains(&xen.domctl) {
                true => good(WHAT, value),
                false => bad(WHAT, value, "Xen 4.17 to 4.22 are known"),
            }
        }
    }
}

fn dom0(facts: &Facts) -> Finding {
    const WHAT: &str = "dom0";
    match facts.guest_type.as_deref() {
        Some(kind @ ("PV" | "PVH")) => good(WHAT, kind),
        Some(kind) => bad(WHAT, kind, "run this in dom0, which is a PV or PVH domain"),
        // Kernels have said it since 4.14; without Xen there is nothing to say.
        None if facts.xen.is_ok() => good(WHAT, "of a kind the kernel does not tell"),
        None => bad(WHAT, "no domain", "boot this machine under Xen"),
    }
}

fn devices(facts: &Facts) -> Finding {
    const WHAT: &str = "devices";
    if facts.devices_missing.is_empty() {
        return good(WHAT, "all there");
    }
    let missing: Vec<_> = facts.devices_missing.iter().map(|name| format!("/dev/{name}")).collect();
    let hint = "modprobe -a xen-privcmd xen-evtchn xen-gntdev";
    bad(WHAT, format!("missing: {}", missing.join(", ")), hint)
}

fn machine(facts: &Facts) -> Vec<Finding> {
    let machine = match &facts.machine {
        Ok(machine) => machine,
        Err(error) => {
            return vec![Finding { what: "machine", value: error.clone(), usable: false, hint: None }]
        }
    };
    let hvm = match machine.hvm {
        true => good("hvm", "on"),
        false => bad("hvm", "off", "PVH guests need VT-x or AMD-V: switch it on in the firmware's setup"),
    };
    let hap = match machine.hap {
        true => good("hap", "on"),
        false => bad(
            "hap",
            "off",
            "PVH guests need nested paging (EPT or NPT): remove hap=0 from Xen's command line",
        ),
    };
    vec![hvm, hap, free_memory(machine)]
}

fn free_memory(machine: &PhysInfo) -> Finding {
    const WHAT: &str = "free memory";
    let mib = |bytes: ByteCount| bytes.0 >> 20;
    let value = format!(
        "{} of {} MiB, {} being scrubbed",
        mib(machine.free),
        mib(machine.total),
        mib(machine.scrubbing)
    );
    match machine.free >= FREE_MIN {
        true => good(WHAT, value),
        false => bad(WHAT, value, "give dom0 less: `xl mem-set 0 …`, or dom0_mem= on Xen's command line"),
    }
}

fn xenstored(facts: &Facts) -> Finding {
    match &facts.xenstored {
        Ok(()) => good("xenstored", "answers"),
        Err(error) => bad("xenstored", error, "systemctl start xenstored"),
    }
}

fn backend(facts: &Facts, kind: &str, module: &'static str, what: &str) -> Finding {
    match facts.backends.iter().any(|loaded| loaded == kind) {
        true => good(module, "loaded"),
        false => bad(module, format!("not loaded: no {what}"), format!("modprobe {module}")),
    }
}

fn device_mapper(facts: &Facts, target: &str, module: &'static str) -> Finding {
    match &facts.targets {
        Err(error) => bad(module, error, "modprobe dm-mod"),
        Ok(targets) if targets.iter().any(|known| known == target) => good(module, "loaded"),
        Ok(_) => bad(module, format!("no target \"{target}\""), format!("modprobe {module}")),
    }
}

/// Without it all works, but for a stock agent's calls.
fn grants(facts: &Facts) -> Finding {
    good(
        "calls",
        match facts.grants {
            true => "a channel each",
            false => "on the launch's own channel; `modprobe xen-gntalloc` gives each its own",
        },
    )
}

fn loop_devices(facts: &Facts) -> Finding {
    match facts.loop_control {
        true => good("loop", "there"),
        false => bad("loop", "no /dev/loop-control", "modprobe loop"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fit() -> Facts {
        Facts {
            xen: Ok(XenVersion {
                command_line: String::new(),
                major: 4,
                minor: 17,
                extra: ".7".into(),
                domctl: 0x15,
                capabilities: "hvm-3.0-x86_64".into(),
            }),
            machine: Ok(PhysInfo {
                free: ByteCount(1 << 30),
                total: ByteCount(2 << 30),
                scrubbing: ByteCount(0),
                hvm: true,
                hap: true,
            }),
            guest_type: Some("PV".into()),
            xenstored: Ok(()),
            devices_missing: vec![],
            grants: true,
            backends: vec!["vbd".into(), "vif".into()],
            targets: Ok(vec!["snapshot".into(), "crypt".into(), "zero".into(), "linear".into()]),
            loop_control: true,
        }
    }

    fn complaints(facts: &Facts) -> Vec<&'static str> {
        let findings = findings(facts);
        assert!(findings
            .iter()
            .all(|finding| finding.usable == finding.hint.is_none() || finding.what == "machine"));
        findings.iter().filter(|finding| !finding.usable).map(|finding| finding.what).collect()
    }

    #[test]
    fn a_fit_dom0_has_nothing_to_mend() {
        assert_eq!(complaints(&fit()), [""; 0]);
        let ungranted = Facts { grants: false, ..fit() };
        assert_eq!(complaints(&ungranted), [""; 0]);
        assert!(findings(&ungranted).iter().any(|finding| finding.value.contains("modprobe xen-gntalloc")));
        assert_eq!(findings(&fit())[0], good("xen", "4.17.7, domctl 0x15"));
    }

    #[test]
    fn each_lack_is_named_alone() {
        type Lack = fn(&mut Facts);
        let lacks: [(Lack, &str); 9] = [
            (|facts| facts.xen.as_mut().unwrap().domctl = 0x19, "xen"),
            (|facts| facts.guest_type = Some("HVM".into()), "dom0"),
            (|facts| facts.devices_missing = vec!["xen/gntdev"], "devices"),
            (|facts| facts.machine.as_mut().unwrap().hap = false, "hap"),
            (|facts| facts.machine.as_mut().unwrap().free = ByteCount(1 << 20), "free memory"),
            (|facts| facts.xenstored = Err("no answer".into()), "xenstored"),
            (|facts| facts.backends.retain(|kind| kind == "vbd"), "xen-netback"),
            (|facts| facts.targets.as_mut().unwrap().retain(|target| target != "crypt"), "dm-crypt"),
            (|facts| facts.loop_control = false, "loop"),
        ];
        for (lack, what) in lacks {
            let mut facts = fit();
            lack(&mut facts);
            assert_eq!(complaints(&facts), [what]);
        }
    }

    #[test]
    fn a_machine_without_xen_says_so_first() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("dev")).unwrap();
        fs::write(root.path().join("dev/loop-control"), "").unwrap();
        let error = || "no such device".to_owned();
        let facts = facts(root.path(), Err(error()), Err(error()), Ok(vec![]));
        assert!(facts.loop_control && facts.devices_missing.len() == DEVICES.len());
        assert_eq!(complaints(&facts)[..3], ["xen", "dom0", "devices"]);
    }
}
