//! What a domain that boots needs and a restored one brings along: its parameters and the pages they name.

use super::restore::identity_page_table;
use super::{LifeError, Shell};
use crate::abi::hvm::param;
use crate::layout::IDENTITY_GFN;

/// Sets the parameters of a shell that is to boot, and opens its rings.
pub fn newborn(shell: &Shell) -> Result<(), LifeError> {
    let (xen, domid) = (shell.xen(), shell.domid());
    let call = LifeError::call;
    let page = xen.map(domid, &[IDENTITY_GFN]).map_err(call("map its identity page table"))?;
    page.copy_from(0, &identity_page_table());
    drop(page);
    let params = [
        (param::STORE_PFN, shell.store().gfn),
        (param::CONSOLE_PFN, shell.console().gfn),
        // A physical address, where the others are frames: `tools/libs/guest/xg_dom_x86.c`.
        (param::IDENT_PT, IDENTITY_GFN << 12),
        (param::STORE_EVTCHN, shell.store().port.into()),
        (param::CONSOLE_EVTCHN, shell.console().port.into()),
    ];
    for (index, value) in params {
        xen.set_hvm_param(domid, index, value).map_err(call("set its HVM parameters"))?;
    }
    shell.grant_rings()
}
