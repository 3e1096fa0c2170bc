//! The results of past runs: one JSON line each, with the machine it was measured on.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::json;

use crate::table::Row;

/// Adds a run of `launches` launches of each kind to benches/results/`bench`.jsonl.
pub fn keep(bench: &str, rows: &[Row], launches: usize) {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let cpu =
        cpu.lines().find_map(|line| line.strip_prefix("model name\t: ")).unwrap_or("unknown").to_owned();
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let line = json!({
        "unix_seconds": seconds,
        "launches": launches,
        "cpu": cpu,
        "cores": std::thread::available_parallelism().map_or(0, usize::from),
        "kernel": fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim(),
        "accel": "tcg",
        // What else the machine did: absolute times of a busy one say little, ratios within the run say more.
        "load_average": load.split_whitespace().next(),
        "rows": rows.iter().map(Row::json).collect::<Vec<_>>(),
    });
    let folder = Path::new("benches/results");
    let path = folder.join(format!("{bench}.jsonl"));
    let kept = fs::create_dir_all(folder)
        .and_then(|()| File::options().append(true).create(true).open(&path))
        .and_then(|mut file| writeln!(file, "{line}"));
    match kept {
        Ok(()) => println!("\nkept in {}", path.display()),
        Err(error) => println!("\ncannot keep the run in {}: {error}", path.display()),
    }
}
