//! A qube that keeps a volume, ready to boot: its lease, the copy it writes to, its limits and identity.

use std::fs::File;

use engine::host::{AgentPipe, Confinement, Host};
use engine::identity::Identity;
use engine::launch::{self, Clone};
use engine::timeline::Timeline;

use super::boot_error;
use super::subject::{Overrides, Subject};
use crate::agent_link::AgentLink;
use crate::clones::{Claim, Keeping, Lease};
use crate::error::{Error, Result};
use crate::machine::{self, Machine};
use crate::state::{self, State};

/// See the module. Whoever has it holds the qube ([`crate::qube::hold_running`]).
pub(super) struct Prepared {
    /// What it is made of.
    pub(super) subject: Subject,
    /// Holds its name and what it stands on.
    pub(super) lease: Lease,
    /// The copy that becomes the next generation.
    pub(super) written: File,
    host: Box<dyn Host>,
    confinement: Confinement,
    identity: Identity,
}

impl Prepared {
    /// Reads the records of `name` and takes what a boot needs.
    pub(super) fn new(
        state: &State,
        machine: &dyn Machine,
        name: &str,
        instead: &Overrides,
        keeping: Keeping,
    ) -> Result<Prepared> {
        let in_use = state::lock_shared(&state.use_lock())?;
        let mut subject = Subject::load(state, name, instead)?;
        let template = subject.template.clone();
        let claim = Claim { dvm: name, root_hash: "", template, keeping, label: None, qube: Some(name) };
        let lease = Lease::claim(state, claim)?;
        drop(in_use);
        let host = machine.host(state, &subject.spec.kernel)?;
        let written = subject.copy_kept_volume(state, name)?;
        let confinement = machine::confinement(state, machine, lease.number());
        machine::check_memory(state, machine, &subject.spec, &confinement)?;
        let identity = Identity::fresh(lease.number()).map_err(Error::failed("draw an identity"))?;
        Ok(Prepared { subject, lease, written, host, confinement, identity })
    }

    /// Boots it.
    pub(super) fn boot(
        &self,
        connect: impl FnOnce(Box<dyn AgentPipe>) -> AgentLink,
        timeline: &mut Timeline,
    ) -> Result<Clone<AgentLink>> {
        let Prepared { host, subject, confinement, identity, .. } = self;
        launch::cold(&**host, &subject.spec, confinement, identity, connect, timeline).map_err(boot_error)
    }
}
