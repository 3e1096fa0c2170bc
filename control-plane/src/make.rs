//! A clone made: restored from its DVM template's savefile, or booted cold, with the reason said. What a launch and a disposable that
//! has a record of its own have in common.

use engine::host::{Confinement, Host, HostError};
use engine::identity::Identity;
use engine::image::hot::HotFiles;
use engine::launch::{self, Clone, LaunchError};
use engine::timeline::Timeline;

use crate::agent_link::AgentLink;
use crate::error::{Error, Kind, Result};
use crate::inputs::Guest;
use crate::output::error_text;
use crate::savefiles::{self, Readiness};
use crate::state::State;

/// What is done about a savefile that does not serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rebuild {
    /// Nothing.
    No,
    /// A new one is built in the background.
    Start,
    /// Somebody is at it already.
    UnderWay,
}

/// The savefile to restore from.
pub struct Image {
    /// Its generation.
    pub generation: u64,
    /// Its root hash.
    pub root_hash: String,
    /// Its admitted files.
    pub files: HotFiles,
}

/// A guest to make a clone of, and who hears about it.
pub struct Maker<'a> {
    /// The state folder.
    pub state: &'a State,
    /// The guest.
    pub guest: &'a Guest,
    /// Where it is to run.
    pub host: &'a dyn Host,
    /// What is done when its savefile does not serve.
    pub rebuild: Rebuild,
    /// Hears why a clone boots cold.
    pub say: &'a dyn Fn(&str),
}

impl Maker<'_> {
    /// The admitted image of a fresh savefile. Without one: says why, starts the rebuild, and answers `None`.
    pub fn ready_image(&self) -> Result<Option<Image>> {
        match savefiles::ready(self.state, self.guest, self.host)? {
            Readiness::Ready { generation, root_hash, files } => {
                Ok(Some(Image { generation, root_hash, files }))
            }
            Readiness::Not { reason } => {
                self.say_cold(&reason);
                Ok(None)
            }
        }
    }

    /// Restores a clone from `image`, or boots it cold. Answers the generation it was restored from as well.
    pub fn make(
        &self,
        image: Option<Image>,
        confinement: &Confinement,
        identity: &Identity,
        connect: impl Fn() -> Box<Connect>,
        timeline: &mut Timeline,
    ) -> Result<(Clone<AgentLink>, Option<u64>)> {
        let (host, spec) = (self.host, &self.guest.spec);
        let before = timeline.clone();
        let generation = image.as_ref().map(|image| image.generation);
        let restored = image.map(|image| {
            launch::restore(host, spec, image.files, confinement, identity, connect(), timeline)
        });
        let (made, generation) = match restored {
            // Nothing has run in it yet.
            Some(Err(LaunchError::Host(error))) if !matches!(error, HostError::Refused { .. }) => {
                *timeline = before;
                let error = error_text(&launch_error(LaunchError::Host(error)));
                let name = &self.guest.dvm_name;
                self.say_cold(&format!("the savefile of {name} does not restore ({error})"));
                (launch::cold(host, spec, confinement, identity, connect(), timeline), None)
            }
            Some(restored) => (restored, generation),
            None => (launch::cold(host, spec, confinement, identity, connect(), timeline), None),
        };
        Ok((made.map_err(launch_error)?, generation))
    }

    /// Says why the clone boots cold, and has a savefile built for the next.
    fn say_cold(&self, reason: &str) {
        let started = match self.rebuild {
            Rebuild::Start => savefiles::start_rebuild(self.state, &self.guest.dvm_name).map(drop),
            Rebuild::No | Rebuild::UnderWay => Ok(()),
        };
        (self.say)(&match (self.rebuild, started) {
            (Rebuild::No, _) => format!("{reason}; booting cold"),
            (_, Ok(())) => {
                format!("{reason}; booting cold, a savefile is being built for the next launch")
            }
            (_, Err(error)) => format!("{reason}; booting cold, and cannot start the rebuild: {error}"),
        });
    }
}

/// Connects to an agent over its fresh channel.
pub type Connect = dyn FnOnce(Box<dyn engine::host::AgentPipe>) -> AgentLink;

/// Why there is no clone, as an error.
pub fn launch_error(error: LaunchError) -> Error {
    let kind = match &error {
        LaunchError::Host(HostError::Refused { .. }) => Kind::Refused,
        _ => Kind::Failed,
    };
    Error::new(kind, "cannot launch a clone").because(error)
}
