//! A domain that has suspended itself, taken as it is: its RAM as a sparse file, the rest as a [`DeviceState`].

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use engine::image::scan::is_zero;
use engine::units::{ByteCount, PageIndex, PageRange, PAGE_BYTES};
use nix::sys::memfd::{memfd_create, MemFdCreateFlag};

use super::restore::{is_special, ring_frames, PARAMS};
use super::LifeError;
use crate::device_state::DeviceState;
use crate::hypercalls::{DomId, FrameKind, Hypercalls, Shutdown};
use crate::layout::{Layout, GFN_MAX};

/// Frames asked about, mapped and copied at once: the most that Xen answers in one call.
const BATCH: u64 = 1024;

/// What was taken.
#[derive(Debug)]
pub struct Captured {
    /// The frames of the layout one after the other; frames that are all zero are holes.
    pub memory: File,
    /// All else.
    pub state: DeviceState,
}

/// Takes a domain of `vcpus` vCPUs. The memory image is `memory_size` bytes long; the guest may have handed back some of it,
/// and then its end is a hole.
///
/// Errors: it has not suspended itself, or has more memory than that, or Xen's.
pub fn capture(
    xen: &dyn Hypercalls,
    domid: DomId,
    vcpus: u32,
    memory_size: ByteCount,
) -> Result<Captured, LifeError> {
    let call = LifeError::call;
    let info = xen.info(domid).map_err(call("look whether it has suspended"))?;
    match info.ok_or(LifeError::Gone(domid))?.shutdown() {
        Some(Shutdown::Suspend) => {}
        _ => return Err(LifeError::NotSuspended(domid)),
    }
    let policy = xen.cpu_policy(domid).map_err(call("fetch its CPU policy"))?;
    let tsc = xen.tsc(domid).map_err(call("fetch its time-stamp counters"))?;
    let hvm_context = xen.hvm_context(domid).map_err(call("fetch the state of its CPUs"))?;
    let hvm_params = params(xen, domid)?;
    let layout = layout(xen, domid, &hvm_params)?;
    if layout.pages().bytes() > memory_size {
        return Err(LifeError::ImageSize { found: memory_size, needed: layout.pages().bytes() });
    }
    let memory = memory_file(memory_size).map_err(LifeError::io("make room for the memory", domid))?;
    copy(xen, domid, &layout, &memory)?;
    let version = xen.version();
    let state = DeviceState {
        xen: (version.major, version.minor),
        vcpus,
        layout,
        tsc,
        hvm_context,
        hvm_params,
        cpuid_policy: policy.leaves,
        msr_policy: policy.msrs,
    };
    Ok(Captured { memory, state })
}

/// The parameters that a restore sets, those that are not zero.
fn params(xen: &dyn Hypercalls, domid: DomId) -> Result<Vec<(u64, u64)>, LifeError> {
    let mut params = Vec::new();
    for index in PARAMS {
        let value = xen.hvm_param(domid, index).map_err(LifeError::call("fetch its HVM parameters"))?;
        if value != 0 {
            params.push((index, value));
        }
    }
    Ok(params)
}

/// Its RAM, without special pages and rings.
fn layout(xen: &dyn Hypercalls, domid: DomId, params: &[(u64, u64)]) -> Result<Layout, LifeError> {
    let call = LifeError::call;
    let rings: Vec<u64> = ring_frames(params).collect();
    let end = xen.max_gfn(domid).map_err(call("look for its last frame"))?.saturating_add(1).min(GFN_MAX);
    let mut runs: Vec<PageRange> = Vec::new();
    let mut first = 0;
    while first < end {
        let gfns: Vec<u64> = (first..end.min(first + BATCH)).collect();
        let kinds = xen.frame_kinds(domid, &gfns).map_err(call("look which frames it has"))?;
        for (gfn, kind) in gfns.into_iter().zip(kinds) {
            if kind == FrameKind::None || is_special(gfn) || rings.contains(&gfn) {
                continue;
            }
            match runs.last_mut() {
                Some(last) if last.end().0 == gfn => last.count.0 += 1,
                _ => runs.push(PageRange::new(gfn, 1)),
            }
        }
        first += BATCH;
    }
    Layout::new(runs).map_err(|rule| LifeError::BadState(rule.to_owned()))
}

fn memory_file(size: ByteCount) -> io::Result<File> {
    let file = File::from(memfd_create(c"guest-memory", MemFdCreateFlag::MFD_CLOEXEC)?);
    file.set_len(size.0)?;
    Ok(file)
}

/// Copies its frames, those that are not all zero, to their places in the image.
fn copy(xen: &dyn Hypercalls, domid: DomId, layout: &Layout, memory: &File) -> Result<(), LifeError> {
    let mut buffer = vec![0; BATCH as usize * PAGE_BYTES];
    let frames = super::shell::frames_of(layout.runs());
    for (at, gfns) in frames.chunks(BATCH as usize).enumerate() {
        let mapped = xen.map(domid, gfns).map_err(LifeError::call("map its frames to copy them"))?;
        let bytes = &mut buffer[..gfns.len() * PAGE_BYTES];
        mapped.copy_to(0, bytes);
        drop(mapped);
        let offset = PageIndex(at as u64 * BATCH).offset().0;
        write_data(memory, offset, bytes).map_err(LifeError::io("write down the memory", domid))?;
    }
    Ok(())
}

/// Writes the pages that are not all zero, neighbours in one go.
fn write_data(file: &File, offset: u64, bytes: &[u8]) -> io::Result<()> {
    let pages: Vec<&[u8]> = bytes.chunks(PAGE_BYTES).collect();
    let mut at = 0;
    for run in pages.chunk_by(|one, two| is_zero(one) == is_zero(two)) {
        let end = at + run.len() * PAGE_BYTES;
        if !is_zero(run[0]) {
            file.write_all_at(&bytes[at..end], offset + at as u64)?;
        }
        at = end;
    }
    Ok(())
}
