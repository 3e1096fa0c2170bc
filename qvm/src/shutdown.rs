//! `qvm-shutdown`: asks qubes to shut down, and kills those that do not.

use std::thread;
use std::time::{Duration, Instant};

use admin_api::lines::Qube;
use admin_api::Kind;
use clap::Parser;

use crate::api::{is, Api};
use crate::names::Qubes;
use crate::outcome::{Failure, Outcome};

/// How often is looked whether they are down.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// Shuts qubes down.
#[derive(Parser)]
#[command(version)]
pub struct Options {
    /// Wait for the qubes to shut down
    #[arg(long)]
    wait: bool,
    /// With --wait: kill those that are not down after this many seconds
    #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = seconds)]
    timeout: Duration,
    /// Shut down even if others are connected to it
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    qubes: Qubes,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let number: f64 = text.parse().map_err(|_| format!("{text:?} is no number"))?;
    Duration::try_from_secs_f64(number).map_err(|error| error.to_string())
}

/// Runs `qvm-shutdown`. The status is the number of qubes that are not down.
pub fn run(options: Options) -> Outcome {
    let api = options.qubes.api();
    let qubes = options.qubes.select(&api)?;
    let force = if options.force || options.qubes.is_all { "force" } else { "" };
    let mut left: Vec<&Qube> = qubes.iter().collect();
    // Who is needed by others can go only after them: as many rounds as it may take.
    for _ in 0..qubes.len() {
        let round = std::mem::take(&mut left);
        let mut asked = Vec::new();
        for qube in round {
            match api.call("admin.vm.Shutdown", &qube.name, force, "") {
                Err(error) if is(&error, Kind::VmNotRunning) || is(&error, Kind::VmNotStarted) => {}
                Err(error) => {
                    left.push(qube);
                    if !options.wait {
                        eprintln!("Shutdown error: {error}");
                    }
                }
                Ok(_) => asked.push(&qube.name[..]),
            }
        }
        if !options.wait {
            return report(left);
        }
        for name in wait(&api, &asked, options.timeout)? {
            match api.tell("admin.vm.Kill", &name) {
                Err(error) if !is(&error, Kind::VmNotStarted) => return Err(error.into()),
                _ => {}
            }
        }
        if left.is_empty() || asked.is_empty() {
            break;
        }
    }
    let names: Vec<&str> = qubes.iter().map(|qube| &qube.name[..]).collect();
    let running = not_halted(&api, &names)?;
    report(qubes.iter().filter(|qube| running.contains(&qube.name)).collect())
}

fn report(failed: Vec<&Qube>) -> Outcome {
    if failed.is_empty() {
        return Ok(0);
    }
    let names: Vec<&str> = failed.iter().map(|qube| &qube.name[..]).collect();
    let status = u8::try_from(failed.len()).unwrap_or(u8::MAX);
    Err(Failure::Runtime(format!("Failed to shut down: {}", names.join(", ")), status))
}

/// Waits until these are down; those that are not when the time is over.
fn wait(api: &Api, names: &[&str], limit: Duration) -> Outcome<Vec<String>> {
    let start = Instant::now();
    loop {
        let left = not_halted(api, names)?;
        let time = limit.saturating_sub(start.elapsed());
        if left.is_empty() || time.is_zero() {
            return Ok(left);
        }
        thread::sleep(LOOK_EVERY.min(time));
    }
}

/// A disposable that is gone is down.
fn not_halted(api: &Api, names: &[&str]) -> Outcome<Vec<String>> {
    let is_left = |qube: &Qube| qube.state != "Halted" && names.contains(&&qube.name[..]);
    Ok(api.qubes()?.into_iter().filter(is_left).map(|qube| qube.name).collect())
}
