//! What becomes of a call out of a guest: the policy is asked, and somebody if the policy says so.

use std::fmt::Write as _;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use policy::{Allow, Answer, Ask, Denial, Destination, Policy, Prompt, Qube, Request, System};
use qrexec::service::{QubeName, Service, Target};
use rustix::fs::{memfd_create, MemfdFlags};

use super::supervise;
use crate::admin;
use crate::error::{Error, Kind, Result};
use crate::state::State;

/// Where the policy of Qubes R4 is.
const POLICY_DIR: &str = "/etc/qubes/policy.d";
/// Where that of R4.0 is, which `!compat-4.0` reads; alone, where there is no other.
const LEGACY_DIR: &str = "/etc/qubes-rpc/policy";
/// dom0 by its number.
const DOM0_UUID: &str = "uuid:00000000-0000-0000-0000-000000000000";
/// What asks somebody, where there is such a program.
const PROMPT: &str = "/etc/dispvm/ask-prompt";

/// Who calls what where.
#[derive(Debug, Clone)]
pub struct Asked {
    /// The caller, as its holder knows it.
    pub source: QubeName,
    /// What it asked for.
    pub target: Target,
    /// The service.
    pub service: Service,
}

/// Where policy and prompt are.
#[derive(Debug, Clone)]
pub struct Rules {
    folders: Vec<PathBuf>,
    legacy: PathBuf,
    prompt: Option<PathBuf>,
}

impl Rules {
    /// As the environment says: DISPVM_POLICY_DIR, DISPVM_LEGACY_POLICY_DIR, DISPVM_ASK_PROMPT; else where Qubes has them.
    pub fn of_environment() -> Rules {
        let named = |name: &str| std::env::var_os(name).filter(|path| !path.is_empty()).map(PathBuf::from);
        Rules {
            folders: vec![named("DISPVM_POLICY_DIR").unwrap_or_else(|| POLICY_DIR.into())],
            legacy: named("DISPVM_LEGACY_POLICY_DIR").unwrap_or_else(|| LEGACY_DIR.into()),
            prompt: named("DISPVM_ASK_PROMPT")
                .or_else(|| Some(PROMPT.into()).filter(|path: &PathBuf| path.is_file())),
        }
    }

    fn load(&self) -> std::result::Result<Policy, policy::PolicyError> {
        let is_there = |folder: &PathBuf| folder.is_dir();
        match self.folders.iter().any(is_there) || !self.legacy.is_dir() {
            true => Policy::load(&self.folders, &self.legacy),
            false => Policy::load_legacy(&self.legacy),
        }
    }
}

/// Decides; with the answer comes whom the caller asked for, as a service of dom0's is told. An error is a refusal, too: it says why, and by
/// which rule.
pub fn decide(state: &State, rules: &Rules, asked: &Asked) -> Result<(Allow, Target)> {
    let Asked { source, target, service } = asked;
    let call = format!("{source} calls {service} in {target}", source = source.as_str());
    let refused = |denial: Denial| Error::new(Kind::Refused, format!("{call}: refused by {denial}"));
    let policy = rules.load().map_err(|error| refused(error.into()))?;
    let system = admin::system_info(state)?;
    if system.get(source.as_str()).is_none() {
        return Err(Error::new(Kind::Refused, format!("{call}: there is no such caller")));
    }
    let request = Request::new(source.as_str(), &target.to_string(), &service.to_string());
    let prompt: &dyn Prompt = match &rules.prompt {
        Some(program) => &Program(program),
        None => &policy::Nobody,
    };
    let allow = policy.decide(&system, &request, prompt).map_err(refused)?;
    Ok((allow, normal(&system, target)))
}

/// dom0 is a keyword, however it was called, and so is what is not there.
fn normal(system: &System, target: &Target) -> Target {
    let keyword = |keyword: &str| Target::Keyword(keyword.to_owned());
    let is_uuid = |uuid: &str, qube: &Qube| qube.uuid.as_deref() == Some(uuid);
    match target {
        Target::Name(name) if name == "dom0" || name == DOM0_UUID => keyword("adminvm"),
        Target::Name(name) => {
            let is_there = match name.strip_prefix("uuid:") {
                Some(uuid) => system.qubes().any(|(_, qube)| is_uuid(uuid, qube)),
                None => system.get(name).is_some(),
            };
            if is_there {
                target.clone()
            } else {
                keyword("default")
            }
        }
        Target::Keyword(_) => target.clone(),
    }
}

/// What is logged of a call that may happen.
pub fn allowed_text(asked: &Asked, allow: &Allow) -> String {
    let Asked { source, target, service } = asked;
    let mut text = format!("{} calls {service} in {target}: allowed", source.as_str());
    let _ = write!(text, " in {} by {}", allow.target, allow.rule.place);
    if let Some(user) = &allow.user {
        let _ = write!(text, " as {user}");
    }
    text
}

/// A program that asks: it is run as `PROGRAM SOURCE SERVICE[+ARG] DEFAULT TARGET…`, DEFAULT empty where nothing is chosen beforehand, and prints
/// which TARGET it is to be. Another exit status than 0 is a no.
struct Program<'a>(&'a Path);

/// Of what it prints.
const ANSWER_BYTES_MAX: usize = 256;

impl Prompt for Program<'_> {
    fn ask(&self, request: &Request, question: &Ask) -> Answer {
        let service = format!("{}{}", request.service, request.argument.trim_end_matches('+'));
        let default = question.default.as_ref().map(Destination::to_string).unwrap_or_default();
        let mut command = Command::new(self.0);
        command.args([&request.source, &service, &default]);
        command.args(question.targets.iter().map(Destination::to_string));
        command.stdin(Stdio::null()).stderr(Stdio::null());
        match output(command) {
            Ok((status, answer)) if status.success() && answer.len() <= ANSWER_BYTES_MAX => {
                let text = String::from_utf8_lossy(&answer);
                let chosen = question.targets.iter().find(|target| target.to_string() == text.trim());
                chosen.cloned().map_or(Answer::Deny, Answer::Allow)
            }
            Ok(_) => Answer::Deny,
            Err(_) => Answer::Nobody,
        }
    }
}

/// What it prints, of which one byte too many may be there, into memory: a pipe would have to be read while the program is waited for.
fn output(mut command: Command) -> io::Result<(ExitStatus, Vec<u8>)> {
    let printed = File::from(memfd_create("answer", MemfdFlags::CLOEXEC)?);
    command.stdout(printed.try_clone()?);
    let status = supervise::run_before(command)?;
    // Where it begins: the place in it is shared with whatever the program has left behind.
    let mut answer = vec![0; ANSWER_BYTES_MAX + 1];
    let count = printed.read_at(&mut answer, 0)?;
    answer.truncate(count);
    Ok((status, answer))
}
