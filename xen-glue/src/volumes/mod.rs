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
mod stack;
pub mod store;

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::thread;

use engine::host::{CapturedDelta, HostError, VolumeSpec};

use crate::hypercalls::Uuid;
use kernel::{Kernel, LoopDevice};
use plan::{Device, Layer};
use stack::Stack;
use store::StoreError;

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
        for stack in self.stacks.iter().filter(|stack| stack.is_spilled()) {
            if stack.is_given_up()? {
                return Ok(Some(stack.volume()));
            }
        }
        Ok(None)
    }

    /// What the guest, and before it the savefile, changed since the bases. Only once the guest's disks are closed.
    pub fn read_deltas(mut self) -> Result<Vec<CapturedDelta>, VolumeError> {
        let spilled = self.stacks.iter_mut().filter(|stack| stack.is_spilled());
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

/// Overwrites a secret, and has the compiler believe that somebody looks.
pub(crate) fn wipe(bytes: &mut [u8]) {
    bytes.fill(0);
    std::hint::black_box(bytes);
}
