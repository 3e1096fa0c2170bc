//! `qrexec-policy`: says what the policy of qrexec makes of a call, and which rule it is.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use policy::explain::Explanation;
use policy::system::SYSTEM_BYTES_MAX;
use policy::{Policy, Request, System, Verdict};

/// The call is to be asked about.
const ASK: u8 = 3;
/// The call is denied; qrexec's own code for it.
const DENIED: u8 = 126;

/// Says what the policy of qrexec makes of a call.
#[derive(Parser)]
#[command(name = "qrexec-policy", version)]
struct Options {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Say whether a call is allowed, and which rule says so
    ///
    /// Nothing is run and nobody is asked.
    ///
    /// Exit status: 0 allowed, 3 somebody would be asked, 126 denied; 1 when policy or system cannot be read, 2 on wrong usage or
    /// when SOURCE is not there.
    Explain(Explain),
}

#[derive(Args)]
struct Explain {
    /// Folder of *.policy files; of several, a file in an earlier one hides those of its name in later ones
    #[arg(long, value_name = "DIR", required = true)]
    policy: Vec<PathBuf>,
    /// The qubes there are, as JSON (docs/policy.md)
    #[arg(long, value_name = "FILE")]
    system: PathBuf,
    /// Folder that !compat-4.0 reads
    #[arg(long, value_name = "DIR", default_value = "/etc/qubes-rpc/policy")]
    legacy: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// The qube that calls
    source: String,
    /// What it calls: a qube, dom0, @dispvm, @dispvm:NAME, or @default for none
    target: String,
    /// The service, and its argument
    #[arg(value_name = "SERVICE[+ARG]")]
    service: String,
}

/// An exit status, and what to say.
struct Failure(u8, String);

fn main() -> ExitCode {
    command_docs::generate_if_asked::<Options>();
    let Command::Explain(options) = Options::parse().command;
    let explained = explain(&options).and_then(|(status, text)| {
        // A reader that went away has read enough.
        match std::io::stdout().write_all(text.as_bytes()) {
            Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
                Err(Failure(1, format!("cannot write the answer: {error}")))
            }
            _ => Ok(status),
        }
    });
    match explained {
        Ok(status) => ExitCode::from(status),
        Err(Failure(status, message)) => {
            if options.json {
                println!("{}", serde_json::json!({ "error": message }));
            }
            eprintln!("qrexec-policy: {message}");
            ExitCode::from(status)
        }
    }
}

/// Answers the exit status and what to print.
fn explain(options: &Explain) -> Result<(u8, String), Failure> {
    let system = read_system(&options.system)?;
    let policy = Policy::load(&options.policy, &options.legacy)
        .map_err(|error| Failure(1, format!("cannot read the policy, so every call is denied: {error}")))?;
    let request = Request::new(&options.source, &options.target, &options.service);
    if system.get(&request.source).is_none() {
        let message = format!("there is no qube {} in {}", request.source, options.system.display());
        return Err(Failure(2, message));
    }
    let verdict = policy.evaluate(&system, &request);
    let status = match verdict {
        Verdict::Allow(_) => 0,
        Verdict::Ask(_) => ASK,
        Verdict::Deny(_) => DENIED,
    };
    let explanation = Explanation::new(&system, &request, &verdict);
    let text = match options.json {
        false => explanation.text(),
        true => serde_json::to_string_pretty(&explanation)
            .map(|text| text + "\n")
            .map_err(|error| Failure(1, format!("cannot write the answer as JSON: {error}")))?,
    };
    Ok((status, text))
}

fn read_system(path: &Path) -> Result<System, Failure> {
    let fail = |cause: &dyn std::fmt::Display| {
        Failure(1, format!("cannot read the system from {}: {cause}", path.display()))
    };
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(SYSTEM_BYTES_MAX as u64 + 1).read_to_end(&mut bytes))
        .map_err(|error| fail(&error))?;
    System::parse(&bytes).map_err(|error| fail(&error))
}
