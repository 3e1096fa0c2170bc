//! From a captured state and its memory to a domain that waits to be introduced to xenstored and unpaused.

use std::fs::File;
use std::sync::Arc;

use engine::units::{ByteCount, ByteOffset, PageIndex, PAGE_BYTES};

use super::{fill, LifeError, Ports, Rings, Shell, ShellPlan};
use crate::abi::hvm::param;
use crate::device_state::DeviceState;
use crate::hypercalls::{CpuPolicy, Hypercalls, Uuid};
use crate::layout::{SPECIAL_COUNT, SPECIAL_FIRST};

/// The parameters that are captured and set again, by number, as libxc has them (`tools/libs/guest/xg_sr_save_x86_hvm.c`).
pub(super) const PARAMS: [u64; 16] = [9, 19, 27, 28, 29, 32, 33, 34, 36, 37, 38, 1, 5, 6, 12, 17];
/// Those of them that name a frame of which Xen or a backend writes.
const RING_PARAMS: [u64; 4] = [param::STORE_PFN, param::IOREQ_PFN, param::BUFIOREQ_PFN, param::CONSOLE_PFN];

/// Restores in one go: what [`shell_plan`], [`Shell::create`], [`fill`] and [`finish`] do one by one.
///
/// Errors: those of the steps; after any, there is no domain.
pub fn restore(
    xen: &Arc<dyn Hypercalls>,
    uuid: Uuid,
    state: &DeviceState,
    memory: &File,
    remotes: Ports,
) -> Result<Shell, LifeError> {
    // An image that cannot be looked at is an error of `fill`'s, which names the domain.
    let size = ByteCount(memory.metadata().map_or(0, |meta| meta.len()));
    let shell = Shell::create(xen, &shell_plan(uuid, state, size)?, remotes)?;
    fill(&shell, memory)?;
    finish(&shell, state)?;
    Ok(shell)
}

/// What the domain has to be for this state; `memory` is the guest's RAM, all of which it may not have had when it was captured.
/// Errors: the state breaks a rule.
pub fn shell_plan(uuid: Uuid, state: &DeviceState, memory: ByteCount) -> Result<ShellPlan, LifeError> {
    if let Some((index, _)) = state.hvm_params.iter().find(|(index, _)| !PARAMS.contains(index)) {
        return Err(LifeError::BadState(format!("HVM parameter {index} is not one that a restore sets")));
    }
    let rings = Rings {
        store: ring(state, param::STORE_PFN, "xenstored")?,
        console: ring(state, param::CONSOLE_PFN, "xenconsoled")?,
    };
    let further = [param::IOREQ_PFN, param::BUFIOREQ_PFN];
    let policy = CpuPolicy { leaves: state.cpuid_policy.clone(), msrs: state.msr_policy.clone() };
    Ok(ShellPlan {
        uuid,
        vcpus: state.vcpus,
        layout: state.layout.clone(),
        memory,
        rings,
        further: further.into_iter().filter_map(|index| value(state, index)).collect(),
        tsc: Some(state.tsc),
        policy: Some(policy),
    })
}

/// Loads what is not memory: parameters, the state of CPUs and devices, the grants of the rings. Beside [`fill`], if need be.
pub fn finish(shell: &Shell, state: &DeviceState) -> Result<(), LifeError> {
    let (xen, domid) = (shell.xen(), shell.domid());
    let call = LifeError::call;
    for (index, value) in &state.hvm_params {
        xen.set_hvm_param(domid, *index, *value).map_err(call("set its HVM parameters"))?;
    }
    // The parameter is an address, not a frame.
    let table = value(state, param::IDENT_PT).map(|address| PageIndex::holding(ByteOffset(address)).0);
    if let Some(gfn) = table.filter(|gfn| is_special(*gfn)) {
        let page = xen.map(domid, &[gfn]).map_err(call("map its identity page table"))?;
        page.copy_from(0, &identity_page_table());
    }
    let event_channel = |index, port: u32| {
        xen.set_hvm_param(domid, index, port.into()).map_err(call("tell it its event channels"))
    };
    event_channel(param::STORE_EVTCHN, shell.store().port)?;
    event_channel(param::CONSOLE_EVTCHN, shell.console().port)?;
    xen.set_hvm_context(domid, &state.hvm_context).map_err(call("load the state of its CPUs"))?;
    shell.grant_rings()
}

/// The frames that are no RAM of the guest's own but rings: they are cleared, not captured.
pub(super) fn ring_frames(params: &[(u64, u64)]) -> impl Iterator<Item = u64> + '_ {
    params.iter().filter(|(index, _)| RING_PARAMS.contains(index)).map(|(_, value)| *value)
}

/// Whether a frame is one of those that libxc and we set apart.
pub(crate) fn is_special(gfn: u64) -> bool {
    (SPECIAL_FIRST..SPECIAL_FIRST + SPECIAL_COUNT).contains(&gfn)
}

fn value(state: &DeviceState, index: u64) -> Option<u64> {
    state.hvm_params.iter().find(|param| param.0 == index).map(|param| param.1).filter(|value| *value != 0)
}

fn ring(state: &DeviceState, index: u64, to: &str) -> Result<u64, LifeError> {
    let gfn = value(state, index).ok_or_else(|| LifeError::BadState(format!("it has no ring to {to}")))?;
    if gfn > u64::from(u32::MAX) {
        return Err(LifeError::BadState(format!("its ring to {to} is at gfn {gfn:#x}, beyond all grants")));
    }
    Ok(gfn)
}

/// What a vCPU that has paging off runs on where the CPU cannot do without: 4 GiB mapped to themselves in pages of 4 MiB, each
/// present, writable, for all, accessed, dirty, large.
pub fn identity_page_table() -> [u8; PAGE_BYTES] {
    let mut table = [0; PAGE_BYTES];
    for (at, entry) in (0u32..).zip(table.as_chunks_mut::<4>().0) {
        *entry = (at << 22 | 0xe7).to_le_bytes();
    }
    table
}
