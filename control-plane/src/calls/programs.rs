//! The programs of ours that stand beside the one that runs.

use std::path::PathBuf;
use std::process::Command;

use crate::state::State;

/// `name`, beside our own executable; else in PATH.
pub fn path(name: &str) -> PathBuf {
    std::env::current_exe()
        .ok()
        .and_then(|own| Some(own.parent()?.join(name)))
        .filter(|beside| beside.is_file())
        .unwrap_or_else(|| name.into())
}

/// It, for the same state folder as ours.
pub fn command(name: &str, state: &State) -> Command {
    let mut command = Command::new(path(name));
    command.arg("--root").arg(state.root());
    command
}
