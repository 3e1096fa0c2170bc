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

use std::ops::Range;
use std::path::Path;

use engine::units::PAGE_BYTES;
use plan::{BootImage, Content, Piece};

use crate::abi::hvm::param;
use crate::hypercalls::{CallError, DomId, Hypercalls};
use crate::layout::{Layout, IDENT_PT_GFN};
use crate::life::restore::identity_page_table;
use crate::life::{LifeError, Shell};

const PAGE: u64 = PAGE_BYTES as u64;
/// So many frames are mapped at a time: 16 MiB.
const FRAMES_MAX: u64 = 4096;

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
    /// Its rings could not be granted.
    #[error(transparent)]
    Life(#[from] LifeError),
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

/// What a guest is booted from, in memory.
pub struct Files {
    vmlinux: Vec<u8>,
    initrd: Vec<u8>,
}

impl Files {
    /// Reads both, and takes the kernel out of its bzImage.
    pub fn read(kernel: &Path, initrd: &Path) -> Result<Files, BootError> {
        let image = kernel::read(kernel)?;
        let vmlinux = kernel::vmlinux(&image)?.into_owned();
        Ok(Files { vmlinux, initrd: kernel::read(initrd)? })
    }

    /// Lays out a guest of them.
    pub fn plan(&self, cmdline: &str, layout: &Layout, vcpus: u32) -> Result<BootImage<'_>, BootError> {
        let kernel = elf::Kernel::parse(&self.vmlinux)?;
        Ok(plan::plan(&kernel, &self.initrd, cmdline, layout, vcpus)?)
    }
}

/// Makes a shell the planned guest, rings included. Then it can be introduced to xenstored and unpaused.
pub fn load(shell: &Shell, image: &BootImage) -> Result<(), BootError> {
    let (xen, domid) = (shell.xen().as_ref(), shell.domid());
    let rings = [
        (param::STORE_PFN, shell.store().gfn),
        (param::CONSOLE_PFN, shell.console().gfn),
        (param::STORE_EVTCHN, shell.store().port.into()),
        (param::CONSOLE_EVTCHN, shell.console().port.into()),
    ];
    for (index, value) in rings {
        set_param(xen, domid, index, value)?;
    }
    write_identity_page_table(xen, domid)?;
    write(xen, domid, image)?;
    Ok(shell.grant_rings()?)
}

/// Intel's older CPUs cannot run a guest without paging but on this table; Xen takes it where it needs it.
fn write_identity_page_table(xen: &dyn Hypercalls, domid: DomId) -> Result<(), BootError> {
    let mapping = xen.map(domid, &[IDENT_PT_GFN]).map_err(|source| BootError::Call {
        step: format!("map the identity page table of domain {domid}"),
        source,
    })?;
    mapping.copy_from(0, &identity_page_table());
    drop(mapping);
    set_param(xen, domid, param::IDENT_PT, IDENT_PT_GFN * PAGE)
}

fn set_param(xen: &dyn Hypercalls, domid: DomId, index: u64, value: u64) -> Result<(), BootError> {
    let step = || format!("set HVM parameter {index} of domain {domid} to {value:#x}");
    xen.set_hvm_param(domid, index, value).map_err(|source| BootError::Call { step: step(), source })
}

/// Writes a planned guest into a newborn domain whose RAM is populated, and sets its first vCPU to begin when it is unpaused.
///
/// What it leaves on an error is for whoever drops the domain.
pub fn write(xen: &dyn Hypercalls, domid: DomId, image: &BootImage) -> Result<(), BootError> {
    write_memory(xen, domid, image)?;
    let call = |step: &str| {
        let step = format!("{step} of domain {domid}");
        move |source| BootError::Call { step, source }
    };
    // Linux that knows version 1 of hvm_start_info takes the map from there; older ones ask Xen.
    xen.set_memory_map(domid, &image.memory_map).map_err(call("set the memory map"))?;
    let own = xen.hvm_context(domid).map_err(call("read the HVM context"))?;
    let apic_id = |vcpu| acpi::apic_id(u32::from(vcpu));
    let context = vcpu::context(&own, image.entry, image.start_info, apic_id);
    let context = context.map_err(|source| BootError::Context { domid, source })?;
    xen.set_hvm_context(domid, &context).map_err(call("load the HVM context"))
}

fn write_memory(xen: &dyn Hypercalls, domid: DomId, image: &BootImage) -> Result<(), BootError> {
    image.pieces.iter().try_for_each(|piece| write_piece(xen, domid, piece))
}

fn write_piece(xen: &dyn Hypercalls, domid: DomId, piece: &Piece) -> Result<(), BootError> {
    for step in steps(&piece.range()) {
        let gfns: Vec<u64> = step.gfns.clone().collect();
        let mapping = xen.map(domid, &gfns).map_err(|source| {
            let place = format!("{} frames of domain {domid} at gfn {:#x}", gfns.len(), step.gfns.start);
            BootError::Call { step: format!("map {place} for its {}", piece.what), source }
        })?;
        match &piece.content {
            Content::Bytes(bytes) => mapping.copy_from(step.offset, &bytes[step.part]),
            Content::Zeros(_) => mapping.copy_from(step.offset, &vec![0; step.part.len()]),
        }
    }
    Ok(())
}

/// A part of a piece, written through one mapping.
#[derive(Debug, PartialEq, Eq)]
struct Step {
    /// The frames mapped; at most [`FRAMES_MAX`].
    gfns: Range<u64>,
    /// Where in them the part begins, in bytes.
    offset: usize,
    /// Which bytes of the piece.
    part: Range<usize>,
}

fn steps(piece: &Range<u64>) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut at = piece.start;
    while at < piece.end {
        let first = at / PAGE;
        let end = piece.end.min((first + FRAMES_MAX) * PAGE);
        steps.push(Step {
            gfns: first..end.div_ceil(PAGE),
            offset: (at % PAGE) as usize,
            part: (at - piece.start) as usize..(end - piece.start) as usize,
        });
        at = end;
    }
    steps
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use engine::units::ByteCount;
    use nix::errno::Errno;
    use proptest::prelude::*;

    use super::*;
    use crate::hypercalls::Uuid;
    use crate::life::{Ports, Rings, ShellPlan};
    use crate::simulated::{Fault, Left, Machine};

    const DIRT: u8 = 0xc2;
    const GUEST: ByteCount = ByteCount(4 << 20);

    /// A kernel at 1 MiB whose code ends inside a frame, and its zeros inside another one.
    fn files() -> Files {
        let segment: (u64, &[u8], u64) = (0x10_0000, &[0x90; 0x1234], 0x3456);
        let vmlinux = elf::tests::elf(&[segment], &elf::tests::notes(0x10_0010));
        Files { vmlinux, initrd: vec![0x55; 0x2001] }
    }

    fn shell(xen: &Arc<dyn Hypercalls>) -> Result<Shell, LifeError> {
        let layout = Layout::fresh(GUEST);
        let (rings, further) = (Rings::default(), Vec::new());
        let plan = ShellPlan {
            uuid: Uuid([1; 16]),
            vcpus: 2,
            memory: layout.pages().bytes(),
            layout,
            rings,
            further,
            tsc: None,
            policy: None,
        };
        Shell::create(xen, &plan, Ports { store_domid: DomId(0), console_domid: DomId(0) })
    }

    #[test]
    fn memory_that_was_somebody_else_s_holds_the_plan_and_nothing_more() {
        let machine = Arc::new(Machine::new(ByteCount(64 << 20)).with_fresh_byte(DIRT));
        let xen: Arc<dyn Hypercalls> = machine.clone();
        let shell = shell(&xen).unwrap();
        let files = files();
        let image = files.plan("console=hvc0", shell.layout(), 2).unwrap();
        write_memory(xen.as_ref(), shell.domid(), &image).unwrap();

        let mut expected = vec![DIRT; GUEST.0 as usize];
        for piece in &image.pieces {
            let place = &mut expected[piece.address as usize..][..piece.size() as usize];
            match &piece.content {
                Content::Bytes(bytes) => place.copy_from_slice(bytes),
                Content::Zeros(_) => place.fill(0),
            }
        }
        for (gfn, expected) in expected.chunks(PAGE_BYTES).enumerate() {
            let frame = machine.frame(shell.domid(), gfn as u64).unwrap();
            assert!(frame == *expected, "gfn {gfn:#x}");
        }
        drop(shell);
        assert_eq!(machine.left(), Left::default());
    }

    #[test]
    fn whatever_call_fails_nothing_is_left() {
        let files = files();
        let attempt = |machine: &Arc<Machine>| {
            let xen: Arc<dyn Hypercalls> = machine.clone();
            let shell = shell(&xen).ok()?;
            let image = files.plan("", shell.layout(), 2).unwrap();
            load(&shell, &image).err()
        };
        let machine = Arc::new(Machine::new(ByteCount(64 << 20)));
        // A simulated newborn's context has no records: so far this gets there.
        assert!(matches!(attempt(&machine), Some(BootError::Context { .. })));
        let last = machine.calls().iter().position(|call| *call == "XEN_DOMCTL_gethvmcontext").unwrap();
        for call in 1..=last + 1 {
            let machine = Arc::new(Machine::new(ByteCount(64 << 20)));
            machine.fail(call, Fault::Refuse(Errno::ENOMEM));
            let error = attempt(&machine);
            assert!(!matches!(error, Some(BootError::Context { .. })), "call {call}: {error:?}");
            assert_eq!(machine.left(), Left::default(), "call {call}");
        }
    }

    #[test]
    fn a_piece_may_begin_and_end_inside_a_frame() {
        let step = Step { gfns: 1..3, offset: 0xfff, part: 0..2 };
        assert_eq!(steps(&(0x1fff..0x2001)), [step]);
        assert_eq!(steps(&(0x1000..0x1000)), []);
    }

    proptest! {
        #[test]
        fn steps_cover_a_piece_exactly(start in 0u64..1 << 40, size in 0u64..200 << 20) {
            let mut at = start;
            for step in steps(&(start..start + size)) {
                prop_assert_eq!(step.gfns.start * PAGE + step.offset as u64, at);
                prop_assert_eq!(step.part.start as u64, at - start);
                prop_assert!(step.gfns.end - step.gfns.start <= FRAMES_MAX);
                at += step.part.len() as u64;
                prop_assert_eq!(step.gfns.end, at.div_ceil(PAGE));
            }
            prop_assert_eq!(at, start + size);
        }
    }
}
