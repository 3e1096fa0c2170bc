//! Runs that are kept: benches/results/BENCH.jsonl, one dated line a run, with the machine it ran on.

use std::io::Write;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::json;

use crate::table::Row;

/// Adds a run.
pub fn keep(bench: &str, rows: &[Row], rounds: usize) {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let cpu =
        cpu.lines().find_map(|line| line.strip_prefix("model name\t: ")).unwrap_or("unknown").to_owned();
    let line = json!({
        "unix_seconds": seconds,
        "launches": rounds,
        "cpu": cpu,
        "cores": std::thread::available_parallelism().map_or(0, usize::from),
        "kernel": std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim(),
        "accel": "tcg",
        "rows": rows.iter().map(Row::json).collect::<Vec<_>>(),
    });
    let path = PathBuf::from(format!("benches/results/{bench}.jsonl"));
    let kept = std::fs::create_dir_all("benches/results")
        .and_then(|()| std::fs::File::options().append(true).create(true).open(&path))
        .and_then(|mut file| writeln!(file, "{line}"));
    match kept {
        Ok(()) => println!("\nkept in {}", path.display()),
        Err(error) => println!("\ncannot keep the run in {}: {error}", path.display()),
    }
}
