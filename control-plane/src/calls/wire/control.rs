//! Our side of a control channel, as messages: what qrexec-daemon is in Qubes. Pure.
//!
//! Invariants: the guest is hostile.
//! - Nothing is said but our `Hello` before the agent's has come, and what is said is in the version that both speak;
//! - at most one incomplete message of the guest's is held ([`Decoder`]'s invariant); a message that breaks the protocol breaks the channel
//!   for ever;
//! - what of a message is a name is parsed, and a bad one refuses that one call.

use qrexec::service::{Service, Target};
use qrexec::stock::control::{Endpoint, RequestId, ToAgent};
use qrexec::stock::message::{AGENT_RING_BYTES, EXEC_BYTES};
use qrexec::stock::negotiate::parse_hello;
use qrexec::stock::{Decoder, FromAgent, Rules, Version, WireError};

/// We are dom0.
const OURSELVES: u32 = 0;

/// What the agent has said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Heard {
    /// Its `Hello`: calls may be made from here on.
    Agreed(Version),
    /// A program wants a call.
    Asked(Asked),
    /// A request that cannot be a call: to be refused.
    Nonsense(RequestId),
    /// It has let go of a call's channel, and the port is free for it.
    Terminated(u32),
}

/// A call that a program in the guest wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    /// Whom it is for.
    pub target: Target,
    /// What is called.
    pub service: Service,
    /// Comes back with the answer.
    pub request: RequestId,
}

/// See the module.
#[derive(Debug)]
pub struct Control {
    decoder: Decoder,
    version: Option<Version>,
    out: Vec<u8>,
    broken: Option<WireError>,
}

impl Default for Control {
    fn default() -> Control {
        Control::new()
    }
}

impl Control {
    /// Of a fresh channel. Our `Hello` waits to be sent.
    pub fn new() -> Control {
        let mut out = Vec::new();
        Version::NEWEST.encode_hello(&mut out);
        Control { decoder: Decoder::new(), version: None, out, broken: None }
    }

    /// Takes bytes off the front of `input`, up to the next thing to know. `None`: all of `input` is taken.
    pub fn hear(&mut self, input: &mut &[u8]) -> Result<Option<Heard>, WireError> {
        if let Some(error) = &self.broken {
            return Err(error.clone());
        }
        self.next(input).inspect_err(|error| self.broken = Some(error.clone()))
    }

    fn next(&mut self, input: &mut &[u8]) -> Result<Option<Heard>, WireError> {
        while let Some(raw) = self.decoder.next(input)? {
            let Some(_) = self.version else {
                let version = Version::NEWEST.agree(parse_hello(&raw.body)?)?;
                self.decoder.expect(Rules::FromAgent(version));
                self.version = Some(version);
                return Ok(Some(Heard::Agreed(version)));
            };
            match FromAgent::parse(&raw)? {
                // A channel to another domain is none of ours.
                FromAgent::ConnectionTerminated(endpoint) if endpoint.domain != OURSELVES => {}
                FromAgent::ConnectionTerminated(endpoint) => {
                    return Ok(Some(Heard::Terminated(endpoint.port)));
                }
                FromAgent::Trigger(trigger) => {
                    let request = trigger.request.clone();
                    return Ok(Some(match trigger.names() {
                        // Who calls is ours to know: a guest that speaks for another is heard in no policy here.
                        Ok((service, target, None)) => Heard::Asked(Asked { target, service, request }),
                        Ok((_, _, Some(_))) | Err(_) => Heard::Nonsense(request),
                    }));
                }
            }
        }
        Ok(None)
    }

    /// Whether calls can be made.
    pub fn is_agreed(&self) -> bool {
        self.version.is_some()
    }

    /// Whether Qubes' own agent could take a command line of so many bytes; no `Hello` says whose agent it is.
    pub fn takes(bytes: usize) -> bool {
        bytes < AGENT_RING_BYTES - EXEC_BYTES
    }

    /// Has a command line run, its bytes over the vchan that is served at `port`.
    pub fn exec(&mut self, port: u32, line: &[u8]) -> Result<(), WireError> {
        self.say(&ToAgent::ExecCmdline(Endpoint { domain: OURSELVES, port }, line.to_vec()))
    }

    /// The call may happen, over the vchan that is served at `port`.
    pub fn connect(&mut self, port: u32, request: RequestId) -> Result<(), WireError> {
        self.say(&ToAgent::ServiceConnect(Endpoint { domain: OURSELVES, port }, request))
    }

    /// The call may not happen.
    pub fn refuse(&mut self, request: RequestId) -> Result<(), WireError> {
        self.say(&ToAgent::ServiceRefused(request))
    }

    fn say(&mut self, message: &ToAgent) -> Result<(), WireError> {
        message.encode(&mut self.out)
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
    use super::*;
    use qrexec::stock::control::Trigger;
    use qrexec::stock::{RawMessage, HEADER_BYTES};

    fn hello(version: u32) -> Vec<u8> {
        let mut bytes = Vec::new();
        RawMessage { kind: 0x300, body: version.to_le_bytes().to_vec() }.encode(&mut bytes);
        bytes
    }

    fn trigger(service: &str, source: &str) -> FromAgent {
        FromAgent::Trigger(Trigger {
            service: service.into(),
            target: b"dom0".to_vec(),
            source: source.into(),
            request: RequestId::new("SOCKET7").unwrap(),
        })
    }

    fn all(control: &mut Control, mut bytes: &[u8]) -> Result<Vec<Heard>, WireError> {
        let mut heard = Vec::new();
        while let Some(one) = control.hear(&mut bytes)? {
            heard.push(one);
        }
        Ok(heard)
    }

    #[test]
    fn an_agent_of_any_version_is_heard_and_answered() {
        for (number, version) in [(2, Version::V2), (3, Version::V3), (9, Version::V4)] {
            let mut bytes = hello(number);
            trigger("test.Who+x", "").encode(version, &mut bytes).unwrap();
            FromAgent::ConnectionTerminated(Endpoint { domain: 0, port: 520 })
                .encode(version, &mut bytes)
                .unwrap();
            FromAgent::ConnectionTerminated(Endpoint { domain: 4, port: 520 })
                .encode(version, &mut bytes)
                .unwrap();
            let mut control = Control::new();
            let heard = all(&mut control, &bytes).unwrap();
            assert_eq!(heard.len(), 3);
            assert_eq!((&heard[0], &heard[2]), (&Heard::Agreed(version), &Heard::Terminated(520)));
            let Heard::Asked(asked) = &heard[1] else { panic!("{heard:?}") };
            assert_eq!(
                (asked.target.to_string(), asked.service.to_string()),
                ("dom0".into(), "test.Who+x".into())
            );
            control.sent(control.unsent().len());
            control.connect(513, asked.request.clone()).unwrap();
            assert_eq!(control.unsent()[..4], 0x202u32.to_le_bytes());
        }
    }

    #[test]
    fn a_command_line_that_would_end_a_stock_agent_is_not_for_it() {
        let mut bytes = Vec::new();
        let line = vec![b'x'; 4087];
        ToAgent::ExecCmdline(Endpoint { domain: 0, port: 513 }, line).encode(&mut bytes).unwrap();
        assert_eq!(bytes.len() - HEADER_BYTES, 4096);
        assert!(Control::takes(4087) && !Control::takes(4088));
    }

    #[test]
    fn who_speaks_for_another_or_names_nonsense_is_refused_and_the_channel_goes_on() {
        let mut bytes = hello(4);
        for (service, source) in [("test.Who", "work"), ("../x", ""), ("test.Who", "wo rk")] {
            trigger(service, source).encode(Version::V4, &mut bytes).unwrap();
        }
        let heard = all(&mut Control::new(), &bytes).unwrap();
        assert!(heard.len() == 4 && heard[1..].iter().all(|one| matches!(one, Heard::Nonsense(_))));
    }

    #[test]
    fn what_comes_before_the_hello_or_twice_breaks_the_channel() {
        let mut early = Vec::new();
        trigger("test.Who", "").encode(Version::V3, &mut early).unwrap();
        assert!(all(&mut Control::new(), &early).is_err());
        let mut control = Control::new();
        assert!(all(&mut control, &[hello(3), hello(3)].concat()).is_err());
        assert!(all(&mut control, &early).is_err(), "for ever");
        assert!(all(&mut Control::new(), &hello(1)).is_err());
    }
}
