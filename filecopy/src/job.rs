//! A whole call: what `qvm-copy`, `qvm-move` and their kin do, wherever they run. How the service is reached is the caller's to say.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::send::{send, SendError};
use crate::walk::{survey, WalkError};
use crate::{SERVICE, UNSAFE_CHARACTERS};

/// Status of a call that the policy refused.
const REFUSED: i32 = 126;
/// Between two lines that say how far it is.
const PROGRESS_BYTES: u64 = 1 << 20;

/// What is to be copied, and how.
#[derive(Debug)]
pub struct Job<'a> {
    /// What to send.
    pub paths: &'a [PathBuf],
    /// Whether they are removed once the target has them; not together with `ignores_links`.
    pub moves: bool,
    /// Whether symbolic links are left out.
    pub ignores_links: bool,
    /// Whether standard error is told how far it is.
    pub shows_progress: bool,
}

/// Why it was not done.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    /// There is something that cannot be sent; nothing was.
    #[error(transparent)]
    Survey(#[from] WalkError),
    /// What is not sent would be removed.
    #[error(
        "symbolic links that are left out would be removed with the rest; copy, then remove what has arrived"
    )]
    LinksLost,
    /// The program that calls cannot be run.
    #[error("cannot run {}: {cause}", program.display())]
    Start {
        /// The program.
        program: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// The policy says no.
    #[error("the call of {SERVICE} was refused")]
    Denied,
    /// The transfer failed.
    #[error(transparent)]
    Send(#[from] SendError),
    /// All was sent, but something is still here.
    #[error("sent, but cannot remove {}: {cause}", path.display())]
    Remove {
        /// What.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
}

impl JobError {
    /// The exit status for it.
    pub fn status(&self) -> u8 {
        match self {
            JobError::Denied => 126,
            JobError::Start { .. } => 125,
            _ => 1,
        }
    }
}

impl Job<'_> {
    /// Does it. `call` gives the command that has the service on its standard input and output.
    pub fn run(&self, call: impl FnOnce(&str) -> Command) -> Result<(), JobError> {
        if self.moves && self.ignores_links {
            return Err(JobError::LinksLost);
        }
        let survey = survey(self.paths, self.ignores_links)?;
        let mut command = match survey.has_unsafe_names {
            false => call(SERVICE),
            true => call(&format!("{SERVICE}+{UNSAFE_CHARACTERS}")),
        };
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|cause| JobError::Start { program: command.get_program().into(), cause })?;
        let mut progress = Progress { total: survey.bytes, sent: 0, told: 0, is_shown: self.shows_progress };
        let sent = match (child.stdin.take(), child.stdout.take()) {
            (Some(to), Some(from)) => {
                send(self.paths, self.ignores_links, to, from, &mut |bytes| progress.add(bytes))
            }
            _ => Err(SendError::NoAnswer),
        };
        progress.end();
        let status = child.wait().ok().and_then(|status| status.code());
        match sent {
            Err(SendError::NoAnswer) if status == Some(REFUSED) => return Err(JobError::Denied),
            sent => sent?,
        }
        if self.moves {
            self.paths.iter().try_for_each(|path| {
                remove(path).map_err(|cause| JobError::Remove { path: path.clone(), cause })
            })?;
        }
        Ok(())
    }
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path)?.is_dir() {
        true => fs::remove_dir_all(path),
        false => fs::remove_file(path),
    }
}

struct Progress {
    total: u64,
    sent: u64,
    told: u64,
    is_shown: bool,
}

impl Progress {
    fn add(&mut self, bytes: u64) {
        self.sent = self.sent.saturating_add(bytes);
        if self.sent.saturating_sub(self.told) >= PROGRESS_BYTES {
            self.tell("\r");
        }
    }

    fn end(&mut self) {
        self.tell("\n");
    }

    fn tell(&mut self, end: &str) {
        self.told = self.sent;
        if self.is_shown {
            // As qfile-agent does. Nobody may be reading it.
            let _ = write!(io::stderr(), "sent {}/{} KB{end}", self.sent / 1024, self.total / 1024);
        }
    }
}
