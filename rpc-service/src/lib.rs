//! Services of Qubes' RPC where they are served, in dom0 and in guests alike: which file is one ([`find`]), what its configuration says
//! ([`config`]), where one behind TCP is ([`tcp`]), and how the bytes of one behind a socket are carried ([`relay`]).
//!
//! As in QubesOS/qubes-core-qrexec (libqrexec/exec.c as of R4.2, libqrexec/toml.c a893050f, libqrexec/process_io.c 53124434,
//! Documentation/qrexec.rst of R4.3).
//!
//! Invariants: the names come from a caller who is somebody else, and have been checked ([`Service`]), so they are components of a path;
//! what the files say is this machine's own word, and no more of it is read than [`config::CONFIG_BYTES_MAX`].
//!
//! [`Service`]: qrexec::service::Service

pub mod config;
pub mod find;
pub mod relay;
pub mod tcp;

use std::io;
use std::path::PathBuf;

use qrexec::service::{EXIT_NOT_FOUND, EXIT_PROBLEM};
use thiserror::Error;

/// Why a service is not served.
#[derive(Debug, Error)]
pub enum NotServed {
    /// No folder has it.
    #[error("there is no such service")]
    Missing,
    /// A file cannot be looked at: a link that leads nowhere, no permission, a broken disk.
    #[error("look at {path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is there, but nothing that can serve.
    #[error("{0} is neither a program that may be run nor a socket")]
    Kind(PathBuf),
    /// Its configuration is wrong.
    #[error("{path}:{error}")]
    Config {
        /// Which file.
        path: PathBuf,
        /// What is wrong, and where.
        error: config::ConfigError,
    },
    /// What the configuration says makes no sense for what the service is.
    #[error("{0}")]
    Senseless(&'static str),
    /// The place of a service behind TCP is none.
    #[error("{link}: {what}")]
    Tcp {
        /// What the file links to.
        link: String,
        /// What is wrong.
        what: &'static str,
    },
}

impl NotServed {
    /// The exit status that qrexec has for it.
    pub fn status(&self) -> u8 {
        match self {
            NotServed::Missing => EXIT_NOT_FOUND,
            _ => EXIT_PROBLEM,
        }
    }
}
