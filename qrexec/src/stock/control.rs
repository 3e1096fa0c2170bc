//! The messages of a control channel, between daemon and agent.
//!
//! Invariants: a parsed command line has no NUL and at least one byte; a parsed request id is what a stock daemon takes. Names of a
//! call stay bytes here, because a name that is no name refuses that one call, not the channel: [`Trigger::names`].
//!
//! Where libqrexec repairs (a command line or id without its NUL gets one, agent/qrexec-agent-data.c and
//! daemon/qrexec-daemon.c), we refuse: no peer of Qubes sends such a thing.

use super::decoder::RawMessage;
use super::message::{kind, put, COMMAND_BYTES_MAX, EXEC_BYTES, IDENT_BYTES, SERVICE_BYTES_MAX};
use super::message::{SERVICE_V2_BYTES, TARGET_BYTES, TARGET_V2_BYTES};
use super::{Version, WireError};
use crate::service::{QubeName, Service, SyntaxError, Target};

/// Ports a daemon gives to calls: one past the control channel's 512, and as many as it has clients.
pub const DATA_PORTS: std::ops::Range<u32> = 513..769;

/// Where a call's data channel is: the other domain, and the port it listens on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Endpoint {
    /// The domain's number.
    pub domain: u32,
    /// The vchan's port.
    pub port: u32,
}

/// The agent's name for a call it asked for; it comes back with the answer.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RequestId(String);

/// Daemon to agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToAgent {
    /// Run this and carry its bytes over the data channel.
    ExecCmdline(Endpoint, Vec<u8>),
    /// Run this on /dev/null; the data channel carries just an exit code of 0.
    JustExec(Endpoint, Vec<u8>),
    /// The call you asked for is allowed: serve the data channel for its client.
    ServiceConnect(Endpoint, RequestId),
    /// The call you asked for is denied.
    ServiceRefused(RequestId),
}

/// A call that a qube asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trigger {
    /// Name and argument.
    pub service: Vec<u8>,
    /// Whom it is for; empty for the policy's default.
    pub target: Vec<u8>,
    /// For whom it is asked (v4, relays of remote qubes); empty for the qube itself. A claim: policy decides what it is worth.
    pub source: Vec<u8>,
    /// Comes back with the answer.
    pub request: RequestId,
}

/// Agent to daemon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FromAgent {
    /// A qube asks for a call.
    Trigger(Trigger),
    /// A data channel is closed, its port free again.
    ConnectionTerminated(Endpoint),
}

impl RequestId {
    /// At most 31 letters, digits, `_`, `-`, `.` and spaces.
    pub fn new(id: &str) -> Option<Self> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_-. ".contains(&byte);
        (id.len() < IDENT_BYTES && id.bytes().all(allowed)).then(|| Self(id.to_owned()))
    }

    /// The id.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn parse(message: &'static str, field: &[u8]) -> Result<Self, WireError> {
        let id = terminated(message, field)?;
        if field.iter().skip(id.len()).any(|byte| *byte != 0) {
            return Err(WireError::malformed(message, "bytes after the request id's NUL"));
        }
        let id = std::str::from_utf8(id).ok().and_then(Self::new);
        id.ok_or(WireError::malformed(message, "the request id has a byte that ids don't have"))
    }
}

impl ToAgent {
    /// Looks into a message that came under [`Rules::ToAgent`](super::Rules::ToAgent).
    pub fn parse(raw: &RawMessage) -> Result<Self, WireError> {
        Ok(match raw.kind {
            kind::EXEC_CMDLINE => {
                let (endpoint, command) = parse_command("ExecCmdline", &raw.body)?;
                Self::ExecCmdline(endpoint, command)
            }
            kind::JUST_EXEC => {
                let (endpoint, command) = parse_command("JustExec", &raw.body)?;
                Self::JustExec(endpoint, command)
            }
            kind::SERVICE_CONNECT => {
                let (endpoint, id) = Endpoint::split("ServiceConnect", &raw.body)?;
                Self::ServiceConnect(endpoint, RequestId::parse("ServiceConnect", id)?)
            }
            kind::SERVICE_REFUSED => Self::ServiceRefused(RequestId::parse("ServiceRefused", &raw.body)?),
            kind => return Err(WireError::UnknownKind { kind, channel: "control channel to the agent" }),
        })
    }

    /// Appends its bytes.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<(), WireError> {
        let (kind, body) = match self {
            Self::ExecCmdline(endpoint, command) => {
                (kind::EXEC_CMDLINE, command_body("ExecCmdline", *endpoint, command)?)
            }
            Self::JustExec(endpoint, command) => {
                (kind::JUST_EXEC, command_body("JustExec", *endpoint, command)?)
            }
            Self::ServiceConnect(endpoint, id) => {
                let mut body = endpoint.encode().to_vec();
                put_field(&mut body, "ServiceConnect", id.0.as_bytes(), IDENT_BYTES)?;
                (kind::SERVICE_CONNECT, body)
            }
            Self::ServiceRefused(id) => {
                let mut body = Vec::new();
                put_field(&mut body, "ServiceRefused", id.0.as_bytes(), IDENT_BYTES)?;
                (kind::SERVICE_REFUSED, body)
            }
        };
        put(out, kind, &body);
        Ok(())
    }
}

impl Trigger {
    /// What it asks for in names that may go into a policy; an error refuses the call.
    pub fn names(&self) -> Result<(Service, Target, Option<QubeName>), SyntaxError> {
        let source = if self.source.is_empty() { None } else { Some(QubeName::parse(&self.source)?) };
        Ok((Service::parse(&self.service)?, Target::parse(&self.target)?, source))
    }
}

impl FromAgent {
    /// Looks into a message that came under [`Rules::FromAgent`](super::Rules::FromAgent).
    pub fn parse(raw: &RawMessage) -> Result<Self, WireError> {
        match raw.kind {
            kind::TRIGGER_SERVICE => {
                let mut fields = Fields { message: "TriggerService", rest: &raw.body };
                let service = fields.text(SERVICE_V2_BYTES)?;
                // As the lengths of v3 and v4 have it.
                if service.is_empty() {
                    return Err(WireError::malformed(fields.message, "no service is named"));
                }
                let target = fields.text(TARGET_V2_BYTES)?;
                let request = fields.request()?;
                Ok(Self::Trigger(Trigger { service, target, source: Vec::new(), request }))
            }
            kind::TRIGGER_SERVICE3 => {
                let mut fields = Fields { message: "TriggerService3", rest: &raw.body };
                let target = fields.text(TARGET_BYTES)?;
                let request = fields.request()?;
                let service = whole(fields.message, fields.rest)?;
                Ok(Self::Trigger(Trigger { service, target, source: Vec::new(), request }))
            }
            kind::TRIGGER_SERVICE4 => {
                let mut fields = Fields { message: "TriggerService4", rest: &raw.body };
                let source = fields.text(TARGET_BYTES)?;
                let target = fields.text(TARGET_BYTES)?;
                let request = fields.request()?;
                let service = whole(fields.message, fields.rest)?;
                Ok(Self::Trigger(Trigger { service, target, source, request }))
            }
            kind::CONNECTION_TERMINATED => {
                let (endpoint, rest) = Endpoint::split("ConnectionTerminated", &raw.body)?;
                if !rest.is_empty() || !DATA_PORTS.contains(&endpoint.port) {
                    return Err(WireError::malformed("ConnectionTerminated", "not a port of a call"));
                }
                Ok(Self::ConnectionTerminated(endpoint))
            }
            kind => Err(WireError::UnknownKind { kind, channel: "control channel from the agent" }),
        }
    }

    /// Appends its bytes, in the form that `version` has for it.
    pub fn encode(&self, version: Version, out: &mut Vec<u8>) -> Result<(), WireError> {
        let (kind, body) = match self {
            Self::ConnectionTerminated(endpoint) => (kind::CONNECTION_TERMINATED, endpoint.encode().to_vec()),
            Self::Trigger(trigger) => trigger.encode(version)?,
        };
        put(out, kind, &body);
        Ok(())
    }
}

impl Trigger {
    fn encode(&self, version: Version) -> Result<(u32, Vec<u8>), WireError> {
        const MESSAGE: &str = "TriggerService";
        if version < Version::V4 && !self.source.is_empty() {
            return Err(WireError::malformed(MESSAGE, "a source can't be named before v4"));
        }
        let mut body = Vec::new();
        let kind = match version {
            Version::V2 => {
                put_field(&mut body, MESSAGE, &self.service, SERVICE_V2_BYTES)?;
                put_field(&mut body, MESSAGE, &self.target, TARGET_V2_BYTES)?;
                kind::TRIGGER_SERVICE
            }
            Version::V3 => {
                put_field(&mut body, MESSAGE, &self.target, TARGET_BYTES)?;
                kind::TRIGGER_SERVICE3
            }
            Version::V4 => {
                put_field(&mut body, MESSAGE, &self.source, TARGET_BYTES)?;
                put_field(&mut body, MESSAGE, &self.target, TARGET_BYTES)?;
                kind::TRIGGER_SERVICE4
            }
        };
        put_field(&mut body, MESSAGE, self.request.0.as_bytes(), IDENT_BYTES)?;
        if version > Version::V2 {
            put_whole(&mut body, MESSAGE, &self.service, SERVICE_BYTES_MAX)?;
        }
        Ok((kind, body))
    }
}

impl Endpoint {
    fn encode(self) -> [u8; EXEC_BYTES] {
        let [d0, d1, d2, d3] = self.domain.to_le_bytes();
        let [p0, p1, p2, p3] = self.port.to_le_bytes();
        [d0, d1, d2, d3, p0, p1, p2, p3]
    }

    fn split<'a>(message: &'static str, body: &'a [u8]) -> Result<(Self, &'a [u8]), WireError> {
        let Some(([d0, d1, d2, d3, p0, p1, p2, p3], rest)) = body.split_first_chunk::<EXEC_BYTES>() else {
            return Err(WireError::malformed(message, "too short"));
        };
        let domain = u32::from_le_bytes([*d0, *d1, *d2, *d3]);
        Ok((Self { domain, port: u32::from_le_bytes([*p0, *p1, *p2, *p3]) }, rest))
    }
}

/// The fixed fields at the front of a message.
struct Fields<'a> {
    message: &'static str,
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    fn field(&mut self, bytes: usize) -> Result<&'a [u8], WireError> {
        let (field, rest) =
            self.rest.split_at_checked(bytes).ok_or(WireError::malformed(self.message, "too short"))?;
        self.rest = rest;
        Ok(field)
    }

    /// What stands before the field's first NUL. What follows it is nobody's, as the stock daemon has it.
    fn text(&mut self, bytes: usize) -> Result<Vec<u8>, WireError> {
        let field = self.field(bytes)?;
        terminated(self.message, field).map(<[u8]>::to_vec)
    }

    fn request(&mut self) -> Result<RequestId, WireError> {
        let field = self.field(IDENT_BYTES)?;
        RequestId::parse(self.message, field)
    }
}

fn terminated<'a>(message: &'static str, field: &'a [u8]) -> Result<&'a [u8], WireError> {
    let end = field.iter().position(|byte| *byte == 0);
    end.and_then(|end| field.get(..end)).ok_or(WireError::malformed(message, "a field has no NUL"))
}

/// A text that fills the rest of a message: its only NUL is its last byte.
fn whole(message: &'static str, bytes: &[u8]) -> Result<Vec<u8>, WireError> {
    match terminated(message, bytes)? {
        [] => Err(WireError::malformed(message, "the text is empty")),
        text if text.len() + 1 == bytes.len() => Ok(text.to_vec()),
        _ => Err(WireError::malformed(message, "bytes after the text's NUL")),
    }
}

fn parse_command(message: &'static str, body: &[u8]) -> Result<(Endpoint, Vec<u8>), WireError> {
    let (endpoint, command) = Endpoint::split(message, body)?;
    Ok((endpoint, whole(message, command)?))
}

fn command_body(message: &'static str, endpoint: Endpoint, command: &[u8]) -> Result<Vec<u8>, WireError> {
    let mut body = endpoint.encode().to_vec();
    put_whole(&mut body, message, command, COMMAND_BYTES_MAX)?;
    Ok(body)
}

fn put_whole(
    body: &mut Vec<u8>,
    message: &'static str,
    text: &[u8],
    bytes_max: usize,
) -> Result<(), WireError> {
    if text.is_empty() || text.len() >= bytes_max || text.contains(&0) {
        return Err(WireError::malformed(message, "a text is empty, too long or has a NUL"));
    }
    body.extend_from_slice(text);
    body.push(0);
    Ok(())
}

/// Appends a text, padded with NULs to `bytes`, at least one.
fn put_field(body: &mut Vec<u8>, message: &'static str, text: &[u8], bytes: usize) -> Result<(), WireError> {
    if text.len() >= bytes || text.contains(&0) {
        return Err(WireError::malformed(message, "a name is too long for this version or has a NUL"));
    }
    let end = body.len() + bytes;
    body.extend_from_slice(text);
    body.resize(end, 0);
    Ok(())
}
