//! The simulated host itself: it finds out a wrong or mixed image, its guests keep to the order of things, and a spare can be
//! made of it: paused, run again, and given its identity only then.
//!
//! The bug these are for: a simulator that is content with anything proves nothing.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use control_plane::agent_link::{AgentLink, COMMAND_STREAM};
use control_plane::inputs::Guest;
use control_plane::machine;
use engine::agent::{Agent, AgentError};
use engine::host::{Domain, Host, HostError};
use engine::identity::{CloneNumber, Identity};
use engine::image::hot::{HotFiles, HotImage};
use qrexec::{Exec, Exit, GuestFrame, HostFrame};
use simulator::context::{violations, Context};
use simulator::host::SimHost;
use simulator::machine::SimMachine;
use simulator::operate::{notes, Action};
use simulator::plan::Plan;
use simulator::scenario::usual_folder;
use simulator::steps::Steps;
use simulator::world::{Contents, World, DVM};

struct Fixture {
    world: World,
    context: Arc<Context>,
    host: SimHost,
    guest: Guest,
}

impl Fixture {
    fn new(seed: u64) -> Fixture {
        let program: PathBuf =
            std::env::current_exe().unwrap().ancestors().nth(2).unwrap().join("dispvm-simulator");
        let contents =
            Contents { savefile: true, evicted: false, damaged: false, garbage: false, third: false };
        let world = World::new(&usual_folder(), &program, seed, contents, false).unwrap();
        let steps = Steps::new(Plan::Nothing, None).unwrap();
        let context = Arc::new(Context::new(&notes(world.folder()), seed, steps).unwrap());
        let host = SimHost::new(context.clone());
        let guest = Guest::load(&world.state, DVM).unwrap();
        Fixture { world, context, host, guest }
    }

    fn image(&self) -> HotFiles {
        let root = self.world.pin(DVM).unwrap().unwrap().root_hash.parse().unwrap();
        HotImage::find(&self.world.state.hot(), &root).unwrap().unwrap().files
    }

    fn restore(&self, image: HotFiles, number: u32) -> Result<Box<dyn Domain>, HostError> {
        let number = CloneNumber::new(number).unwrap();
        let machine = SimMachine::new(self.context.clone());
        let confinement = machine::confinement(&self.world.state, &machine, number);
        self.host.restore(&self.guest.spec, image, &confinement)
    }

    fn violations(&self) -> String {
        std::fs::read_to_string(violations(&notes(self.world.folder()))).unwrap_or_default()
    }
}

fn next(link: &mut AgentLink) -> GuestFrame {
    loop {
        link.flush().unwrap();
        if let Some(frame) = link.next_frame().unwrap() {
            return frame;
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

#[test]
fn a_spare_is_warmed_frozen_and_parked_and_runs_its_command_under_its_identity() {
    let fixture = Fixture::new(1);
    let mut domain = fixture.restore(fixture.image(), 5).unwrap();
    let mut link = AgentLink::new(domain.agent().unwrap());
    domain.run().unwrap();
    let number = CloneNumber::new(5).unwrap();
    let first = Identity::fresh(number).unwrap();
    link.identify(&first).unwrap();
    link.warm().unwrap();
    link.freeze().unwrap();
    domain.pause().unwrap();

    link.queue(&HostFrame::Ping(7)).unwrap();
    link.flush().unwrap();
    std::thread::sleep(std::time::Duration::from_millis(30));
    while let Some(frame) = link.next_frame().unwrap() {
        assert!(!matches!(frame, GuestFrame::Pong(_)), "a paused guest answers");
    }
    domain.run().unwrap();
    while next(&mut link) != GuestFrame::Pong(7) {}

    let again = Identity { entropy: Identity::fresh(number).unwrap().entropy, ..first };
    link.identify(&again).unwrap();
    let exec = Box::new(Exec::user(["exit", "3"]));
    link.queue(&HostFrame::Exec { stream: COMMAND_STREAM, exec }).unwrap();
    let exit = loop {
        if let GuestFrame::Exited { exit, .. } = next(&mut link) {
            break exit;
        }
    };
    assert_eq!(exit, Exit::Code(3));
    domain.destroy().unwrap();
    assert_eq!(fixture.violations(), "");
}

#[test]
fn a_mixed_image_is_found_out() {
    let fixture = Fixture::new(2);
    let old = fixture.image();
    let build = Action::Build { dvm: DVM.to_owned(), prerun: None };
    // Open, the old generation's files outlive it.
    fixture.world.run(&build, Plan::Nothing, false).unwrap();
    let new = fixture.image();
    let clone = |file: &File| file.try_clone().unwrap();
    let mixed = |memory: &HotFiles, state: &HotFiles, deltas: &HotFiles| HotFiles {
        memory: clone(&memory.memory),
        working_set: memory.working_set.clone(),
        device_state: clone(&state.device_state),
        deltas: deltas.deltas.iter().map(|(name, file)| (name.clone(), clone(file))).collect(),
    };
    fixture.restore(mixed(&old, &old, &old), 1).unwrap().destroy().unwrap();
    fixture.restore(mixed(&new, &new, &new), 2).unwrap().destroy().unwrap();
    assert_eq!(fixture.violations(), "");
    for (at, image) in
        [mixed(&old, &new, &new), mixed(&new, &old, &new), mixed(&new, &new, &old)].into_iter().enumerate()
    {
        assert!(fixture.restore(image, 3 + at as u32).is_err());
        assert_eq!(fixture.violations().lines().count(), 1 + at);
    }
    let mut swapped = mixed(&new, &new, &new);
    let (first, second) = (clone(&swapped.deltas[0].1), clone(&swapped.deltas[1].1));
    (swapped.deltas[0].1, swapped.deltas[1].1) = (second, first);
    assert!(fixture.restore(swapped, 9).is_err());
}

#[test]
fn what_is_against_the_order_of_things_is_refused_and_noted() {
    let fixture = Fixture::new(3);
    let mut domain = fixture.restore(fixture.image(), 8).unwrap();
    let mut link = AgentLink::new(domain.agent().unwrap());
    domain.run().unwrap();
    let exec = Box::new(Exec::user(["echo", "too early"]));
    link.queue(&HostFrame::Exec { stream: COMMAND_STREAM, exec }).unwrap();
    assert!(matches!(next(&mut link), GuestFrame::Failed { stream: COMMAND_STREAM, .. }));
    assert!(matches!(link.settle(), Err(AgentError::Failed { .. })), "a clone is not settled");
    assert!(matches!(link.freeze(), Err(AgentError::Failed { .. })), "it is frozen already");
    let another = Identity::fresh(CloneNumber::new(9).unwrap()).unwrap();
    assert!(matches!(link.identify(&another), Err(AgentError::Failed { .. })), "the slot is disp8");
    let noted = fixture.violations();
    for what in ["nobody yet", "settle: in a clone", "frozen already", "not that of the slot"] {
        assert!(noted.contains(what), "{what}: {noted}");
    }
}
