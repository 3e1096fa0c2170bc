//! Builds and collections in the background, and how they stand.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use crate::state::{self, State};

/// How the rebuilding of a savefile stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rebuild {
    /// Somebody is at it.
    UnderWay,
    /// The last one in the background failed: its last words, and where the others are.
    Failed(String, PathBuf),
    /// Nothing to tell.
    Quiet,
}

/// How the rebuilding of the savefile of `dvm` stands.
pub fn rebuild(state: &State, dvm: &str) -> Rebuild {
    if is_building(state, dvm) {
        return Rebuild::UnderWay;
    }
    let log = rebuild_log(state, dvm);
    let text = fs::read_to_string(&log).unwrap_or_default();
    match text.lines().rev().find(|line| !line.trim().is_empty()) {
        Some(last) => Rebuild::Failed(last.to_owned(), log),
        None => Rebuild::Quiet,
    }
}

/// Whether somebody is building a savefile of `dvm`.
pub fn is_building(state: &State, dvm: &str) -> bool {
    let path = state.savefiles(dvm).join("build.lock");
    path.exists() && matches!(state::is_locked(&path), Ok(true))
}

/// Starts `dispvm-savefile build` in a session of its own, at low priority: it outlives us and our terminal. It ends by
/// itself when another build of the same template is under way.
pub fn start_rebuild(state: &State, dvm: &str) -> io::Result<Child> {
    let program = std::env::current_exe()?.with_file_name("dispvm-savefile");
    let mut command = Command::new("setsid");
    command.args(["nice", "-n", "10"]).arg(program).arg("--root").arg(state.root());
    command.args(["build", "--background"]).arg(dvm);
    fs::create_dir_all(state.savefiles(dvm))?;
    let log = fs::File::create(rebuild_log(state, dvm))?;
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn()
}

/// Starts `dispvm-savefile gc`, which says nothing.
pub fn start_collection(state: &State) -> io::Result<Child> {
    let mut command = Command::new(std::env::current_exe()?.with_file_name("dispvm-savefile"));
    command.arg("--root").arg(state.root()).arg("gc");
    command.stdin(Stdio::null()).stdout(Stdio::null()).spawn()
}

/// What the last rebuild had to say.
pub fn rebuild_log(state: &State, dvm: &str) -> PathBuf {
    state.savefiles(dvm).join("build.log")
}
