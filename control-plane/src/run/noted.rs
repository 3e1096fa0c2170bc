//! A domain whose pauses are noted in its record, where everybody sees them.

use std::os::fd::BorrowedFd;

use engine::host::{Domain, HostError};

use crate::clones::{Lease, Power};
use crate::output::error_text;
use crate::session::Attended;

/// See the module.
pub struct Noted<'a> {
    domain: &'a mut Box<dyn Domain>,
    lease: &'a mut Lease,
}

impl<'a> Noted<'a> {
    /// A domain and its record.
    pub fn new(domain: &'a mut Box<dyn Domain>, lease: &'a mut Lease) -> Noted<'a> {
        Noted { domain, lease }
    }

    /// That it could not be noted is no reason to take back what was done.
    fn note(&mut self, power: Power) {
        if let Err(error) = self.lease.tell(power) {
            tracing::warn!("cannot note that the guest is {power:?}: {}", error_text(&error));
        }
    }
}

impl Attended for Noted<'_> {
    fn events(&self) -> BorrowedFd<'_> {
        Attended::events(self.domain)
    }

    fn attend(&mut self) -> Result<(), HostError> {
        self.domain.attend()
    }

    fn pause(&mut self) -> Result<(), HostError> {
        Attended::pause(self.domain)?;
        self.note(Power::Paused);
        Ok(())
    }

    fn unpause(&mut self) -> Result<(), HostError> {
        self.domain.unpause()?;
        self.note(Power::Running);
        Ok(())
    }
}
