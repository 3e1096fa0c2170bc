//! A call out of a guest: whom a program in it wants to run what. Payload: target, NUL, service and perhaps its argument, NUL.
//!
//! Invariants: streams of calls have bit 31 set, the guest chooses them and uses each once; those of commands have it clear. Parsing
//! checks that, so neither side's numbers can name what the other began. Bytes of calls flow within windows as those of commands do.

use crate::service::{Service, Target};
use crate::ProtocolError;

/// What tells the streams of calls from those of commands.
pub const CALL_STREAM: u32 = 1 << 31;

const FRAME: &str = "Call";

/// What a program in the guest asks for. Who it is nobody says: it is the guest whose connection this is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// Whom it is for.
    pub target: Target,
    /// What is to run there.
    pub service: Service,
}

impl Call {
    /// Checks both texts.
    pub fn parse(target: &[u8], service: &[u8]) -> Result<Self, crate::service::SyntaxError> {
        Ok(Self { target: Target::parse(target)?, service: Service::parse(service)? })
    }

    /// The payload: what a program in the guest sends to its agent, and the agent to the host.
    pub fn encode(&self) -> Vec<u8> {
        format!("{}\0{}\0", self.target, self.service).into_bytes()
    }

    /// Checks a payload.
    pub fn decode(payload: &[u8]) -> Result<Self, ProtocolError> {
        let mut texts = payload.split(|byte| *byte == 0);
        let (Some(target), Some(service), Some([]), None) =
            (texts.next(), texts.next(), texts.next(), texts.next())
        else {
            return Err(ProtocolError::malformed(FRAME, "not two texts, each ended by a NUL"));
        };
        Self::parse(target, service).map_err(|error| ProtocolError::malformed(FRAME, error.what))
    }
}
