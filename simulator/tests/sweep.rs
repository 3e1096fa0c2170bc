//! Every step of every operation failed in turn and killed in turn, and seeds for what has no order: nothing is left,
//! nothing is lost, others are unharmed. And the same seed gives the same run.
//!
//! The bugs these are for: a record, a lock, a temporary file or a hot image that outlives a failure; a savefile pinned before
//! it is whole; a build or a collection that takes away what a clone beside it uses; a command that runs in a clone which is
//! nobody; a launch that hangs.

use std::path::PathBuf;
use std::process::Command;
use std::sync::{Mutex, MutexGuard};

use simulator::plan::{Fault, FileFault, Plan};
use simulator::scenario::{usual_folder, Op, Scenario, Stage};
use simulator::sweep::{every_meanwhile, every_step, sweep, Swept};

/// The worlds' seed, whose steps are all taken.
const BASE: u64 = 7;
/// Seeds beside them: kills at any instant, limits, and operations beside each other.
const SEEDS: usize = 120;

/// One at a time: each takes all processors, and counts this process's descriptors.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn program() -> PathBuf {
    // Beside the folder of test binaries. Cargo's own variable has a hyphen in its name, which dash, the shell of
    // tools/rustc-static, does not hand on.
    std::env::current_exe().unwrap().ancestors().nth(2).unwrap().join("dispvm-simulator")
}

fn stage() -> Stage {
    Stage { folder: usual_folder(), program: program(), keep: false }
}

fn tell(what: &str, found: &[String]) {
    eprintln!("FAILED: {what}\n    {}", found.join("\n    "));
}

fn all_held(swept: &Swept) {
    eprintln!("{} scenarios in {:.1} s", swept.scenarios, swept.took.as_secs_f64());
    assert!(swept.failures.is_empty(), "{} of {} failed", swept.failures.len(), swept.scenarios);
}

#[test]
fn every_step_failed_and_killed_leaves_nothing_loses_nothing_and_harms_nobody() {
    let _alone = alone();
    let stage = stage();
    let all = every_step(&stage, BASE, &Op::ALONE).unwrap();
    assert!(all.len() > 1000, "only {} steps and faults", all.len());
    all_held(&sweep(&stage, all.len(), |at| Ok(all[at]), tell));
}

#[test]
fn an_operation_held_anywhere_ends_well_though_others_take_away_what_they_may() {
    let _alone = alone();
    let stage = stage();
    let ops = [Op::BuildFirst, Op::Launch, Op::LaunchCold, Op::RmQube];
    let all = every_meanwhile(&stage, BASE, &ops).unwrap();
    assert!(all.len() > 100, "only {} places to be held at", all.len());
    all_held(&sweep(&stage, all.len(), |at| Ok(all[at]), tell));
}

#[test]
fn kills_at_any_instant_limits_and_operations_side_by_side_do_no_harm_either() {
    let _alone = alone();
    let stage = stage();
    let scenario = |at| Scenario::from_seed(&stage, BASE * 1_000_000 + at as u64, None);
    all_held(&sweep(&stage, SEEDS, scenario, tell));
}

fn trace(arguments: &[&str]) -> String {
    let output = Command::new(program()).arg("run").args(arguments).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}");
    text
}

#[test]
fn the_same_seed_gives_the_same_trace() {
    let _alone = alone();
    let cases = [
        ("build-next", "step:5=failed"),
        ("build-next", "file:40=kill"),
        ("launch", "step:9=hang-up"),
        ("launch-admit", "file:20=enospc"),
        ("launch-cold", "nothing"),
        ("gc", "file:30=eio"),
    ];
    for (op, plan) in cases {
        let arguments = ["--seed", "5", "--op", op, "--plan", plan];
        let (first, second) = (trace(&arguments), trace(&arguments));
        assert!(first.lines().count() > 5, "{first}");
        assert_eq!(first, second, "{op} {plan}");
    }
    // What a seed alone stands for is drawn from the steps, so it is the same too.
    for seed in 40..46 {
        let stage = stage();
        let drawn = || Scenario::from_seed(&stage, seed, None).unwrap();
        let (first, second) = (drawn(), drawn());
        let timed = |scenario: &Scenario| matches!(scenario.plan, Plan::KillAfter(_));
        assert!(first == second || (timed(&first) && timed(&second)), "{first:?} {second:?}");
    }
}

#[test]
fn a_trace_ends_at_the_step_that_was_killed() {
    let _alone = alone();
    let stage = stage();
    let play = |plan| Scenario { seed: BASE, op: Op::Launch, plan }.play(&stage).unwrap().0;
    let whole = Scenario { seed: BASE, op: Op::Launch, plan: Plan::Nothing }.rehearse(&stage).unwrap();
    let killed = play(Plan::Step(6, Fault::Kill));
    assert_eq!(killed.steps, whole.steps[..6]);
    let killed = play(Plan::File(12, FileFault::Kill));
    assert_eq!(killed.files, whole.files[..12]);
    assert_eq!(play(Plan::File(12, FileFault::Io)).files[..12], whole.files[..12]);
}
