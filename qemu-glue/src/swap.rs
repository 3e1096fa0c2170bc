//! Keeping guests out of a plaintext swap: what a clone wrote must not be readable from the disk, and a page that was
//! swapped out is on the disk.
//!
//! Nothing is needed where there is no swap, or only swap in memory (zram) or under dm-crypt, or where the launcher's
//! own cgroup forbids swapping. Else QEMU locks its pages as it touches them, if it can (10.0) and may. Else the
//! launch is refused and says what would help.

use std::fs;
use std::path::Path;

use engine::host::HostError;
use nix::sys::resource::{getrlimit, Resource};

/// What has to be done about swap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SwapGuard {
    /// Nothing.
    NotNeeded,
    /// `-overcommit mem-lock=on-fault`.
    LockOnFault,
}

/// Decides for a domain that may come to use `bytes_max` bytes of memory.
pub fn guard(bytes_max: u64, can_lock: bool) -> Result<SwapGuard, HostError> {
    let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
    let plaintext: Vec<&str> = swap_devices(&swaps).filter(|device| is_plaintext(device)).collect();
    if plaintext.is_empty() || own_cgroup_forbids_swap() {
        return Ok(SwapGuard::NotNeeded);
    }
    if can_lock && may_lock(bytes_max) {
        return Ok(SwapGuard::LockOnFault);
    }
    Err(HostError::Refused {
        step: "keep the clone out of swap",
        reason: format!(
            "{} would take its memory in the clear. Hint: start it with `systemd-run --user --scope -p \
             MemorySwapMax=0 …`, encrypt the swap, or use QEMU 10 or later with a memory lock limit (ulimit -l) \
             above {} MiB",
            plaintext.join(", "),
            bytes_max >> 20
        ),
    })
}

/// The devices and files of /proc/swaps (proc(5)): one a line after a heading, the name first.
fn swap_devices(swaps: &str) -> impl Iterator<Item = &str> {
    swaps.lines().skip(1).filter_map(|line| line.split_whitespace().next())
}

fn is_plaintext(device: &str) -> bool {
    let Some(name) =
        fs::canonicalize(device).ok().and_then(|path| path.file_name()?.to_str().map(str::to_owned))
    else {
        return true;
    };
    let block = Path::new("/sys/class/block").join(&name);
    if name.starts_with("zram") {
        // A zram may write pages back to a disk.
        return !matches!(
            fs::read_to_string(block.join("backing_dev")).as_deref().map(str::trim),
            Ok("none") | Err(_)
        );
    }
    !fs::read_to_string(block.join("dm/uuid")).is_ok_and(|uuid| uuid.starts_with("CRYPT-"))
}

/// cgroup v2: `memory.swap.max` of our own group or of one above it is 0.
fn own_cgroup_forbids_swap() -> bool {
    let Ok(own) = fs::read_to_string("/proc/self/cgroup") else { return false };
    let Some(path) = own.lines().find_map(|line| line.strip_prefix("0::/")) else { return false };
    let root = Path::new("/sys/fs/cgroup");
    root.join(path)
        .ancestors()
        .take_while(|folder| *folder != root)
        .any(|folder| fs::read_to_string(folder.join("memory.swap.max")).is_ok_and(|max| max.trim() == "0"))
}

/// Root raises the limit for the child; anyone else lives with the one there is.
fn may_lock(bytes_max: u64) -> bool {
    nix::unistd::geteuid().is_root()
        || getrlimit(Resource::RLIMIT_MEMLOCK)
            .is_ok_and(|(_, hard)| hard == nix::libc::RLIM_INFINITY || hard >= bytes_max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_from_the_first_column() {
        let text = "Filename\t\t\t\tType\t\tSize\n/dev/sda2    partition\t1\n/swapfile file 2\n";
        assert_eq!(swap_devices(text).collect::<Vec<_>>(), ["/dev/sda2", "/swapfile"]);
        assert_eq!(swap_devices("Filename\n").count(), 0);
    }

    #[test]
    fn an_unknown_device_counts_as_plaintext() {
        assert!(is_plaintext("/dev/no-such-swap"));
        assert!(is_plaintext("/etc/hostname"));
    }
}
