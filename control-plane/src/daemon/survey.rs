//! What the daemon knows: the records as they are, the keepers it hears from, the processes it has started.

use std::time::Instant;

use super::policy::{Memory, Situation, Waiting};
use super::protocol::{DvmStatus, Status};
use super::server::{Daemon, Phase, Work};
use crate::inputs::Guest;
use crate::machine::{self, Machine};
use crate::output::error_text;
use crate::qube::Qube;
use crate::savefiles;
use crate::state::State;

impl Daemon<'_> {
    /// Looks at every DVM template's records.
    pub(super) fn survey_all(&mut self) {
        self.surveyed = Some(Instant::now());
        let names = match Qube::names(self.state) {
            Ok(names) => names,
            Err(error) => return tracing::warn!("cannot read the qubes: {error}"),
        };
        self.dvms.retain(|name, _| names.contains(name));
        // A record that cannot be read is its own qube's trouble.
        let is_dvm = |name: &&String| Qube::load(self.state, name).is_ok_and(|qube| qube.dvm().is_ok());
        let dvms: Vec<String> = names.iter().filter(is_dvm).cloned().collect();
        for name in &dvms {
            self.survey(name);
            let serves_not = self.dvms.get(name).is_some_and(|dvm| matches!(dvm.serving, Some(Err(_))));
            // A savefile that was removed is not missed before somebody launches.
            if serves_not && self.has_savefile(name) {
                self.rebuild(name, false);
            }
        }
    }

    /// Looks at one DVM template's records, as they are now.
    pub(super) fn survey(&mut self, name: &str) {
        let guest = match Guest::load(self.state, name) {
            Ok(guest) => guest,
            Err(_) => return drop(self.dvms.remove(name)),
        };
        let dvm = self.dvms.entry(name.to_owned()).or_default();
        let let_go = dvm.let_go_until.is_some_and(|until| Instant::now() < until);
        dvm.wanted = if let_go { 0 } else { guest.dvm.spares.unwrap_or(self.options.spares) };
        let host = self.machine.host(self.state, &guest.spec.kernel);
        dvm.serving = match host.and_then(|host| savefiles::serving(self.state, &guest, &*host)) {
            Ok(serving) => Some(serving),
            Err(error) => {
                tracing::warn!("cannot tell how {name} stands: {}", error_text(&error));
                None
            }
        };
        dvm.memory = Some(memory(self.state, self.machine, &guest));
    }

    fn has_savefile(&self, name: &str) -> bool {
        Guest::load(self.state, name).is_ok_and(|guest| guest.dvm.savefile.is_some())
    }

    /// One template as the policy sees it, and where its spares are among the keepers.
    pub(super) fn situation(&mut self, name: &str) -> (Vec<usize>, Situation) {
        let making_somewhere = self.making(None) > 0;
        let making = self.making(Some(name));
        let (mut places, mut waiting) = (Vec::new(), Vec::new());
        let serving = self.dvms.get(name).and_then(|dvm| dvm.serving.as_ref()?.as_ref().ok()).cloned();
        for (at, keeper) in self.keepers.iter().enumerate().filter(|(_, keeper)| keeper.dvm == name) {
            if let Phase::Waiting { spare, since, .. } = &keeper.phase {
                let current = serving.as_ref().is_some_and(|serving| {
                    spare.root_hash == serving.root_hash && spare.inputs == serving.inputs
                });
                places.push(at);
                waiting.push(Waiting { since: *since, current });
            }
        }
        let dvm = self.dvms.entry(name.to_owned()).or_default();
        let enough = waiting.len() as u32 + making >= dvm.wanted;
        dvm.too_few_since = if enough { None } else { dvm.too_few_since.or_else(|| Some(Instant::now())) };
        let situation = Situation {
            wanted: dvm.wanted,
            age_max: self.options.age_max,
            fresh: serving.is_some(),
            memory: dvm.memory.unwrap_or(Memory::Enough),
            making_somewhere,
            making,
            waiting,
            last_launch: dvm.last_launch,
            too_few_since: dvm.too_few_since,
            failures: dvm.failures,
        };
        (places, situation)
    }

    /// How many spares (or hot images) of this template, or of any, are being made.
    pub(super) fn making(&self, name: Option<&str>) -> u32 {
        let wanted = |dvm: &str| name.is_none_or(|name| name == dvm);
        let ours = self.children.values();
        let ours = ours.filter(|child| {
            matches!(child.what, Work::Keeper | Work::Admit) && !child.ready && wanted(&child.dvm)
        });
        // An earlier daemon's keeper may still be at it.
        let others = self.keepers.iter().filter(|keeper| {
            let adopted = !self.children.contains_key(&(keeper.pid as i32));
            adopted && matches!(keeper.phase, Phase::Making) && wanted(&keeper.dvm)
        });
        (ours.count() + others.count()) as u32
    }

    pub(super) fn status(&mut self) -> Status {
        self.survey_all();
        let names: Vec<String> = self.dvms.keys().cloned().collect();
        let dvms = names.iter().map(|name| self.dvm_status(name)).collect();
        let kept = self.keepers.iter().filter_map(|keeper| match &keeper.phase {
            Phase::Running(spare) => Some(format!("disp{}", spare.number)),
            _ => None,
        });
        Status { pid: std::process::id(), dvms, kept: kept.collect() }
    }

    fn dvm_status(&mut self, name: &str) -> DvmStatus {
        let (places, situation) = self.situation(name);
        let dvm = &self.dvms[name];
        DvmStatus {
            dvm: name.to_owned(),
            savefile: match &dvm.serving {
                Some(Ok(_)) => "fresh".to_owned(),
                Some(Err(reason)) => reason.clone(),
                None => "unknown".to_owned(),
            },
            spares_wanted: dvm.wanted,
            spares_ready: places.len() as u32,
            spares_preparing: situation.making,
            rebuilding: savefiles::is_building(self.state, name),
            last_failure: dvm.last_failure.clone(),
        }
    }
}

fn memory(state: &State, machine: &dyn Machine, guest: &Guest) -> Memory {
    let Some(number) = engine::identity::CloneNumber::new(0) else { return Memory::Enough };
    let budget = machine.budget(state, &guest.spec, &machine::confinement(state, machine, number));
    match budget.available {
        Some(available) if available < budget.needed_for(1) => Memory::Short,
        Some(available) if available < budget.needed_for(2) => Memory::Enough,
        _ => Memory::Plenty,
    }
}
