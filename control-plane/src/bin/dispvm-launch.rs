//! `dispvm-launch`: a command in a fresh disposable VM, which is destroyed when the command ends.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use control_plane::calls::{service, system_log};
use control_plane::cli::{fail, generate_if_asked, machine, Common, LOGIN_SHELL};
use control_plane::error::{Error, Kind, Result};
use control_plane::launcher::{self, Report, Request};
use control_plane::output::error_text;
use control_plane::qube::{self, Qube};
use qrexec::{Exec, User};

/// Runs a command in a fresh disposable VM.
///
/// Its standard input, output and error and its exit status are the command's. The disposable is destroyed when the
/// command ends, when nobody reads its output any more, and on SIGHUP, SIGINT or SIGTERM.
///
/// Exit status: the command's; 125 when the launch failed, 126 when it was refused, 127 when there is no such command or
/// service in the disposable.
#[derive(Parser)]
#[command(name = "dispvm-launch", version)]
struct Options {
    #[command(flatten)]
    common: Common,
    /// DVM template [default: the default_dispvm, or the only one there is]
    #[arg(long, value_name = "NAME")]
    dvm: Option<String>,
    /// The disposable's label, if it is not to be the DVM template's: red, orange, yellow, green, gray, blue, purple or black. There are
    /// no spares of other labels
    #[arg(long, value_name = "LABEL")]
    label: Option<String>,
    /// Print each phase in ms on standard error
    #[arg(long)]
    timing: bool,
    /// Print one JSON object about the launch on standard error
    #[arg(long)]
    json: bool,
    /// Do not start building the savefile that was missing or stale
    #[arg(long)]
    no_rebuild: bool,
    /// Say what there is to say in the system's log, not on standard error, which is the command's alone then
    #[arg(long, conflicts_with_all = ["timing", "json"])]
    quiet: bool,
    /// Run this qrexec service instead of a command
    #[arg(long, value_name = "SERVICE[+ARG]", conflicts_with = "command")]
    service: Option<String>,
    /// Who runs it in the disposable: DEFAULT, user or root
    #[arg(long, value_name = "USER", default_value = "DEFAULT")]
    user: String,
    /// Who calls the service, as it is told
    #[arg(long, value_name = "NAME", default_value = "dom0", requires = "service")]
    source: String,
    /// Command and arguments [default: a login shell]
    #[arg(value_name = "CMD", trailing_var_arg = true)]
    command: Vec<OsString>,
}

fn main() -> ExitCode {
    let start = Instant::now();
    generate_if_asked::<Options>();
    let options = match Options::try_parse() {
        Ok(options) => options,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { launcher::EXIT_FAILED } else { 0 });
        }
    };
    match launch(&options, start) {
        Ok(report) => {
            tell(&options, &report);
            ExitCode::from(report.exit_status())
        }
        Err(error) => {
            let status = launcher::exit_of(&error);
            if options.json {
                let text = error_text(&error);
                eprintln!("{}", serde_json::json!({ "error": text, "exit_status": status }));
                return ExitCode::from(status);
            }
            if options.quiet {
                system_log::say_of_call("dispvm-launch", &error_text(&error));
                return ExitCode::from(status);
            }
            fail("dispvm-launch", &error, status)
        }
    }
}

fn launch(options: &Options, start: Instant) -> Result<Report> {
    let state = options.common.state()?;
    let dvm = options.dvm.clone().map_or_else(|| qube::default_dvm(&state), Ok)?;
    let exec = exec(options)?;
    options.label.as_deref().map_or(Ok(()), qube::check_label)?;
    let label =
        options.label.clone().filter(|label| Qube::load(&state, &dvm).is_ok_and(|qube| qube.label != *label));
    let say = |text: &str| match options.quiet {
        true => system_log::say_of_call("dispvm-launch", text),
        false => eprintln!("dispvm-launch: {text}"),
    };
    launcher::run(
        &state,
        &machine()?,
        Request { dvm, exec, label, start, rebuild: !options.no_rebuild },
        &say,
    )
}

fn exec(options: &Options) -> Result<Exec> {
    let user = service::user(&options.user)?;
    let exec = match &options.service {
        Some(text) => service::exec(&service::parse(text)?, &service::parse_source(&options.source)?, user),
        None => {
            let command = options.command.iter().cloned().map(OsString::into_vec);
            let exec = if options.command.is_empty() { Exec::user(LOGIN_SHELL) } else { Exec::user(command) };
            Exec { user: user.unwrap_or(User::User), ..exec }
        }
    };
    exec.validate().map_err(|error| Error::new(Kind::Usage, "the command cannot be sent").because(error))?;
    Ok(exec)
}

fn tell(options: &Options, report: &Report) {
    if options.json {
        eprintln!("{}", report.json());
    } else if options.timing {
        eprintln!("{} ({})", report.name, if report.generation.is_some() { "restored" } else { "cold boot" });
        for ((phase, at), (_, took)) in report.timeline.marks_ms().zip(report.timeline.phases_ms()) {
            eprintln!("{phase:>12} {at:9.1} ms  (+{took:.1})");
        }
    }
}
