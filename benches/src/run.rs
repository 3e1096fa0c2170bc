//! What the benches' programs share: their options, and how a run is guarded.

use std::process::ExitCode;

use clap::{Args, Command, FromArgMatches};

use crate::results;
use crate::table::{self, Row};

/// A bench's options.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct Options {
    /// As many launches as a published figure needs; adds to benches/results/
    #[arg(long)]
    pub full: bool,
    /// CI's guard: a few launches of each kind; fails when a ratio is worse than its mark by half, twice in a row
    #[arg(long, conflicts_with = "full")]
    pub short: bool,
    /// Another number of launches
    #[arg(long)]
    pub launches: Option<usize>,
}

impl Options {
    /// Those on the command line of a bench that has no others, and does what `about` says.
    pub fn parse(about: &'static str) -> Options {
        let mut command = Options::augment_args(Command::new("bench")).about(about);
        let matches = command.get_matches_mut();
        Options::from_arg_matches(&matches).unwrap_or_else(|error| error.format(&mut command).exit())
    }

    /// How many launches of each kind: so many for a full run and so many else, unless told otherwise.
    pub fn launches(&self, full: usize, otherwise: usize) -> usize {
        self.launches.unwrap_or(if self.full { full } else { otherwise })
    }

    /// Measures, shows, keeps a full run as `bench`, and measures once more if a ratio is far off.
    pub fn run(&self, bench: &str, launches: usize, mut measure: impl FnMut() -> Vec<Row>) -> ExitCode {
        let mut rows = measure();
        println!("{}", table::text(&rows));
        if self.full {
            results::keep(bench, &rows, launches);
        }
        if rows.iter().any(Row::is_far_off) {
            println!("\na ratio is far off its mark; measuring once more");
            rows = measure();
            println!("{}", table::text(&rows));
        }
        match rows.iter().find(|row| row.is_far_off()) {
            Some(row) => {
                println!("\nfar off twice in a row: {}", row.measure);
                ExitCode::FAILURE
            }
            None => ExitCode::SUCCESS,
        }
    }
}
