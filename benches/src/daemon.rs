//! `dispvmd` beside what is measured, with one spare of one guest.

use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

use crate::guests::{Bench, Subject};

/// A spare under emulation is made within some seconds.
const SPARE_LIMIT: Duration = Duration::from_secs(60);

/// `dispvmd`, keeping one spare of one guest.
pub struct Daemon<'a> {
    /// Where it runs.
    pub bench: &'a Bench,
    /// Whose spare it keeps.
    pub subject: &'a Subject,
    child: Child,
}

impl<'a> Daemon<'a> {
    /// Starts it, with the Admin API at a socket if one is given.
    pub fn start(bench: &'a Bench, subject: &'a Subject, api_socket: Option<&Path>) -> Daemon<'a> {
        want_spares(bench, subject, "1");
        let mut command = bench.command("dispvmd");
        command.args(["--spares", "0"]);
        if let Some(path) = api_socket {
            command.arg("--api-socket").arg(path);
        }
        Daemon { bench, subject, child: command.spawn().expect("it starts") }
    }

    /// Waits until the spare is there, and its maker has come to rest.
    pub fn await_spare(&self) {
        let start = Instant::now();
        while !self.has_spare() {
            assert!(start.elapsed() < SPARE_LIMIT, "no spare of {}", self.subject.dvm);
            std::thread::sleep(Duration::from_millis(50));
        }
        std::thread::sleep(Duration::from_millis(50));
    }

    fn has_spare(&self) -> bool {
        let output = self.bench.command("dispvmd").args(["status", "--json"]).output().expect("it runs");
        let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        let dvms = status["dvms"].as_array().cloned().unwrap_or_default();
        dvms.iter().any(|dvm| dvm["dvm"] == self.subject.dvm && dvm["spares_ready"] == 1)
    }
}

fn want_spares(bench: &Bench, subject: &Subject, count: &str) {
    let mut add = bench.command("dispvm-qube");
    add.args(["add-dvm", subject.dvm, "--template", subject.template, "--spares", count]);
    add.args(["--memory", &subject.memory_mib.to_string(), "--vcpus", &subject.vcpus.to_string()]);
    assert!(add.status().is_ok_and(|status| status.success()), "{add:?}");
}

impl Drop for Daemon<'_> {
    fn drop(&mut self) {
        // The next one is to keep spares of another guest.
        want_spares(self.bench, self.subject, "0");
        let pid = nix::unistd::Pid::from_raw(self.child.id() as i32);
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let _ = self.child.wait();
    }
}
