//! Events: what a client that has asked for them is told (`admin.Events`).
//!
//! Changes that come through the API are told as they are made. Qubes that come and go, disposables above all, do so without
//! us: while somebody listens, they are looked for [`LOOK_EVERY`].

use std::collections::BTreeMap;
use std::sync::mpsc::{sync_channel, Receiver, SyncSender};
use std::sync::Mutex;
use std::time::Duration;

use admin_api::{Event, ADMIN_VM};

use super::settings;
use super::world::{Context, World};
use crate::clones;
use crate::error::Result;

/// How soon a disposable is seen.
pub(super) const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Events that wait for a client to read them; one that does not is hung up on.
const QUEUE_MAX: usize = 1024;

/// Who listens, and what they know.
#[derive(Default)]
pub(super) struct Hub {
    listeners: Mutex<Vec<Listener>>,
    /// Each qube's state, as last told of; `None` while nobody listens.
    known: Mutex<Option<BTreeMap<String, Seen>>>,
}

struct Listener {
    /// The qube it wants to hear of, `dom0` for all.
    about: String,
    queue: SyncSender<Event>,
}

/// What is known of a qube. One of the same name that was started later is another.
#[derive(PartialEq, Eq, Clone)]
struct Seen {
    uuid: String,
    state: &'static str,
}

impl Hub {
    /// Events from now on. When the other end is dropped, it is over; when this one reads nothing for long, too.
    pub(super) fn listen(&self, about: &str) -> Receiver<Event> {
        let (queue, events) = sync_channel(QUEUE_MAX);
        let _ = queue.try_send(Event::new("", "connection-established"));
        self.lock_listeners().push(Listener { about: about.to_owned(), queue });
        events
    }

    /// Tells whoever wants to hear it.
    pub(super) fn fire(&self, event: &Event) {
        self.lock_listeners().retain(|listener| {
            let wanted = listener.about == ADMIN_VM || listener.about == event.subject;
            !wanted || listener.queue.try_send(event.clone()).is_ok()
        });
    }

    /// Looks who has come, gone, started or ended since the last look, and tells.
    pub(super) fn look(&self, context: &Context) -> Result<()> {
        let mut known = self.known.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if self.lock_listeners().is_empty() {
            *known = None;
            return Ok(());
        }
        let now = survey(context)?;
        if let Some(before) = &*known {
            differences(before, &now).iter().for_each(|event| self.fire(event));
        }
        *known = Some(now);
        Ok(())
    }

    fn lock_listeners(&self) -> std::sync::MutexGuard<'_, Vec<Listener>> {
        self.listeners.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

fn survey(context: &Context) -> Result<BTreeMap<String, Seen>> {
    let world = World::new(context);
    let mut now = BTreeMap::new();
    for vm in world.all()? {
        let seen = Seen { uuid: vm.uuid(), state: world.power_state(&vm)? };
        now.insert(vm.name.clone(), seen);
    }
    Ok(now)
}

/// Removes what is left of disposables that are gone.
pub(super) fn sweep(context: &Context) -> Result<()> {
    if !context.state.disposables().exists() {
        return Ok(());
    }
    let _lock = settings::lock(&context.state)?;
    settings::sweep(&context.state, || {
        let living = clones::list(&context.state)?.into_iter();
        Ok(living.map(|clone| settings::Owner::Disposable(clone.name, clone.started)).collect())
    })
}

fn differences(before: &BTreeMap<String, Seen>, now: &BTreeMap<String, Seen>) -> Vec<Event> {
    let mut events = Vec::new();
    for (name, was) in before {
        if now.get(name).is_none_or(|is| is.uuid != was.uuid) {
            events.extend(
                (!matches!(was.state, "Halted" | "Transient")).then(|| Event::new(name, "domain-shutdown")),
            );
            events.push(Event::new("", "domain-delete").detail("vm", name));
        }
    }
    for (name, is) in now {
        let was = before.get(name).filter(|was| was.uuid == is.uuid);
        if was.is_none() {
            events.push(Event::new("", "domain-add").detail("vm", name));
        }
        let what = match (was.map_or("Halted", |was| was.state), is.state) {
            (was, is) if was == is => continue,
            // It is being started, or could not be.
            (_, "Transient") | ("Transient", "Halted") => continue,
            ("Paused", "Running") => "domain-unpaused",
            (_, "Running") => "domain-start",
            (_, "Paused") => "domain-paused",
            _ => "domain-shutdown",
        };
        events.push(Event::new(name, what));
    }
    events
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changes_is_told_in_order() {
        let seen = |uuid: &str, state| Seen { uuid: uuid.into(), state };
        let before = BTreeMap::from([
            ("a".into(), seen("1", "Running")),
            ("b".into(), seen("2", "Paused")),
            ("c".into(), seen("3", "Halted")),
        ]);
        let now = BTreeMap::from([("b".into(), seen("2", "Running")), ("c".into(), seen("4", "Running"))]);
        let told: Vec<String> = differences(&before, &now)
            .iter()
            .map(|event| format!("{} {}", event.get("vm").unwrap_or(&event.subject), event.name))
            .collect();
        assert_eq!(
            told,
            [
                "a domain-shutdown",
                "a domain-delete",
                "c domain-delete",
                "b domain-unpaused",
                "c domain-add",
                "c domain-start"
            ]
        );
        assert!(differences(&now, &now).is_empty());
    }

    #[test]
    fn a_listener_that_does_not_read_is_let_go() {
        let hub = Hub::default();
        let (all, one) = (hub.listen(ADMIN_VM), hub.listen("a"));
        for _ in 0..2 * QUEUE_MAX {
            hub.fire(&Event::new("b", "x"));
        }
        assert_eq!(all.iter().count(), QUEUE_MAX, "and then the channel is closed");
        hub.fire(&Event::new("a", "x"));
        assert_eq!(one.try_iter().count(), 2);
    }
}
