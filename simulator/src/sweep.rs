//! Many scenarios: every step with every fault, or seed after seed, on as many threads as there are processors.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use control_plane::error::Result;

use crate::operate::descriptors;
use crate::plan::{Fault, FileFault, Plan, StepKind};
use crate::scenario::{Op, Scenario, Stage};

/// What a sweep found.
#[derive(Debug)]
pub struct Swept {
    /// How many scenarios were played.
    pub scenarios: usize,
    /// Those that failed, and why.
    pub failures: Vec<(String, Vec<String>)>,
    /// How long it took.
    pub took: Duration,
}

/// Every step of `ops` with every fault it can have, and killed; every system call on the state's files failed with ENOSPC
/// and killed.
pub fn every_step(stage: &Stage, seed: u64, ops: &[Op]) -> Result<Vec<Scenario>> {
    let mut all = Vec::new();
    for &op in ops {
        let scenario = |plan| Scenario { seed, op, plan };
        all.push(scenario(Plan::Nothing));
        let dry = scenario(Plan::Nothing).rehearse(stage)?;
        for (at, line) in (1..).zip(&dry.steps) {
            let faults = StepKind::of_line(line).map_or(&[Fault::Kill][..], StepKind::faults);
            all.extend(faults.iter().map(|fault| scenario(Plan::Step(at, *fault))));
        }
        for (at, _) in (1..).zip(&dry.files) {
            all.extend([FileFault::NoSpace, FileFault::Kill].map(|fault| scenario(Plan::File(at, fault))));
        }
    }
    Ok(all)
}

/// Each of `ops` held at every system call on the state's files, while others take away what it uses, if they may.
pub fn every_meanwhile(stage: &Stage, seed: u64, ops: &[Op]) -> Result<Vec<Scenario>> {
    let mut all = Vec::new();
    for &op in ops {
        let dry = Scenario { seed, op, plan: Plan::Nothing }.rehearse(stage)?;
        all.extend((1..=dry.files.len() as u64).map(|at| Scenario { seed, op, plan: Plan::Meanwhile(at) }));
    }
    Ok(all)
}

/// Plays scenarios given as functions of their number; `tell` hears of each failure as it comes.
pub fn sweep(
    stage: &Stage,
    count: usize,
    scenario: impl Fn(usize) -> Result<Scenario> + Sync,
    tell: impl Fn(&str, &[String]) + Sync,
) -> Swept {
    let start = Instant::now();
    let (next, failures) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let before = descriptors().map_or(0, |fds| fds.len());
    let fail = |what: String, found: Vec<String>| {
        tell(&what, &found);
        failures.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push((what, found));
    };
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, |count| count.get()) {
            scope.spawn(|| loop {
                let at = next.fetch_add(1, Ordering::Relaxed);
                if at >= count {
                    break;
                }
                let text = |error| control_plane::output::error_text(&error);
                match scenario(at) {
                    Err(error) => fail(format!("scenario {at}"), vec![text(error)]),
                    Ok(scenario) => match scenario.play(stage) {
                        Ok((_, found)) if found.is_empty() => {}
                        Ok((_, found)) => fail(scenario.replay(), found),
                        Err(error) => fail(scenario.replay(), vec![text(error)]),
                    },
                }
            });
        }
    });
    let after = descriptors().map_or(usize::MAX, |fds| fds.len());
    if after > before {
        fail("all of them".to_owned(), vec![format!("{before} descriptors became {after}")]);
    }
    let failures = failures.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
    Swept { scenarios: count, failures, took: start.elapsed() }
}
