//! A guest and the switch of its CPUs, shared by the domain (the host's side) and the agent's thread (the guest's).

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use crate::context::Context;
use crate::guest::Guest;

/// What is behind the lock.
pub struct State {
    /// The guest.
    pub guest: Guest,
    /// Whether its CPUs run.
    pub running: bool,
    /// Whether it is gone.
    pub ended: bool,
    /// Whether it has switched itself off, which the host learns when it is called.
    pub off: bool,
}

/// A virtual machine.
pub struct Vm {
    /// The simulation.
    pub context: Arc<Context>,
    /// The number of the clone it is, or of the build.
    pub slot: u32,
    /// Its event line: a byte in it calls the host.
    pub bell: UnixStream,
    state: Mutex<State>,
    change: Condvar,
}

impl Vm {
    /// A machine whose CPUs run or not.
    pub fn new(context: Arc<Context>, slot: u32, bell: UnixStream, guest: Guest, running: bool) -> Vm {
        let state = Mutex::new(State { guest, running, ended: false, off: false });
        Vm { context, slot, bell, state, change: Condvar::new() }
    }

    /// The state, for the host: the guest does nothing meanwhile.
    pub fn stopped(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// The state, for the guest: once its CPUs run and `ready` holds. `None`: it is gone.
    pub fn when(&self, ready: impl Fn(&Guest) -> bool) -> Option<MutexGuard<'_, State>> {
        let waits = |state: &mut State| !(state.ended || state.running && ready(&state.guest));
        let guard =
            self.change.wait_while(self.stopped(), waits).unwrap_or_else(|poisoned| poisoned.into_inner());
        (!guard.ended).then_some(guard)
    }

    /// Changes the state, for the host.
    pub fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = change(&mut self.stopped());
        self.change.notify_all();
        result
    }

    /// Calls the host.
    pub fn ring(&self) {
        let _ = (&self.bell).write_all(&[1]);
    }
}
