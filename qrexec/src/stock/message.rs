//! The header of every message, the kinds, and which of them may stand where, with which length.
//!
//! Invariants: a [`Header`] that [`Rules::check`] let through has a kind of its channel and a length within that kind's limits, so
//! its length is a number one may allocate by. Numbers are those of libqrexec/qrexec.h (QubesOS/qubes-core-qrexec, 079c2f89);
//! lengths are what the receivers there enforce.

use super::{Version, WireError};

/// Bytes of a header: kind u32, length u32, little-endian.
pub const HEADER_BYTES: usize = 8;
/// Bytes of a command line with its NUL (`MAX_QREXEC_CMD_LEN`).
pub const COMMAND_BYTES_MAX: usize = 65_535;
/// Bytes of the ring by which Qubes' own agent hears its control channel. It takes a message's body at once, and ends when the ring can't hold
/// that (agent/qrexec-agent.c, 01a6ca23).
pub const AGENT_RING_BYTES: usize = 4096;
/// Bytes of a service's name, argument and NUL from v3 on (`MAX_SERVICE_NAME_LEN`): with header and names it fits a vchan's ring.
pub const SERVICE_BYTES_MAX: usize = 65_000;

/// Bytes of `Hello`.
pub(crate) const HELLO_BYTES: usize = 4;
/// Bytes of `struct exec_params` before its command line.
pub const EXEC_BYTES: usize = 8;
/// Bytes of `struct service_params`: the request's id.
pub(crate) const IDENT_BYTES: usize = 32;
/// Bytes of a service's name in v2.
pub(crate) const SERVICE_V2_BYTES: usize = 64;
/// Bytes of a target in v2.
pub(crate) const TARGET_V2_BYTES: usize = 32;
/// Bytes of a target from v3 on, and of a source in v4: room for `@dispvm:uuid:` and a UUID.
pub(crate) const TARGET_BYTES: usize = 64;

const TRIGGER_V2_BYTES: usize = SERVICE_V2_BYTES + TARGET_V2_BYTES + IDENT_BYTES;
const TRIGGER_V3_BYTES: usize = TARGET_BYTES + IDENT_BYTES;
const TRIGGER_V4_BYTES: usize = 2 * TARGET_BYTES + IDENT_BYTES;
const _: () = assert!(TRIGGER_V2_BYTES == 128 && TRIGGER_V3_BYTES == 96 && TRIGGER_V4_BYTES == 160);
// The longest control message fits the 64 KiB ring of a vchan, as the header file intends.
const _: () = assert!(HEADER_BYTES + TRIGGER_V4_BYTES + SERVICE_BYTES_MAX <= 64 << 10);

/// The numbers on the wire.
#[allow(missing_docs)]
pub mod kind {
    pub const DATA_STDIN: u32 = 0x190;
    pub const DATA_STDOUT: u32 = 0x191;
    pub const DATA_STDERR: u32 = 0x192;
    pub const DATA_EXIT_CODE: u32 = 0x193;

    pub const EXEC_CMDLINE: u32 = 0x200;
    pub const JUST_EXEC: u32 = 0x201;
    pub const SERVICE_CONNECT: u32 = 0x202;
    pub const SERVICE_REFUSED: u32 = 0x203;

    pub const TRIGGER_SERVICE: u32 = 0x210;
    pub const CONNECTION_TERMINATED: u32 = 0x211;
    pub const TRIGGER_SERVICE3: u32 = 0x212;
    // R4.3's; the header file at hand ends with v3 (docs/qrexec.md).
    pub const TRIGGER_SERVICE4: u32 = 0x213;

    pub const HELLO: u32 = 0x300;
}

/// A header as it stands on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// One of [`kind`], or anything else.
    pub kind: u32,
    /// Bytes of the body that follows.
    pub length: u32,
}

impl Header {
    /// Reads a header; any bytes are one.
    pub fn parse(bytes: [u8; HEADER_BYTES]) -> Self {
        let [k0, k1, k2, k3, l0, l1, l2, l3] = bytes;
        Self { kind: u32::from_le_bytes([k0, k1, k2, k3]), length: u32::from_le_bytes([l0, l1, l2, l3]) }
    }

    /// Its bytes.
    pub fn encode(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..4].copy_from_slice(&self.kind.to_le_bytes());
        bytes[4..].copy_from_slice(&self.length.to_le_bytes());
        bytes
    }
}

/// What may come next on a channel, in one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rules {
    /// The first message of any channel.
    Hello,
    /// Control, from daemon to agent.
    ToAgent,
    /// Control, from agent to daemon.
    FromAgent(Version),
    /// Data, either way.
    Data(Version),
}

impl Rules {
    /// The body's length, when a message like that may come.
    pub fn check(self, header: Header) -> Result<usize, WireError> {
        let (message, min, max) = self.lengths(header.kind)?;
        match usize::try_from(header.length) {
            Ok(length) if (min..=max).contains(&length) => Ok(length),
            _ => Err(WireError::Length { message, length: header.length, min, max }),
        }
    }

    /// A kind's name, and the least and most bytes of its body.
    fn lengths(self, kind: u32) -> Result<(&'static str, usize, usize), WireError> {
        let exactly = |name, bytes| (name, bytes, bytes);
        // A command line is at least its NUL, a service's name at least one byte and its NUL.
        let command = |name| (name, EXEC_BYTES + 1, EXEC_BYTES + COMMAND_BYTES_MAX);
        let named = |name, fixed| (name, fixed + 2, fixed + SERVICE_BYTES_MAX);
        Ok(match (self, kind) {
            (Self::Hello, kind::HELLO) => exactly("Hello", HELLO_BYTES),
            (Self::ToAgent, kind::EXEC_CMDLINE) => command("ExecCmdline"),
            (Self::ToAgent, kind::JUST_EXEC) => command("JustExec"),
            (Self::ToAgent, kind::SERVICE_CONNECT) => {
                ("ServiceConnect", EXEC_BYTES + 1, EXEC_BYTES + IDENT_BYTES)
            }
            (Self::ToAgent, kind::SERVICE_REFUSED) => exactly("ServiceRefused", IDENT_BYTES),
            (Self::FromAgent(_), kind::CONNECTION_TERMINATED) => exactly("ConnectionTerminated", EXEC_BYTES),
            (Self::FromAgent(Version::V2), kind::TRIGGER_SERVICE) => {
                exactly("TriggerService", TRIGGER_V2_BYTES)
            }
            (Self::FromAgent(Version::V3 | Version::V4), kind::TRIGGER_SERVICE3) => {
                named("TriggerService3", TRIGGER_V3_BYTES)
            }
            (Self::FromAgent(Version::V4), kind::TRIGGER_SERVICE4) => {
                named("TriggerService4", TRIGGER_V4_BYTES)
            }
            (Self::Data(version), kind::DATA_STDIN) => ("DataStdin", 0, version.chunk_bytes_max()),
            (Self::Data(version), kind::DATA_STDOUT) => ("DataStdout", 0, version.chunk_bytes_max()),
            (Self::Data(version), kind::DATA_STDERR) => ("DataStderr", 0, version.chunk_bytes_max()),
            (Self::Data(version), kind::DATA_EXIT_CODE) => ("DataExitCode", 0, version.chunk_bytes_max()),
            _ => return Err(WireError::UnknownKind { kind, channel: self.channel() }),
        })
    }

    fn channel(self) -> &'static str {
        match self {
            Self::Hello => "channel before its Hello",
            Self::ToAgent => "control channel to the agent",
            Self::FromAgent(Version::V2) => "control channel from a v2 agent",
            Self::FromAgent(Version::V3) => "control channel from a v3 agent",
            Self::FromAgent(Version::V4) => "control channel from a v4 agent",
            Self::Data(_) => "data channel",
        }
    }
}

/// Appends a message. Bodies are within their limits by then, which are far below 4 GiB.
pub(crate) fn put(out: &mut Vec<u8>, kind: u32, body: &[u8]) {
    let length = u32::try_from(body.len()).unwrap_or(u32::MAX);
    out.extend_from_slice(&Header { kind, length }.encode());
    out.extend_from_slice(body);
}
