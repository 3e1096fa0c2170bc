//! `qfile-daemon-dvm` and `qvm-create-default-dvm`, as R3.2 had them (QubesOS/qubes-core-admin, release3.2, dispvm/qfile-daemon-dvm
//! and qvm-tools/qvm-create-default-dvm).

use std::os::unix::process::CommandExt;

use admin_api::lines::{Property, Qube};
use admin_api::{ApiError, Kind};
use clap::Parser;

use crate::api::{is, Api, Common, SYSTEM};
use crate::outcome::{Failure, Outcome, FAILED};
use crate::programs::{not_started, own, status_of, DEFAULT_USER, LAUNCHER, SAVEFILE_TOOL};

/// The label of R3.2's DVM templates.
const DVM_LABEL: &str = "gray";

/// Runs a service in a fresh disposable.
///
/// Its standard input and output, and its exit status, are the service's: `echo xterm | qfile-daemon-dvm qubes.VMShell dom0 DEFAULT
/// red`.
#[derive(Parser)]
#[command(version)]
pub struct Daemon {
    /// The service, and its argument
    #[arg(value_name = "SERVICE[+ARG]")]
    service: String,
    /// The qube that calls
    source: String,
    /// Who runs it, DEFAULT for the disposable's own user
    user: String,
    /// The disposable's label [default: the DVM template's]
    #[arg(default_value = "", hide_default_value = true)]
    label: String,
    /// Only for those who call it with an empty one: disposables cannot have rules of their own yet
    #[arg(default_value = "", hide_default_value = true)]
    firewall: String,
}

/// Runs `qfile-daemon-dvm`: the launcher takes this process's place.
pub fn daemon(options: Daemon) -> Outcome {
    if !options.firewall.is_empty() {
        // Without its rules it could reach more than the caller wants.
        let message = format!("a disposable with the rules of {} is not possible yet", options.firewall);
        return Err(Failure::Runtime(message, FAILED));
    }
    let mut command = own(LAUNCHER);
    command.args(["--service", &options.service, "--source", &options.source]);
    if options.user != DEFAULT_USER {
        command.args(["--user", &options.user]);
    }
    if !options.label.is_empty() {
        command.args(["--label", &options.label]);
    }
    let error = command.exec();
    Err(not_started(&command, &error))
}

/// Makes a template's DVM template and its savefile, or makes the savefile anew, and has disposables made from it.
///
/// The DVM template of TEMPLATE is TEMPLATE-dvm.
#[derive(Parser)]
#[command(
    version,
    override_usage = "qvm-create-default-dvm TEMPLATE|--default-template|--used-template [SCRIPT|--default-script]"
)]
pub struct Create {
    #[command(flatten)]
    common: Common,
    /// The template that new qubes are based on
    #[arg(long, conflicts_with = "used_template")]
    default_template: bool,
    /// The template that disposables are based on now
    #[arg(long)]
    used_template: bool,
    /// Prepare it as dispvm-savefile does unless told otherwise
    #[arg(long)]
    default_script: bool,
    /// A TemplateVM, if no option says which; then a script to prepare it with, as of `dispvm-savefile build --prerun`
    #[arg(value_name = "TEMPLATE|SCRIPT", num_args = 0..=2)]
    words: Vec<String>,
}

/// Runs `qvm-create-default-dvm`.
pub fn create(options: Create) -> Outcome {
    let api = options.common.api();
    let mut words = options.words.iter();
    let template = match (options.default_template, options.used_template) {
        (true, _) => default_template(&api)?,
        (_, true) => used_template(&api)?.map_or_else(|| default_template(&api), Ok)?,
        _ => words.next().cloned().ok_or_else(|| Failure::Usage("TEMPLATE is required".into()))?,
    };
    let script = words.next();
    if words.next().is_some() || (script.is_some() && options.default_script) {
        return Err(Failure::Usage("one template and one script at most".into()));
    }
    let qubes = api.qubes()?;
    if !qubes.iter().any(|qube| qube.name == template && qube.class == "TemplateVM") {
        return Err(Failure::Runtime(format!("{template:?} is no TemplateVM"), FAILED));
    }
    let dvm = format!("{template}-dvm");
    make(&api, &qubes, &dvm, &template)?;
    let mut build = own(SAVEFILE_TOOL);
    build.args(["build", &dvm]);
    if let Some(script) = script {
        build.args(["--prerun", script]);
    }
    let status = build.status().map_err(|error| not_started(&build, &error)).map(status_of)?;
    if status == 0 {
        api.call("admin.property.Set", SYSTEM, "default_dispvm", &dvm)?;
    }
    Ok(status)
}

/// Makes it what a DVM template is. In R3.2 such a qube is internal.
fn make(api: &Api, qubes: &[Qube], dvm: &str, template: &str) -> Outcome<()> {
    if !qubes.iter().any(|qube| qube.name == dvm) {
        api.call("admin.vm.Create.AppVM", SYSTEM, template, &format!("name={dvm} label={DVM_LABEL}"))?;
        api.call("admin.vm.feature.Set", dvm, "internal", "1")?;
    }
    api.call("admin.vm.property.Set", dvm, "template_for_dispvms", "True")?;
    Ok(())
}

fn default_template(api: &Api) -> Outcome<String> {
    property(api, "admin.property.Get", SYSTEM, "default_template")?
        .ok_or_else(|| Failure::Runtime("there is no default template".into(), FAILED))
}

fn used_template(api: &Api) -> Outcome<Option<String>> {
    match property(api, "admin.property.Get", SYSTEM, "default_dispvm")? {
        Some(dvm) => property(api, "admin.vm.property.Get", &dvm, "template"),
        None => Ok(None),
    }
}

fn property(api: &Api, method: &str, qube: &str, name: &str) -> Outcome<Option<String>> {
    let answer = match api.text(method, qube, name) {
        Err(error) if is(&error, Kind::NoSuchProperty) => return Ok(None),
        answer => answer?,
    };
    let value = Property::decode(&answer).map_err(ApiError::from)?.value;
    Ok(Some(value).filter(|value| !value.is_empty()))
}
