//! Which step of an operation goes wrong, and how. A plan has a text, which a failing run prints and `run --plan` takes.
//!
//! Two kinds of steps are counted, each from 1 and apart, so that each count is the same in every run of one seed:
//! - calls of the host and the machine, and control frames the agent handles ([`crate::steps`], in the process itself);
//! - system calls with which the process's main thread changes or opens files of the state folder ([`crate::tracer`],
//!   from outside).

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use nix::errno::Errno;

/// What happens at a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// [`engine::host::HostError::Refused`]; of the machine: too little memory.
    Refused,
    /// [`engine::host::HostError::Hypervisor`].
    Hypervisor,
    /// ENOSPC.
    NoSpace,
    /// EIO.
    Io,
    /// ENOMEM.
    NoMemory,
    /// The domain has ended by itself.
    Gone,
    /// [`engine::host::HostError::Timeout`].
    Timeout,
    /// The agent answers `Failed`.
    Failed,
    /// The agent never says anything again.
    Silent,
    /// The agent's channel closes.
    HangUp,
    /// The agent sends bytes that are no frame.
    Garbage,
    /// The agent sends a frame that the protocol forbids here: more than its window.
    Violation,
    /// The process is killed before the step.
    Kill,
}

/// Who takes a step, and with that what can go wrong in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StepKind {
    /// A question to the machine.
    Machine,
    /// A call of `Host` or `Domain`.
    Host,
    /// A frame the agent handles.
    Agent,
}

const NAMES: [(Fault, &str); 13] = [
    (Fault::Refused, "refused"),
    (Fault::Hypervisor, "hypervisor"),
    (Fault::NoSpace, "enospc"),
    (Fault::Io, "eio"),
    (Fault::NoMemory, "enomem"),
    (Fault::Gone, "gone"),
    (Fault::Timeout, "timeout"),
    (Fault::Failed, "failed"),
    (Fault::Silent, "silent"),
    (Fault::HangUp, "hang-up"),
    (Fault::Garbage, "garbage"),
    (Fault::Violation, "violation"),
    (Fault::Kill, "kill"),
];

impl StepKind {
    /// Everything that can go wrong in such a step.
    pub fn faults(self) -> &'static [Fault] {
        use Fault::*;
        match self {
            StepKind::Machine => &[Refused, Kill],
            StepKind::Host => &[Refused, Hypervisor, NoSpace, Io, NoMemory, Gone, Timeout, Kill],
            StepKind::Agent => &[Failed, Silent, HangUp, Garbage, Violation, Kill],
        }
    }

    /// Its letter in a trace.
    pub fn letter(self) -> char {
        match self {
            StepKind::Machine => 'M',
            StepKind::Host => 'H',
            StepKind::Agent => 'A',
        }
    }

    /// The kind of a line of a trace.
    pub fn of_line(line: &str) -> Option<StepKind> {
        [StepKind::Machine, StepKind::Host, StepKind::Agent]
            .into_iter()
            .find(|kind| line.starts_with(kind.letter()))
    }
}

/// What happens at a system call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileFault {
    /// It fails with ENOSPC.
    NoSpace,
    /// It fails with EIO.
    Io,
    /// The process is killed before it.
    Kill,
}

impl FileFault {
    /// All there are.
    pub const ALL: [FileFault; 3] = [FileFault::NoSpace, FileFault::Io, FileFault::Kill];

    /// The error injected, if it is one.
    pub fn errno(self) -> Option<Errno> {
        match self {
            FileFault::NoSpace => Some(Errno::ENOSPC),
            FileFault::Io => Some(Errno::EIO),
            FileFault::Kill => None,
        }
    }
}

/// What goes wrong in one run of one operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Plan {
    /// Nothing.
    #[default]
    Nothing,
    /// This at the n-th step.
    Step(u64, Fault),
    /// This at the n-th system call on files of the state.
    File(u64, FileFault),
    /// Held at the n-th system call on files of the state, while others do what they have to do.
    Meanwhile(u64),
    /// Killed from outside so long after the start, whatever it does then.
    KillAfter(Duration),
    /// No file may become longer than so many bytes (RLIMIT_FSIZE): every thread's writes fail, not only the main one's.
    FileBytes(u64),
    /// So many descriptors and no more (RLIMIT_NOFILE).
    Descriptors(u64),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = NAMES.iter().find(|(fault, _)| fault == self).map_or("?", |(_, name)| name);
        f.write_str(name)
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Plan::Nothing => f.write_str("nothing"),
            Plan::Step(at, fault) => write!(f, "step:{at}={fault}"),
            Plan::File(at, FileFault::NoSpace) => write!(f, "file:{at}=enospc"),
            Plan::File(at, FileFault::Io) => write!(f, "file:{at}=eio"),
            Plan::File(at, FileFault::Kill) => write!(f, "file:{at}=kill"),
            Plan::Meanwhile(at) => write!(f, "meanwhile:{at}"),
            Plan::KillAfter(after) => write!(f, "kill-after-us:{}", after.as_micros()),
            Plan::FileBytes(bytes) => write!(f, "file-bytes:{bytes}"),
            Plan::Descriptors(count) => write!(f, "descriptors:{count}"),
        }
    }
}

impl FromStr for Plan {
    type Err = String;

    fn from_str(text: &str) -> Result<Plan, String> {
        let no_plan =
            || format!("{text:?} is no plan; examples: step:3=gone, file:12=kill, kill-after-us:900");
        let (what, rest) = text.split_once(':').unwrap_or((text, ""));
        let (number, how) = rest.split_once('=').unwrap_or((rest, ""));
        if text == "nothing" {
            return Ok(Plan::Nothing);
        }
        let number: u64 = number.parse().map_err(|_| no_plan())?;
        let fault = NAMES.iter().find(|(_, name)| *name == how).map(|(fault, _)| *fault);
        match (what, fault) {
            ("step" | "file" | "meanwhile", _) if number == 0 => Err(no_plan()),
            ("step", Some(fault)) => Ok(Plan::Step(number, fault)),
            ("file", Some(Fault::NoSpace)) => Ok(Plan::File(number, FileFault::NoSpace)),
            ("file", Some(Fault::Io)) => Ok(Plan::File(number, FileFault::Io)),
            ("file", Some(Fault::Kill)) => Ok(Plan::File(number, FileFault::Kill)),
            ("meanwhile", None) if how.is_empty() => Ok(Plan::Meanwhile(number)),
            ("kill-after-us", None) if how.is_empty() => Ok(Plan::KillAfter(Duration::from_micros(number))),
            ("file-bytes", None) if how.is_empty() => Ok(Plan::FileBytes(number)),
            ("descriptors", None) if how.is_empty() => Ok(Plan::Descriptors(number)),
            _ => Err(no_plan()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_s_text_is_read_back() {
        let files = FileFault::ALL.map(|fault| Plan::File(7, fault));
        let steps = NAMES.map(|(fault, _)| Plan::Step(3, fault));
        let others = [
            Plan::Nothing,
            Plan::Meanwhile(8),
            Plan::KillAfter(Duration::from_micros(1234)),
            Plan::FileBytes(4096),
            Plan::Descriptors(9),
        ];
        for plan in files.into_iter().chain(steps).chain(others) {
            assert_eq!(plan.to_string().parse(), Ok(plan));
        }
        for text in
            ["", "step:3", "step:x=gone", "step:0=gone", "file:3=gone", "kill-after-us:1=kill", "nothing:1"]
        {
            assert!(text.parse::<Plan>().is_err(), "{text}");
        }
    }
}
