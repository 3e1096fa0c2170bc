//! A PVH domain's life, apart from its devices: created, filled, restored, captured, destroyed.
//!
//! Invariants:
//! - whoever holds a [`Shell`] holds a domain, and dropping it destroys the domain, whatever step failed;
//! - no mapping of a domain's frames outlives its [`Shell`]: a domain with mapped frames cannot go;
//! - what is to be asked of Xen is planned by pure functions ([`plan`]), and done by functions that decide nothing.

pub mod capture;
pub mod fill;
pub mod plan;
pub mod restore;
pub mod shell;

use std::io;

use engine::units::ByteCount;

pub use capture::{capture, Captured};
pub use fill::fill;
pub use restore::{finish, restore, shell_plan};
pub use shell::{Ports, Ring, Rings, Shell, ShellPlan};

use crate::hypercalls::{CallError, DomId};

/// What went wrong, by step. Where it concerns a domain or a frame, the source names it.
#[derive(Debug, thiserror::Error)]
pub enum LifeError {
    /// Xen did not do what it was asked.
    #[error("{step}")]
    Call {
        /// What was being done.
        step: &'static str,
        /// Xen's answer.
        source: CallError,
    },
    /// Frames could not be had.
    #[error("populate {frames} frames of domain {domid} from gfn {first:#x} on")]
    Populate {
        /// The domain.
        domid: DomId,
        /// The first of them.
        first: u64,
        /// How many.
        frames: u64,
        /// Xen's answer.
        source: CallError,
    },
    /// There is no room for the domain.
    #[error("too little Xen memory: {needed} bytes are needed, {free} are free")]
    TooLittleMemory {
        /// What it needs.
        needed: ByteCount,
        /// What there is.
        free: ByteCount,
    },
    /// What is to be restored breaks a rule of ours.
    #[error("this state cannot be restored: {0}")]
    BadState(String),
    /// The memory image is not as long as the guest's frames.
    #[error("the memory image has {found} bytes, the guest's frames need {needed}")]
    ImageSize {
        /// Its size.
        found: ByteCount,
        /// What the frames need, or what there is room for.
        needed: ByteCount,
    },
    /// The domain is not one that suspended itself.
    #[error("domain {0} has not suspended itself")]
    NotSuspended(DomId),
    /// There is no such domain any more.
    #[error("domain {0} is gone")]
    Gone(DomId),
    /// The system failed.
    #[error("{step} of domain {domid}")]
    Io {
        /// What was being done.
        step: &'static str,
        /// The domain it was for.
        domid: DomId,
        /// The system's error.
        source: io::Error,
    },
}

impl LifeError {
    /// For `map_err`: Xen's answer in the named step.
    pub(crate) fn call(step: &'static str) -> impl FnOnce(CallError) -> LifeError {
        move |source| LifeError::Call { step, source }
    }

    /// For `map_err`: a system's error in the named step, done for `domid`.
    pub(crate) fn io(step: &'static str, domid: DomId) -> impl FnOnce(io::Error) -> LifeError {
        move |source| LifeError::Io { step, domid, source }
    }
}
