//! The policy of qrexec: which qube may call which service where, read from the files of Qubes R4 and evaluated as Qubes does.
//!
//! Invariants:
//! - a policy is read whole or not at all: an error in any file is the error of every call ([`PolicyError`], with file and line);
//! - reading is bounded by the named limits of [`load`], whatever files include;
//! - the first rule that matches decides; where none does, the call is denied;
//! - what is allowed names a qube that is there, a template for disposables, or dom0, and never the caller itself;
//! - evaluation is pure: it reads a [`Policy`] and a [`System`] and touches nothing else.
//!
//! Behaviour was read from QubesOS/qubes-core-qrexec, `qrexec/policy/parser.py` and `parser_compat.py` as of R4.3;
//! docs/policy.md lists where this crate is stricter.

pub mod error;
pub mod evaluate;
pub mod explain;
pub mod load;
pub mod rule;
pub mod system;
pub mod token;
pub mod verdict;

mod ask;
mod lines;

pub use error::{Place, PolicyError, What};
pub use evaluate::Request;
pub use load::Policy;
pub use rule::{Action, Rule};
pub use system::{Qube, System, SystemError};
pub use token::{Role, Token};
pub use verdict::{Allow, Answer, Ask, Denial, Destination, Nobody, Prompt, Reason, Verdict};
