//! What the engine asks of the program inside the guest. How the words travel is the control plane's business.
//!
//! Order, which the caller keeps and the guest checks: for a capture `ready`, `prerun`, `settle`, `warm`, `freeze`;
//! for a clone `identify`, then `thaw`; for a spare `rehearse` and `freeze`, as often as it takes, and for the
//! clone of a build's rehearsal `rehearse` alone. Between the restore and `identify` or `rehearse` no program of the guest but the
//! agent runs.

use std::time::Duration;

use crate::identity::Identity;
use crate::units::ByteCount;

/// The agent did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// It said why.
    #[error("{step}: the agent answered: {message}")]
    Failed {
        /// What was asked.
        step: &'static str,
        /// The agent's words.
        message: String,
    },
    /// It said nothing in time.
    #[error("{step}: no answer from the agent within {} s", limit.as_secs())]
    Silent {
        /// What was asked.
        step: &'static str,
        /// How long was waited.
        limit: Duration,
    },
    /// The channel broke: the guest has died, or does not keep to the protocol.
    #[error("{step}: the agent's channel broke: {reason}")]
    Broken {
        /// What was asked.
        step: &'static str,
        /// How.
        reason: String,
    },
}

/// What the agent says of itself when it is up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AgentFacts {
    /// The agent's version.
    pub version: String,
}

/// The agent of one guest.
pub trait Agent {
    /// Waits until the guest's session is up and the agent listens.
    fn ready(&mut self, limit: Duration) -> Result<AgentFacts, AgentError>;
    /// Runs `program` (an executable's bytes) as the user, in the session, to its end.
    fn prerun(&mut self, program: &[u8]) -> Result<(), AgentError>;
    /// Writes everything back and drops the caches. Says how much memory is free after that.
    fn settle(&mut self) -> Result<ByteCount, AgentError>;
    /// Runs once what a launch runs, so that its pages are in the image.
    fn warm(&mut self) -> Result<(), AgentError>;
    /// Stops every program but the agent.
    fn freeze(&mut self) -> Result<(), AgentError>;
    /// Makes the clone itself: entropy, clock, names, addresses.
    fn identify(&mut self, identity: &Identity) -> Result<(), AgentError>;
    /// Lets the programs go on.
    fn thaw(&mut self) -> Result<(), AgentError>;
    /// All that a launch asks of a clone, and a small command run to its end.
    fn rehearse(&mut self, identity: &Identity) -> Result<(), AgentError>;
}
