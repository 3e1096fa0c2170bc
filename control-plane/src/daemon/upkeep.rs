//! What the daemon does by itself: spares made and ended as the policy says, hot images and savefiles made anew.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use engine::image::hot::HotImage;
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;

use super::policy::{self, Memory, Situation};
use super::protocol::{KeeperHears, KeeperSays};
use super::server::{Child, Daemon, Phase, Work};
use crate::inputs::{self, Guest};
use crate::machine;
use crate::savefiles;
use crate::state::State;

/// A keeper that is told to end its spare does so within some milliseconds.
const END_LIMIT: Duration = Duration::from_secs(5);
/// After a template was let go of, in which time it is removed.
const LET_GO: Duration = Duration::from_secs(10);
/// How long making a spare may take: with sixteen launches at a time on two cores, in the background, it takes half a minute.
const MAKING_LIMIT: Duration = Duration::from_secs(150);
/// A rebuild that failed is tried again after this time, or when the inputs have changed.
const REBUILD_AGAIN: Duration = Duration::from_secs(600);

impl Daemon<'_> {
    /// Does what the policy says. Answers when to look again.
    pub(super) fn act(&mut self) -> Option<Instant> {
        self.kill_lost_makers();
        let names: Vec<String> = self.dvms.keys().cloned().collect();
        let mut again = None;
        for name in &names {
            let (places, situation) = self.situation(name);
            let decision = policy::decide(&situation, Instant::now());
            self.dismiss_all(&places, &situation, &decision.end);
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
        let decision = policy::decide(&situation, Instant::now());
        self.dismiss_all(&places, &situation, &decision.end);
    }

    fn dismiss_all(&mut self, places: &[usize], situation: &Situation, end: &[usize]) {
        self.outdated |= end.iter().any(|at| !situation.waiting[*at].current);
        let mut ended: Vec<usize> = end.iter().map(|at| places[*at]).collect();
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

    fn dismiss(&mut self, at: usize) {
        let keeper = self.keepers.remove(at);
        let _ = keeper.channel.send(&KeeperHears::End, &[]);
    }

    /// Ends the spares of one template, or all, those being made too, and waits until they are gone.
    pub(super) fn end_spares(&mut self, of: Option<&str>) {
        let meant = |dvm: &str| of.is_none_or(|name| name == dvm);
        let mut ending = Vec::new();
        for keeper in std::mem::take(&mut self.keepers) {
            if !matches!(keeper.phase, Phase::Waiting { .. }) || !meant(&keeper.dvm) {
                self.keepers.push(keeper);
            } else if keeper.channel.send(&KeeperHears::End, &[]).is_ok() {
                ending.push(keeper);
            }
        }
        self.kill_makers(|child| meant(&child.dvm));
        for keeper in ending {
            let _ = keeper.channel.receive_within::<KeeperSays>(END_LIMIT);
        }
        let _ = machine::sweep(self.state, self.machine);
    }

    /// A template is to be removed: its spares go, and no more are made for a while.
    pub(super) fn let_go(&mut self, name: &str) {
        if let Some(dvm) = self.dvms.get_mut(name) {
            dvm.let_go_until = Some(Instant::now() + LET_GO);
            dvm.wanted = 0;
            self.end_spares(Some(name));
        }
    }

    /// Kills what is at a spare or a hot image and meant. A keeper that is still making its spare does not listen; with it goes
    /// its QEMU, and it holds nothing else. It is our child and not waited for yet, so the number is still its own.
    fn kill_makers(&mut self, meant: impl Fn(&Child) -> bool) {
        for (pid, child) in &self.children {
            if matches!(child.what, Work::Keeper | Work::Admit) && !child.ready && meant(child) {
                let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
            }
        }
    }

    /// Kills what takes too long, or makes what is not wanted any more.
    fn kill_lost_makers(&mut self) {
        let unwanted: Vec<String> = (self.dvms.iter())
            .filter(|(_, dvm)| !matches!(dvm.serving, Some(Ok(_))))
            .map(|(name, _)| name.clone())
            .collect();
        self.kill_makers(|child| child.since.elapsed() >= MAKING_LIMIT || unwanted.contains(&child.dvm));
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
                self.note_child(child.id(), name, Work::Rebuild);
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

    /// Removes hot images and generations that nothing uses any more.
    pub(super) fn collect(&mut self) {
        self.outdated = false;
        match savefiles::start_collection(self.state) {
            Ok(child) => self.note_child(child.id(), "", Work::Collect),
            Err(error) => tracing::warn!("cannot start the collection: {error}"),
        }
    }

    fn start(&mut self, name: &str, what: Work) {
        match start_helper(self.state, name, what) {
            Ok(pid) => self.note_child(pid, name, what),
            Err(error) => self.note_failure(name, format!("cannot start a keeper: {error}")),
        }
    }

    fn note_child(&mut self, pid: u32, name: &str, what: Work) {
        let child = Child { dvm: name.to_owned(), what, since: Instant::now(), ready: false };
        self.children.insert(pid as i32, child);
    }
}

/// Starts ourselves for one piece of work, in a process group of its own: a terminal's Ctrl-C is for us, not for clones that run.
fn start_helper(state: &State, dvm: &str, what: Work) -> io::Result<u32> {
    // Not by our path: an upgrade may have put another file there, or none.
    let mut command = Command::new("/proc/self/exe");
    let word = if what == Work::Admit { "admit" } else { "keeper" };
    command.arg0("dispvmd").arg("--root").arg(state.root()).args([word, dvm]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).process_group(0);
    Ok(command.spawn()?.id())
}
