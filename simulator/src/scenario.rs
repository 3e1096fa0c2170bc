//! A scenario: a world, an operation in it, what goes wrong, and what must hold afterwards. A seed decides all of it.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use control_plane::error::{Error, Kind, Result};
use control_plane::savefiles::Standing;
use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;

use crate::invariants::{self, Before};
use crate::operate::{own_error, Action};
use crate::plan::{Fault, FileFault, Plan, StepKind};
use crate::rng::Rng;
use crate::world::{Contents, Conversation, Outcome, World, DVM, NEW, NEW_TEMPLATE, OTHER, TEMPLATE};

/// What is done while something goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, clap::ValueEnum)]
pub enum Op {
    /// The first build of a DVM template
    BuildFirst,
    /// A build beside an older savefile, with a hook
    BuildNext,
    /// A launch from an admitted savefile; its command reads more than a window of stdin
    Launch,
    /// A launch that has to admit the savefile first
    LaunchAdmit,
    /// A launch without a savefile
    LaunchCold,
    /// A launch from a damaged savefile
    LaunchDamaged,
    /// A launch whose command writes more than memory may hold
    LaunchSpill,
    /// A collection with something to collect
    Gc,
    /// The removal of a savefile
    Rm,
    /// A template's next generation
    AddTemplate,
    /// A new template
    NewTemplate,
    /// A new DVM template
    NewDvm,
    /// A new disposable with a record of its own
    NewDisposable,
    /// The removal of a DVM template
    RmQube,
    /// Two builds at once, one of which goes wrong
    TwoBuilds,
    /// Two launches at once
    TwoLaunches,
    /// A build, and two launches and a collection meanwhile
    Mixed,
}

impl Op {
    /// All there are.
    pub const ALL: [Op; 17] = [
        Op::BuildFirst,
        Op::BuildNext,
        Op::Launch,
        Op::LaunchAdmit,
        Op::LaunchCold,
        Op::LaunchDamaged,
        Op::LaunchSpill,
        Op::Gc,
        Op::Rm,
        Op::AddTemplate,
        Op::NewTemplate,
        Op::NewDvm,
        Op::NewDisposable,
        Op::RmQube,
        Op::TwoBuilds,
        Op::TwoLaunches,
        Op::Mixed,
    ];

    /// Those with one process, whose steps are the same in every run.
    pub const ALONE: [Op; 14] = [
        Op::BuildFirst,
        Op::BuildNext,
        Op::Launch,
        Op::LaunchAdmit,
        Op::LaunchCold,
        Op::LaunchDamaged,
        Op::LaunchSpill,
        Op::Gc,
        Op::Rm,
        Op::AddTemplate,
        Op::NewTemplate,
        Op::NewDvm,
        Op::NewDisposable,
        Op::RmQube,
    ];

    /// As `--op` takes it.
    pub fn name(self) -> String {
        clap::ValueEnum::to_possible_value(&self).map_or(String::new(), |value| value.get_name().to_owned())
    }

    fn contents(self) -> Contents {
        Contents {
            savefile: self != Op::BuildFirst,
            evicted: matches!(self, Op::LaunchAdmit | Op::LaunchDamaged),
            damaged: self == Op::LaunchDamaged,
            garbage: self == Op::Gc,
            third: self == Op::RmQube,
        }
    }

    fn action(self, world: &World) -> Action {
        let launch = |dvm: &str, command: &[&str]| Action::Launch {
            dvm: dvm.to_owned(),
            command: command.iter().map(|word| (*word).to_owned()).collect(),
        };
        let dvm = DVM.to_owned();
        match self {
            Op::BuildFirst => Action::Build { dvm, prerun: None },
            Op::BuildNext | Op::TwoBuilds | Op::Mixed => {
                Action::Build { dvm, prerun: Some(world.folder().join("hook")) }
            }
            Op::Launch | Op::TwoLaunches => launch(DVM, &["cat"]),
            Op::LaunchAdmit | Op::LaunchDamaged => launch(DVM, &["echo", "hello"]),
            Op::LaunchCold => launch(OTHER, &["echo", "hello"]),
            Op::LaunchSpill => launch(DVM, &["fill", "40"]),
            Op::Gc => Action::Gc,
            Op::Rm => Action::Rm { dvm },
            Op::AddTemplate | Op::NewTemplate => {
                let name = if self == Op::AddTemplate { TEMPLATE } else { NEW_TEMPLATE };
                Action::AddTemplate { name: name.to_owned(), root: world.folder().join("root-2.img") }
            }
            Op::NewDvm => Action::AddDvm { name: NEW.to_owned() },
            Op::NewDisposable => Action::AddDisposable { name: NEW.to_owned() },
            Op::RmQube => Action::RmQube { name: NEW.to_owned() },
        }
    }

    /// What takes away all that the operation is about to use, if only it may: done while it is held somewhere.
    fn takes_away(self, world: &World) -> Vec<Action> {
        let next = Action::AddTemplate { name: TEMPLATE.to_owned(), root: world.folder().join("root-2.img") };
        match self {
            Op::Rm | Op::RmQube => vec![Action::Gc],
            Op::AddTemplate | Op::NewTemplate | Op::NewDvm | Op::NewDisposable => vec![Action::Gc],
            Op::Gc => vec![Action::Build { dvm: DVM.to_owned(), prerun: None }],
            Op::BuildFirst => vec![next, Action::Gc],
            _ => vec![Action::Rm { dvm: DVM.to_owned() }, next, Action::Gc],
        }
    }

    /// What runs at the same time, and must succeed.
    fn others(self) -> Vec<Action> {
        let launch =
            |dvm: &str| Action::Launch { dvm: dvm.to_owned(), command: vec!["echo".into(), "hello".into()] };
        match self {
            Op::TwoBuilds => vec![Action::Build { dvm: DVM.to_owned(), prerun: None }],
            Op::TwoLaunches => vec![launch(DVM)],
            Op::Mixed => vec![launch(DVM), Action::Gc, launch(OTHER)],
            _ => Vec::new(),
        }
    }
}

/// Where scenarios are played.
#[derive(Debug, Clone)]
pub struct Stage {
    /// Where worlds are made.
    pub folder: PathBuf,
    /// The simulator's own binary.
    pub program: PathBuf,
    /// Whether worlds are kept.
    pub keep: bool,
}

/// One scenario.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scenario {
    /// What the world is made from.
    pub seed: u64,
    /// What is done.
    pub op: Op,
    /// What goes wrong.
    pub plan: Plan,
}

impl Scenario {
    /// The one a seed stands for. The plan is drawn from the steps that a run without faults takes.
    pub fn from_seed(stage: &Stage, seed: u64, op: Option<Op>) -> Result<Scenario> {
        let mut rng = Rng::new(seed);
        let drawn = *rng.pick(&Op::ALL);
        let op = op.unwrap_or(drawn);
        let dry = Scenario { seed, op, plan: Plan::Nothing }.rehearse(stage)?;
        let plan = match rng.below(10) {
            0..=3 if !dry.steps.is_empty() => {
                let at = rng.below(dry.steps.len() as u64);
                let kind = StepKind::of_line(&dry.steps[at as usize]).unwrap_or(StepKind::Host);
                Plan::Step(at + 1, *rng.pick(kind.faults()))
            }
            0..=5 if !dry.files.is_empty() => {
                Plan::File(1 + rng.below(dry.files.len() as u64), *rng.pick(&FileFault::ALL))
            }
            6 if !dry.files.is_empty() => Plan::Meanwhile(1 + rng.below(dry.files.len() as u64)),
            // What a process says still fits.
            7 => Plan::FileBytes((1 << 10) + rng.below(100 << 10)),
            8 => Plan::Descriptors(5 + rng.below(25)),
            // Traced, it took longer than it will.
            _ => Plan::KillAfter(Duration::from_micros(rng.below(dry.took.as_micros() as u64 + 1))),
        };
        Ok(Scenario { seed, op, plan })
    }

    /// Runs the operation traced, in a world of its own, beside the same clone as ever: what steps there are.
    pub fn rehearse(&self, stage: &Stage) -> Result<Outcome> {
        let world = World::new(&stage.folder, &stage.program, self.seed, self.op.contents(), stage.keep)?;
        let mut bystander = self.bystander(&world)?;
        ask(&mut bystander, "before", &mut Vec::new());
        let outcome = world.run(&self.op.action(&world), Plan::Nothing, true);
        let outcome = outcome.map_err(own_error("run an operation"))?;
        match outcome.status {
            WaitStatus::Exited(_, 0) => Ok(outcome),
            other => Err(Error::new(
                Kind::Failed,
                format!("{} fails with nothing wrong: {other:?}: {}", self.op.name(), outcome.stderr),
            )),
        }
    }

    /// A clone that runs all the time; restored where there is an admitted savefile.
    fn bystander(&self, world: &World) -> Result<Conversation> {
        let dvm = if self.op.contents().evicted { OTHER } else { DVM }.to_owned();
        let witness = Action::Launch { dvm, command: vec!["witness".into()] };
        world.converse(&witness).map_err(own_error("start a clone"))
    }

    /// The command that plays it again.
    pub fn replay(&self) -> String {
        format!("dispvm-simulator run --seed {} --op {} --plan {}", self.seed, self.op.name(), self.plan)
    }

    /// Plays it. Answers what the operation did, and everything that is against the rules.
    pub fn play(&self, stage: &Stage) -> Result<(Outcome, Vec<String>)> {
        let contents = self.op.contents();
        let world = World::new(&stage.folder, &stage.program, self.seed, contents, stage.keep)?;
        let mut found = Vec::new();
        let run = || own_error("run an operation");

        // A clone beside it keeps what it uses: where all shall be taken away, there is none.
        let held = matches!(self.plan, Plan::Meanwhile(_));
        let mut bystander = (!held).then(|| self.bystander(&world)).transpose()?;
        ask_if_there(&mut bystander, "before", &mut found);
        let removes = self.op == Op::Rm || held;
        let before =
            Before::of(&world, contents.damaged, removes, bystander.as_ref().map(Conversation::pid))?;

        let action = self.op.action(&world);
        let (outcome, meanwhile) = self.run(&world, &action).map_err(run())?;
        found.extend(self.judge(&world, &action, &outcome));
        let fine = Scenario { plan: Plan::Nothing, ..*self };
        for (other, outcome) in meanwhile {
            let judged = fine.judge(&world, &other, &outcome);
            found.extend(judged.into_iter().map(|what| format!("meanwhile, {what}")));
        }
        ask_if_there(&mut bystander, "after", &mut found);

        // One ordinary command, and nothing is left of it all.
        found.extend(ordinary(&world, &Action::Gc)?);
        found.extend(invariants::check(&world, &before));
        found.extend(launches(&world)?);
        ask_if_there(&mut bystander, "at the end", &mut found);
        match bystander.map(Conversation::end).transpose() {
            Ok(status) if status.is_none_or(|status| status.success()) => {}
            ended => found.push(format!("the clone beside it ended badly: {ended:?}")),
        }
        found.extend(ordinary(&world, &Action::Gc)?);
        found.extend(invariants::check(&world, &Before { bystander: None, ..before }));
        found.dedup();
        Ok((outcome, found))
    }

    /// Runs the operation and those at the same time.
    fn run(&self, world: &World, action: &Action) -> io::Result<(Outcome, Vec<(Action, Outcome)>)> {
        if let Plan::Meanwhile(_) = self.plan {
            return world.run_beside(action, self.plan, &self.op.takes_away(world));
        }
        let start = |other: Action| Ok((world.start(&other, Plan::Nothing, false)?, other));
        let started = self.op.others().into_iter().map(start).collect::<io::Result<Vec<_>>>()?;
        let outcome = world.run(action, self.plan, matches!(self.plan, Plan::File(..)))?;
        let finished = started.into_iter().map(|(running, other)| Ok((other, running.finish()?)));
        Ok((outcome, finished.collect::<io::Result<_>>()?))
    }

    /// Whether the step that was to go wrong never came.
    fn was_not_reached(&self, outcome: &Outcome) -> bool {
        match self.plan {
            Plan::Step(at, _) => at > outcome.steps.len() as u64,
            Plan::File(at, _) => at > outcome.files.len() as u64,
            _ => false,
        }
    }

    /// Whether what went wrong was a call of the host without which there is no success. (One that stacks a delta has another
    /// way out, to boot cold; without knowing what was touched, a savefile has no working set.)
    fn must_fail(&self, outcome: &Outcome) -> bool {
        let Plan::Step(at, _) = self.plan else { return false };
        let step = outcome.steps.get(at as usize - 1);
        step.is_some_and(|step| {
            step.starts_with("H ") && step != "H host.stack" && step != "H domain.touched"
        })
    }

    /// Whether an operation ended as it may, by the plan, and said what it must.
    fn judge(&self, world: &World, action: &Action, outcome: &Outcome) -> Vec<String> {
        let mut found = Vec::new();
        let kills = matches!(
            self.plan,
            Plan::Step(_, Fault::Kill) | Plan::File(_, FileFault::Kill) | Plan::KillAfter(_)
        );
        let silent = matches!(self.plan, Plan::Step(_, Fault::Silent));
        let told = outcome.stderr.trim();
        match outcome.status {
            WaitStatus::Exited(_, 0) if self.must_fail(outcome) && !booted_cold_instead(action, told) => {
                found.push(format!("{action:?} succeeded, though a step of it failed"));
            }
            WaitStatus::Exited(_, 0) => {}
            WaitStatus::Exited(_, 143) if silent => {}
            _ if matches!(self.plan, Plan::Nothing | Plan::Meanwhile(_)) || self.was_not_reached(outcome) => {
                found.push(format!("{action:?} failed with nothing wrong: {:?}: {told}", outcome.status));
            }
            WaitStatus::Exited(_, 1 | 125 | 126) if !told.is_empty() => {}
            WaitStatus::Exited(_, 1 | 125 | 126) => found.push("it failed and did not say why".to_owned()),
            WaitStatus::Signaled(_, Signal::SIGKILL, _) if kills => {}
            WaitStatus::Signaled(_, Signal::SIGTERM, _) if silent => {}
            WaitStatus::Signaled(_, Signal::SIGALRM, _) => found.push(format!("{action:?} hangs")),
            other => found.push(format!("{action:?} ended with {other:?}: {told}")),
        }
        let expected = match action {
            Action::Launch { command, .. } if command[0] == "cat" => world.input(),
            Action::Launch { command, .. } if command[0] == "fill" => b"filled\n".to_vec(),
            Action::Launch { .. } => b"hello\n".to_vec(),
            _ => Vec::new(),
        };
        let lies = matches!(self.plan, Plan::Step(_, Fault::Violation));
        if !lies && !expected.starts_with(&outcome.stdout) {
            found.push(format!("{action:?} wrote what the command did not"));
        }
        if let WaitStatus::Exited(_, 0) = outcome.status {
            if outcome.stdout != expected {
                found.push(format!("{action:?} succeeded without all of its output"));
            }
            if told.contains("\"cold_boot\":true") && !told.contains("booting cold") {
                found.push("it booted cold and did not say so".to_owned());
            }
        }
        found
    }
}

/// Asks the clone that runs beside it all how it is.
fn ask(bystander: &mut Conversation, line: &str, found: &mut Vec<String>) {
    match bystander.ask(line) {
        Ok(answer) if answer == format!("ok {line}") => {}
        answer => found.push(format!("the clone beside it is disturbed {line}: {answer:?}")),
    }
}

fn ask_if_there(bystander: &mut Option<Conversation>, line: &str, found: &mut Vec<String>) {
    bystander.iter_mut().for_each(|bystander| ask(bystander, line, found));
}

/// Runs an operation in which nothing may go wrong.
fn ordinary(world: &World, action: &Action) -> Result<Vec<String>> {
    let outcome = world.run(action, Plan::Nothing, false).map_err(own_error("run an operation"))?;
    Ok(match outcome.status {
        WaitStatus::Exited(_, 0) => Vec::new(),
        other => vec![format!("the next {action:?} ended with {other:?}: {}", outcome.stderr.trim())],
    })
}

/// Launches, and expects a clone from the savefile if it is fresh, else one booted cold that says why.
fn launches(world: &World) -> Result<Vec<String>> {
    let action = Action::Launch { dvm: DVM.to_owned(), command: vec!["echo".into(), "again".into()] };
    let warm = world.standing(DVM)? == Standing::Fresh;
    let outcome = world.run(&action, Plan::Nothing, false).map_err(own_error("run an operation"))?;
    let mut found = Vec::new();
    if outcome.status != WaitStatus::Exited(outcome_pid(&outcome), 0) || outcome.stdout != b"again\n" {
        found.push(format!("the next launch ended with {:?}: {}", outcome.status, outcome.stderr.trim()));
    }
    let cold = outcome.stderr.contains("\"cold_boot\":true");
    let says_so = outcome.stderr.contains("booting cold");
    let damaged = outcome.stderr.contains("cannot be used");
    if cold != says_so || (warm && cold && !damaged) {
        found.push(format!(
            "the next launch: the savefile fresh: {warm}, booted cold: {cold}, said so: {says_so}"
        ));
    }
    Ok(found)
}

fn outcome_pid(outcome: &Outcome) -> nix::unistd::Pid {
    outcome.status.pid().unwrap_or(nix::unistd::Pid::from_raw(0))
}

/// The folder worlds are made in: in memory, where syncing costs nothing, if there is one.
pub fn usual_folder() -> PathBuf {
    let memory = Path::new("/dev/shm");
    match nix::unistd::access(memory, nix::unistd::AccessFlags::W_OK) {
        Ok(()) => memory.to_owned(),
        Err(_) => std::env::temp_dir(),
    }
}

/// Whether a launch whose restore went wrong has said so and booted cold.
fn booted_cold_instead(action: &Action, told: &str) -> bool {
    matches!(action, Action::Launch { .. })
        && told.contains("does not restore")
        && told.contains("booting cold")
        && told.contains("\"cold_boot\":true")
}
