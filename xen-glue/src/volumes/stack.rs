//! One volume's devices, from its base to what the guest sees.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use engine::host::{CapturedDelta, VolumeSpec};
use engine::units::{ByteCount, PageRange};
use memmap2::MmapMut;
use nix::sys::memfd::{memfd_create, MemFdCreateFlag};
use rustix::fs::OFlags;

use super::kernel::{Kernel, LoopDevice};
use super::plan::{self, Device, Layer, Part, Planned, Table, KEY_BYTES};
use super::store::{self, Changes, StoreError};
use super::{io_error, wipe, Disk, VolumeError};
use crate::hypercalls::Uuid;

/// The devices of one volume, removed when dropped.
#[derive(Debug)]
pub struct Stack {
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

impl Stack {
    /// One of which nothing is made yet.
    pub fn new(kernel: &Arc<Kernel>, tag: &Uuid, planned: Planned) -> Stack {
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

    /// Makes its devices. `spill` is the domain's; `delta` what a savefile changed.
    pub fn make(mut self, delta: Option<File>, spill: Option<Device>) -> Result<Stack, VolumeError> {
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

    /// The volume's name.
    pub fn volume(&self) -> &str {
        &self.planned.spec.name
    }

    /// Whether what the guest writes goes with the devices.
    pub fn is_spilled(&self) -> bool {
        self.planned.spill.is_some()
    }

    /// Whether the kernel has given the snapshot up: its status is then a word instead of numbers.
    pub fn is_given_up(&self) -> Result<bool, VolumeError> {
        let status = self.kernel.status(&self.name(Layer::Top));
        let status = status.map_err(io_error("ask for the state", self.volume()))?;
        Ok(!status.starts_with(|first: char| first.is_ascii_digit()))
    }

    /// What the guest is given.
    pub fn disk(&self) -> Disk {
        Disk {
            name: self.planned.spec.name.clone(),
            vdev: self.planned.vdev,
            device: self.top,
            read_only: false,
            discard: self.planned.spec.base.is_persistent(),
        }
    }

    /// What was changed since the base. The guest's disk must be closed; the top is removed.
    pub fn read_delta(&mut self) -> Result<CapturedDelta, VolumeError> {
        let VolumeSpec { name: volume, size, .. } = self.planned.spec.clone();
        let step = "take the snapshot off the writes";
        self.kernel.unmap(&self.name(Layer::Top)).map_err(io_error(step, &volume))?;
        self.layers.retain(|layer| *layer != Layer::Top);
        self.copy_changes(size)
            .map_err(|source| VolumeError::Store { volume: volume.clone(), source })
            .map(|(raw, changed)| CapturedDelta { volume, size, raw, changed })
    }

    fn copy_changes(&self, size: ByteCount) -> Result<(File, Vec<PageRange>), StoreError> {
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

    /// Removes what was made.
    pub fn remove(&mut self) -> Result<(), VolumeError> {
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

/// A sparse file in memory.
fn memory_file(size: ByteCount) -> io::Result<File> {
    let file: OwnedFd = memfd_create(c"delta", MemFdCreateFlag::MFD_CLOEXEC)?;
    let file = File::from(file);
    file.set_len(size.0)?;
    Ok(file)
}
