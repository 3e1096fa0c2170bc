//! A domain's disks as dom0 makes them: loop devices and device-mapper, by the kernel's own requests, without tools.
//!
//! Invariants:
//! - a base and a savefile's changes are opened read-only and lie under read-only devices;
//! - what a guest writes reaches the disk under a key that was drawn for this one volume, was given to the kernel and to
//!   nobody else, and is gone with the device. A volume that is kept ([`engine::host::Base::Persistent`]) is the exception;
//! - a domain's spill is one file without a name: whoever dies, its blocks are free when its devices are;
//! - every mapped device carries its domain's uuid in its name, so that [`sweep`] finds those of domains that are gone. Loop
//!   devices need no sweep: they go with their last user.
//!
//! | module | what is in it |
//! |---|---|
//! | [`plan`] | names, tables and places, as values |
//! | [`store`] | the exception store of dm-snapshot, read and written |
//! | [`kernel`] | what is asked of the kernel |

pub mod kernel;
pub mod plan;
pub mod store;

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::thread;

use engine::host::{CapturedDelta, HostError, VolumeSpec};
use engine::units::ByteCount;
use memmap2::MmapMut;
use nix::sys::memfd::{memfd_create, MemFdCreateFlag};
use rustix::fs::OFlags;

use crate::hypercalls::Uuid;
use kernel::{Kernel, LoopDevice};
use plan::{Device, Layer, Part, Planned, Table, KEY_BYTES};
use store::{Changes, StoreError};

/// What went wrong with a domain's volumes.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// They cannot be made as asked.
    #[error("volume {volume}: {why}")]
    Impossible {
        /// Which volume.
        volume: String,
        /// What is wrong.
        why: String,
    },
    /// The system failed.
    #[error("cannot {step} of volume {volume}: {source}")]
    Io {
        /// What was being done.
        step: &'static str,
        /// For which volume, or `all`.
        volume: String,
        /// The system's error.
        source: io::Error,
    },
    /// What the guest changed cannot be read.
    #[error("volume {volume}")]
    Store {
        /// Which volume.
        volume: String,
        /// What is wrong.
        source: StoreError,
    },
}

impl From<VolumeError> for HostError {
    fn from(err: VolumeError) -> HostError {
        match err {
            VolumeError::Impossible { volume, why } => {
                HostError::Refused { step: "make the volumes", reason: format!("volume {volume}: {why}") }
            }
            err => HostError::Io { step: "make the volumes", source: io::Error::other(err) },
        }
    }
}

fn io_error<'a>(step: &'static str, volume: &'a str) -> impl Fn(io::Error) -> VolumeError + 'a {
    move |source| VolumeError::Io { step, volume: volume.to_owned(), source }
}

/// A disk that a guest can be given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// The volume's name: `root`.
    pub name: String,
    /// The virtual device: 51712 for xvda (docs/man/xen-vbd-interface.7).
    pub vdev: u32,
    /// The block device in dom0.
    pub device: Device,
    /// Whether the guest may only read it.
    pub read_only: bool,
    /// Whether what it discards may be given back to the disk: only of a volume that is kept.
    pub discard: bool,
}

/// The volumes of one domain. Dropping them removes them.
#[derive(Debug)]
pub struct Volumes {
    disks: Vec<Disk>,
    stacks: Vec<Stack>,
}

/// The devices of one volume, removed when dropped.
#[derive(Debug)]
struct Stack {
    kernel: Arc<Kernel>,
    tag: Uuid,
    planned: Planned,
    /// What was made, in this order.
    layers: Vec<Layer>,
    top: Device,
    cow: Device,
    /// The store of a savefile's changes.
    delta: Option<File>,
    /// The loop device of a volume that is kept: nothing else holds it until the guest does.
    _kept: Option<LoopDevice>,
}

impl Volumes {
    /// Makes a domain's volumes. `tag` is the domain's uuid; `deltas` are what a savefile changed, by volume, as
    /// [`store::write_store`] wrote it; `spill_dir` is where what the guest writes goes.
    ///
    /// On failure nothing is left.
    pub fn assemble(
        tag: &Uuid,
        specs: &[VolumeSpec],
        deltas: Vec<(String, File)>,
        spill_dir: &Path,
    ) -> Result<Volumes, VolumeError> {
        let names: Vec<&str> = deltas.iter().map(|(name, _)| name.as_str()).collect();
        let (planned, spill_bytes) =
            plan::plan(specs, &names).map_err(|(volume, why)| VolumeError::Impossible { volume, why })?;
        let kernel = Arc::new(Kernel::open().map_err(io_error("open the kernel's devices", "all"))?);
        let spill = match spill_bytes.0 {
            0 => None,
            bytes => Some(make_spill(&kernel, spill_dir, bytes).map_err(io_error("make the spill", "all"))?),
        };
        let mut files: Vec<Option<File>> = deltas.into_iter().map(|(_, file)| Some(file)).collect();
        let mut works = Vec::with_capacity(planned.len());
        for volume in planned {
            let delta = volume.delta.and_then(|at| files.get_mut(at)?.take());
            works.push((Stack::new(&kernel, tag, volume), delta));
        }
        // Volumes do not depend on each other, and each waits for the kernel now and then.
        let spill = spill.as_ref().map(|spill| spill.device);
        let made: Vec<Result<Stack, VolumeError>> = thread::scope(|scope| {
            let running: Vec<_> = works
                .into_iter()
                .map(|(stack, delta)| scope.spawn(move || stack.make(delta, spill)))
                .collect();
            let died = || VolumeError::Impossible { volume: "all".into(), why: "a thread died".into() };
            running.into_iter().map(|thread| thread.join().unwrap_or_else(|_| Err(died()))).collect()
        });
        let stacks = made.into_iter().collect::<Result<Vec<_>, _>>()?;
        Ok(Volumes { disks: stacks.iter().map(Stack::disk).collect(), stacks })
    }

    /// The disks, in the order of the specs.
    pub fn disks(&self) -> &[Disk] {
        &self.disks
    }

    /// The first volume whose snapshot was given up, because the disk below it was full or failed. Its guest has read and
    /// write errors from then on.
    pub fn failed(&self) -> Result<Option<&str>, VolumeError> {
        for stack in self.stacks.iter().filter(|stack| stack.planned.spill.is_some()) {
            let volume = &stack.planned.spec.name;
            let status = stack
                .kernel
                .status(&stack.name(Layer::Top))
                .map_err(io_error("ask for the state", volume))?;
            if !status.starts_with(|first: char| first.is_ascii_digit()) {
                return Ok(Some(volume));
            }
        }
        Ok(None)
    }

    /// What the guest, and before it the savefile, changed since the bases. Only once the guest's disks are closed.
    pub fn read_deltas(mut self) -> Result<Vec<CapturedDelta>, VolumeError> {
        let spilled = self.stacks.iter_mut().filter(|stack| stack.planned.spill.is_some());
        let deltas = spilled.map(Stack::read_delta).collect::<Result<_, _>>()?;
        self.close()?;
        Ok(deltas)
    }

    /// Removes them, shortly waiting for whoever still has them open, and then leaving it to the kernel to do it when
    /// nobody has.
    pub fn close(mut self) -> Result<(), VolumeError> {
        self.remove()
    }

    /// All at once: to remove a device is to wait for grace periods of the kernel's, and these can be the same ones.
    fn remove(&mut self) -> Result<(), VolumeError> {
        let stacks = std::mem::take(&mut self.stacks);
        thread::scope(|scope| {
            let running: Vec<_> =
                stacks.into_iter().map(|mut stack| scope.spawn(move || stack.remove())).collect();
            running.into_iter().map(|thread| thread.join().unwrap_or(Ok(()))).fold(Ok(()), Result::and)
        })
    }
}

impl Drop for Volumes {
    fn drop(&mut self) {
        if let Err(err) = self.remove() {
            tracing::warn!("{err}");
        }
    }
}

impl Stack {
    fn new(kernel: &Arc<Kernel>, tag: &Uuid, planned: Planned) -> Stack {
        let none = Device { major: 0, minor: 0 };
        let kernel = kernel.clone();
        Stack {
            kernel,
            tag: *tag,
            planned,
            layers: Vec::new(),
            top: none,
            cow: none,
            delta: None,
            _kept: None,
        }
    }

    fn make(mut self, delta: Option<File>, spill: Option<Device>) -> Result<Stack, VolumeError> {
        let size = self.planned.spec.size;
        // Held until the layer above holds it.
        let base = self.attach_base()?;
        let (Some(part), Some(spill)) = (self.planned.spill, spill) else {
            if let Some(base) = base {
                self.top = base.device;
                self._kept = Some(base);
            }
            return Ok(self);
        };
        let mut origin = match &base {
            Some(base) => base.device,
            None => self.map(Layer::Zero, &Table::zero(size))?,
        };
        if let Some(file) = delta {
            origin = self.stack_delta(origin, &file)?;
            self.delta = Some(file);
        }
        self.cow = self.make_cow(spill, part)?;
        self.top = self.map(Layer::Top, &Table::snapshot(origin, self.cow, size, false))?;
        Ok(self)
    }

    fn attach_base(&self) -> Result<Option<LoopDevice>, VolumeError> {
        let VolumeSpec { name, base, size } = &self.planned.spec;
        let Some(path) = base.path() else { return Ok(None) };
        let writable = base.is_persistent();
        let file =
            File::options().read(true).write(writable).open(path).map_err(io_error("open the base", name))?;
        let length = file.metadata().map_err(io_error("open the base", name))?.len();
        if length < size.0 {
            let why = format!("{} has {length} bytes, and the volume {}", path.display(), size.0);
            return Err(VolumeError::Impossible { volume: name.clone(), why });
        }
        let attached = self.kernel.attach(&file, size.0, !writable);
        attached.map(Some).map_err(io_error("attach the base", name))
    }

    /// The savefile's changes over the base.
    fn stack_delta(&mut self, origin: Device, file: &File) -> Result<Device, VolumeError> {
        let VolumeSpec { name, size, .. } = self.planned.spec.clone();
        let step = "attach the changes";
        let length = file.metadata().map_err(io_error(step, &name))?.len();
        let store = self.kernel.attach(file, length, true).map_err(io_error(step, &name))?;
        self.map(Layer::Delta, &Table::snapshot(origin, store.device, size, true))
    }

    /// An empty store under a key that nobody knows.
    fn make_cow(&mut self, spill: Device, part: Part) -> Result<Device, VolumeError> {
        let step = "draw a key for the writes";
        let mut key = [0; KEY_BYTES];
        let drawn = File::open("/dev/urandom").and_then(|mut random| random.read_exact(&mut key));
        drawn.map_err(io_error(step, &self.planned.spec.name))?;
        let table = Table::crypt(&key, spill, part);
        wipe(&mut key);
        let cow = self.map(Layer::Cow, &table)?;
        self.write_empty(cow).map_err(io_error("prepare the writes", &self.planned.spec.name))?;
        Ok(cow)
    }

    /// What was never written reads as noise through the key, and would not pass for an empty store.
    fn write_empty(&self, cow: Device) -> io::Result<()> {
        let device = self.kernel.open_device(cow, OFlags::RDWR | OFlags::DIRECT)?;
        // Direct writes ask for memory that is aligned to a sector; this is aligned to a page.
        let mut buffer = MmapMut::map_anon(store::EMPTY_BYTES)?;
        buffer.copy_from_slice(&store::empty());
        device.write_all_at(&buffer, 0)
    }

    fn map(&mut self, layer: Layer, table: &Table) -> Result<Device, VolumeError> {
        let device = self.kernel.map(&self.name(layer), table);
        let device = device.map_err(io_error("map a layer", &self.planned.spec.name))?;
        self.layers.push(layer);
        Ok(device)
    }

    fn name(&self, layer: Layer) -> String {
        plan::name(&self.tag, &self.planned.spec.name, layer)
    }

    fn disk(&self) -> Disk {
        Disk {
            name: self.planned.spec.name.clone(),
            vdev: self.planned.vdev,
            device: self.top,
            read_only: false,
            discard: self.planned.spec.base.is_persistent(),
        }
    }

    fn read_delta(&mut self) -> Result<CapturedDelta, VolumeError> {
        let VolumeSpec { name: volume, size, .. } = self.planned.spec.clone();
        let step = "take the snapshot off the writes";
        self.kernel.unmap(&self.name(Layer::Top)).map_err(io_error(step, &volume))?;
        self.layers.retain(|layer| *layer != Layer::Top);
        self.copy_changes(size)
            .map_err(|source| VolumeError::Store { volume: volume.clone(), source })
            .map(|(raw, changed)| CapturedDelta { volume, size, raw, changed })
    }

    fn copy_changes(&self, size: ByteCount) -> Result<(File, Vec<engine::units::PageRange>), StoreError> {
        let length = ByteCount(self.planned.spill.map_or(0, |part| part.size));
        let raw = memory_file(size)?;
        let cow = self.kernel.open_device(self.cow, OFlags::RDONLY)?;
        let changes = Changes::read(&cow, length, size)?;
        changes.copy(&cow, &raw)?;
        let Some(delta) = &self.delta else { return Ok((raw, changes.ranges())) };
        let earlier = Changes::read(delta, ByteCount(delta.metadata()?.len()), size)?.without(&changes);
        earlier.copy(delta, &raw)?;
        Ok((raw, changes.ranges_with(&earlier)))
    }

    fn remove(&mut self) -> Result<(), VolumeError> {
        let mut result = Ok(());
        while let Some(layer) = self.layers.pop() {
            let removed = self.kernel.unmap_in_the_end(&self.name(layer));
            result = result.and(removed.map_err(io_error("remove a layer", &self.planned.spec.name)));
        }
        result
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        if let Err(err) = self.remove() {
            tracing::warn!("{err}");
        }
    }
}

/// Removes the mapped devices of domains that are no more. Answers how many there were; those that somebody has open go when
/// nobody has.
pub fn sweep(is_alive: &dyn Fn(&Uuid) -> bool) -> Result<usize, VolumeError> {
    let step = "remove what dead domains left";
    let kernel = Kernel::open().map_err(io_error(step, "all"))?;
    let mapped = kernel.mapped().map_err(io_error(step, "all"))?;
    let dead = |name: &String| plan::owner(name).is_some_and(|uuid| !is_alive(&uuid));
    let mut left: Vec<String> = mapped.into_iter().filter(dead).collect();
    let found = left.len();
    // A layer can go when those above it have gone; so there are at most as many rounds as layers.
    for _ in Layer::ALL {
        left.retain(|name| !kernel.try_unmap(name));
    }
    for name in left {
        kernel.unmap_in_the_end(&name).map_err(io_error(step, &name))?;
    }
    Ok(found)
}

fn make_spill(kernel: &Kernel, folder: &Path, bytes: u64) -> io::Result<LoopDevice> {
    let file =
        File::options().read(true).write(true).custom_flags(libc::O_TMPFILE).mode(0o600).open(folder)?;
    file.set_len(bytes)?;
    kernel.attach(&file, bytes, false)
}

/// A sparse file in memory.
fn memory_file(size: ByteCount) -> io::Result<File> {
    let file: OwnedFd = memfd_create(c"delta", MemFdCreateFlag::MFD_CLOEXEC)?;
    let file = File::from(file);
    file.set_len(size.0)?;
    Ok(file)
}

/// Overwrites a secret, and has the compiler believe that somebody looks.
pub(crate) fn wipe(bytes: &mut [u8]) {
    bytes.fill(0);
    std::hint::black_box(bytes);
}
