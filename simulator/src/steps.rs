//! The count of steps: each is written to the trace, then does what the plan says.
//!
//! A line of the trace is one write to a file opened for appending, made before the step: a killed process's trace ends
//! with the step it was killed at.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::sync::Mutex;

use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;

use crate::plan::{Fault, Plan, StepKind};

/// Counts steps and says which of them goes wrong.
pub struct Steps {
    plan: Plan,
    state: Mutex<(u64, Option<File>)>,
}

impl Steps {
    /// By this plan, traced to a file at `trace`.
    pub fn new(plan: Plan, trace: Option<&Path>) -> io::Result<Steps> {
        let open = |path| File::options().append(true).create(true).open(path);
        Ok(Steps { plan, state: Mutex::new((0, trace.map(open).transpose()?)) })
    }

    /// Whether an agent is to fall silent.
    pub fn has_silence(&self) -> bool {
        matches!(self.plan, Plan::Step(_, Fault::Silent))
    }

    /// The next step. `Some`: what goes wrong in it. Does not return from one to be killed at.
    pub fn at(&self, kind: StepKind, name: &str) -> Option<Fault> {
        let mut state = self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        state.0 += 1;
        let now = state.0;
        if let Some(trace) = &mut state.1 {
            let _ = trace.write_all(format!("{} {name}\n", kind.letter()).as_bytes());
        }
        match self.plan {
            Plan::Step(at, Fault::Kill) if at == now => {
                let _ = kill(Pid::this(), Signal::SIGKILL);
                loop {
                    std::thread::park();
                }
            }
            Plan::Step(at, fault) if at == now => Some(fault),
            _ => None,
        }
    }
}
