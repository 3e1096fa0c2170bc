//! Keeping guests out of a plaintext swap: what a clone wrote must not be readable from the disk, and a page that was
//! swapped out is on the disk.
//!
//! Nothing is needed where there is no swap, or only swap in memory (zram) or under dm-crypt, or where the launcher's
//! own cgroup forbids swapping. Else the launcher and QEMU lock their pages as they touch them, and overlays lie on a
//! tmpfs that is never swapped (what is not mapped cannot be locked): QEMU 10.0, Linux 6.4, and the rights for both.
//! Else the launch is refused and says what would help.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use engine::host::HostError;
use engine::units::ByteCount;
use nix::sys::resource::{getrlimit, setrlimit, Resource};
use rustix::fs::{Mode, OFlags};
use rustix::mm::MlockAllFlags;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};

/// What has to be done about swap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SwapGuard {
    /// Nothing.
    NotNeeded,
    /// `-overcommit mem-lock=on-fault` for QEMU, [`unswappable_file`] for overlays; the launcher is locked already.
    LockOnFault,
}

/// Decides for a domain that may come to use `bytes_max` bytes of memory.
pub fn guard(bytes_max: u64, can_lock: bool) -> Result<SwapGuard, HostError> {
    let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
    let plaintext: Vec<&str> = swap_devices(&swaps).filter(|device| is_plaintext(device)).collect();
    if plaintext.is_empty() || own_cgroup_forbids_swap() {
        return Ok(SwapGuard::NotNeeded);
    }
    let locked = match can_lock {
        true => lock_ourselves(bytes_max).and_then(|()| unswappable_file(ByteCount(4096)).map(drop)),
        false => Err(io::Error::other("this QEMU cannot lock memory as it is touched")),
    };
    let Err(error) = locked else { return Ok(SwapGuard::LockOnFault) };
    Err(HostError::Refused {
        step: "keep the clone out of swap",
        reason: format!(
            "{} would take its memory in the clear, and it cannot be locked ({error}). Hint: start it with \
             `systemd-run --user --scope -p MemorySwapMax=0 …`, encrypt the swap, or be root with QEMU 10 on Linux 6.4 \
             or later",
            plaintext.join(", ")
        ),
    })
}

/// Locks what this process has touched and will touch: what a clone says passes through it. Its limits become those of
/// QEMU, which may come to use `bytes_max`.
fn lock_ourselves(bytes_max: u64) -> io::Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_MEMLOCK)?;
    if !has_ipc_lock() && hard < bytes_max {
        return Err(io::Error::other(format!("ulimit -l is below {} MiB", bytes_max >> 20)));
    }
    setrlimit(Resource::RLIMIT_MEMLOCK, hard, hard)?;
    Ok(rustix::mm::mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT)?)
}

/// A file in memory that is never swapped out and holds up to `size` bytes: without a name, on a tmpfs of its own which is
/// mounted nowhere and ends with the file.
pub fn unswappable_file(size: ByteCount) -> io::Result<File> {
    let tmpfs = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_set_flag(&tmpfs, "noswap")?;
    rustix::mount::fsconfig_set_string(&tmpfs, "size", size.0.to_string())?;
    rustix::mount::fsconfig_create(&tmpfs)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOEXEC | MountAttrFlags::MOUNT_ATTR_NODEV;
    let root = rustix::mount::fsmount(&tmpfs, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(&root, ".", flags, Mode::RUSR | Mode::WUSR)?.into())
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

/// Whether we have CAP_IPC_LOCK (14): /proc/self/status, proc(5).
pub fn has_ipc_lock() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).is_some_and(|set| set & 1 << 14 != 0)
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
