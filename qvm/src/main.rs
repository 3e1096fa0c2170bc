//! `qvm`: Qubes' command line tools over the Admin API, in one binary.
//!
//! It is the tool whose name it is called by (a link `qvm-ls` to it), or else the one its first argument names: `qvm qvm-ls`,
//! `qvm ls`. Options, columns, messages and exit statuses are those of the stock client of R4.3 (QubesOS/qubes-core-admin-client,
//! `qubesadmin/tools/*.py`).
//!
//! Invariants:
//! - a tool is a function of its arguments and of what the API answers; it keeps nothing;
//! - one file per tool, or for a few that do alike. What several need stands in `api` (calls, and what they answer), `names` (which qubes are meant),
//!   `outcome` (how a tool ends), `programs` (what they run) and `table`.

mod api;
mod clone;
mod create;
mod features;
mod files;
mod firewall;
mod interrupt;
mod legacy;
mod ls;
mod names;
mod outcome;
mod power;
mod prefs;
mod programs;
mod remove;
mod run;
mod shutdown;
mod table;
mod tags;
mod volume;

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

/// A tool: its name, and what it does with that and its arguments, of which the first is how it was called.
type Tool = (&'static str, fn(&'static str, Vec<OsString>) -> u8);

const TOOLS: &[Tool] = &[
    ("qvm-ls", |name, args| outcome::tool(name, args, ls::run)),
    ("qvm-prefs", |name, args| outcome::tool(name, args, prefs::of_qube)),
    ("qubes-prefs", |name, args| outcome::tool(name, args, prefs::of_system)),
    ("qvm-features", |name, args| outcome::tool(name, args, features::run)),
    ("qvm-tags", |name, args| outcome::tool(name, args, tags::run)),
    ("qvm-firewall", |name, args| outcome::tool(name, args, firewall::run)),
    ("qvm-volume", |name, args| outcome::tool(name, args, volume::run)),
    ("qvm-create", |name, args| outcome::tool(name, args, create::run)),
    ("qvm-clone", |name, args| outcome::tool(name, args, clone::run)),
    ("qvm-remove", |name, args| outcome::tool(name, args, remove::run)),
    ("qvm-start", |name, args| outcome::tool(name, args, power::start)),
    ("qvm-shutdown", |name, args| outcome::tool(name, args, shutdown::run)),
    ("qvm-run", |name, args| outcome::tool(name, args, run::run)),
    ("qvm-kill", |name, args| outcome::tool(name, args, power::kill)),
    ("qvm-pause", |name, args| outcome::tool(name, args, power::pause)),
    ("qvm-unpause", |name, args| outcome::tool(name, args, power::unpause)),
    ("qvm-copy-to-vm", |name, args| outcome::tool(name, args, files::copy)),
    ("qvm-move-to-vm", |name, args| outcome::tool(name, args, files::move_)),
    ("qvm-create-default-dvm", |name, args| outcome::tool(name, args, legacy::create)),
    ("qfile-daemon-dvm", |name, args| outcome::tool(name, args, legacy::daemon)),
];

fn main() -> ExitCode {
    let mut args: Vec<OsString> = std::env::args_os().collect();
    let called = args.first().and_then(|path| find(Path::new(path).file_name()?.to_str()?));
    let tool = called.or_else(|| {
        args = args.split_off(args.len().min(1));
        find(args.first()?.to_str()?)
    });
    let Some((name, run)) = tool else {
        let names: Vec<_> = TOOLS.iter().map(|(name, _)| *name).collect();
        eprintln!("usage: qvm TOOL [ARGUMENT...]\n\ntools: {}", names.join(", "));
        return ExitCode::from(outcome::USAGE);
    };
    ExitCode::from(run(name, args))
}

/// The tool of this name, whose prefix may be left out.
fn find(name: &str) -> Option<Tool> {
    TOOLS.iter().find(|(tool, _)| *tool == name || tool.strip_prefix("qvm-") == Some(name)).copied()
}
