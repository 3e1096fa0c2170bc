//! Launches against their peers, interleaved in one run: the hand-driven QEMU and a cold boot, of the test guest and of a
//! Debian guest.
//!
//! `--full` measures 100 launches each and adds its lines to benches/results/; `--short` is CI's guard: it fails when a
//! ratio is worse than its mark by half, twice in a row.

use std::io::Read;
use std::path::Path;
use std::process::{Child, ExitCode, Stdio};
use std::time::{Duration, Instant};

use benches::clock::{children_of, first_byte, ms};
use benches::guests::{Bench, Subject, DEBIAN, TEST, TEST_4G};
use benches::run::Options;
use benches::stats::{median, percentile};
use benches::table::Row;

const ABOUT: &str =
    "Measures launches against their peers: 100 of each kind and 5 cold boots, or a dozen and one.";

/// The command whose first byte is waited for.
const COMMAND: [&str; 2] = ["echo", "x"];

/// Everything measured of one guest, in ms.
#[derive(Default)]
struct Times {
    ours: Vec<f64>,
    by_hand: Vec<f64>,
    cold: Vec<f64>,
    exit: Vec<f64>,
}

fn main() -> ExitCode {
    let options = Options::parse(ABOUT);
    let launches = options.launches(100, 12);
    let cold_boots = if options.full { 5 } else { 1 };
    let bench = Bench::open();
    for subject in [&TEST, &TEST_4G, &DEBIAN] {
        bench.prepare(subject);
    }
    options.run("launch", launches, || measure(&bench, launches, cold_boots))
}

fn measure(bench: &Bench, launches: usize, cold_boots: usize) -> Vec<Row> {
    let mut test = Times::default();
    let mut test_4g = Times::default();
    let mut debian = Times::default();
    for round in 0..launches {
        for (subject, times) in [(&TEST, &mut test), (&DEBIAN, &mut debian)] {
            one_launch(bench, subject, times);
            times.by_hand.push(first_byte(&mut bench.by_hand(subject, false, &COMMAND)));
            if round < cold_boots {
                times.cold.push(first_byte(&mut bench.by_hand(subject, true, &COMMAND)));
            }
        }
        one_launch(bench, &TEST_4G, &mut test_4g);
    }
    let mut rows = Vec::new();
    for (name, times, cold_mark) in [("test guest", &test, 1.0 / 20.0), ("Debian guest", &debian, 1.0 / 30.0)]
    {
        let ours = median(&times.ours);
        rows.push(Row::report(format!("{name}: launch → first byte, p50"), ours, "ms"));
        rows.push(Row::report(
            format!("{name}: launch → first byte, p95"),
            percentile(&times.ours, 95.0),
            "ms",
        ));
        rows.push(Row::report(format!("{name}: hand-driven, p50"), median(&times.by_hand), "ms"));
        rows.push(Row::report(format!("{name}: hand-driven, p95"), percentile(&times.by_hand, 95.0), "ms"));
        rows.push(Row::report(format!("{name}: cold boot, p50"), median(&times.cold), "ms"));
        rows.push(Row::ratio(format!("{name}: launch : hand-driven"), ours / median(&times.by_hand), 1.15));
        rows.push(Row::ratio(format!("{name}: launch : cold boot"), ours / median(&times.cold), cold_mark));
    }
    rows.push(Row::ratio("4 GiB guest : 256 MiB guest", median(&test_4g.ours) / median(&test.ours), 1.15));
    let exits: Vec<f64> = [&test, &debian, &test_4g].iter().flat_map(|times| times.exit.clone()).collect();
    rows.push(Row::limit("command's end → launcher exits, p50", median(&exits), "ms", 10.0));
    rows.push(Row::report("command's end → launcher exits, p95", percentile(&exits, 95.0), "ms"));
    let gone: Vec<f64> = (0..launches.min(20)).map(|_| all_gone(bench)).collect();
    rows.push(Row::limit("command's end → all gone, p50", median(&gone), "ms", 100.0));
    rows.push(Row::limit("idle test clone: private memory", idle_private(bench, &TEST), "MiB", 1.0));
    rows.push(Row::limit("idle Debian clone: private memory", idle_private(bench, &DEBIAN), "MiB", 16.0));
    rows
}

/// One of our launches: to the first byte, and from the command's end to the launcher's.
fn one_launch(bench: &Bench, subject: &Subject, times: &mut Times) {
    let mut command = bench.ours(subject, &COMMAND);
    let start = Instant::now();
    let mut launch = command.stdout(Stdio::piped()).spawn().expect("it starts");
    let mut stdout = launch.stdout.take().expect("a pipe");
    let mut byte = [0u8];
    stdout.read_exact(&mut byte).unwrap_or_else(|_| panic!("no byte from {}", subject.dvm));
    times.ours.push(ms(start));
    // The command closes its output when it ends; the launcher closes ours when it exits.
    let _ = stdout.read_to_end(&mut Vec::new());
    launch.wait().expect("it ends");
    times.exit.extend(exit_delay(bench, subject));
}

/// From the agent's word that the command has ended to the exit of the launcher, by the launcher's own timeline and our
/// clock.
fn exit_delay(bench: &Bench, subject: &Subject) -> Option<f64> {
    let mut command = bench.command("dispvm-launch");
    let start = Instant::now();
    let output = command.args(["--json", "--dvm", subject.dvm, "--", "true"]).output().ok()?;
    let total = ms(start);
    let said: serde_json::Value = serde_json::from_slice(&output.stderr).ok()?;
    let phases = said["phases_ms"].as_object()?;
    let until_exited: f64 =
        phases.iter().filter(|(phase, _)| *phase != "closed").filter_map(|(_, ms)| ms.as_f64()).sum();
    Some(total - until_exited)
}

/// From the end of stdin, which ends the command, to the end of QEMU, both seen from outside.
fn all_gone(bench: &Bench) -> f64 {
    let (mut launch, qemu) = idle_clone(bench, &TEST);
    let start = Instant::now();
    drop(launch.stdin.take());
    while Path::new(&format!("/proc/{qemu}")).exists() {
        std::thread::sleep(Duration::from_micros(200));
    }
    let taken = ms(start);
    launch.wait().expect("it ends");
    taken
}

/// `Anonymous` of the RAM mapping 5 s after the thaw, in MiB.
fn idle_private(bench: &Bench, subject: &Subject) -> f64 {
    let (mut launch, qemu) = idle_clone(bench, subject);
    std::thread::sleep(Duration::from_secs(5));
    let smaps = std::fs::read_to_string(format!("/proc/{qemu}/smaps")).expect("smaps");
    let mut in_ram = false;
    let mut kib = 0.0;
    for line in smaps.lines() {
        if line.split_whitespace().next().is_some_and(|word| word.contains('-') && !word.ends_with(':')) {
            in_ram = line.ends_with("memory.img");
        } else if let Some(rest) = line.strip_prefix("Anonymous:").filter(|_| in_ram) {
            kib += rest.trim().trim_end_matches(" kB").parse::<f64>().unwrap_or(0.0);
        }
    }
    drop(launch.stdin.take());
    launch.wait().expect("it ends");
    kib / 1024.0
}

/// A clone that has said something and waits for the end of its stdin, and its QEMU.
fn idle_clone(bench: &Bench, subject: &Subject) -> (Child, u32) {
    let mut command = bench.ours(subject, &["sh", "-c", "echo x; read go"]);
    let mut launch = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("it starts");
    let mut byte = [0u8];
    launch.stdout.as_mut().expect("a pipe").read_exact(&mut byte).expect("a byte");
    let qemu = *children_of(launch.id()).first().expect("the launcher has one child");
    (launch, qemu)
}
