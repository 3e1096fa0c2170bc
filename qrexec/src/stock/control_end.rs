//! One end of a control channel, daemon's or agent's: what both do alike.
//!
//! Invariants: the other end is hostile.
//! - Our `Hello` is the first that is said, and the other's the first that is heard; what comes after them is in the version that both speak.
//!   Calls are for after both ([`ControlEnd::is_agreed`]);
//! - at most one incomplete message is held ([`Decoder`]'s invariant); a message that breaks the protocol breaks the channel for ever;
//! - a message that cannot be said leaves nothing of itself to be sent. How much waits to be sent is for whoever answers to bound.

use super::negotiate::parse_hello;
use super::{Decoder, FromAgent, RawMessage, Rules, ToAgent, Version, WireError};

/// What the other end has said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Said<M> {
    /// Its `Hello`: this version is spoken from here on.
    Agreed(Version),
    /// Anything after it.
    Message(M),
}

/// An end that hears messages `M`.
#[derive(Debug)]
pub struct ControlEnd<M> {
    rules: fn(Version) -> Rules,
    parse: fn(&RawMessage) -> Result<M, WireError>,
    decoder: Decoder,
    version: Option<Version>,
    out: Vec<u8>,
    broken: Option<WireError>,
}

impl ControlEnd<FromAgent> {
    /// The daemon's, of a fresh channel. Our `Hello` waits to be sent.
    pub fn of_daemon() -> Self {
        Self::new(Rules::FromAgent, FromAgent::parse)
    }

    /// Has a message wait to be sent.
    pub fn say(&mut self, message: &ToAgent) -> Result<(), WireError> {
        message.encode(&mut self.out)
    }
}

impl ControlEnd<ToAgent> {
    /// The agent's, of a fresh channel. Our `Hello` waits to be sent.
    pub fn of_agent() -> Self {
        Self::new(|_| Rules::ToAgent, ToAgent::parse)
    }

    /// Has a message wait to be sent: in the version spoken, but none beyond `newest`.
    pub fn say(&mut self, message: &FromAgent, newest: Version) -> Result<(), WireError> {
        message.encode(self.version.unwrap_or(Version::V2).min(newest), &mut self.out)
    }
}

impl<M> ControlEnd<M> {
    fn new(rules: fn(Version) -> Rules, parse: fn(&RawMessage) -> Result<M, WireError>) -> Self {
        let mut out = Vec::new();
        Version::NEWEST.encode_hello(&mut out);
        Self { rules, parse, decoder: Decoder::new(), version: None, out, broken: None }
    }

    /// Takes bytes off the front of `input`, up to the end of one message. `None`: all of `input` is taken.
    pub fn hear(&mut self, input: &mut &[u8]) -> Result<Option<Said<M>>, WireError> {
        if let Some(error) = &self.broken {
            return Err(error.clone());
        }
        self.next(input).inspect_err(|error| self.broken = Some(error.clone()))
    }

    fn next(&mut self, input: &mut &[u8]) -> Result<Option<Said<M>>, WireError> {
        let Some(raw) = self.decoder.next(input)? else { return Ok(None) };
        if self.version.is_some() {
            return (self.parse)(&raw).map(Said::Message).map(Some);
        }
        let version = Version::NEWEST.agree(parse_hello(&raw.body)?)?;
        self.decoder.expect((self.rules)(version));
        self.version = Some(version);
        Ok(Some(Said::Agreed(version)))
    }

    /// Whether the other end has said its `Hello`.
    pub fn is_agreed(&self) -> bool {
        self.version.is_some()
    }

    /// What waits to be sent.
    pub fn unsent(&self) -> &[u8] {
        &self.out
    }

    /// So much of it is.
    pub fn sent(&mut self, count: usize) {
        self.out.drain(..count.min(self.out.len()));
    }
}

#[cfg(test)]
mod tests {
    use super::super::control::Endpoint;
    use super::*;

    const PLACE: Endpoint = Endpoint { domain: 0, port: 520 };

    fn hello(version: u32) -> Vec<u8> {
        let mut bytes = Vec::new();
        RawMessage { kind: 0x300, body: version.to_le_bytes().to_vec() }.encode(&mut bytes);
        bytes
    }

    fn all<M>(end: &mut ControlEnd<M>, mut bytes: &[u8]) -> Result<Vec<Said<M>>, WireError> {
        std::iter::from_fn(|| end.hear(&mut bytes).transpose()).collect()
    }

    #[test]
    fn both_ends_agree_on_the_smaller_version_and_hear_each_other_however_it_is_cut() {
        for (number, version) in [(2, Version::V2), (3, Version::V3), (9, Version::V4)] {
            let (mut daemon, mut agent) = (ControlEnd::of_daemon(), ControlEnd::of_agent());
            assert_eq!((daemon.unsent(), agent.unsent()), (&hello(4)[..], &hello(4)[..]));
            assert_eq!(all(&mut daemon, &hello(number)).unwrap(), [Said::Agreed(version)]);
            assert_eq!(all(&mut agent, &hello(number)).unwrap(), [Said::Agreed(version)]);
            daemon.sent(12);
            agent.sent(usize::MAX);
            assert!(daemon.is_agreed() && agent.unsent().is_empty());
            let order = ToAgent::ExecCmdline(PLACE, b"user:id".to_vec());
            daemon.say(&order).unwrap();
            let told = FromAgent::ConnectionTerminated(PLACE);
            agent.say(&told, Version::NEWEST).unwrap();
            let heard: Vec<_> =
                daemon.unsent().iter().flat_map(|byte| all(&mut agent, &[*byte]).unwrap()).collect();
            assert_eq!(heard, [Said::Message(order)]);
            assert_eq!(all(&mut daemon, agent.unsent()).unwrap(), [Said::Message(told)]);
        }
    }

    #[test]
    fn what_comes_before_the_hello_or_twice_or_is_nothing_breaks_the_channel_for_ever() {
        let mut early = Vec::new();
        FromAgent::ConnectionTerminated(PLACE).encode(Version::V3, &mut early).unwrap();
        // Its length is right, its port none of a call's.
        let mut nonsense = early.clone();
        nonsense[12..].fill(0);
        let nonsense = [hello(3), nonsense].concat();
        for bytes in [early.clone(), hello(1), [hello(3), hello(3)].concat(), nonsense] {
            let mut end = ControlEnd::of_daemon();
            let error = all(&mut end, &bytes).unwrap_err();
            assert_eq!(end.hear(&mut &early[..]), Err(error.clone()));
            assert_eq!(end.hear(&mut &[][..]), Err(error));
        }
        assert!(all(&mut ControlEnd::of_agent(), &[hello(3), early].concat()).is_err());
    }

    #[test]
    fn what_cannot_be_said_leaves_nothing() {
        let mut end = ControlEnd::of_daemon();
        let before = end.unsent().to_vec();
        assert!(end.say(&ToAgent::ExecCmdline(PLACE, vec![b'x'; 70_000])).is_err());
        assert_eq!(end.unsent(), before);
    }
}
