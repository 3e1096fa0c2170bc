//! How a tool ends: the messages and exit statuses of Python's argparse and of `QubesArgumentParser` (qubesadmin/tools/__init__.py).

use std::ffi::OsString;
use std::fmt::Display;
use std::io::{self, Write};

use admin_api::ApiError;
use clap::Parser;

/// Status of a wrong command line.
pub const USAGE: u8 = 2;
/// Status of what did not work.
pub const FAILED: u8 = 1;

/// What a tool ends with: its exit status, or why there is none.
pub type Outcome<T = u8> = Result<T, Failure>;

/// Why a tool ends early.
#[derive(Debug)]
pub enum Failure {
    /// The command line is wrong, or names what is not there: the usage, then `TOOL: error: …`, status 2.
    Usage(String),
    /// It did not work: `TOOL: error: …`.
    Runtime(String, u8),
    /// It did not work, in a tool that says `Error: …`, status 1.
    Error(String),
}

impl Failure {
    /// For `map_err`, in tools that say `Error: …`.
    pub fn error(message: impl Display) -> Failure {
        Failure::Error(message.to_string())
    }
}

impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Failure {
        Failure::Runtime(error.to_string(), FAILED)
    }
}

/// Runs a tool: parses its arguments, tells how it ended, and gives its exit status.
pub fn tool<P: Parser>(name: &'static str, args: Vec<OsString>, run: impl FnOnce(P) -> Outcome) -> u8 {
    let command = || P::command().name(name).bin_name(name);
    if let Some(kind) = command_docs::asked(args.get(1..).unwrap_or_default()) {
        return document(command(), kind);
    }
    let parsed =
        command().try_get_matches_from(args).and_then(|mut matches| P::from_arg_matches_mut(&mut matches));
    let outcome = match parsed {
        Ok(options) => run(options),
        Err(error) if error.use_stderr() => Err(Failure::Usage(summary(&error))),
        Err(help) => {
            let _ = help.print();
            return 0;
        }
    };
    match outcome {
        Ok(status) => status,
        Err(Failure::Usage(message)) => {
            let usage = command().render_usage().to_string();
            eprintln!("{}\n{name}: error: {message}", usage.replacen("Usage", "usage", 1));
            USAGE
        }
        Err(Failure::Runtime(message, status)) => {
            eprintln!("{name}: error: {message}");
            status
        }
        Err(Failure::Error(message)) => {
            eprintln!("Error: {message}");
            FAILED
        }
    }
}

/// Writes a manual page or completions.
fn document(command: clap::Command, kind: &str) -> u8 {
    let name = command.get_name().to_owned();
    match command_docs::generate(command, kind).and_then(|text| io::stdout().write_all(&text)) {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("{name}: error: {error}");
            USAGE
        }
    }
}

/// What is wrong with the arguments, in one line: the usage is told anyway.
fn summary(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let text = text.split("\n\nUsage:").next().unwrap_or_default();
    let words: Vec<&str> = text.split_whitespace().collect();
    let text = words.join(" ");
    text.strip_prefix("error: ").map_or(text.clone(), str::to_owned)
}

/// Prints to standard output. A reader that is gone is no reason to panic.
pub fn print(text: &str) -> Outcome<()> {
    let mut out = io::stdout().lock();
    let printed = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    printed.map_err(|error| Failure::Runtime(format!("cannot write to standard output: {error}"), FAILED))
}

/// Why no root volume is filled from a file.
pub fn no_import(path: &str) -> String {
    format!(
        "root volumes are not filled through this API. Hint: `dispvm-qube add-template NAME --root-image {path} …` gives a TemplateVM its root"
    )
}

/// A name as Python shows it.
pub fn quoted(name: &str) -> String {
    format!("'{name}'")
}
