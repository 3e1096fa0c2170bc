//! Our side of a control channel, as messages: what qrexec-daemon is in Qubes. Pure.
//!
//! Invariants: the guest is hostile; [`ControlEnd`]'s are the channel's. What of a message is a name is parsed, and a bad one refuses that one
//! call.

use qrexec::service::{Service, Target};
use qrexec::stock::control::{Endpoint, RequestId, ToAgent, Trigger};
use qrexec::stock::message::{AGENT_RING_BYTES, EXEC_BYTES};
use qrexec::stock::{ControlEnd, FromAgent, Said, Version, WireError};

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
pub struct Control(ControlEnd<FromAgent>);

impl Default for Control {
    fn default() -> Control {
        Control::new()
    }
}

impl Control {
    /// Of a fresh channel. Our `Hello` waits to be sent.
    pub fn new() -> Control {
        Control(ControlEnd::of_daemon())
    }

    /// Takes bytes off the front of `input`, up to the next thing to know. `None`: all of `input` is taken.
    pub fn hear(&mut self, input: &mut &[u8]) -> Result<Option<Heard>, WireError> {
        while let Some(said) = self.0.hear(input)? {
            match said {
                Said::Agreed(version) => return Ok(Some(Heard::Agreed(version))),
                // A channel to another domain is none of ours.
                Said::Message(FromAgent::ConnectionTerminated(at)) if at.domain != OURSELVES => {}
                Said::Message(FromAgent::ConnectionTerminated(at)) => {
                    return Ok(Some(Heard::Terminated(at.port)));
                }
                Said::Message(FromAgent::Trigger(trigger)) => return Ok(Some(heard(trigger))),
            }
        }
        Ok(None)
    }

    /// Whether calls can be made.
    pub fn is_agreed(&self) -> bool {
        self.0.is_agreed()
    }

    /// Whether Qubes' own agent could take a command line of so many bytes; no `Hello` says whose agent it is.
    pub fn takes(bytes: usize) -> bool {
        bytes < AGENT_RING_BYTES - EXEC_BYTES
    }

    /// Has a command line run, its bytes over the vchan that is served at `port`.
    pub fn exec(&mut self, port: u32, line: &[u8]) -> Result<(), WireError> {
        self.0.say(&ToAgent::ExecCmdline(Endpoint { domain: OURSELVES, port }, line.to_vec()))
    }

    /// The call may happen, over the vchan that is served at `port`.
    pub fn connect(&mut self, port: u32, request: RequestId) -> Result<(), WireError> {
        self.0.say(&ToAgent::ServiceConnect(Endpoint { domain: OURSELVES, port }, request))
    }

    /// The call may not happen.
    pub fn refuse(&mut self, request: RequestId) -> Result<(), WireError> {
        self.0.say(&ToAgent::ServiceRefused(request))
    }

    /// What waits to be sent.
    pub fn unsent(&self) -> &[u8] {
        self.0.unsent()
    }

    /// So much of it is.
    pub fn sent(&mut self, count: usize) {
        self.0.sent(count);
    }
}

fn heard(trigger: Trigger) -> Heard {
    match trigger.names() {
        // Who calls is ours to know: a guest that speaks for another is heard in no policy here.
        Ok((service, target, None)) => Heard::Asked(Asked { target, service, request: trigger.request }),
        Ok((_, _, Some(_))) | Err(_) => Heard::Nonsense(trigger.request),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use qrexec::stock::HEADER_BYTES;

    fn hello(version: Version) -> Vec<u8> {
        let mut bytes = Vec::new();
        version.encode_hello(&mut bytes);
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
        std::iter::from_fn(|| control.hear(&mut bytes).transpose()).collect()
    }

    #[test]
    fn an_agent_of_any_version_is_heard_and_answered() {
        for version in [Version::V2, Version::V3, Version::V4] {
            let mut bytes = hello(version);
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
        let mut bytes = hello(Version::V4);
        for (service, source) in [("test.Who", "work"), ("../x", ""), ("test.Who", "wo rk")] {
            trigger(service, source).encode(Version::V4, &mut bytes).unwrap();
        }
        let heard = all(&mut Control::new(), &bytes).unwrap();
        assert!(heard.len() == 4 && heard[1..].iter().all(|one| matches!(one, Heard::Nonsense(_))));
    }
}
