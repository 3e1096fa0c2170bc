//! A launch before there is a savefile: a clone restored straight from what was captured, given an identity and a command
//! as any other, then destroyed.
//!
//! It proves that what was captured comes to life again before anything is written, and it tells which pages of memory a
//! launch touches: the savefile's working set. Nothing of the clone gets into the savefile: it runs on a private view of
//! the captured memory and on overlays of its own, and its identity is thrown away with it.

use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;

use nix::sys::memfd::{memfd_create, MemFdCreateFlag};

use crate::agent::Agent;
use crate::build::Order;
use crate::host::{AgentPipe, Capture, CapturedDelta, Confinement, GuestSpec, Host, HostError, Nic};
use crate::identity::{CloneNumber, Identity};
use crate::image::hot::HotFiles;
use crate::image::working_set;
use crate::launch::LaunchError;
use crate::savefile::{Content, ImageId, Manifest, PageMap, PageMapBuilder, Run, Slot};
use crate::units::{PageCount, PageRange};

/// Rehearses a launch from `capture`; answers which pages of memory it touched, empty where the host cannot tell.
pub fn rehearse<A: Agent>(
    host: &dyn Host,
    order: &Order<'_>,
    capture: &Capture,
    connect: impl Fn(Box<dyn AgentPipe>) -> A,
) -> Result<Vec<PageRange>, LaunchError> {
    let step = "make a clone's files of what was captured";
    let image = clone_files(host, &order.manifest, capture).map_err(HostError::io(step))?;
    let identity = identity(order.confinement).map_err(HostError::io("draw an identity"))?;
    // What it writes is of no clone that anybody uses, and its card is plugged into nothing: nobody shall hear of it.
    let confinement = Confinement { keep_from_swap: false, ..order.confinement.clone() };
    let spec = GuestSpec { nic: Nic::None, ..order.spec.clone() };

    let mut domain = host.restore(&spec, image, &confinement)?;
    let mut agent = connect(domain.agent()?);
    domain.run()?;
    agent.rehearse(&identity)?;
    let touched = domain.touched().unwrap_or_else(|error| {
        tracing::warn!(%error, "nobody can tell what a launch touches: the savefile gets no working set");
        Vec::new()
    });
    drop(agent);
    domain.destroy()?;
    Ok(working_set::bounded(touched, capture.memory_size.pages_covering()))
}

/// The builder holds the name of its slot's number: no living clone is called so.
fn identity(confinement: &Confinement) -> io::Result<Identity> {
    Identity::fresh(CloneNumber::new(confinement.slot).ok_or(io::ErrorKind::InvalidInput)?)
}

/// What was captured as the files a clone is restored from, all in memory.
fn clone_files(host: &dyn Host, manifest: &Manifest, capture: &Capture) -> io::Result<HotFiles> {
    let mut state = in_memory(c"device-state")?;
    state.write_all(&capture.device_state)?;
    let deltas =
        capture.deltas.iter().map(|delta| stacked(host, manifest, delta)).collect::<io::Result<_>>()?;
    Ok(HotFiles {
        memory: read_only(&capture.memory)?,
        device_state: read_only(&state)?,
        deltas,
        working_set: Vec::new(),
    })
}

fn stacked(host: &dyn Host, manifest: &Manifest, delta: &CapturedDelta) -> io::Result<(String, File)> {
    let name = &delta.volume;
    let unknown = || io::Error::other(format!("the manifest has no volume {name}"));
    let info = manifest.volume(name).ok_or_else(unknown)?;
    let out = in_memory(c"delta")?;
    host.stack(info, &map_of(delta)?, &delta.raw, &out)?;
    Ok((name.clone(), read_only(&out)?))
}

/// The map of a delta that nobody has looked at yet: every page that changed holds data, zeros or not.
fn map_of(delta: &CapturedDelta) -> io::Result<PageMap> {
    let image = ImageId::Volume(delta.volume.clone());
    let mut builder = PageMapBuilder::new(image, delta.size.pages_covering(), delta.changed.len());
    let mut slots = PageCount::ZERO;
    for pages in &delta.changed {
        builder.push(Run { pages: *pages, content: Content::Data(Slot(slots.0)) });
        slots.0 += pages.count.0;
    }
    builder.finish(slots).map_err(|fault| io::Error::other(fault.to_string()))
}

fn in_memory(name: &CStr) -> io::Result<File> {
    Ok(File::from(memfd_create(name, MemFdCreateFlag::MFD_CLOEXEC)?))
}

/// The same file, opened anew for reading only, as a hot image's are.
fn read_only(file: &File) -> io::Result<File> {
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}
