//! A domain's life on a simulated Xen: what is captured comes back as it was, and whatever call fails, nothing is left.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use engine::units::{ByteCount, PageRange, PAGE_BYTES};
use nix::errno::Errno;
use xen_glue::device_state::{DeviceState, TscInfo};
use xen_glue::hypercalls::{CallError, CpuPolicy, DomId, Hypercalls, Uuid};
use xen_glue::layout::{Layout, SPECIAL_FIRST};
use xen_glue::life::{capture, fill, finish, restore, shell_plan, LifeError, Ports, Shell};
use xen_glue::simulated::{Fault, Left, Machine};

const MEMORY: ByteCount = ByteCount(64 << 20);
/// Of the guest; a little more than its layout has.
const GUEST: ByteCount = ByteCount(5 << 20);
const UUID: Uuid = Uuid([7; 16]);
const PORTS: Ports = Ports { store_domid: DomId(0), console_domid: DomId(0) };
const STORE: u64 = SPECIAL_FIRST + 4;
const CONSOLE: u64 = SPECIAL_FIRST + 7;
const FRAME_KINDS: &str = "XEN_DOMCTL_getpageframeinfo3";
const IDENT_PT: u64 = SPECIAL_FIRST + 6;

/// A guest with a hole in its memory, one large extent, and pages at the edges.
fn state() -> DeviceState {
    DeviceState {
        xen: (4, 17),
        vcpus: 2,
        layout: Layout::new(vec![PageRange::new(0, 16), PageRange::new(17, 1200)]).unwrap(),
        tsc: TscInfo { mode: 0, khz: 2_600_000, nsec: 5, incarnation: 1 },
        hvm_context: vec![9; 64 + 512],
        hvm_params: vec![(1, STORE), (5, SPECIAL_FIRST + 5), (12, IDENT_PT * 4096), (17, CONSOLE)],
        cpuid_policy: vec![7; 48],
        msr_policy: vec![1; 16],
    }
}

/// Its memory: some pages with data, all others holes.
fn memory() -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(GUEST.0).unwrap();
    for page in [0u64, 1, 15, 16, 40, 600, 1215] {
        file.write_all_at(&[page as u8 + 1; PAGE_BYTES], page * PAGE_BYTES as u64).unwrap();
    }
    file
}

fn bytes_of(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn machine() -> (Arc<Machine>, Arc<dyn Hypercalls>) {
    let machine = Arc::new(Machine::new(MEMORY));
    (machine.clone(), machine)
}

/// Restores, suspends, captures: what a clone and a template go through.
fn life(machine: &Machine, xen: &Arc<dyn Hypercalls>) -> Result<(Vec<u8>, DeviceState), LifeError> {
    let shell = restore(xen, UUID, &state(), &memory(), PORTS)?;
    machine.suspend(shell.domid());
    let captured = capture(xen.as_ref(), shell.domid(), 2, GUEST)?;
    let taken = (bytes_of(&captured.memory), captured.state);
    shell.destroy()?;
    Ok(taken)
}

#[test]
fn what_is_restored_is_captured_as_it_was() {
    let (machine, xen) = machine();
    let (bytes, captured) = life(&machine, &xen).unwrap();
    assert_eq!(captured.layout, state().layout);
    assert_eq!(captured.hvm_context, state().hvm_context);
    assert_eq!(captured.cpuid_policy, state().cpuid_policy);
    assert_eq!(captured.tsc, state().tsc);
    let mut params = captured.hvm_params;
    params.sort_unstable();
    assert_eq!(params, state().hvm_params);
    assert!(bytes == bytes_of(&memory()));
    assert_eq!(machine.left(), Left::default());
}

#[test]
fn rings_are_cleared_granted_and_have_ports() {
    let (machine, xen) = machine();
    let shell = restore(&xen, UUID, &state(), &memory(), PORTS).unwrap();
    let domid = shell.domid();
    assert_eq!((shell.store().gfn, shell.console().gfn), (STORE, CONSOLE));
    assert_eq!(machine.grants(domid), [(0, DomId(0), CONSOLE), (1, DomId(0), STORE)]);
    let params = machine.params(domid);
    assert_eq!((params[&2], params[&18]), (shell.store().port.into(), shell.console().port.into()));
    assert_ne!(shell.store().port, shell.console().port);
    assert_eq!(machine.frame(domid, STORE), Some([0; PAGE_BYTES]));
    let table = machine.frame(domid, IDENT_PT).unwrap();
    assert_eq!(table[..8], [0xe7, 0, 0, 0, 0xe7, 0, 0x40, 0]);
    assert!(xen.info(domid).unwrap().unwrap().is_paused());
}

/// What a frame has in it before it is filled: zeros where Xen scrubs all, a pattern where it is a debug build, and what a living
/// guest left in a page it handed back.
fn machines() -> [Machine; 3] {
    let machine = |byte, line| Machine::new(MEMORY).with_fresh_byte(byte).with_command_line(line);
    [machine(0, "scrub-domheap"), machine(0xc2, "scrub-domheap"), machine(0x41, "")]
}

#[test]
fn frames_without_data_read_as_zero_on_any_xen() {
    for (machine, knows) in machines().into_iter().zip([true, false, false]) {
        let machine = Arc::new(machine);
        let xen: Arc<dyn Hypercalls> = machine.clone();
        let shell = restore(&xen, UUID, &state(), &memory(), PORTS).unwrap();
        assert_eq!(shell.fresh_is_zero(), knows);
        assert_eq!(machine.frame(shell.domid(), 300), Some([0; PAGE_BYTES]));
        assert_eq!(machine.frame(shell.domid(), SPECIAL_FIRST), Some([0; PAGE_BYTES]));
        assert_eq!(machine.frame(shell.domid(), 17), Some([17; PAGE_BYTES]));
    }
}

#[test]
fn filling_fast_and_slowly_is_the_same() {
    for machine in machines() {
        let machine = Arc::new(machine);
        let xen: Arc<dyn Hypercalls> = machine.clone();
        let plan = shell_plan(UUID, &state(), GUEST).unwrap();
        let make = || Shell::create(&xen, &plan, PORTS).unwrap();
        let (fast, slow) = (make(), make());
        fill(&fast, &memory()).unwrap();
        xen_glue::life::fill::fill_slowly(&slow, &memory()).unwrap();
        for gfn in state().layout.runs().iter().flat_map(|run| run.pages()) {
            assert!(machine.frame(fast.domid(), gfn.0) == machine.frame(slow.domid(), gfn.0), "{gfn}");
        }
    }
}

/// Each call of a whole life fails once, in each way.
#[test]
fn whatever_call_fails_nothing_is_left() {
    let (machine, xen) = machine();
    life(&machine, &xen).unwrap();
    let calls = machine.calls();
    let first_look = calls.iter().position(|call| *call == FRAME_KINDS).unwrap();
    for fault in [Fault::Refuse(Errno::EPERM), Fault::Refuse(Errno::ENOMEM), Fault::Short, Fault::Vanish] {
        for (at, call) in (1..).zip(&calls) {
            // A thousand times the same: looking which frames there are. The first few and the last stand for all.
            if *call == FRAME_KINDS && at > first_look + 2 && calls[at] == FRAME_KINDS {
                continue;
            }
            let (machine, xen) = self::machine();
            machine.fail(at, fault);
            let result = life(&machine, &xen);
            let harmless = match *call {
                // Memory in one piece may run out: then it is taken page by page.
                "XENMEM_populate_physmap" => fault == Fault::Short,
                // Is asked before it is destroyed whether it is still the same one; if it has gone, all the better.
                "XEN_DOMCTL_getdomaininfo" => at == calls.len() - 1,
                "XEN_DOMCTL_destroydomain" => fault == Fault::Vanish,
                _ => false,
            };
            assert!(result.is_err() || harmless, "call {at}, {call}, {fault:?} was not noticed");
            let left = machine.left();
            if *call == "XEN_DOMCTL_destroydomain" && fault != Fault::Vanish {
                // That leaves a domain, which the next sweep finds by its number and handle.
                assert_eq!(left.domains.len(), 1);
            } else {
                assert_eq!(left, Left::default(), "after call {at}, {call}, {fault:?}");
            }
        }
    }
}

#[test]
fn refusals_are_typed() {
    let (machine, xen) = machine();
    let restore =
        |state: &DeviceState, memory: &File| restore(&xen, UUID, state, memory, PORTS).err().unwrap();

    let large = Layout::fresh(ByteCount(MEMORY.0));
    let error = restore(&DeviceState { layout: large, ..state() }, &memory());
    assert!(
        matches!(error, LifeError::TooLittleMemory { free: MEMORY, needed } if needed > MEMORY),
        "{error}"
    );
    assert!(!machine.calls().contains(&"XEN_DOMCTL_createdomain"));

    let short = memory();
    short.set_len(10 * PAGE_BYTES as u64).unwrap();
    let error = restore(&state(), &short);
    assert!(matches!(error, LifeError::ImageSize { .. }), "{error}");

    let error = restore(&DeviceState { hvm_params: vec![(1, STORE), (2, 5)], ..state() }, &memory());
    assert!(matches!(error, LifeError::BadState(_)), "{error}");
    let error = restore(&DeviceState { hvm_params: vec![(1, STORE)], ..state() }, &memory());
    assert!(matches!(error, LifeError::BadState(_)), "{error}");

    let error = restore(&DeviceState { cpuid_policy: vec![7; 24 * 100], ..state() }, &memory());
    let LifeError::Call { source, .. } = error else { panic!("{error}") };
    assert!(matches!(source, CallError::Policy { leaf: Some((3, None)), .. }), "{source}");

    let shell = Shell::create(&xen, &shell_plan(UUID, &state(), GUEST).unwrap(), PORTS).unwrap();
    let error = capture(xen.as_ref(), shell.domid(), 2, GUEST).err().unwrap();
    assert!(matches!(error, LifeError::NotSuspended(_)), "{error}");
    machine.suspend(shell.domid());
    let error = capture(xen.as_ref(), shell.domid(), 2, ByteCount(1 << 20)).err().unwrap();
    assert!(matches!(error, LifeError::ImageSize { .. }), "{error}");
    let error = capture(xen.as_ref(), DomId(99), 2, GUEST).err().unwrap();
    assert!(matches!(error, LifeError::Gone(DomId(99))), "{error}");
}

/// A guest that handed back frames has a layout with holes, and a shorter image.
#[test]
fn what_the_guest_handed_back_is_not_captured() {
    let (machine, xen) = machine();
    let shell = restore(&xen, UUID, &state(), &memory(), PORTS).unwrap();
    machine.balloon_out(shell.domid(), 100);
    machine.suspend(shell.domid());
    let captured = capture(xen.as_ref(), shell.domid(), 2, GUEST).unwrap();
    let expected = [PageRange::new(0, 16), PageRange::new(17, 83), PageRange::new(101, 1116)];
    assert_eq!(captured.state.layout.runs(), expected);
    let clone = restore(&xen, Uuid([8; 16]), &captured.state, &captured.memory, PORTS).unwrap();
    for gfn in [0, 17, 41, 601, 1216] {
        assert_eq!(machine.frame(clone.domid(), gfn), machine.frame(shell.domid(), gfn), "{gfn:#x}");
    }
    assert_eq!(machine.frame(clone.domid(), 100), None);
    // It may take back what it handed back.
    let most = |shell: &Shell| xen.info(shell.domid()).unwrap().unwrap().pages_max.bytes();
    assert!(most(&clone) > GUEST);
    xen.populate(clone.domid(), &[100], 0).unwrap();
}

/// A domain that others destroyed, and whose number another domain has, is not destroyed a second time.
#[test]
fn only_its_own_domain_is_destroyed() {
    let (machine, xen) = machine();
    let shell = restore(&xen, UUID, &state(), &memory(), PORTS).unwrap();
    xen.destroy(shell.domid()).unwrap();
    shell.destroy().unwrap();
    assert_eq!(machine.left(), Left::default());
    assert_eq!(machine.calls().iter().filter(|call| **call == "XEN_DOMCTL_destroydomain").count(), 1);
}

/// An image that cannot be read ends the filling for all its threads, and leaves nothing mapped.
#[test]
fn an_image_that_cannot_be_read_ends_the_filling() {
    let (machine, xen) = machine();
    let layout = Layout::new(vec![PageRange::new(0, 12_000)]).unwrap();
    let folder = File::open("/").unwrap();
    let shell =
        Shell::create(&xen, &shell_plan(UUID, &DeviceState { layout, ..state() }, GUEST).unwrap(), PORTS)
            .unwrap();
    let unreadable = tempfile::NamedTempFile::new().unwrap();
    unreadable.as_file().set_len(12_000 * PAGE_BYTES as u64).unwrap();
    for page in 0..12_000 {
        unreadable.as_file().write_all_at(&[1], page * PAGE_BYTES as u64).unwrap();
    }
    // Opened for writing only.
    let image = File::options().write(true).open(unreadable.path()).unwrap();
    for image in [image, folder] {
        assert!(matches!(fill(&shell, &image), Err(LifeError::Io { .. } | LifeError::ImageSize { .. })));
    }
    drop(shell);
    assert_eq!(machine.left(), Left::default());
}

#[test]
fn filling_runs_beside_the_rest() {
    let (machine, xen) = machine();
    let shell = Shell::create(&xen, &shell_plan(UUID, &state(), GUEST).unwrap(), PORTS).unwrap();
    std::thread::scope(|scope| {
        let filling = scope.spawn(|| fill(&shell, &memory()));
        finish(&shell, &state()).unwrap();
        filling.join().unwrap().unwrap();
    });
    assert_eq!(machine.frame(shell.domid(), 0), Some([1; PAGE_BYTES]));
    let _: CpuPolicy = xen.cpu_policy(shell.domid()).unwrap();
}
