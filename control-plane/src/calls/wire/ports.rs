//! The ports at which we serve calls' channels to one guest. Pure.
//!
//! Invariant: a port is given again only when both sides have let go of it, or ours has and the guest's agent is another one. An agent that waits for a channel which is there no more would
//! take the next one at that port for it.

use std::collections::BTreeMap;

use qrexec::stock::control::DATA_PORTS;

/// See the module.
#[derive(Debug)]
pub struct Ports {
    next: u32,
    taken: BTreeMap<u32, Hold>,
}

/// Who still has a port.
#[derive(Debug, Clone, Copy)]
struct Hold {
    ours: bool,
    theirs: bool,
}

impl Default for Ports {
    fn default() -> Ports {
        Ports { next: DATA_PORTS.start, taken: BTreeMap::new() }
    }
}

impl Ports {
    /// A free one, the longest unused first; `None`: the guest has not let go of enough of them.
    pub fn take(&mut self) -> Option<u32> {
        let later = (self.next..DATA_PORTS.end).chain(DATA_PORTS.start..self.next);
        let port = later.into_iter().find(|port| !self.taken.contains_key(port))?;
        self.next = if port + 1 < DATA_PORTS.end { port + 1 } else { DATA_PORTS.start };
        self.taken.insert(port, Hold { ours: true, theirs: true });
        Some(port)
    }

    /// Whether one is free.
    pub fn has_one(&self) -> bool {
        self.taken.len() < DATA_PORTS.len()
    }

    /// Nobody has it: the guest has not heard of it. The next call may have it.
    pub fn free(&mut self, port: u32) {
        self.taken.remove(&port);
        if self.next == port + 1 {
            self.next = port;
        }
    }

    /// We have let go of it.
    pub fn give_back(&mut self, port: u32) {
        self.lose(port, |hold| hold.ours = false);
    }

    /// The guest has, or says so. Whether it had it until now.
    pub fn terminated(&mut self, port: u32) -> bool {
        let had = self.taken.get(&port).is_some_and(|hold| hold.theirs);
        self.lose(port, |hold| hold.theirs = false);
        had
    }

    /// The guest has a new agent: of what the one before it had, only that is taken which we have. It can say no more that it has let go.
    pub fn renew(&mut self) {
        self.taken.retain(|_, hold| hold.ours);
        self.taken.values_mut().for_each(|hold| hold.theirs = false);
    }

    fn lose(&mut self, port: u32, lose: impl FnOnce(&mut Hold)) {
        let Some(hold) = self.taken.get_mut(&port) else { return };
        lose(hold);
        if !hold.ours && !hold.theirs {
            self.taken.remove(&port);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_comes_again_when_both_have_let_go_of_it_and_the_longest_unused_first() {
        let mut ports = Ports::default();
        let all: Vec<u32> = std::iter::from_fn(|| ports.take()).collect();
        assert_eq!(all, DATA_PORTS.collect::<Vec<_>>());
        ports.terminated(600);
        ports.give_back(700);
        assert_eq!(ports.take(), None);
        ports.terminated(7);
        ports.give_back(600);
        ports.terminated(700);
        assert_eq!((ports.take(), ports.take(), ports.take()), (Some(600), Some(700), None));
        ports.free(700);
        assert_eq!((ports.take(), ports.take()), (Some(700), None));
    }

    #[test]
    fn with_a_new_agent_only_what_we_have_is_taken() {
        let mut ports = Ports::default();
        while ports.take().is_some() {}
        ports.give_back(600);
        assert!(ports.terminated(601) && !ports.terminated(601) && !ports.terminated(7));
        ports.renew();
        assert_eq!((ports.take(), ports.take()), (Some(600), None));
        // The one before it has none of these any more.
        ports.give_back(602);
        assert_eq!((ports.take(), ports.take()), (Some(602), None));
    }
}
