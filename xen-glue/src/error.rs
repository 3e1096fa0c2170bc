//! Errors of the rooms as the engine's [`HostError`], which names the step and carries the rest as its source.

use std::io;

use engine::host::HostError;

use crate::hypercalls::CallError;
use crate::life::LifeError;
use crate::xenstore::domain::GuestError;
use crate::xenstore::XenstoreError;

/// An error and all that was behind it, in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text += &format!(": {error}");
        source = error.source();
    }
    text
}

/// Xen's answer.
pub(crate) fn xen_error(step: &'static str, error: &CallError) -> HostError {
    HostError::Hypervisor { step, message: error.to_string() }
}

/// A step of a domain's life; that there is too little room for one is a refusal.
pub(crate) fn life_error(step: &'static str, error: LifeError) -> HostError {
    match error {
        LifeError::TooLittleMemory { .. } => HostError::Refused { step, reason: error.to_string() },
        LifeError::Gone(_) => HostError::Gone { step, detail: String::new() },
        error => HostError::Hypervisor { step, message: chain(&error) },
    }
}

/// Xenstored's answer.
pub(crate) fn store_error(step: &'static str, error: XenstoreError) -> HostError {
    HostError::Io { step, source: io::Error::other(error) }
}

/// A guest that did not do what it was asked.
pub(crate) fn guest_error(step: &'static str, error: GuestError) -> HostError {
    match error {
        GuestError::Silent { limit, .. } => HostError::Timeout { step, limit },
        GuestError::Gone { .. } => HostError::Gone { step, detail: String::new() },
        GuestError::Unable { .. } => HostError::Refused { step, reason: error.to_string() },
        GuestError::Store(error) => store_error(step, error),
    }
}
