//! Our side of the control channel, as messages: what Qubes' own agent is there. Pure.
//!
//! Invariants: [`ControlEnd`]'s. What waits to be sent is bounded by whoever stops hearing at [`UNSENT_MAX`].

use qrexec::stock::control::{Endpoint, RequestId, Trigger};
use qrexec::stock::{ControlEnd, FromAgent, Said, ToAgent, Version, WireError};
use qrexec::Call;

/// With more than this waiting to be sent, nothing is heard: an answer is smaller than what it answers.
pub const UNSENT_MAX: usize = 64 << 10;

/// What dom0 has said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Heard {
    /// Its `Hello`: programs may call from here on.
    Agreed,
    /// Something is to run, as this line says.
    Exec {
        /// Where its vchan is.
        endpoint: Endpoint,
        /// Not yet looked into.
        line: Vec<u8>,
        /// Whether only that it starts is of interest.
        just: bool,
    },
    /// A program's call may happen.
    Connect(Endpoint, RequestId),
    /// It may not.
    Refused(RequestId),
}

/// See the module.
#[derive(Debug)]
pub struct Control(ControlEnd<ToAgent>);

impl Default for Control {
    fn default() -> Self {
        Self::new()
    }
}

impl Control {
    /// Of a fresh channel; our `Hello` waits to be sent.
    pub fn new() -> Self {
        Self(ControlEnd::of_agent())
    }

    /// Takes bytes off the front of `input`, up to the next thing to know. `None`: all of `input` is taken.
    pub fn hear(&mut self, input: &mut &[u8]) -> Result<Option<Heard>, WireError> {
        Ok(self.0.hear(input)?.map(|said| match said {
            Said::Agreed(_) => Heard::Agreed,
            Said::Message(ToAgent::ExecCmdline(endpoint, line)) => {
                Heard::Exec { endpoint, line, just: false }
            }
            Said::Message(ToAgent::JustExec(endpoint, line)) => Heard::Exec { endpoint, line, just: true },
            Said::Message(ToAgent::ServiceConnect(endpoint, request)) => Heard::Connect(endpoint, request),
            Said::Message(ToAgent::ServiceRefused(request)) => Heard::Refused(request),
        }))
    }

    /// Whether dom0 has said its `Hello`.
    pub fn is_agreed(&self) -> bool {
        self.0.is_agreed()
    }

    /// Asks for a program's call. An error: names that this version cannot say; nothing is sent then.
    pub fn trigger(&mut self, call: &Call, request: RequestId) -> Result<(), WireError> {
        let trigger = Trigger {
            service: call.service.to_string().into_bytes(),
            target: call.target.to_string().into_bytes(),
            source: Vec::new(),
            request,
        };
        // v4's own form only says more of whom one speaks for, which is nobody here.
        self.0.say(&FromAgent::Trigger(trigger), Version::V3)
    }

    /// Tells that nothing of a call's vchan is held here any more.
    pub fn terminated(&mut self, endpoint: Endpoint) -> Result<(), WireError> {
        self.0.say(&FromAgent::ConnectionTerminated(endpoint), Version::V3)
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

#[cfg(test)]
mod tests {
    use super::*;

    const PLACE: Endpoint = Endpoint { domain: 0, port: 513 };

    fn hello(version: Version) -> Vec<u8> {
        let mut bytes = Vec::new();
        version.encode_hello(&mut bytes);
        bytes
    }

    fn said(messages: &[ToAgent]) -> Vec<u8> {
        let mut bytes = hello(Version::V3);
        messages.iter().for_each(|message| message.encode(&mut bytes).expect("encodes"));
        bytes
    }

    fn all(control: &mut Control, mut bytes: &[u8]) -> Result<Vec<Heard>, WireError> {
        std::iter::from_fn(|| control.hear(&mut bytes).transpose()).collect()
    }

    #[test]
    fn what_dom0_says_is_heard_however_it_is_cut() {
        let request = RequestId::new("call1").expect("an id");
        let bytes = said(&[
            ToAgent::ExecCmdline(PLACE, b"user:id".to_vec()),
            ToAgent::JustExec(PLACE, b"root:true".to_vec()),
            ToAgent::ServiceConnect(PLACE, request.clone()),
            ToAgent::ServiceRefused(request.clone()),
        ]);
        let exec = |line: &str, just| Heard::Exec { endpoint: PLACE, line: line.into(), just };
        let expected = [
            Heard::Agreed,
            exec("user:id", false),
            exec("root:true", true),
            Heard::Connect(PLACE, request.clone()),
            Heard::Refused(request),
        ];
        assert_eq!(all(&mut Control::new(), &bytes).expect("sound"), expected);
        let (mut control, mut heard) = (Control::new(), Vec::new());
        for byte in &bytes {
            heard.extend(all(&mut control, &[*byte]).expect("sound"));
        }
        assert_eq!(heard, expected);
    }

    #[test]
    fn a_call_is_asked_for_in_the_version_spoken() {
        for (version, kind) in [(Version::V2, 0x210u32), (Version::V3, 0x212), (Version::V4, 0x212)] {
            let mut control = Control::new();
            all(&mut control, &hello(version)).expect("sound");
            control.sent(control.unsent().len());
            let call = Call::parse(b"work", b"test.Who+x").expect("a call");
            control.trigger(&call, RequestId::new("call7").expect("an id")).expect("can be said");
            assert_eq!(control.unsent()[..4], kind.to_le_bytes());
            let long = Call::parse(b"work", format!("test.{}", "x".repeat(100)).as_bytes()).expect("a call");
            let before = control.unsent().len();
            let told = control.trigger(&long, RequestId::new("call8").expect("an id"));
            assert_eq!(
                (told.is_err(), control.unsent().len() == before),
                (version == Version::V2, version == Version::V2)
            );
        }
    }
}
