//! What is asked of dom0's kernel for volumes: loop devices, mapped devices, and block devices opened by number.
//!
//! Nothing here depends on udev, and on devtmpfs only for the two control devices: block devices are opened by nodes made for the
//! purpose on a file system that is mounted nowhere.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use rustix::fs::{AtFlags, FileType, FlockOperation, Mode, OFlags};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};

use super::plan::{Device, Table};
use crate::sys::device_mapper::Control;
use crate::sys::loop_device;

const DM_CONTROL: &str = "/dev/mapper/control";
const LOOP_CONTROL: &str = "/dev/loop-control";
/// Interface 4 of device-mapper, which all kernels since 2003 have.
const DM_MAJOR: u32 = 4;
/// How often a loop device that another process took first is given up for the next.
const LOOP_TRIES: u32 = 64;
/// A device that somebody still has open is tried again after 1, 2, 4 … ms: half a second in all.
const REMOVE_TRIES: u32 = 9;
/// A snapshot that others disturb is tried again after 1, 2, 4 … ms.
const LOAD_TRIES: u32 = 6;

/// The kernel's devices.
#[derive(Debug)]
pub struct Kernel {
    control: Control,
    /// Locked while a loop device is found and taken, so that our own threads do not race for it.
    loops: Mutex<File>,
    /// Locked while a snapshot's table is loaded; see [`Kernel::load_snapshot`].
    snapshots: Mutex<File>,
    nodes: OwnedFd,
}

/// A loop device, held open: it lets go of its file when nobody holds it.
#[derive(Debug)]
pub struct LoopDevice {
    /// Its number.
    pub device: Device,
    _held: File,
}

impl Kernel {
    /// Opens what is needed. NotFound: the modules loop or dm-mod are not loaded.
    pub fn open() -> io::Result<Kernel> {
        let open = |path| File::options().read(true).write(true).open(path);
        let control = Control::new(open(DM_CONTROL).map_err(without("dm-mod"))?);
        let version = control.version()?;
        if version.first() != Some(&DM_MAJOR) {
            return Err(io::Error::other(format!(
                "device-mapper speaks {version:?} and not version {DM_MAJOR}"
            )));
        }
        let loops = Mutex::new(open(LOOP_CONTROL).map_err(without("loop"))?);
        let snapshots = Mutex::new(open(DM_CONTROL)?);
        Ok(Kernel { control, loops, snapshots, nodes: private_folder()? })
    }

    /// Opens a block device by its number.
    pub fn open_device(&self, device: Device, flags: OFlags) -> io::Result<File> {
        let name = format!("{device}-{:?}", thread::current().id());
        let number = rustix::fs::makedev(device.major, device.minor);
        rustix::fs::mknodat(&self.nodes, &name, FileType::BlockDevice, Mode::RUSR | Mode::WUSR, number)?;
        let opened = rustix::fs::openat(&self.nodes, &name, flags | OFlags::CLOEXEC, Mode::empty());
        rustix::fs::unlinkat(&self.nodes, &name, AtFlags::empty())?;
        Ok(opened?.into())
    }

    /// Puts the first `size` bytes of a file under a loop device.
    pub fn attach(&self, file: &File, size: u64, read_only: bool) -> io::Result<LoopDevice> {
        let loops = self.loops.lock().unwrap_or_else(PoisonError::into_inner);
        for _ in 0..LOOP_TRIES {
            let number = loop_device::free_number(loops.as_fd())?;
            let device = device_of(&fs::read_to_string(format!("/sys/block/loop{number}/dev"))?)?;
            let access = if read_only { OFlags::RDONLY } else { OFlags::RDWR };
            let held = self.open_device(device, access)?;
            match loop_device::configure(held.as_fd(), file, size, read_only) {
                Err(err) if err.raw_os_error() == Some(Errno::EBUSY as i32) => {}
                configured => return configured.map(|()| LoopDevice { device, _held: held }),
            }
        }
        Err(Errno::EBUSY.into())
    }

    /// Makes a mapped device. On failure there is none.
    pub fn map(&self, name: &str, table: &Table) -> io::Result<Device> {
        let device = self.control.create(name)?;
        let loaded = match table.target {
            "snapshot" => self.load_snapshot(name, table),
            _ => self.control.load(name, table),
        };
        match loaded.and_then(|()| self.control.resume(name)) {
            Ok(()) => Ok(device),
            Err(err) => {
                let _ = self.control.remove(name, false);
                let known = self.control.targets().unwrap_or_default();
                match known.iter().any(|target| target == table.target) {
                    true => Err(err),
                    false => Err(without(&format!("dm-{}", table.target))(err)),
                }
            }
        }
    }

    /// Of several snapshots that are loaded at once, by whomever, some fail with ENOMEM and a warning in the kernel's log: each
    /// load makes and destroys a slab cache of the same name, which is not atomic (dm-bufio, Linux 6.1 and before 6.12). So
    /// ours take turns, across processes too, and one that others disturb is tried again.
    fn load_snapshot(&self, name: &str, table: &Table) -> io::Result<()> {
        let turn = self.snapshots.lock().unwrap_or_else(PoisonError::into_inner);
        rustix::fs::flock(&*turn, FlockOperation::LockExclusive)?;
        let mut result = self.control.load(name, table);
        for attempt in 0..LOAD_TRIES {
            if !result.as_ref().is_err_and(|err| is(err, Errno::ENOMEM)) {
                break;
            }
            thread::sleep(Duration::from_millis(1 << attempt));
            result = self.control.load(name, table);
        }
        rustix::fs::flock(&*turn, FlockOperation::Unlock)?;
        result
    }

    /// Removes a mapped device, waiting shortly for whoever has it open. One that is not there is removed.
    pub fn unmap(&self, name: &str) -> io::Result<()> {
        for attempt in 0..REMOVE_TRIES {
            match self.control.remove(name, false) {
                Err(err) if is(&err, Errno::ENXIO) => return Ok(()),
                Err(err) if is(&err, Errno::EBUSY) => thread::sleep(Duration::from_millis(1 << attempt)),
                removed => return removed,
            }
        }
        self.control.remove(name, false)
    }

    /// Removes a mapped device now, or else as soon as nobody has it open.
    pub fn unmap_in_the_end(&self, name: &str) -> io::Result<()> {
        match self.unmap(name) {
            Err(err) if is(&err, Errno::EBUSY) => self.control.remove(name, true),
            removed => removed,
        }
    }

    /// Removes a mapped device at once, if nobody has it open. Whether it is gone.
    pub fn try_unmap(&self, name: &str) -> bool {
        self.control.remove(name, false).is_ok()
    }

    /// The names of all mapped devices.
    pub fn mapped(&self) -> io::Result<Vec<String>> {
        Ok(self.control.list()?.into_iter().map(|(name, _)| name).collect())
    }

    /// What the target of a mapped device says of itself.
    pub fn status(&self, name: &str) -> io::Result<String> {
        self.control.status(name)
    }
}

fn is(err: &io::Error, errno: Errno) -> bool {
    err.raw_os_error() == Some(errno as i32)
}

fn without(module: &str) -> impl FnOnce(io::Error) -> io::Error + '_ {
    move |err| io::Error::new(err.kind(), format!("{err}. Hint: modprobe {module}"))
}

/// A file system in memory that is mounted nowhere and allows device nodes.
fn private_folder() -> io::Result<OwnedFd> {
    let tmpfs = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_create(&tmpfs)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOEXEC | MountAttrFlags::MOUNT_ATTR_NOSUID;
    Ok(rustix::mount::fsmount(&tmpfs, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?)
}

/// `7:3` as sysfs has it.
fn device_of(text: &str) -> io::Result<Device> {
    let (major, minor) = text.trim().split_once(':').ok_or(io::ErrorKind::InvalidData)?;
    let number = |text: &str| text.parse().map_err(|_| io::Error::from(io::ErrorKind::InvalidData));
    Ok(Device { major: number(major)?, minor: number(minor)? })
}
