//! What a method comes to: bytes, the protocol's exception, or a hang-up.
//!
//! qubesd tells a client of failures that are its business (QubesException and its kin), and closes the connection without a word
//! on calls that are malformed or not permitted (PermissionDenied, ProtocolError): QubesOS/qubes-core-admin
//! `qubes/api/__init__.py`, `QubesDaemonProtocol.respond`, R4.3.

use admin_api::{Exception, Kind, ADMIN_VM};

use crate::error::Error;
use crate::output::{error_text, without_paths};
use crate::state::State;

/// Why a call has no answer.
#[derive(Debug)]
pub(super) enum Refusal {
    /// The client is told.
    Exception(Exception),
    /// The client is hung up on; the log says why.
    Silent(String),
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Refusal::Exception(exception) => exception.fmt(f),
            Refusal::Silent(why) => f.write_str(why),
        }
    }
}

/// What a method comes to.
pub(super) type Answer<T = Vec<u8>> = Result<T, Refusal>;

/// A failure the client is told of.
pub(super) fn exception(kind: Kind, message: impl AsRef<str>) -> Refusal {
    Refusal::Exception(Exception::new(kind, message.as_ref()))
}

/// A name in a message, as Python's `repr` writes it: what core-admin's messages have, and scripts look for.
pub(super) fn quoted(name: &str) -> String {
    format!("'{}'", name.escape_debug())
}

/// A call that is no proper one.
pub(super) fn silent(why: impl Into<String>) -> Refusal {
    Refusal::Silent(why.into())
}

/// Hangs up unless it holds.
pub(super) fn enforce(holds: bool, why: &str) -> Answer<()> {
    match holds {
        true => Ok(()),
        false => Err(silent(why)),
    }
}

/// The exception as its caller is told it: nobody but dom0 hears where dom0's files are, which its log says.
pub(super) fn told(exception: Exception, caller: &str, state: &State) -> Exception {
    let whole = exception.message();
    let text = without_paths(&whole, state.root());
    if caller == ADMIN_VM || text == whole {
        return exception;
    }
    tracing::warn!("{caller} is told without the paths: {whole}");
    Exception::new(exception.kind, &text)
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Refusal {
        exception(Kind::QubesException, error_text(&error))
    }
}
