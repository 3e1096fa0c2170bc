//! Times and processes, as they are seen from outside.

use std::io::Read;
use std::process::{Command, Stdio};
use std::time::Instant;

/// Milliseconds since `start`.
pub fn ms(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1e3
}

/// Exec to the first byte of the command's output; its end is waited for.
pub fn first_byte(command: &mut Command) -> f64 {
    let start = Instant::now();
    let mut child = command.stdout(Stdio::piped()).spawn().expect("it starts");
    let mut byte = [0u8];
    let read = child.stdout.as_mut().expect("a pipe").read_exact(&mut byte);
    read.unwrap_or_else(|_| panic!("no byte from {command:?}"));
    let taken = ms(start);
    child.wait().expect("it ends");
    taken
}

/// The processes a process has started.
pub fn children_of(pid: u32) -> Vec<u32> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    text.split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}

/// What of a process's memory goes with it, in MiB: its anonymous pages and its share of memory files. The pages of files it maps, of
/// which a hot image's are the most, are the page cache's, shared by all and given up at will (/proc/PID/smaps_rollup, Linux 5.1).
pub fn own_mib(pid: u32) -> f64 {
    let text = rollup(pid);
    (kib(&text, "Pss_Anon:") + kib(&text, "Pss_Shmem:")) / 1024.0
}

/// A process's proportional share of all it maps, in MiB.
pub fn pss_mib(pid: u32) -> f64 {
    kib(&rollup(pid), "Pss:") / 1024.0
}

fn rollup(pid: u32) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default()
}

/// Bytes available on this machine, in MiB.
pub fn available_mib() -> f64 {
    kib(&std::fs::read_to_string("/proc/meminfo").unwrap_or_default(), "MemAvailable:") / 1024.0
}

/// Processor time a process has had, in seconds (/proc/PID/stat, in ticks of 10 ms).
pub fn cpu_seconds(pid: u32) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields = text.rsplit_once(") ").map_or("", |(_, rest)| rest);
    fields.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<f64>().ok()).sum::<f64>()
        / 100.0
}

fn kib(text: &str, key: &str) -> f64 {
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    line.and_then(|rest| rest.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(0.0)
}
