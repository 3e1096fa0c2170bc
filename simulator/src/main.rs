//! `dispvm-simulator`: plays scenarios in which a step of the engine fails or its process is killed, and says which of the
//! invariants did not hold. Exit status: 0 all held, 1 one did not, 2 usage.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use control_plane::error::Result;
use control_plane::output::error_text;
use simulator::operate::{self, Action, Setting};
use simulator::plan::Plan;
use simulator::scenario::{usual_folder, Op, Scenario, Stage};
use simulator::serve;
use simulator::sweep;

/// Plays failures on a simulated machine.
#[derive(Parser)]
#[command(version)]
struct Options {
    /// The state folder of a runner
    #[arg(long)]
    root: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Args)]
struct Place {
    /// Where worlds are made [default: /dev/shm]
    #[arg(long)]
    folder: Option<PathBuf>,
    /// Keep the worlds
    #[arg(long)]
    keep: bool,
}

#[derive(Subcommand)]
enum Command {
    /// Play one scenario and print its trace
    Run {
        /// Seed
        #[arg(long)]
        seed: u64,
        /// What is done [default: drawn from the seed]
        #[arg(long)]
        op: Option<Op>,
        /// What goes wrong, as a failing run prints it [default: drawn from the seed]
        #[arg(long)]
        plan: Option<Plan>,
        #[command(flatten)]
        place: Place,
    },
    /// Play many
    Sweep {
        /// The first seed
        #[arg(long, default_value_t = 1)]
        from: u64,
        /// How many seeds
        #[arg(long, default_value_t = 100)]
        count: u64,
        /// Instead of one scenario per seed, every step with every fault, from the first seed alone
        #[arg(long)]
        every: bool,
        /// Only this
        #[arg(long)]
        op: Option<Op>,
        #[command(flatten)]
        place: Place,
    },
    /// Serve as `dispvmd` does, on a world's state folder
    Daemon {
        /// The world's folder
        #[arg(long)]
        world: PathBuf,
        /// The Admin API's socket
        #[arg(long)]
        api_socket: PathBuf,
    },
    /// Run a qube (started by the daemon)
    #[command(hide = true)]
    Runner {
        /// Qube
        name: String,
    },
    /// One operation, which may go wrong: what the others start
    #[command(hide = true)]
    Operate {
        #[command(flatten)]
        setting: Setting,
        #[command(subcommand)]
        action: Action,
    },
}

fn main() -> ExitCode {
    let Options { root, command } = Options::parse();
    let result = match command {
        Command::Daemon { world, api_socket } => serve::daemon(&world, &api_socket).map(|()| true),
        Command::Runner { name } => serve::runner(root.as_deref(), &name).map(|()| true),
        Command::Operate { setting, action } => match operate::run(&setting, &action) {
            Ok(status) => return ExitCode::from(status),
            Err(error) => Err(operate::own_error("run an operation")(error)),
        },
        Command::Run { seed, op, plan, place } => run(seed, op, plan, &place),
        Command::Sweep { from, count, every, op, place } => sweep_all(from, count, every, op, &place),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("dispvm-simulator: {}", error_text(&error));
            ExitCode::FAILURE
        }
    }
}

fn stage(place: &Place) -> Result<Stage> {
    let program = std::env::current_exe().map_err(operate::own_error("find this program"))?;
    let folder = place.folder.clone().unwrap_or_else(usual_folder);
    Ok(Stage { folder, program, keep: place.keep })
}

fn run(seed: u64, op: Option<Op>, plan: Option<Plan>, place: &Place) -> Result<bool> {
    let stage = stage(place)?;
    let scenario = match (op, plan) {
        (Some(op), Some(plan)) => Scenario { seed, op, plan },
        (op, plan) => {
            let drawn = Scenario::from_seed(&stage, seed, op)?;
            Scenario { plan: plan.unwrap_or(drawn.plan), ..drawn }
        }
    };
    println!("{}", scenario.replay());
    let (outcome, found) = scenario.play(&stage)?;
    for line in outcome.steps.iter().chain(&outcome.files) {
        println!("{line}");
    }
    println!("ended: {}", status_text(&outcome.status));
    eprint!("{}", outcome.stderr);
    found.iter().for_each(|what| println!("VIOLATED: {what}"));
    Ok(found.is_empty())
}

/// Without the process id, which differs from run to run.
fn status_text(status: &nix::sys::wait::WaitStatus) -> String {
    use nix::sys::wait::WaitStatus;
    match status {
        WaitStatus::Exited(_, code) => format!("status {code}"),
        WaitStatus::Signaled(_, signal, _) => format!("{signal}"),
        other => format!("{other:?}"),
    }
}

fn sweep_all(from: u64, count: u64, every: bool, op: Option<Op>, place: &Place) -> Result<bool> {
    let stage = stage(place)?;
    let tell = |what: &str, found: &[String]| {
        println!("FAILED: {what}");
        found.iter().for_each(|what| println!("    {what}"));
    };
    let swept = if every {
        let ops = op.map_or(Op::ALONE.to_vec(), |op| vec![op]);
        let mut all = sweep::every_step(&stage, from, &ops)?;
        all.extend(sweep::every_meanwhile(&stage, from, &ops)?);
        sweep::sweep(&stage, all.len(), |at| Ok(all[at]), tell)
    } else {
        let scenario = |at| Scenario::from_seed(&stage, from + at as u64, op);
        sweep::sweep(&stage, count as usize, scenario, tell)
    };
    let (scenarios, seconds) = (swept.scenarios, swept.took.as_secs_f64());
    println!("{scenarios} scenarios in {seconds:.1} s, {} failed", swept.failures.len());
    Ok(swept.failures.is_empty())
}
