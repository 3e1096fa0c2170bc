//! What the daemon does by itself: spares made and ended as the policy says, hot images and savefiles made anew.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use engine::image::hot::HotImage;
use nix::sys::signal::{kill, Signal};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;

use super::policy::{self, Memory};
use super::protocol::{KeeperHears, KeeperSays};
use super::server::{Child, Daemon, Phase, Work};
use crate::clones;
use crate::inputs::{self, Guest};
use crate::savefiles;
use crate::state::State;

/// A keeper that is told to end its spare does so within some milliseconds.
const END_LIMIT: Duration = Duration::from_secs(5);
/// A rebuild that failed is tried again after this time, or when the inputs have changed.
const REBUILD_AGAIN: Duration = Duration::from_secs(600);

impl Daemon<'_> {
    /// Does what the policy says. Answers when to look again.
    pub(super) fn act(&mut self) -> Option<Instant> {
        let names: Vec<String> = self.dvms.keys().cloned().collect();
        let mut again = None;
        for name in &names {
            let (places, situation) = self.situation(name);
            let decision = policy::decide(&situation, Instant::now());
            let mut ended: Vec<usize> = decision.end.iter().map(|at| places[*at]).collect();
            ended.sort_unstable();
            for at in ended.into_iter().rev() {
                self.dismiss(at);
            }
            if decision.make {
                self.start(name, Work::Keeper);
            } else if situation.fresh && situation.wanted == 0 && !situation.making_somewhere {
                self.admit(name);
            }
            again = again.into_iter().chain(decision.again).min();
        }
        self.end_of_the_unknown();
        again
    }

    /// Ends what a launch must not be given.
    pub(super) fn end_unfit(&mut self, name: &str) {
        let (places, mut situation) = self.situation(name);
        situation.wanted = u32::MAX;
        situation.memory = Memory::Plenty;
        let mut ended: Vec<usize> =
            policy::decide(&situation, Instant::now()).end.iter().map(|at| places[*at]).collect();
        ended.sort_unstable();
        for at in ended.into_iter().rev() {
            self.dismiss(at);
        }
    }

    /// Ends the spares of templates that are no more.
    fn end_of_the_unknown(&mut self) {
        for at in (0..self.keepers.len()).rev() {
            let keeper = &self.keepers[at];
            if matches!(keeper.phase, Phase::Waiting { .. }) && !self.dvms.contains_key(&keeper.dvm) {
                self.dismiss(at);
            }
        }
    }

    pub(super) fn dismiss(&mut self, at: usize) {
        let keeper = self.keepers.remove(at);
        let _ = keeper.channel.send(&KeeperHears::End, &[]);
    }

    /// Ends all spares, those being made too, and waits until they are gone.
    pub(super) fn dismiss_spares(&mut self) {
        let mut ending = Vec::new();
        for keeper in std::mem::take(&mut self.keepers) {
            if matches!(keeper.phase, Phase::Waiting { .. })
                && keeper.channel.send(&KeeperHears::End, &[]).is_ok()
            {
                ending.push(keeper);
            }
        }
        // One that is still making a spare does not listen. With it goes its QEMU; it holds nothing else. It is our child and not
        // waited for yet, so the number is still its own.
        for (pid, _) in self.children.iter().filter(|(_, child)| child.what != Work::Rebuild && !child.ready)
        {
            let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
            let _ = waitpid(Pid::from_raw(*pid), None);
        }
        for keeper in ending {
            let _ = keeper.channel.receive_within::<KeeperSays>(END_LIMIT);
        }
        let _ = clones::sweep(self.state);
    }

    /// Has the savefile built, unless that was just tried in vain. Says whether it is being built.
    pub(super) fn rebuild(&mut self, name: &str, asked: bool) -> bool {
        let rebuilding = self.children.values().any(|child| child.what == Work::Rebuild && child.dvm == name);
        if rebuilding || savefiles::is_building(self.state, name) {
            return true;
        }
        let Some(dvm) = self.dvms.get_mut(name) else { return false };
        let Ok(inputs) = Guest::load(self.state, name).and_then(|guest| {
            let host = self.machine.host(self.state, &guest.spec.kernel)?;
            inputs::hash(&guest.manifest(host.facts()))
        }) else {
            return false;
        };
        let tried = dvm.rebuilt.as_ref();
        if !asked && tried.is_some_and(|(at, what)| *what == inputs && at.elapsed() < REBUILD_AGAIN) {
            return false;
        }
        match savefiles::start_rebuild(self.state, name) {
            Ok(child) => {
                tracing::info!("rebuilding the savefile of {name}");
                dvm.rebuilt = Some((Instant::now(), inputs));
                self.children.insert(
                    child.id() as i32,
                    Child { dvm: name.to_owned(), what: Work::Rebuild, ready: false },
                );
                true
            }
            Err(error) => {
                tracing::warn!("cannot start the rebuild of {name}: {error}");
                false
            }
        }
    }

    /// Has the hot image made, if it is not there.
    fn admit(&mut self, name: &str) {
        let serving = self.dvms.get(name).and_then(|dvm| dvm.serving.as_ref()?.as_ref().ok());
        let Some(root) = serving.map(|serving| serving.root) else { return };
        let tried = self.dvms.get(name).is_some_and(|dvm| dvm.admitted == Some(root));
        if tried || HotImage::list(&self.state.hot()).is_ok_and(|admitted| admitted.contains(&root)) {
            return;
        }
        if let Some(dvm) = self.dvms.get_mut(name) {
            dvm.admitted = Some(root);
        }
        self.start(name, Work::Admit);
    }

    fn start(&mut self, name: &str, what: Work) {
        match start_helper(self.state, name, what) {
            Ok(pid) => drop(self.children.insert(pid, Child { dvm: name.to_owned(), what, ready: false })),
            Err(error) => self.note_failure(name, format!("cannot start a keeper: {error}")),
        }
    }
}

/// Starts ourselves for one piece of work, in a process group of its own: a terminal's Ctrl-C is for us, not for clones that run.
fn start_helper(state: &State, dvm: &str, what: Work) -> io::Result<i32> {
    let mut command = Command::new(std::env::current_exe()?);
    let word = if what == Work::Admit { "admit" } else { "keeper" };
    command.arg("--root").arg(state.root()).args([word, dvm]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).process_group(0);
    Ok(command.spawn()?.id() as i32)
}
