//! Running a TemplateVM or a DVM template itself, to change it from inside: boot, command, shutdown, next generation.
//!
//! As in Qubes, of a TemplateVM the root volume is kept, of a DVM template the private one; what is written elsewhere is gone with
//! the run. (A TemplateVM's private volume, which Qubes keeps, starts empty: no qube is made from it.)
//!
//! Invariants:
//! - The guest writes to a copy that has no name, so nothing is left of a run that is killed, however it is.
//! - The copy becomes the next generation only when the guest has switched itself off. However else a run ends, the generation
//!   it started from stays the current one.
//! - A qube runs itself once at a time ([`qube::hold_running`]); launches and builds go on from the generation the record names.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use engine::agent::AgentError;
use engine::host::{Base, Confinement, Domain, GuestSpec, Host, HostError, VolumeSpec};
use engine::identity::Identity;
use engine::launch::{self, Clone, LaunchError};
use engine::timeline::Timeline;
use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::signal::Signal;
use qrexec::{Exec, Exit, GuestFrame, HostFrame};

use crate::agent_link::AgentLink;
use crate::clones::{Keeping, Lease};
use crate::error::{Error, Kind, Result};
use crate::inputs::{self, Guest};
use crate::machine::{self, Machine};
use crate::qube::{self, Class, Dvm, Qube};
use crate::savefiles;
use crate::session::{self, Caller, Ending, SessionError, Signals};
use crate::state::{self, State};
use crate::{templates, volume};

/// How long a guest may take to shut down: twice what systemd gives a service that does not want to end.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(180);
/// How long a domain may take to tell that it has ended once its agent's channel has closed.
const END_LIMIT: Duration = Duration::from_secs(10);
/// A TemplateVM's settings, whose record has none: those a DVM template has unless told otherwise.
const TEMPLATE_MEMORY_MIB: u64 = 1024;
const TEMPLATE_VCPUS: u32 = 2;
const TEMPLATE_PRIVATE_MIB: u64 = 2048;
const TEMPLATE_VOLATILE_MIB: u64 = 1024;

/// What is asked for.
pub struct Request {
    /// The TemplateVM or DVM template.
    pub name: String,
    /// The command to run in it.
    pub exec: Exec,
    /// RAM in MiB, instead of the record's.
    pub memory_mib: Option<u64>,
    /// vCPUs, instead of the record's.
    pub vcpus: Option<u32>,
    /// Network, instead of the record's (TemplateVMs have none).
    pub net: Option<String>,
    /// Whether savefiles that become stale are rebuilt in the background.
    pub rebuild: bool,
}

/// How a run ended.
enum Finish {
    /// The guest switched itself off; how the command ended, if that was before.
    Off(Option<Exit>),
    /// Something else came first: what, and the exit status that says so.
    Cut(String, u8),
}

/// Runs a qube itself. Answers the exit status: the command's own, as a shell gives it.
pub fn run(state: &State, machine: &dyn Machine, request: Request, say: &dyn Fn(&str)) -> Result<u8> {
    machine::forbid_core_dump()?;
    let name = request.name.clone();
    Qube::load(state, &name)?;
    let running = qube::hold_running(state, &name)?;
    machine::sweep(state, machine)?;
    let in_use = state::lock_shared(&state.use_lock())?;
    let mut subject = Subject::load(state, &request)?;
    let lease = Lease::take(state, &name, "", subject.template.clone(), Keeping::Launcher, None)?;
    drop(in_use);
    let host = machine.host(state, &subject.spec.kernel)?;
    let written = subject.copy_kept_volume(state, &name)?;
    let confinement = machine::confinement(state, machine, lease.number());
    machine::check_memory(state, machine, &subject.spec, &confinement)?;
    let identity = Identity::fresh(lease.number()).map_err(Error::failed("draw an identity"))?;

    let stays = format!(
        "{name} stays at {} generation {}, nothing of this run is kept",
        subject.kept, subject.generation
    );
    let status = match live(&*host, &subject.spec, &confinement, &identity, request.exec, hostname(&name)) {
        Ok(Finish::Off(exit)) => exit.map_or(0, Exit::status),
        Ok(Finish::Cut(what, status)) => {
            say(&format!("{what}; {stays}"));
            return Ok(status);
        }
        Err(error) => return Err(error.hint(stays)),
    };
    let next = subject.keep(state, &name, &written)?;
    drop((written, lease, running));
    match next {
        None => say(&format!(
            "nothing was changed: {name} stays at {} generation {}",
            subject.kept, subject.generation
        )),
        Some(generation) => {
            say(&format!("{name} is at {} generation {generation} now", subject.kept));
            savefiles::collect(state)?;
            tell_stale(state, &name, request.rebuild, say)?;
        }
    }
    Ok(status)
}

/// A qube to run, and the one volume of it that is kept.
struct Subject {
    kept: &'static str,
    generation: u64,
    /// The template and its generation that must stay meanwhile.
    template: (String, u64),
    spec: GuestSpec,
}

impl Subject {
    fn load(state: &State, request: &Request) -> Result<Subject> {
        let name = &request.name;
        match Qube::load(state, name)?.class {
            Class::TemplateVM(template) => {
                let mut spec =
                    inputs::spec(state, name, &settings(template_settings(name), request), &template)?;
                set_base(&mut spec, "private", Base::Empty);
                let generation = template.generation;
                Ok(Subject { kept: "root", generation, template: (name.clone(), generation), spec })
            }
            Class::AppVM(_) => {
                let Guest { dvm, template, .. } = Guest::load(state, name)?;
                let generation = dvm.private_generation;
                let uses = (dvm.template.clone(), template.generation);
                let spec = inputs::spec(state, name, &settings(dvm, request), &template)?;
                Ok(Subject { kept: "private", generation, template: uses, spec })
            }
        }
    }

    /// Puts a copy to write to in the place of the volume that is kept.
    fn copy_kept_volume(&mut self, state: &State, name: &str) -> Result<File> {
        let kept = self.spec.volumes.iter().find(|volume| volume.name == self.kept);
        let Some(VolumeSpec { base: Base::Frozen(base), .. }) = kept else {
            return Err(Error::new(Kind::Failed, format!("there is no {} volume to keep", self.kept)));
        };
        // In the qube's folder, on the file system where the next generation will have its name.
        let copy = volume::unnamed_copy(base, &state.qube(name))?;
        set_base(&mut self.spec, self.kept, Base::Persistent(volume::path_of(&copy)));
        Ok(copy)
    }

    fn keep(&self, state: &State, name: &str, written: &File) -> Result<Option<u64>> {
        match self.kept {
            "root" => templates::next_root(state, name, self.generation, written),
            _ => templates::next_private(state, name, self.generation, written),
        }
    }
}

fn set_base(spec: &mut GuestSpec, name: &str, base: Base) {
    if let Some(volume) = spec.volumes.iter_mut().find(|volume| volume.name == name) {
        volume.base = base;
    }
}

/// The settings of a TemplateVM when it runs itself.
fn template_settings(name: &str) -> Dvm {
    Dvm {
        template: name.to_owned(),
        template_for_dispvms: false,
        memory_mib: TEMPLATE_MEMORY_MIB,
        vcpus: TEMPLATE_VCPUS,
        net: "none".to_owned(),
        private_mib: TEMPLATE_PRIVATE_MIB,
        private_generation: 0,
        private_id: String::new(),
        volatile_mib: TEMPLATE_VOLATILE_MIB,
        spares: None,
        savefile: None,
    }
}

fn settings(dvm: Dvm, request: &Request) -> Dvm {
    Dvm {
        memory_mib: request.memory_mib.unwrap_or(dvm.memory_mib),
        vcpus: request.vcpus.unwrap_or(dvm.vcpus),
        net: request.net.clone().unwrap_or(dvm.net),
        ..dvm
    }
}

/// A qube's name as a host name: what a host name cannot have becomes a hyphen.
fn hostname(name: &str) -> String {
    let legal = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
    name.chars().map(legal).collect::<String>().trim_end_matches('-').to_owned()
}

/// Boots the guest, runs the command in it, and has it shut down.
fn live(
    host: &dyn Host,
    spec: &GuestSpec,
    confinement: &Confinement,
    identity: &Identity,
    exec: Exec,
    hostname: String,
) -> Result<Finish> {
    let mut timeline = Timeline::since(Instant::now());
    let connect = |pipe| AgentLink::with_command(pipe, exec).named(hostname);
    let booted = launch::cold(host, spec, confinement, identity, connect, &mut timeline);
    let Clone { mut domain, mut agent } = booted.map_err(boot_error)?;
    let mut signals = Signals::block().map_err(Error::failed("block signals"))?;
    let (stdin, stdout, stderr) = (io::stdin(), io::stdout(), io::stderr());
    let caller = Caller { stdin: stdin.as_fd(), stdout: stdout.as_fd(), stderr: stderr.as_fd() };
    let (exit, off) = match session::run(&mut agent, &mut domain, &caller, &mut signals, &mut timeline) {
        Ok(Ending::Exited(exit)) => {
            agent.queue(&HostFrame::Shutdown).map_err(Error::failed("ask the qube to shut down"))?;
            (Some(exit), await_off(&mut *domain, Some(&mut agent), &mut signals, SHUTDOWN_LIMIT))
        }
        Ok(Ending::Signal(signal)) => return Ok(cut_by(signal)),
        Ok(Ending::HungUp) => {
            let what = "nobody reads the command's output any more".to_owned();
            return Ok(Finish::Cut(what, 128 + Signal::SIGPIPE as u8));
        }
        Ok(Ending::PoweredOff) => (None, Ok(None)),
        // The agent's channel may close before the host tells that the guest has switched itself off.
        Err(SessionError::Agent(error)) => {
            let off = await_off(&mut *domain, None, &mut signals, END_LIMIT);
            (None, off.map_err(|_| SessionError::Agent(error)))
        }
        Err(error) => (None, Err(error)),
    };
    match off.map_err(Error::failed("run the qube to its end"))? {
        None => Ok(Finish::Off(exit)),
        Some(signal) => Ok(cut_by(signal)),
    }
}

/// Waits until the guest has switched itself off, or a signal comes.
fn await_off(
    domain: &mut dyn Domain,
    mut agent: Option<&mut AgentLink>,
    signals: &mut Signals,
    limit: Duration,
) -> std::result::Result<Option<Signal>, SessionError> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(link) = agent.take() {
            // A channel that closes is no error: the guest is going down.
            agent = listen(link)?.then_some(link);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(HostError::Timeout { step: "shut the qube down", limit }.into());
        }
        let timeout = PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX);
        let mut fds = vec![
            PollFd::new(signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(domain.events(), PollFlags::POLLIN),
        ];
        fds.extend(agent.as_ref().map(|link| {
            let sends = if link.wants_to_send() { PollFlags::POLLOUT } else { PollFlags::empty() };
            PollFd::new(link.as_fd(), PollFlags::POLLIN | sends)
        }));
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(SessionError::Io { step: "wait", source: error.into() }),
        }
        if let Some(signal) = signals.pending() {
            return Ok(Some(signal));
        }
        match domain.serve() {
            Ok(()) => {}
            Err(HostError::PoweredOff { .. }) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Sends and hears what there is. Whether the channel is still open; an error when the agent cannot shut down.
fn listen(link: &mut AgentLink) -> std::result::Result<bool, SessionError> {
    if link.flush().is_err() {
        return Ok(false);
    }
    loop {
        match link.next_frame() {
            Ok(Some(GuestFrame::Failed { stream: 0, failed })) => {
                let message = format!("{}: {}", failed.step, failed.message);
                return Err(AgentError::Failed { step: "shut the qube down", message }.into());
            }
            Ok(Some(_)) => {}
            Ok(None) => return Ok(true),
            Err(_) => return Ok(false),
        }
    }
}

fn cut_by(signal: Signal) -> Finish {
    Finish::Cut(format!("{signal} came before the qube had shut down"), 128 + signal as u8)
}

fn boot_error(error: LaunchError) -> Error {
    let kind = match &error {
        LaunchError::Host(HostError::Refused { .. }) => Kind::Refused,
        _ => Kind::Failed,
    };
    Error::new(kind, "cannot start the qube").because(error)
}

/// Says which savefiles are stale now that `name` has a new generation, and has them rebuilt if that is wanted.
fn tell_stale(state: &State, name: &str, rebuild: bool, say: &dyn Fn(&str)) -> Result<()> {
    for qube in Qube::all(state)? {
        let Ok(dvm) = qube.dvm() else { continue };
        if dvm.savefile.is_none() || (qube.name != name && dvm.template != name) {
            continue;
        }
        let stale = format!("the savefile of {} is stale", qube.name);
        if !rebuild {
            say(&format!("{stale}: `dispvm-savefile build {}`", qube.name));
            continue;
        }
        match savefiles::start_rebuild(state, &qube.name) {
            Ok(_) => say(&format!("{stale}, a new one is being built; launches boot cold until then")),
            Err(error) => say(&format!("{stale}, and the rebuild cannot be started: {error}")),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::host::{AgentPipe, Capture};
    use engine::units::ByteCount;
    use qrexec::{Failed, Op};
    use std::io::{Read, Write};
    use std::os::fd::BorrowedFd;
    use std::os::unix::net::UnixStream;

    /// A domain whose events are bytes: `o` has it off, `x` dead.
    struct Bytes(UnixStream);

    impl Domain for Bytes {
        fn events(&self) -> BorrowedFd<'_> {
            self.0.as_fd()
        }

        fn serve(&mut self) -> std::result::Result<(), HostError> {
            let (step, mut byte) = ("serve", [0]);
            match self.0.read(&mut byte) {
                Ok(_) if byte == *b"o" => Err(HostError::PoweredOff { step }),
                Ok(_) if byte == *b"x" => Err(HostError::Gone { step, detail: String::new() }),
                _ => Ok(()),
            }
        }

        fn agent(&mut self) -> std::result::Result<Box<dyn AgentPipe>, HostError> {
            unreachable!("it has been connected to")
        }

        fn run(&mut self) -> std::result::Result<(), HostError> {
            unreachable!("it runs")
        }

        fn pause(&mut self) -> std::result::Result<(), HostError> {
            unreachable!("it is going down")
        }

        fn touched(&mut self) -> std::result::Result<Vec<engine::units::PageRange>, HostError> {
            unreachable!("it is going down")
        }

        fn steps(&mut self) -> Vec<(&'static str, Instant)> {
            unreachable!("it is going down")
        }

        fn reclaim_free_memory(&mut self, _: ByteCount) -> std::result::Result<(), HostError> {
            unreachable!("it is going down")
        }

        fn capture(&mut self) -> std::result::Result<Capture, HostError> {
            unreachable!("it is going down")
        }

        fn destroy(self: Box<Self>) -> std::result::Result<(), HostError> {
            Ok(())
        }
    }

    /// Waits for the end of a domain whose hypervisor and agent say these bytes; without any, the agent hangs up.
    fn awaited(events: &[u8], agent: &[u8]) -> std::result::Result<Option<Signal>, SessionError> {
        let pair = || {
            let (ours, theirs) = UnixStream::pair().unwrap();
            ours.set_nonblocking(true).unwrap();
            (ours, theirs)
        };
        let ((ours, mut hypervisor), (pipe, mut guest)) = (pair(), pair());
        hypervisor.write_all(events).unwrap();
        guest.write_all(agent).unwrap();
        let guest = Some(guest).filter(|_| !agent.is_empty());
        let mut link = AgentLink::new(Box::new(pipe));
        let mut signals = Signals::block().unwrap();
        let ended = await_off(&mut Bytes(ours), Some(&mut link), &mut signals, Duration::from_millis(50));
        drop(guest);
        ended
    }

    fn frame(frame: &GuestFrame) -> Vec<u8> {
        let mut bytes = Vec::new();
        frame.encode(&mut bytes);
        bytes
    }

    #[test]
    fn only_a_guest_that_switches_itself_off_in_time_has_shut_down() {
        let done = frame(&GuestFrame::Done(Op::Shutdown));
        assert!(matches!(awaited(b"o", &done), Ok(None)));
        assert!(matches!(awaited(b"o", b""), Ok(None)), "the channel's end is no error");
        let died = awaited(b"x", &done);
        assert!(matches!(died, Err(SessionError::Host(HostError::Gone { .. }))), "{died:?}");
        for agent in [&done[..], b""] {
            let late = awaited(b"", agent);
            assert!(matches!(late, Err(SessionError::Host(HostError::Timeout { .. }))), "{late:?}");
        }
        let failed =
            Failed { op: Some(Op::Shutdown), step: "power off".into(), errno: 1, message: "no".into() };
        let refused = awaited(b"", &frame(&GuestFrame::Failed { stream: 0, failed }));
        assert!(matches!(refused, Err(SessionError::Agent(AgentError::Failed { .. }))), "{refused:?}");
    }

    #[test]
    fn a_signal_is_heard_while_a_guest_shuts_down() {
        let _blocked = Signals::block().unwrap();
        nix::sys::signal::raise(Signal::SIGTERM).unwrap();
        assert!(matches!(awaited(b"", b""), Ok(Some(Signal::SIGTERM))));
    }

    #[test]
    fn names_of_qubes_become_host_names() {
        for (name, expected) in [("debian-12", "debian-12"), ("a_b.c", "a-b-c"), ("x._-", "x")] {
            assert_eq!(hostname(name), expected);
        }
    }
}
