//! From a kernel image on disk to the first instruction of a PVH guest, without libxenguest.
//!
//! | file | what it does |
//! |---|---|
//! | [`kernel`], `bzimage`, `lz4` | the ELF kernel in a kernel file |
//! | [`elf`] | its segments and its PVH entry point |
//! | [`acpi`], [`start_info`] | what the guest is told of its machine |
//! | [`plan`] | what goes where |
//! | [`vcpu`] | the state in which the first vCPU begins |
//! | here | a plan is carried out |
//!
//! The kernel file and the initrd come from a template a user added: nothing in them makes this panic, or take memory beyond the
//! limits named. `docs/misc/pvh.pandoc` of Xen is the boot protocol.

pub mod acpi;
mod bzimage;
pub mod elf;
pub mod kernel;
mod lz4;
pub mod plan;
pub mod start_info;
pub mod vcpu;

use crate::hypercalls::{CallError, DomId, Hypercalls};
use plan::{BootImage, Content, Piece};

const PAGE: u64 = 4096;
/// So many frames are mapped at a time: 16 MiB.
const FRAMES_MAX: u64 = 4096;
static ZEROS: [u8; 1 << 20] = [0; 1 << 20];

/// Why a guest could not be started.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The kernel file.
    #[error(transparent)]
    Kernel(#[from] kernel::KernelError),
    /// The kernel in it.
    #[error(transparent)]
    Elf(#[from] elf::ElfError),
    /// It does not fit.
    #[error(transparent)]
    Plan(#[from] plan::PlanError),
    /// Xen did not do what it was asked.
    #[error("{step}")]
    Call {
        /// What was being done, and where.
        step: String,
        /// Its answer.
        source: CallError,
    },
    /// The domain is not a newborn PVH domain.
    #[error("set the first vCPU of domain {domid}")]
    Context {
        /// Which.
        domid: DomId,
        /// What is wrong.
        source: vcpu::ContextError,
    },
}

/// Writes a planned guest into a newborn domain whose RAM is populated, and sets its first vCPU to begin when it is unpaused.
///
/// What it leaves on an error is for whoever drops the domain.
pub fn write(xen: &dyn Hypercalls, domid: DomId, image: &BootImage) -> Result<(), BootError> {
    for piece in &image.pieces {
        write_piece(xen, domid, piece)?;
    }
    let call = |step: &str| {
        let step = format!("{step} of domain {domid}");
        move |source| BootError::Call { step, source }
    };
    xen.set_memory_map(domid, &image.memory_map).map_err(call("set the memory map"))?;
    let own = xen.hvm_context(domid).map_err(call("read the HVM context"))?;
    let apic_id = |vcpu| acpi::apic_id(u32::from(vcpu));
    let context = vcpu::context(&own, image.entry, image.start_info, apic_id);
    let context = context.map_err(|source| BootError::Context { domid, source })?;
    xen.set_hvm_context(domid, &context).map_err(call("load the HVM context"))
}

fn write_piece(xen: &dyn Hypercalls, domid: DomId, piece: &Piece) -> Result<(), BootError> {
    let range = piece.range();
    let mut at = range.start;
    while at < range.end {
        let first = at / PAGE;
        let end = range.end.min((first + FRAMES_MAX) * PAGE);
        let gfns: Vec<u64> = (first..end.div_ceil(PAGE)).collect();
        let mapping = xen.map(domid, &gfns).map_err(|source| {
            let step = format!(
                "map {} frames of domain {domid} at gfn {first:#x} for its {}",
                gfns.len(),
                piece.what
            );
            BootError::Call { step, source }
        })?;
        // Both fit: they are at most the bytes of FRAMES_MAX frames, and the piece is in memory.
        let (offset, done) = ((at - first * PAGE) as usize, (at - range.start) as usize);
        let count = (end - at) as usize;
        match &piece.content {
            Content::Bytes(bytes) => mapping.copy_from(offset, &bytes[done..done + count]),
            Content::Zeros(_) => {
                for start in (0..count).step_by(ZEROS.len()) {
                    mapping.copy_from(offset + start, &ZEROS[..ZEROS.len().min(count - start)]);
                }
            }
        }
        at = end;
    }
    Ok(())
}
