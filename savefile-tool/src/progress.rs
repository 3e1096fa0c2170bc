//! Progress of long work, on a terminal only: indicatif draws nothing where standard error is none.

use std::time::Duration;

use control_plane::output::bytes_text;
use engine::build::{Step, Watch};
use engine::savefile::Progress;
use indicatif::{ProgressBar, ProgressStyle};

/// How often a waiting step's spinner moves; steps shorter than this are never seen.
const TICK: Duration = Duration::from_millis(250);

/// A bar for one run over a savefile's bytes.
pub struct Bar(ProgressBar);

impl Bar {
    /// Not shown before there is something to show.
    pub fn new() -> Bar {
        let bar = ProgressBar::new_spinner();
        bar.enable_steady_tick(TICK);
        Bar(bar)
    }

    /// Shows how far it is.
    pub fn show(&self, progress: Progress) {
        let (done, total) = (progress.done.0, progress.total.0);
        self.0.set_message(format!("{} of {}", bytes_text(done), bytes_text(total)));
    }

    /// Takes it away.
    pub fn finish(&self) {
        self.0.finish_and_clear();
    }
}

/// A build's steps, one line each as they end.
pub struct BuildWatch {
    bar: ProgressBar,
}

impl BuildWatch {
    /// Nothing under way yet.
    pub fn new() -> BuildWatch {
        let bar = ProgressBar::new_spinner();
        if let Ok(style) = ProgressStyle::with_template("{spinner} {prefix} {msg} [{elapsed}]") {
            bar.set_style(style);
        }
        bar.enable_steady_tick(TICK);
        BuildWatch { bar }
    }

    /// Takes it away.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

impl Watch for BuildWatch {
    fn step(&mut self, step: Step) {
        self.bar.set_prefix(step.name());
        self.bar.set_message("");
    }

    fn wrote(&self, progress: Progress) {
        self.bar.set_message(format!("{} of {}", bytes_text(progress.done.0), bytes_text(progress.total.0)));
    }
}
