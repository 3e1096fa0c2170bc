//! Which libxc record may follow which: the rules that make a stream one, without a byte of it.

use super::libxc::{self, Domain};
use super::Fault;

/// How far a libxc stream has come.
#[derive(Debug)]
pub(super) struct Order {
    domain: Domain,
    static_data_ended: bool,
    memory_begun: bool,
    pv_info: bool,
}

impl Order {
    pub fn new(domain: Domain) -> Order {
        Order { domain, static_data_ended: false, memory_begun: false, pv_info: false }
    }

    /// A record of this type comes.
    pub fn admit(&mut self, kind: u32) -> Result<(), Fault> {
        use libxc::*;
        let pv = self.domain.kind == libxc::GuestKind::Pv;
        match kind {
            X86_PV_INFO | X86_PV_P2M_FRAMES | X86_PV_VCPU_BASIC | X86_PV_VCPU_EXTENDED
            | X86_PV_VCPU_XSAVE | X86_PV_VCPU_MSRS | SHARED_INFO
                if !pv =>
            {
                return Err(Fault::Misplaced("only a PV guest has it"))
            }
            HVM_CONTEXT | HVM_PARAMS if pv => {
                return Err(Fault::Misplaced("a PV guest does not have it"));
            }
            STATIC_DATA_END | X86_CPUID_POLICY | X86_MSR_POLICY if self.domain.version < 3 => {
                return Err(Fault::Misplaced("a stream of version 2 does not have it"));
            }
            STATIC_DATA_END | X86_CPUID_POLICY | X86_MSR_POLICY if self.static_data_ended => {
                return Err(Fault::Misplaced("the static data has ended"));
            }
            TOOLSTACK => {
                return Err(Fault::Misplaced("it is deprecated, no stream of version 2 or 3 has it"))
            }
            CHECKPOINT_DIRTY_PFN_LIST => {
                return Err(Fault::Misplaced("it goes from a secondary to a primary, never the other way"))
            }
            _ => {}
        }
        match kind {
            X86_PV_INFO => self.pv_info = true,
            STATIC_DATA_END => self.static_data_ended = true,
            X86_PV_P2M_FRAMES | PAGE_DATA => self.begin_memory(pv)?,
            END if !self.memory_begun => return Err(Fault::Misplaced("there was no memory")),
            _ => {}
        }
        Ok(())
    }

    /// Memory ends the static data: said so in version 3, tacitly in version 2.
    fn begin_memory(&mut self, pv: bool) -> Result<(), Fault> {
        if pv && !self.pv_info {
            return Err(Fault::Misplaced("X86_PV_INFO has not come yet"));
        }
        if self.domain.version >= 3 && !self.static_data_ended {
            return Err(Fault::Misplaced("STATIC_DATA_END has not come yet"));
        }
        (self.static_data_ended, self.memory_begun) = (true, true);
        Ok(())
    }
}
