//! `public/hvm/{hvm_op,params}.h`.

use std::mem::{offset_of, size_of};

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::{operation, Operation};

pub const SET_PARAM: Operation = operation("HVMOP_set_param", 0);
pub const GET_PARAM: Operation = operation("HVMOP_get_param", 1);

/// struct xen_hvm_param.
#[repr(C)]
#[derive(Clone, Copy, Debug, IntoBytes, FromBytes, Immutable)]
pub struct Param {
    pub domid: u16,
    pub pad: u16,
    pub index: u32,
    pub value: u64,
}
const _: () = assert!(size_of::<Param>() == 16 && offset_of!(Param, value) == 8);

/// The parameters by name, without their HVM_PARAM_.
pub mod param {
    pub const STORE_PFN: u64 = 1;
    pub const STORE_EVTCHN: u64 = 2;
    pub const IOREQ_PFN: u64 = 5;
    pub const BUFIOREQ_PFN: u64 = 6;
    pub const TIMER_MODE: u64 = 10;
    pub const IDENT_PT: u64 = 12;
    pub const CONSOLE_PFN: u64 = 17;
    pub const CONSOLE_EVTCHN: u64 = 18;
}
