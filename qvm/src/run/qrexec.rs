//! In a qube, by `qrexec-client`.

use std::ffi::OsString;
use std::io::{self, IsTerminal, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::thread;

use admin_api::lines::Property;
use admin_api::{ApiError, Kind};

use super::command::{shell_quoted, What};
use super::Options;
use crate::api::{is, Api};
use crate::outcome::{Failure, Outcome, FAILED};

/// Where the stock client looks for it.
const QREXEC_CLIENT: &str = "/usr/lib/qubes/qrexec-client";
/// Who runs it unless the user says so: the qube's default user.
const DEFAULT_USER: &str = "DEFAULT";

impl Api {
    /// Whether the qube's agents know qubes.VMExec.
    pub fn has_vmexec(&self, qube: &str) -> Result<bool, ApiError> {
        match self.text("admin.vm.feature.CheckWithTemplate", qube, "vmexec") {
            Err(error) if is(&error, Kind::FeatureNotFound) => Ok(false),
            value => Ok(!value?.is_empty()),
        }
    }
}

/// Starts the qube, if it does not run.
pub fn start(api: &Api, qube: &str) -> Result<(), ApiError> {
    match api.tell("admin.vm.Start", qube) {
        Err(error) if is(&error, Kind::VmNotHalted) => Ok(()),
        started => started,
    }
}

/// Waits for the session of the qube's user. That it fails is no reason not to go on, as with the stock client.
pub fn wait_for_session(api: &Api, qube: &str) -> Outcome<()> {
    let answer = api.text("admin.vm.property.Get", qube, "default_user")?;
    let user = Property::decode(&answer).map_err(ApiError::from)?.value;
    let mut command = client(qube, &[], &request(DEFAULT_USER, "qubes.WaitForSession"));
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map_err(not_started)?;
    feed(child.stdin.take(), user.as_bytes());
    child.wait().map_err(not_started)?;
    Ok(())
}

/// A call under way.
pub struct Call(Child);

impl Call {
    /// Waits for its end; its exit status.
    pub fn wait(mut self) -> Outcome {
        self.0.wait().map(status_of).map_err(not_started)
    }
}

/// Makes the call. What is told to a shell is the first line of its input, in front of what comes from here.
pub fn call(options: &Options, qube: &str, what: &What, takes_argv: bool) -> Outcome<Call> {
    let (service, line) = match what {
        What::Service(service) => (service.clone(), None),
        What::Argv(words) if takes_argv => (format!("qubes.VMExec+{}", qrexec::vmexec::encode(words)), None),
        what => ("qubes.VMShell".into(), Some(format!("{}; exit", what.shell_line()))),
    };
    let mut flags: Vec<OsString> = Vec::new();
    if options.filters_escapes() {
        flags.push("-t".into());
    }
    if options.filters_escapes() || io::stderr().is_terminal() {
        flags.push("-T".into());
    }
    match (&options.localcmd, &line) {
        (Some(local), None) => flags.extend(["-l".into(), local.into()]),
        (Some(local), Some(line)) => {
            flags.extend(["-l".into(), format!("printf '%s\\n' {}; {local}", shell_quoted(line)).into()]);
        }
        (None, _) => {}
    }
    if options.service && !options.pass_io {
        flags.push("-e".into());
    }
    let user = options.user.as_deref().unwrap_or(DEFAULT_USER);
    let mut command = client(qube, &flags, &request(user, &service));
    if !options.pass_io {
        command.stdout(Stdio::null()).stderr(Stdio::null());
    }
    let passes_input = options.pass_io && options.localcmd.is_none();
    match (&line, passes_input) {
        (None, true) => command.stdin(Stdio::inherit()),
        _ => command.stdin(Stdio::piped()),
    };
    let mut child = command.spawn().map_err(not_started)?;
    let line = line.filter(|_| options.localcmd.is_none()).map(|line| line + "\n").unwrap_or_default();
    let input = child.stdin.take();
    match passes_input {
        true => pass_on(input, line),
        false => feed(input, line.as_bytes()),
    }
    Ok(Call(child))
}

fn client(qube: &str, flags: &[OsString], request: &str) -> Command {
    let named = std::env::var_os("DISPVM_QREXEC_CLIENT").filter(|path| !path.is_empty());
    let path = named.map(PathBuf::from).or_else(beside).unwrap_or_else(|| QREXEC_CLIENT.into());
    let mut command = Command::new(path);
    command.args(["-d", qube]).args(flags).arg(request);
    command
}

/// Ours, where it stands beside this program.
fn beside() -> Option<PathBuf> {
    let own = std::env::current_exe().ok()?;
    Some(own.parent()?.join("qrexec-client")).filter(|path| path.is_file())
}

fn request(user: &str, service: &str) -> String {
    format!("{user}:QUBESRPC {service} dom0")
}

/// Gives all of its input. Who does not read it has ended, and how is told by the exit status.
fn feed(input: Option<ChildStdin>, bytes: &[u8]) {
    let _ = input.map(|mut input| input.write_all(bytes));
}

/// Gives the line, then whatever comes in here, as long as there is someone to take it.
fn pass_on(input: Option<ChildStdin>, line: String) {
    let Some(mut input) = input else { return };
    thread::spawn(move || {
        let _ = input.write_all(line.as_bytes()).and_then(|()| io::copy(&mut io::stdin().lock(), &mut input));
    });
}

/// The status of a shell for it.
pub fn status_of(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(FAILED)
}

fn not_started(error: io::Error) -> Failure {
    let message = format!(
        "cannot run qrexec-client: {error}. Hint: DISPVM_QREXEC_CLIENT names another than {QREXEC_CLIENT}"
    );
    Failure::Runtime(message, FAILED)
}
