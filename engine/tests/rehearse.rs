//! A build on a host of this test's own: what the rehearsal's clone is restored from, what becomes of what it touched, and that
//! nothing is written when it fails.

mod common;

use std::cell::RefCell;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{content, image, Guest, StackRaw};
use engine::agent::{Agent, AgentError, AgentFacts};
use engine::build::{self, BuildError, Order, Step, Watch};
use engine::host::{
    AgentPipe, BootPurpose, Capture, CapturedDelta, Confinement, Domain, GuestSpec, Host, HostError,
    HostFacts, Nic,
};
use engine::identity::Identity;
use engine::image::hot::{HotFiles, StackDelta};
use engine::savefile::{self, PageMap, VolumeInfo, Written};
use engine::timeline::Timeline;
use engine::units::{ByteCount, PageRange};

/// What a test sees of the clone, and how the clone behaves.
#[derive(Default)]
struct Seen {
    /// Memory, device state, deltas, as the clone found them.
    memory: Vec<u8>,
    device_state: Vec<u8>,
    deltas: Vec<(String, Vec<u8>)>,
    writable: bool,
    restored_as: Option<(Nic, Confinement)>,
    identity: Option<Identity>,
    destroyed: bool,
    fails: bool,
    mute: bool,
}

struct TestHost {
    guest: Guest,
    facts: HostFacts,
    seen: Arc<Mutex<Seen>>,
}

impl StackDelta for TestHost {
    fn stack(&self, volume: &VolumeInfo, map: &PageMap, raw: &File, out: &File) -> io::Result<()> {
        StackRaw::default().stack(volume, map, raw, out)
    }

    fn file_name(&self, volume: &str) -> String {
        StackRaw::default().file_name(volume)
    }
}

impl Host for TestHost {
    fn facts(&self) -> &HostFacts {
        &self.facts
    }

    fn boot(&self, _: &GuestSpec, _: BootPurpose, _: &Confinement) -> Result<Box<dyn Domain>, HostError> {
        Ok(Box::new(TestDomain { guest: Some(self.guest.clone()), seen: self.seen.clone() }))
    }

    fn restore(
        &self,
        spec: &GuestSpec,
        mut image: HotFiles,
        confinement: &Confinement,
    ) -> Result<Box<dyn Domain>, HostError> {
        let mut seen = self.seen.lock().unwrap();
        seen.memory = content(&image.memory);
        image.device_state.read_to_end(&mut seen.device_state).unwrap();
        seen.deltas = image.deltas.iter().map(|(name, file)| (name.clone(), content(file))).collect();
        seen.writable = image.memory.write(b"x").is_ok() || image.deltas[0].1.write(b"x").is_ok();
        seen.restored_as = Some((spec.nic.clone(), confinement.clone()));
        Ok(Box::new(TestDomain { guest: None, seen: self.seen.clone() }))
    }
}

/// The guest that is booted has something to capture, a clone has not.
struct TestDomain {
    guest: Option<Guest>,
    seen: Arc<Mutex<Seen>>,
}

impl Domain for TestDomain {
    fn agent(&mut self) -> Result<Box<dyn AgentPipe>, HostError> {
        let (ours, _) = std::os::unix::net::UnixStream::pair().map_err(HostError::io("connect"))?;
        Ok(Box::new(ours))
    }

    fn run(&mut self) -> Result<(), HostError> {
        Ok(())
    }

    fn pause(&mut self) -> Result<(), HostError> {
        unreachable!("a build pauses nothing")
    }

    fn reclaim_free_memory(&mut self, _: ByteCount) -> Result<(), HostError> {
        Ok(())
    }

    fn capture(&mut self) -> Result<Capture, HostError> {
        let guest = self.guest.as_ref().expect("a clone is not captured");
        let size = |pages: usize| ByteCount(pages as u64 * engine::units::PAGE_SIZE);
        Ok(Capture {
            memory: image(&guest.memory),
            memory_size: size(guest.memory.len()),
            device_state: b"registers".to_vec(),
            device_state_version: 3,
            deltas: vec![CapturedDelta {
                volume: "root".into(),
                size: size(guest.root.len()),
                raw: image(&guest.root),
                changed: guest.changed.clone(),
            }],
        })
    }

    fn touched(&mut self) -> Result<Vec<PageRange>, HostError> {
        assert!(self.seen.lock().unwrap().identity.is_some(), "asked after the rehearsal");
        match self.seen.lock().unwrap().mute {
            true => Err(HostError::Io { step: "look", source: io::ErrorKind::PermissionDenied.into() }),
            // In no order, and one beyond memory.
            false => Ok([(9, 1), (1, 2), (3, 1), (1 << 40, 1)].map(|(a, n)| PageRange::new(a, n)).to_vec()),
        }
    }

    fn steps(&mut self) -> Vec<(&'static str, Instant)> {
        Vec::new()
    }

    fn events(&self) -> BorrowedFd<'_> {
        unreachable!("nothing is awaited")
    }

    fn serve(&mut self) -> Result<(), HostError> {
        unreachable!("nothing is served")
    }

    fn destroy(self: Box<Self>) -> Result<(), HostError> {
        if self.guest.is_none() {
            self.seen.lock().unwrap().destroyed = true;
        }
        Ok(())
    }
}

struct TestAgent(Arc<Mutex<Seen>>);

impl Agent for TestAgent {
    fn ready(&mut self, _: Duration) -> Result<AgentFacts, AgentError> {
        Ok(AgentFacts { version: "0.1.0".into() })
    }
    fn prerun(&mut self, _: &[u8]) -> Result<(), AgentError> {
        Ok(())
    }
    fn settle(&mut self) -> Result<ByteCount, AgentError> {
        Ok(ByteCount::ZERO)
    }
    fn warm(&mut self) -> Result<(), AgentError> {
        Ok(())
    }
    fn freeze(&mut self) -> Result<(), AgentError> {
        Ok(())
    }
    fn identify(&mut self, _: &Identity) -> Result<(), AgentError> {
        unreachable!("`rehearse` is all of it")
    }
    fn thaw(&mut self) -> Result<(), AgentError> {
        unreachable!("`rehearse` is all of it")
    }
    fn rehearse(&mut self, identity: &Identity) -> Result<(), AgentError> {
        let mut seen = self.0.lock().unwrap();
        seen.identity = Some(identity.clone());
        match seen.fails {
            true => Err(AgentError::Failed { step: "run a command in the clone", message: "no".into() }),
            false => Ok(()),
        }
    }
}

#[derive(Default)]
struct Steps(RefCell<Vec<&'static str>>);

impl Watch for Steps {
    fn step(&mut self, step: Step) {
        self.0.borrow_mut().push(step.name());
    }
    fn wrote(&self, _: savefile::Progress) {}
}

const CONFINEMENT: fn() -> Confinement = || Confinement {
    slot: 77,
    volume_memory_max: ByteCount(1 << 20),
    spill_dir: "/nowhere".into(),
    background: false,
    keep_from_swap: true,
};

/// Builds [`Guest::small`] to `path` on a host that behaves as `seen` says.
fn build(path: &Path, seen: Seen) -> (Result<Written, BuildError>, Arc<Mutex<Seen>>, Vec<&'static str>) {
    let seen = Arc::new(Mutex::new(seen));
    let guest = Guest::small();
    let manifest = guest.manifest();
    let host = TestHost { facts: manifest.host.clone(), guest, seen: seen.clone() };
    let spec = GuestSpec {
        memory: ByteCount(manifest.memory_bytes),
        vcpus: 1,
        kernel: "k".into(),
        initrd: "i".into(),
        cmdline: String::new(),
        volumes: vec![],
        nic: Nic::User,
    };
    let order = Order { spec: &spec, confinement: &CONFINEMENT(), prerun: None, manifest, path };
    let mut steps = Steps::default();
    let mut timeline = Timeline::since(std::time::Instant::now());
    let agent = seen.clone();
    let built = build::build(&host, order, move |_| TestAgent(agent.clone()), &mut steps, &mut timeline);
    (built, seen, steps.0.into_inner())
}

#[test]
fn the_clone_is_what_was_captured_and_what_it_touches_is_recorded() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("1.savefile");
    let (built, seen, steps) = build(&path, Seen::default());
    built.unwrap();
    let (guest, seen) = (Guest::small(), seen.lock().unwrap());
    assert!(seen.memory == guest.memory_bytes());
    assert_eq!(seen.device_state, b"registers");
    assert_eq!(seen.deltas.len(), 1);
    assert!(seen.deltas[0] == ("root".to_owned(), guest.delta_bytes()));
    assert!(!seen.writable, "a clone's files are for reading");
    assert!(seen.destroyed);
    let expected = Confinement { keep_from_swap: false, ..CONFINEMENT() };
    assert_eq!(seen.restored_as, Some((Nic::None, expected)), "nobody hears of it");
    assert_eq!(seen.identity.as_ref().unwrap().number.get(), 77);
    assert_eq!(steps[steps.len() - 3..], ["capture", "rehearse", "write"]);
    let manifest = savefile::peek(&path, None).unwrap().manifest;
    assert_eq!(manifest.working_set, [(1, 3), (9, 1)]);
    assert_eq!(manifest.working_set_bytes(), ByteCount(4 * 4096));
}

#[test]
fn a_rehearsal_that_fails_fails_the_build_by_its_name_and_nothing_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("1.savefile");
    let (built, seen, steps) = build(&path, Seen { fails: true, ..Seen::default() });
    let error = built.unwrap_err();
    assert!(matches!(error, BuildError::Rehearsal(_)) && error.to_string().contains("rehearsal"), "{error}");
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert!(source.contains("run a command in the clone"), "{source}");
    assert_eq!(steps.last(), Some(&"rehearse"));
    assert!(seen.lock().unwrap().identity.is_some());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn a_host_that_cannot_tell_gets_a_savefile_without_a_working_set() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("1.savefile");
    let (built, seen, _) = build(&path, Seen { mute: true, ..Seen::default() });
    built.unwrap();
    assert!(seen.lock().unwrap().destroyed);
    assert!(savefile::peek(&path, None).unwrap().manifest.working_set.is_empty());
}
