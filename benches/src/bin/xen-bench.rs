//! Launches on a real Xen beside `xl restore` of the same guest, interleaved in one run: how long until the domain runs, how long until
//! its agent's first reply, with a spare and without; and a savefile beside the `xl save` file of the same guest.
//!
//! The peer is the guest of our own savefile: exported, restored by xl, saved by xl. So it has the same memory, vCPU and disks, which xl
//! attaches by its scripts. All of it runs in the rig's dom0 under software emulation: only the ratios mean anything.

use std::process::ExitCode;
use std::time::Duration;

use benches::run::Options;
use benches::stats::median;
use benches::table::Row;
use fixtures::xen::lab::XenLab;
use fixtures::xen::Options as HostOptions;
use fixtures::{binary, DVM};
use serde_json::Value;

const ABOUT: &str = "Measures launches on Xen: 10 of each kind, or 2.";

/// What xl takes for a file of the guest on a busy machine.
const LIMIT: Duration = Duration::from_secs(180);

fn main() -> ExitCode {
    let options = Options::parse(ABOUT);
    let launches = options.launches(10, 2);
    options.run("xen", launches, || measure(launches))
}

fn measure(launches: usize) -> Vec<Row> {
    let files = vec![(binary("xen-agent"), "bin/xen-agent".to_owned())];
    let lab = XenLab::with("xen_bench", HostOptions { memory_mib: 3072, dom0_mib: 1024, files });
    let mut rows = savefile_beside_xl(&lab);
    let exec = median(&(0..5).map(|_| timed(&lab, "dispvm-launch --version >/dev/null")).collect::<Vec<_>>());

    let (mut unpaused, mut replied) = (Vec::new(), Vec::new());
    let (mut xl_paused, mut xl_replied, mut xl_reply) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..launches {
        let phases = launch(&lab, false);
        unpaused.push(exec + until(&phases, "unpaused"));
        replied.push(exec + until(&phases, "identity"));
        xl_paused.push(timed(&lab, "xl restore -p peer.xl >/dev/null 2>&1"));
        lab.must(&format!("xl destroy {DVM}"));
        let restored = timed(&lab, "xl restore peer.xl >/dev/null 2>&1");
        let reply = first_reply(&lab);
        xl_reply.push(reply);
        xl_replied.push(restored + reply);
        lab.must(&format!("xl destroy {DVM}"));
    }
    let spares = with_spares(&lab, launches, exec);

    rows.push(Row::report("exec of dispvm-launch alone", exec, "ms"));
    rows.push(Row::report("exec → domain unpaused", median(&unpaused), "ms"));
    rows.push(Row::report("xl restore -p", median(&xl_paused), "ms"));
    rows.push(Row::ratio("exec → unpaused : xl restore -p", median(&unpaused) / median(&xl_paused), 0.25));
    rows.push(Row::report("exec → agent's first reply", median(&replied), "ms"));
    rows.push(Row::report("xl restore → the same reply", median(&xl_replied), "ms"));
    rows.push(Row::report("of that, after xl has ended", median(&xl_reply), "ms"));
    rows.push(Row::ratio("exec → reply : xl restore → reply", median(&replied) / median(&xl_replied), 0.55));
    rows.push(Row::report("exec → reply of a spare", median(&spares), "ms"));
    rows.push(Row::ratio(
        "exec → reply of a spare : xl restore → reply",
        median(&spares) / median(&xl_replied),
        0.1,
    ));
    rows
}

/// Builds the savefile, and has xl save the same guest to peer.xl.
fn savefile_beside_xl(lab: &XenLab) -> Vec<Row> {
    let built = lab.run_with(&format!("dispvm-savefile build {DVM} --json"), b"", LIMIT);
    let built: Value = serde_json::from_str(&built.out()).expect("a build's JSON");
    let phase = |name: &str| built["phases_ms"][name].as_f64().expect("a build has this phase");
    lab.run_with(
        &format!("dispvm-savefile export {DVM} exported.xl && xl restore exported.xl >/dev/null 2>&1"),
        b"",
        LIMIT,
    );
    first_reply(lab);
    let saved = timed(lab, &format!("xl save {DVM} peer.xl >/dev/null 2>&1"));
    let size =
        |path: &str| lab.must(&format!("stat -c %s {path}")).trim().parse::<f64>().expect("a size") / 1e6;
    let (ours, theirs) = (size(built["path"].as_str().expect("a path")), size("peer.xl"));
    let captured = phase("capture") + phase("write");
    vec![
        Row::report("savefile", ours, "MB"),
        Row::report("xl save's file", theirs, "MB"),
        Row::ratio("savefile : xl save's file", ours / theirs, 1.0 / 3.0),
        Row::report("capture → savefile on disk", captured, "ms"),
        Row::report("xl save", saved, "ms"),
        Row::ratio("capture → savefile : xl save", captured / saved, 1.0),
    ]
}

/// Exec → reply of launches that got a spare.
fn with_spares(lab: &XenLab, launches: usize, exec: f64) -> Vec<f64> {
    let _daemon = lab.spawn("exec dispvmd --spares 1");
    let ready = "dispvmd status --json | grep -q '\"spares_ready\": *1'";
    let taken = (0..launches).map(|_| {
        lab.host.until(&in_lab(ready), LIMIT, "a spare");
        std::thread::sleep(Duration::from_millis(500));
        exec + until(&launch(lab, true), "identity")
    });
    let taken = taken.collect();
    lab.run("pkill dispvmd; sleep 1");
    taken
}

fn in_lab(script: &str) -> String {
    format!("export DISPVM_ROOT={} PATH=/state/bin:$PATH; {script}", fixtures::xen::lab::ROOT)
}

/// The phases of one launch, in ms, each from the end of the one before.
fn launch(lab: &XenLab, spare: bool) -> Value {
    let (ran, told) = lab.launch_json(&["--dvm", DVM, "--no-rebuild"], &["true"]);
    assert_eq!(ran.status, 0, "{ran}");
    assert_eq!(told["spare"], spare, "{told}");
    told["phases_ms"].clone()
}

/// From the start to the end of a phase.
fn until(phases: &Value, last: &str) -> f64 {
    let phases = phases.as_object().expect("an object");
    let end = phases.keys().position(|name| name == last).expect("the launch has this phase") + 1;
    phases.values().take(end).filter_map(Value::as_f64).sum()
}

/// How long a script takes in dom0, by its own clock, in ms.
fn timed(lab: &XenLab, script: &str) -> f64 {
    let ran = lab.run_with(&format!("TIMEFORMAT=%R; time {{ {script}; }}"), b"", LIMIT);
    assert_eq!(ran.status, 0, "{ran}");
    ran.err().lines().last().and_then(|line| line.trim().parse::<f64>().ok()).expect("a time") * 1e3
}

/// How long the agent of the domain that xl restored takes to its first reply, in ms.
fn first_reply(lab: &XenLab) -> f64 {
    let ran = lab.run_with(&format!("xen-agent $(xl domid {DVM}) -- true"), b"", LIMIT);
    assert_eq!(ran.status, 0, "{ran}");
    let said = ran.err();
    let seconds =
        said.split("first reply after ").nth(1).and_then(|rest| rest.split(' ').next()?.parse::<f64>().ok());
    seconds.unwrap_or_else(|| panic!("no time in {said}")) * 1e3
}
