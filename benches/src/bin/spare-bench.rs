//! Launches that get a spare, beside a spare driven by hand, interleaved in one run; what a spare costs while it waits; and
//! how much memory many clones take.
//!
//! `--full` measures 200 launches of each guest and adds its lines to benches/results/; `--short` is CI's guard.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdout, ExitCode, Stdio};
use std::time::{Duration, Instant};

use benches::clock::{available_mib, children_of, cpu_seconds, first_byte, ms, own_mib, pss_mib};
use benches::daemon::Daemon;
use benches::guests::{Bench, Subject, DEBIAN, TEST};
use benches::run::Options;
use benches::stats::{median, percentile};
use benches::table::Row;

const ABOUT: &str = "Measures launches that get a spare: 200 of each guest and 40 clones at once, or ten.";

/// The command whose first byte is waited for.
const COMMAND: [&str; 2] = ["echo", "x"];
/// How many clones run at once for the memory of one.
const MANY: usize = 40;

fn main() -> ExitCode {
    let options = Options::parse(ABOUT);
    let launches = options.launches(200, 10);
    let bench = Bench::open();
    options.run("spare", launches, || measure(&bench, launches, options.full))
}

fn measure(bench: &Bench, launches: usize, many: bool) -> Vec<Row> {
    let mut rows = Vec::new();
    for (name, subject, mark) in [("test guest", &TEST, 15.0), ("Debian guest", &DEBIAN, 40.0)] {
        bench.prepare(subject);
        let daemon = Daemon::start(bench, subject, None);
        let (mut ours, mut by_hand) = (Vec::new(), Vec::new());
        for _ in 0..launches {
            // Both are made before either is measured; the daemon's next one is not begun before both are over.
            let peer = HandDriven::start(bench, subject);
            daemon.await_spare();
            ours.push(first_byte(&mut bench.ours(subject, &COMMAND)));
            by_hand.push(peer.go());
        }
        let (p50, p95) = (median(&ours), percentile(&ours, 95.0));
        rows.push(Row::limit(format!("{name}: exec → first byte with a spare, p50"), p50, "ms", mark));
        rows.push(Row::report(format!("{name}: exec → first byte with a spare, p95"), p95, "ms"));
        rows.push(Row::ratio(format!("{name}: p95 : p50"), p95 / p50, 2.0));
        rows.push(Row::report(format!("{name}: spare driven by hand, p50"), median(&by_hand), "ms"));
        let ratio = p50 / median(&by_hand);
        // The test guest's mark is the one in ms: of its 10 ms our own process's start alone is one.
        rows.push(match subject.guest {
            "debian" => Row::ratio(format!("{name}: ours : by hand"), ratio, 1.15),
            _ => Row::report(format!("{name}: ours : by hand"), ratio, "x"),
        });
        rows.extend(cost_of_waiting(&daemon, name));
    }
    if many {
        rows.push(Row::limit(
            format!("{MANY} Debian clones at once: memory of each"),
            many_clones(bench),
            "MiB",
            80.0,
        ));
    }
    rows
}

/// A spare's memory against a booted guest's, and its processor time.
fn cost_of_waiting(daemon: &Daemon, name: &str) -> Vec<Row> {
    daemon.await_spare();
    let keeper = daemon.bench.keeper(daemon.subject);
    let processes: Vec<u32> = children_of(keeper).into_iter().chain([keeper]).collect();
    let spare: f64 = processes.iter().map(|pid| own_mib(*pid)).sum();
    let mapped: f64 = processes.iter().map(|pid| pss_mib(*pid)).sum();
    let before: f64 = processes.iter().map(|pid| cpu_seconds(*pid)).sum();
    std::thread::sleep(Duration::from_secs(10));
    let used = processes.iter().map(|pid| cpu_seconds(*pid)).sum::<f64>() - before;
    let booted = booted_mib(daemon.bench, daemon.subject);
    vec![
        Row::report(format!("{name}: memory of a waiting spare"), spare, "MiB"),
        Row::report(format!("{name}: the same with page cache it maps"), mapped, "MiB"),
        Row::report(format!("{name}: memory of a booted guest"), booted, "MiB"),
        Row::ratio(format!("{name}: waiting spare : booted guest"), spare / booted, 0.2),
        Row::limit(format!("{name}: processor time of a waiting spare"), used * 10.0, "%", 0.5),
    ]
}

/// A spare driven by hand, ready to go on.
struct HandDriven {
    process: Child,
    stdout: BufReader<ChildStdout>,
}

impl HandDriven {
    fn start(bench: &Bench, subject: &Subject) -> HandDriven {
        let mut command = bench.spare_by_hand(subject, &COMMAND);
        let mut process = command.stdout(Stdio::piped()).spawn().expect("it starts");
        let mut stdout = BufReader::new(process.stdout.take().expect("a pipe"));
        stdout.read_line(&mut String::new()).expect("its word that it is ready");
        HandDriven { process, stdout }
    }

    /// From the word to go on to the first byte, in ms.
    fn go(mut self) -> f64 {
        let start = Instant::now();
        self.process.stdin.as_mut().expect("a pipe").write_all(b"go\n").expect("it listens");
        self.stdout.read_exact(&mut [0u8]).expect("a byte");
        let taken = ms(start);
        self.process.wait().expect("it ends");
        taken
    }
}

/// The memory of the QEMU of a guest that was booted, when it has come to rest.
fn booted_mib(bench: &Bench, subject: &Subject) -> f64 {
    let mut command = bench.by_hand(subject, true, &["sh", "-c", "echo x; sleep 6"]);
    let mut peer = command.stdout(Stdio::piped()).spawn().expect("it starts");
    peer.stdout.as_mut().expect("a pipe").read_exact(&mut [0u8]).expect("a byte");
    std::thread::sleep(Duration::from_secs(5));
    let qemu = *children_of(peer.id()).first().expect("QEMU");
    let used = own_mib(qemu);
    peer.wait().expect("it ends");
    used
}

/// What of the machine's memory each of many Debian clones takes, all of them alive and idle.
fn many_clones(bench: &Bench) -> f64 {
    bench.prepare(&DEBIAN);
    let before = available_mib();
    let mut clones: Vec<Child> = (0..MANY)
        .map(|_| {
            let mut launch = bench.ours(&DEBIAN, &["sh", "-c", "echo x; read go"]);
            launch.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("it starts")
        })
        .collect();
    for clone in &mut clones {
        clone.stdout.as_mut().expect("a pipe").read_exact(&mut [0u8]).expect("a byte of each");
    }
    std::thread::sleep(Duration::from_secs(5));
    let each = (before - available_mib()) / MANY as f64;
    for mut clone in clones {
        drop(clone.stdin.take());
        clone.wait().expect("it ends");
    }
    each
}
