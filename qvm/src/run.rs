//! `qvm-run`: a command or a service in a qube, or in a fresh disposable.
//!
//! A disposable is `dispvm-launch`'s: its standard streams, its exit status and its end are those of the command. In a qube it is `qrexec-client`'s, called as the stock client calls it (qubesadmin/app.py, run_service).

mod command;
mod dispvm;
mod filter;
mod qrexec;

use std::io::{self, IsTerminal, Write};

use admin_api::ApiError;
use clap::Parser;

use crate::api::{is_running, start, Api, Common};
use crate::names;
use crate::outcome::{quoted, Failure, Outcome, FAILED};
use command::What;

/// Status when the call could not be made: -1, as the stock client has it.
const NOT_CALLED: u8 = 255;
/// ANSI's red.
const RED: &str = "31";

/// Runs a command or a service in a qube.
#[derive(Parser)]
#[command(
    version,
    override_usage = "qvm-run [OPTIONS] VMNAME COMMAND [ARG...]\n       qvm-run [OPTIONS] --all COMMAND [ARG...]\n       qvm-run [OPTIONS] --dispvm[=BASE_APPVM] [--] COMMAND [ARG...]"
)]
pub struct Options {
    #[command(flatten)]
    common: Common,
    /// Run as this user
    #[arg(long, short)]
    user: Option<String>,
    /// Ignored: this is the default
    #[arg(long, short, visible_alias = "auto")]
    autostart: bool,
    /// Do not start a qube that does not run
    #[arg(long, short, visible_alias = "no-auto")]
    no_autostart: bool,
    /// Pass standard input, output and error
    #[arg(long, short)]
    pass_io: bool,
    /// With --pass-io: pass them to this program
    #[arg(long, value_name = "COMMAND", requires = "pass_io")]
    localcmd: Option<String>,
    /// Ignored: this is the default
    #[arg(long)]
    gui: bool,
    /// Do not wait for the qube's graphical session
    #[arg(long, visible_alias = "nogui")]
    no_gui: bool,
    /// Mark what the qube prints with this ANSI colour (31 for red)
    #[arg(long, visible_alias = "color-output", value_name = "COLOUR")]
    colour_output: Option<String>,
    /// Do not mark it
    #[arg(long, visible_alias = "no-color-output", conflicts_with = "colour_output")]
    no_colour_output: bool,
    /// Mark what it prints on standard error
    #[arg(long, visible_alias = "color-stderr", value_name = "COLOUR")]
    colour_stderr: Option<String>,
    /// Do not mark it
    #[arg(long, visible_alias = "no-color-stderr", conflicts_with = "colour_stderr")]
    no_colour_stderr: bool,
    /// Filter terminal escape sequences [default: if the output is a terminal]
    #[arg(long)]
    filter_escape_chars: bool,
    /// Do not filter them. DANGEROUS if the output is a terminal emulator
    #[arg(long, conflicts_with = "filter_escape_chars")]
    no_filter_escape_chars: bool,
    /// COMMAND is a qrexec service
    #[arg(long)]
    service: bool,
    /// Do not pass COMMAND to a shell
    #[arg(long, conflicts_with = "service")]
    no_shell: bool,
    /// Run it in a fresh disposable, which may be based on this qube
    #[arg(long, value_name = "BASE_APPVM", num_args = 0..=1, default_missing_value = "", conflicts_with = "is_all")]
    dispvm: Option<String>,
    /// Run it in all qubes but dom0
    #[arg(long = "all")]
    is_all: bool,
    /// Exclude the qube from --all
    #[arg(long, value_name = "VMNAME", requires = "is_all")]
    exclude: Vec<String>,
    /// The qube, then the command and its arguments
    #[arg(value_name = "VMNAME|COMMAND|ARG")]
    words: Vec<String>,
}

impl Options {
    fn filters_escapes(&self) -> bool {
        self.filter_escape_chars || (!self.no_filter_escape_chars && io::stdout().is_terminal())
    }

    /// Red where a terminal shows it, unless the user wants another colour or none.
    fn colour(&self) -> Option<&str> {
        let default = || (self.filters_escapes() && !self.no_colour_output).then_some(RED);
        self.colour_output.as_deref().or_else(default)
    }

    fn stderr_colour(&self) -> Option<&str> {
        let is_marked = || io::stderr().is_terminal() && self.colour().is_none() && !self.no_colour_stderr;
        self.colour_stderr.as_deref().or_else(|| is_marked().then_some(RED))
    }

    /// Whether something is to be printed after it.
    fn is_marked(&self) -> bool {
        self.colour().is_some() || self.stderr_colour().is_some()
    }

    /// Says where it is run, unless the user would rather not know.
    fn tell(&self, what: &What, qube: &str) {
        let verbosity = 1 + i32::from(self.common.verbose) - i32::from(self.common.quiet);
        if verbosity - i32::from(self.pass_io) > 0 {
            eprintln!("Running {} on {qube}", quoted(&what.to_string()));
        }
    }
}

/// Runs `qvm-run`.
pub fn run(mut options: Options) -> Outcome {
    if options.colour_output.is_some() && !options.filters_escapes() {
        return Err(Failure::Usage("--color-output must be used with --filter-escape-chars".into()));
    }
    let _mark = Mark::new(&options);
    if let Some(mut dvm) = options.dispvm.take() {
        // `--dispvm xterm`: without a command, what looks like a base is it.
        let is_base =
            || std::env::args_os().any(|arg| arg.to_str().is_some_and(|arg| arg.starts_with("--dispvm=")));
        if options.words.is_empty() && !dvm.is_empty() && !is_base() {
            options.words.push(std::mem::take(&mut dvm));
        }
        let what = What::new(&options, options.words.clone())?;
        return dispvm::run(&options, &dvm, &what);
    }
    let mut words = options.words.clone();
    let target = match options.is_all {
        true => None,
        false if words.is_empty() => {
            return Err(Failure::Usage("one of the arguments --all --dispvm VMNAME is required".into()))
        }
        false => Some(words.remove(0)),
    };
    let what = What::new(&options, words)?;
    let api = options.common.api();
    let qubes = api.qubes()?;
    let qubes = match &target {
        Some(name) => names::by_name(&qubes, std::slice::from_ref(name))?,
        None => qubes
            .into_iter()
            .filter(|qube| qube.class != "AdminVM" && !options.exclude.contains(&qube.name))
            .collect(),
    };
    if qubes.len() > 1 && options.pass_io && options.localcmd.is_none() {
        let message = "--passio cannot be used when more than 1 qube is chosen and no --localcmd is used";
        return Err(Failure::Usage(message.into()));
    }
    let alone = qubes.len() == 1;
    let mut status = 0;
    let mut calls = Vec::new();
    for qube in qubes {
        if options.no_autostart && !is_running(&qube.state) {
            eprintln!("Qube {} not started", quoted(&qube.name));
            status = FAILED;
            continue;
        }
        match call(&options, &api, &qube.name, &what, alone) {
            Ok(call) => calls.push(call),
            Err(Called::Api(error)) => {
                eprintln!("{error}");
                return Ok(NOT_CALLED);
            }
            Err(Called::Failure(failure)) => return Err(failure),
        }
    }
    for call in calls {
        status = status.max(call.wait()?);
    }
    Ok(status)
}

/// Why there was no call.
enum Called {
    Api(ApiError),
    Failure(Failure),
}

fn call(options: &Options, api: &Api, qube: &str, what: &What, alone: bool) -> Result<qrexec::Call, Called> {
    if !options.no_autostart {
        start(api, qube).map_err(Called::Api)?;
    }
    options.tell(what, qube);
    if !options.no_gui {
        qrexec::wait_for_session(api, qube).map_err(Called::Failure)?;
    }
    let takes_argv = !matches!(what, What::Service(_)) && api.has_vmexec(qube).map_err(Called::Api)?;
    qrexec::call(options, qube, what, takes_argv, alone).map_err(Called::Failure)
}

/// What is printed while it lives has a colour.
struct Mark {
    stdout: bool,
    stderr: bool,
}

impl Mark {
    fn new(options: &Options) -> Mark {
        let begin = |to: &mut dyn Write, colour: Option<&str>| {
            colour.iter().for_each(|colour| say(to, &format!("\x1b[0;{colour}m")));
            colour.is_some()
        };
        Mark {
            stdout: begin(&mut io::stdout(), options.colour()),
            stderr: begin(&mut io::stderr(), options.stderr_colour()),
        }
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        if self.stdout {
            say(&mut io::stdout(), "\x1b[0m");
        }
        if self.stderr {
            say(&mut io::stderr(), "\x1b[0m");
        }
    }
}

fn say(to: &mut dyn Write, sequence: &str) {
    let _ = to.write_all(sequence.as_bytes()).and_then(|()| to.flush());
}
