//! In a qube, by `qrexec-client`.

use std::ffi::OsString;
use std::io::{self, IsTerminal, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Stdio};
use std::thread;

use admin_api::lines::Property;
use admin_api::{ApiError, Kind};

use super::command::{shell_quoted, What};
use super::Options;
use crate::api::{is, Api};
use crate::outcome::{Failure, Outcome, FAILED};
use crate::programs::{self, not_started, status_of, DEFAULT_USER};

/// A longer call does not fit into the command line that qrexec carries.
const SERVICE_BYTES_MAX: usize = 60_000;

impl Api {
    /// Whether the qube's agents know qubes.VMExec.
    pub fn has_vmexec(&self, qube: &str) -> Result<bool, ApiError> {
        match self.text("admin.vm.feature.CheckWithTemplate", qube, "vmexec") {
            Err(error) if is(&error, Kind::FeatureNotFound) => Ok(false),
            value => Ok(!value?.is_empty()),
        }
    }
}

/// Waits for the session of the qube's user. That it fails is no reason not to go on, as with the stock client.
pub fn wait_for_session(api: &Api, qube: &str) -> Outcome<()> {
    let answer = api.text("admin.vm.property.Get", qube, "default_user")?;
    let user = Property::decode(&answer).map_err(ApiError::from)?.value;
    let no_flags: [&str; 0] = [];
    let mut command = programs::service(qube, &no_flags, DEFAULT_USER, "qubes.WaitForSession");
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().map_err(|error| not_started(&command, &error))?;
    feed(child.stdin.take(), user.as_bytes());
    child.wait().map_err(|error| not_started(&command, &error))?;
    Ok(())
}

/// A call under way.
pub struct Call(Child);

impl Call {
    /// Waits for its end; its exit status.
    pub fn wait(mut self) -> Outcome {
        let failed = |error| Failure::Runtime(format!("cannot wait for qrexec-client: {error}"), FAILED);
        self.0.wait().map(status_of).map_err(failed)
    }
}

/// What is called, and what its input begins with. A shell gets its line as an argument where that can be: a shell that reads its line
/// from its input may read more than that, and the command would miss it (busybox does, bash does not).
fn service(what: &What, takes_argv: bool) -> (String, Option<String>) {
    let argv = match what {
        What::Service(service) => return (service.clone(), None),
        What::Argv(words) => words.clone(),
        What::Shell(_) => vec!["/bin/sh".into(), "-c".into(), what.shell_line()],
    };
    let call = format!("qubes.VMExec+{}", qrexec::vmexec::encode(&argv));
    match takes_argv && call.len() <= SERVICE_BYTES_MAX {
        true => (call, None),
        false => ("qubes.VMShell".into(), Some(format!("{}; exit", what.shell_line()))),
    }
}

/// Makes the call. What is told to a shell is the first line of its input, in front of what comes from here. With `becomes` it is made in
/// this process's place, if nothing is left to be done here: who ends this one then ends the call.
pub fn call(options: &Options, qube: &str, what: &What, takes_argv: bool, becomes: bool) -> Outcome<Call> {
    let (service, line) = service(what, takes_argv);
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
    let mut command = programs::service(qube, &flags, user, &service);
    if !options.pass_io {
        command.stdout(Stdio::null()).stderr(Stdio::null());
    }
    let passes_input = options.pass_io && options.localcmd.is_none();
    match (&line, passes_input) {
        (None, true) => command.stdin(Stdio::inherit()),
        _ => command.stdin(Stdio::piped()),
    };
    if becomes && passes_input && line.is_none() && !options.is_marked() {
        let error = command.exec();
        return Err(not_started(&command, &error));
    }
    let mut child = command.spawn().map_err(|error| not_started(&command, &error))?;
    let line = line.filter(|_| options.localcmd.is_none()).map(|line| line + "\n").unwrap_or_default();
    let input = child.stdin.take();
    match passes_input {
        true => pass_on(input, line),
        false => feed(input, line.as_bytes()),
    }
    Ok(Call(child))
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
