//! [`SimHost`]: boots and restores simulated guests.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use engine::host::{BootPurpose, Confinement, Domain, GuestSpec, Host, HostError, HostFacts};
use engine::image::hot::{HotFiles, StackDelta};
use engine::savefile::{PageMap, VolumeInfo};
use nix::fcntl::{fcntl, FcntlArg, OFlag};

use crate::context::Context;
use crate::delta;
use crate::domain::{fail, SimDomain};
use crate::guest::Guest;
use crate::plan::{Fault, StepKind};
use crate::vm::Vm;

/// A simulated hypervisor.
pub struct SimHost {
    context: Arc<Context>,
    facts: HostFacts,
}

impl SimHost {
    /// Of this simulation.
    pub fn new(context: Arc<Context>) -> SimHost {
        let facts = HostFacts {
            kind: "simulated".to_owned(),
            version: "1".to_owned(),
            machine: "simulated".to_owned(),
            cpu_model: "simulated".to_owned(),
            accel: "none".to_owned(),
        };
        SimHost { context, facts }
    }

    fn start(
        &self,
        guest: Guest,
        running: bool,
        confinement: &Confinement,
    ) -> Result<Box<dyn Domain>, HostError> {
        let pair = || UnixStream::pair().map_err(HostError::io("make a channel"));
        let ((ours, theirs), (bell, events)) = (pair()?, pair()?);
        events.set_nonblocking(true).map_err(HostError::io("make a channel"))?;
        let vm = Vm::new(self.context.clone(), confinement.slot, bell, guest, running);
        Ok(Box::new(SimDomain::new(Arc::new(vm), ours, theirs, events, confinement)))
    }
}

impl StackDelta for SimHost {
    fn stack(&self, volume: &VolumeInfo, map: &PageMap, raw: &File, out: &File) -> io::Result<()> {
        match self.context.steps.at(StepKind::Host, "host.stack") {
            None => delta::write(volume, map, raw, out),
            Some(Fault::NoSpace) => Err(io::Error::from_raw_os_error(nix::libc::ENOSPC)),
            Some(fault) => Err(io::Error::other(fault.to_string())),
        }
    }

    fn file_name(&self, volume: &str) -> String {
        format!("{volume}.delta")
    }
}

impl Host for SimHost {
    fn facts(&self) -> &HostFacts {
        &self.facts
    }

    fn boot(
        &self,
        spec: &GuestSpec,
        purpose: BootPurpose,
        confinement: &Confinement,
    ) -> Result<Box<dyn Domain>, HostError> {
        let step = "boot the guest";
        fail(&self.context, "host.boot", step)?;
        self.context.dawdle();
        let io = || HostError::io(step);
        self.context.use_slot(confinement.slot).map_err(io())?;
        let boot = self.context.new_boot().map_err(io())?;
        let memfd_name = self.context.memfd_name();
        let mut guest = Guest::boot(spec, purpose, boot, &memfd_name).map_err(io())?;
        guest.limit_volumes(confinement.volume_memory_max);
        self.start(guest, true, confinement)
    }

    fn restore(
        &self,
        spec: &GuestSpec,
        image: HotFiles,
        confinement: &Confinement,
    ) -> Result<Box<dyn Domain>, HostError> {
        let step = "restore the clone";
        fail(&self.context, "host.restore", step)?;
        self.context.dawdle();
        let io = || HostError::io(step);
        self.context.use_slot(confinement.slot).map_err(io())?;
        let deltas = image.deltas.iter().map(|(_, file)| file);
        for file in deltas.chain([&image.memory, &image.device_state]) {
            if !cannot_be_written(file).map_err(io())? {
                self.context.violation("a hot image's file is not read-only");
            }
        }
        let own = self.context.new_boot().map_err(io())?;
        let mut guest = Guest::restore(spec, image, own).map_err(|error| {
            if matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof) {
                self.context.violation(&format!("restored: {error}"));
            }
            io()(error)
        })?;
        guest.limit_volumes(confinement.volume_memory_max);
        self.start(guest, false, confinement)
    }
}

/// Whether a file was opened for reading and, if it has a name, has no writer's permission.
fn cannot_be_written(file: &File) -> io::Result<bool> {
    let flags = OFlag::from_bits_truncate(fcntl(file.as_raw_fd(), FcntlArg::F_GETFL)?);
    let meta = file.metadata()?;
    let immutable = meta.nlink() == 0 || meta.permissions().mode() & 0o222 == 0;
    Ok(flags & OFlag::O_ACCMODE == OFlag::O_RDONLY && immutable)
}
