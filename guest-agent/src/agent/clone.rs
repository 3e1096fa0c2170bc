//! From a capture to a clone that runs its command: freeze, identity, the command, thaw.
//!
//! Invariants: nothing runs in a clone that has not become who it was to be. The command does not wait for the rest to thaw, and the rest
//! does not compete with it for its first word.

use std::time::Duration;

use qrexec::{Exec, Identity, Op, ProtocolError, STREAMS_MAX};

use super::Agent;
use crate::cgroup::Freezer;
use crate::command::{Command, NotStarted, Unborn};
use crate::failure::Failure;
use crate::identity::Kit;

/// Programs that the command may be waiting for are not kept from running for longer.
const THAW_PAUSE: Duration = Duration::from_millis(100);

impl Agent {
    pub(super) fn freeze(&mut self) -> Result<(), Failure> {
        self.alone()?;
        if self.commands.any() || self.stock.any() {
            return Err(Failure::ours("freeze", libc::EBUSY, "commands are running"));
        }
        self.kit = Some(Kit::open()?);
        self.unborn = Unborn::new(&self.place).ok(); // without, a command is started the usual way
        let apart = self.place.cgroup_path().map(String::from);
        let frozen = self
            .freezer()?
            .freeze(apart.as_deref())
            .and_then(|()| self.kit.as_mut().map_or(Ok(()), Kit::poise));
        match frozen {
            Ok(()) => {
                self.stock.end();
                self.calls.end(&mut self.outbox);
            }
            Err(_) => drop(self.thaw()),
        }
        frozen
    }

    /// With what was made ready for it; where others have run since, the files may have changed, and are opened anew.
    pub(super) fn identify(&mut self, identity: &Identity) -> Result<(), Failure> {
        self.nobody = true;
        let untouched = self.freezer.as_ref().is_ok_and(Freezer::is_whole);
        match self.kit.as_mut().filter(|_| untouched) {
            Some(kit) => kit.apply(identity),
            None => Kit::open()?.apply(identity),
        }?;
        self.nobody = false;
        Ok(())
    }

    /// The command and the thaw come along with the identity: where that has failed, they must not happen.
    pub(super) fn refuse(&mut self, stream: u32, op: Op) {
        let why = "the guest has not become who it was to be";
        self.fail(stream, Some(op), Failure::ours("go on", libc::EPERM, why));
    }

    /// Starts a command, if everything is frozen in the process that waits for it. The group of commands is thawed for it: a
    /// command need not wait for all the rest.
    pub(super) fn execute(&mut self, stream: u32, exec: Exec) -> Result<(), ProtocolError> {
        if self.commands.count() + self.stock.commands() >= STREAMS_MAX {
            let why = "64 commands are running";
            self.fail(stream, Some(Op::Exec), Failure::ours("start a process", libc::EAGAIN, why));
            return Ok(());
        }
        let exec = match self.place.services().resolve(exec) {
            Ok(exec) => exec,
            Err(failure) => {
                self.fail(stream, Some(Op::Exec), failure);
                return Ok(());
            }
        };
        let Self { place, commands, outbox, freezer, unborn, .. } = self;
        let thaw = || match (freezer, place.top_cgroup()) {
            (Ok(freezer), Some(name)) => freezer.thaw_group(name),
            _ => Ok(()),
        };
        let suits = unborn.as_ref().is_some_and(|unborn| unborn.suits(&exec));
        let unborn = unborn.take_if(|_| suits);
        commands.start_by(stream, outbox, || match unborn {
            Some(unborn) => Command::bear(stream, exec, place, unborn, thaw),
            None => {
                thaw().map_err(NotStarted::Failure).and_then(|()| Command::start(stream, exec, place, None))
            }
        })
    }

    /// How long a thaw waits for the first word of the command that was launched: all the rest of the guest would wake up and
    /// compete with it, for nobody's good.
    pub(super) fn thaw_pause(&self) -> Duration {
        let waits = self.commands.any() && self.freezer.as_ref().is_ok_and(Freezer::is_frozen);
        if waits {
            THAW_PAUSE
        } else {
            Duration::ZERO
        }
    }

    /// Thaws, if that has been put off.
    pub(super) fn thaw_now(&mut self) {
        if self.thaw_by.take().is_some() {
            self.answer(Op::Thaw, Self::thaw);
        }
    }

    pub(super) fn thaw(&mut self) -> Result<(), Failure> {
        self.freezer()?.thaw()?;
        self.spent = self.kit.take();
        self.unborn = None;
        Ok(())
    }
}
