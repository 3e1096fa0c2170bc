//! `dispvm-savefile doctor`: which host this machine has for disposables, and what stands in the way of the others.
//!
//! Nothing is changed and no state folder is needed: who has trouble may not have one yet. Where Xen can be used it is used; where only
//! a part of it is missing, commands fail and do not turn to QEMU instead, so that part is what to mend.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use control_plane::machine::ThisMachine;
use qemu_glue::probe;
use serde_json::json;
use xen_glue::doctor::{facts, findings, Finding};
use xen_glue::hypercalls::Hypercalls;
use xen_glue::sys::device_mapper::Control;
use xen_glue::sys::Privcmd;
use xen_glue::xenstore::{Nodes, Xenstore};

/// What was found.
struct Report {
    /// The host that commands use: `xen`, `qemu`, or none.
    host: Option<&'static str>,
    /// Why not the others, or nothing; a sentence.
    why: Option<String>,
    xen: Vec<Finding>,
    qemu: Vec<Finding>,
}

/// Looks, prints, and answers 0 when there is a host to use, else 1.
pub fn run(machine: &ThisMachine, json: bool) -> ExitCode {
    let report = look(machine);
    match json {
        true => report.print_json(),
        false => report.print_table(),
    }
    match report.host {
        Some(_) => ExitCode::SUCCESS,
        None => ExitCode::FAILURE,
    }
}

fn look(machine: &ThisMachine) -> Report {
    let opened = Privcmd::open();
    let is_dom0 = matches!(opened, Ok(Some(_)));
    let xen = xen(opened.map_err(|error| sentence(&error)));
    let qemu = qemu(machine);
    let usable = |findings: &[Finding], what: Option<&str>| {
        let mut looked_at = findings.iter().filter(|finding| what.is_none_or(|what| finding.what == what));
        looked_at.all(|finding| finding.usable)
    };
    let qemu_usable = usable(&qemu, Some("qemu"));
    let bad = xen.iter().find(|finding| !finding.usable);
    let why = bad.map(|finding| format!("Xen cannot be used: {}: {}", finding.what, finding.value));
    let host = match (is_dom0, bad.is_none()) {
        (true, true) => Some("xen"),
        (true, false) => None,
        (false, _) => qemu_usable.then_some("qemu"),
    };
    Report { host, why, xen, qemu }
}

fn xen(opened: Result<Option<Privcmd>, String>) -> Vec<Finding> {
    let xen = match &opened {
        Ok(Some(xen)) => Ok(xen as &dyn Hypercalls),
        Ok(None) => Err("there is none under this system".to_owned()),
        Err(error) => Err(error.clone()),
    };
    let xenstored = Xenstore::open()
        .and_then(|store| store.read("/local/domain/0/domid"))
        .map(drop)
        .map_err(|error| sentence(&error));
    let targets = File::options()
        .read(true)
        .write(true)
        .open("/dev/mapper/control")
        .and_then(|file| Control::new(file).targets())
        .map_err(|error| format!("/dev/mapper/control: {error}"));
    findings(&facts(Path::new("/"), xen, xenstored, targets))
}

fn qemu(machine: &ThisMachine) -> Vec<Finding> {
    let program = machine.qemu.clone().or_else(|| probe::in_path(&machine.path));
    let qemu = match &program {
        None => Finding {
            what: "qemu",
            value: "not there".into(),
            usable: false,
            hint: Some("apt install qemu-system-x86, or name another with DISPVM_QEMU=FILE".into()),
        },
        Some(program) => match version(program) {
            Ok(version) => Finding { what: "qemu", value: version, usable: true, hint: None },
            Err(error) => Finding {
                what: "qemu",
                value: format!("{}: {error}", program.display()),
                usable: false,
                hint: Some("name one that runs with DISPVM_QEMU=FILE".into()),
            },
        },
    };
    vec![qemu, kvm()]
}

/// From `qemu-system-x86_64 --version`: its first line, and where it is.
fn version(program: &PathBuf) -> Result<String, String> {
    let output = Command::new(program).arg("--version").output().map_err(|error| error.to_string())?;
    let text = String::from_utf8_lossy(&output.stdout);
    match text.lines().next().filter(|_| output.status.success()) {
        Some(line) => Ok(format!("{}, {}", line.trim(), program.display())),
        None => Err(format!("it ended with {}", output.status)),
    }
}

/// That it can be opened: whether guests come up with it, the first build finds out.
fn kvm() -> Finding {
    const WHAT: &str = "kvm";
    match File::options().read(true).write(true).open("/dev/kvm") {
        Ok(_) => Finding { what: WHAT, value: "/dev/kvm can be opened".into(), usable: true, hint: None },
        Err(error) => Finding {
            what: WHAT,
            value: format!("/dev/kvm: {error}: guests are emulated, which is slow"),
            usable: false,
            hint: Some(
                "switch VT-x or AMD-V on, `modprobe kvm-intel` or kvm-amd, and join the group kvm".into(),
            ),
        },
    }
}

impl Report {
    fn print_table(&self) {
        for (host, findings) in [("Xen", &self.xen), ("QEMU", &self.qemu)] {
            println!("{host}");
            for finding in findings {
                let mark = if finding.usable { "ok" } else { "--" };
                println!("  {mark}  {:<14} {}", finding.what, finding.value);
                if let Some(hint) = &finding.hint {
                    println!("      {:<14} hint: {hint}", "");
                }
            }
        }
        match self.host {
            Some("xen") => println!("Disposables run on Xen."),
            Some(_) => println!("Disposables run on QEMU. {}.", self.why.as_deref().unwrap_or_default()),
            None => println!(
                "Disposables cannot run here. {}.",
                self.why.as_deref().unwrap_or("There is no QEMU")
            ),
        }
    }

    fn print_json(&self) {
        let list = |findings: &[Finding]| -> Vec<serde_json::Value> {
            findings
                .iter()
                .map(|finding| {
                    json!({
                        "what": finding.what,
                        "value": finding.value,
                        "usable": finding.usable,
                        "hint": finding.hint,
                    })
                })
                .collect()
        };
        let (xen, qemu) = (list(&self.xen), list(&self.qemu));
        println!("{}", json!({ "host": self.host, "why_not_xen": self.why, "xen": xen, "qemu": qemu }));
    }
}

fn sentence(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(source) = cause {
        text.push_str(&format!(": {source}"));
        cause = source.source();
    }
    text
}
