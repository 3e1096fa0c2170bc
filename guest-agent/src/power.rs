//! Settling the guest's memory before a capture, and switching the guest off.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::Path;

use crate::failure::{Failure, Step};
use crate::sys;

/// systemd's signal for `poweroff.target`, from SIGRTMIN on.
const SYSTEMD_POWEROFF: i32 = 4;

/// Writes back what is dirty, then gives up what can be read again: the savefile gets smaller, and free memory contiguous.
/// Answers how many bytes of memory are free then.
pub fn settle() -> Result<u64, Failure> {
    nix::unistd::sync();
    write_knob("/proc/sys/vm/drop_caches", b"3")?;
    // Not every kernel can compact.
    let compact = "/proc/sys/vm/compact_memory";
    if Path::new(compact).exists() {
        write_knob(compact, b"1")?;
    }
    free_bytes()
}

/// Has systemd shut down, where process 1 is systemd, else syncs and switches off at once.
pub fn shut_down() -> Result<(), Failure> {
    let init = fs::read_to_string("/proc/1/comm").unwrap_or_default();
    if init.trim_end() == "systemd" {
        return sys::signal_init(SYSTEMD_POWEROFF).step(|| "have systemd power off");
    }
    nix::unistd::sync();
    Err(Failure::system("power off", sys::power_off()))
}

/// `MemFree` of proc(5), there in KiB.
fn free_bytes() -> Result<u64, Failure> {
    let text = fs::read_to_string("/proc/meminfo").step(|| "read /proc/meminfo")?;
    let kib = text
        .lines()
        .find_map(|line| line.strip_prefix("MemFree:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    Ok(kib.unwrap_or(0) << 10)
}

fn write_knob(file: &str, value: &[u8]) -> Result<(), Failure> {
    let knob = OpenOptions::new().write(true).open(file);
    knob.and_then(|mut knob| knob.write_all(value)).step(|| format!("write {file}"))
}
