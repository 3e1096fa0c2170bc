use std::thread;

use nix::errno::Errno;

use super::super::simulated::Simulated;
use super::*;

const ID: DomId = DomId(7);
const LIMIT: Duration = Duration::from_secs(10);

fn domain() -> DomainNodes {
    DomainNodes {
        domid: ID,
        uuid: Uuid([0xab; 16]),
        name: "disp1".into(),
        vcpus: 2,
        memory_max: ByteCount(256 << 20),
        memory: ByteCount(128 << 20),
        store: Ring { gfn: 0xfeff9, port: 1 },
        console: Ring { gfn: 0xfeffc, port: 2 },
    }
}

/// As libxl 4.17 leaves it for a PVH guest (`xenstore-ls -fp` after `xl create -p`), but for the numbers; there, a guest owns
/// `console/backend-id`, for no reason.
const BY_LIBXL: &str = r#"
/local/domain/7 = ""   (n0,r7)
/local/domain/7/attr = ""   (n7)
/local/domain/7/console = ""   (n0,r7)
/local/domain/7/console/backend = "/local/domain/0/backend/console/7/0"   (n0,r7)
/local/domain/7/console/backend-id = "0"   (n0,r7)
/local/domain/7/console/limit = "1048576"   (n0,r7)
/local/domain/7/console/output = "pty"   (n0,r7)
/local/domain/7/console/port = "2"   (n0,r7)
/local/domain/7/console/ring-ref = "1044476"   (n0,r7)
/local/domain/7/console/tty = ""   (n0,r7)
/local/domain/7/console/type = "xenconsoled"   (n0,r7)
/local/domain/7/control = ""   (n0,r7)
/local/domain/7/control/feature-poweroff = ""   (n7)
/local/domain/7/control/feature-reboot = ""   (n7)
/local/domain/7/control/feature-suspend = ""   (n7)
/local/domain/7/control/platform-feature-multiprocessor-suspend = "1"   (n0,r7)
/local/domain/7/control/platform-feature-xs_reset_watches = "1"   (n0,r7)
/local/domain/7/control/shutdown = ""   (n7)
/local/domain/7/control/sysrq = ""   (n7)
/local/domain/7/cpu = ""   (n0,r7)
/local/domain/7/cpu/0 = ""   (n0,r7)
/local/domain/7/cpu/0/availability = "online"   (n0,r7)
/local/domain/7/cpu/1 = ""   (n0,r7)
/local/domain/7/cpu/1/availability = "online"   (n0,r7)
/local/domain/7/data = ""   (n7)
/local/domain/7/device = ""   (n0,r7)
/local/domain/7/device/suspend = ""   (n0,r7)
/local/domain/7/device/suspend/event-channel = ""   (n7)
/local/domain/7/domid = "7"   (n0,r7)
/local/domain/7/drivers = ""   (n7)
/local/domain/7/error = ""   (n7)
/local/domain/7/feature = ""   (n7)
/local/domain/7/memory = ""   (n0,r7)
/local/domain/7/memory/static-max = "262144"   (n0,r7)
/local/domain/7/memory/target = "131072"   (n0,r7)
/local/domain/7/memory/videoram = "0"   (n0,r7)
/local/domain/7/name = "disp1"   (n0,r7)
/local/domain/7/store = ""   (n0,r7)
/local/domain/7/store/port = "1"   (n0,r7)
/local/domain/7/store/ring-ref = "1044473"   (n0,r7)
/local/domain/7/vm = "/vm/abababab-abab-abab-abab-abababababab"   (n0,r7)
/local/domain/0/backend/console/7 = ""   (n0)
/local/domain/0/backend/console/7/0 = ""   (n0,r7)
/local/domain/0/backend/console/7/0/frontend = "/local/domain/7/console"   (n0,r7)
/local/domain/0/backend/console/7/0/frontend-id = "7"   (n0,r7)
/local/domain/0/backend/console/7/0/online = "1"   (n0,r7)
/local/domain/0/backend/console/7/0/protocol = "vt100"   (n0,r7)
/local/domain/0/backend/console/7/0/state = "1"   (n0,r7)
/libxl/7 = ""   (n0)
/libxl/7/device = ""   (n0)
/libxl/7/device/console = ""   (n0)
/libxl/7/device/console/0 = ""   (n0)
/libxl/7/device/console/0/backend = "/local/domain/0/backend/console/7/0"   (n0)
/libxl/7/device/console/0/frontend = "/local/domain/7/console"   (n0)
/libxl/7/device/console/0/frontend-id = "7"   (n0)
/libxl/7/device/console/0/online = "1"   (n0)
/libxl/7/device/console/0/protocol = "vt100"   (n0)
/libxl/7/device/console/0/state = "1"   (n0)
/libxl/7/dm-version = "qemu_xen"   (n0)
/libxl/7/type = "pvh"   (n0)
"#;

fn listing(simulated: &Simulated) -> Vec<String> {
    let parts = ["/local/domain/7", "/local/domain/0/backend/console/7", "/libxl/7"];
    parts.iter().flat_map(|part| simulated.listing(part)).collect()
}

#[test]
fn nodes_are_as_libxl_writes_them() {
    let simulated = Simulated::new();
    let store = simulated.connect();
    simulated.set("/local/domain/7/data/stale", "of an earlier domain");
    domain().publish(&store).unwrap();
    let expected: Vec<&str> = BY_LIBXL.trim().lines().collect();
    assert_eq!(listing(&simulated), expected);
    assert_eq!(simulated.get("/vm/abababab-abab-abab-abab-abababababab/name").as_deref(), Some("disp1"));
    assert_eq!(simulated.introduced(ID), Some((0xfeff9, 1)));
    withdraw(&store, ID, &domain().uuid).unwrap();
    withdraw(&store, ID, &domain().uuid).unwrap();
    assert_eq!(listing(&simulated), Vec::<String>::new());
    assert_eq!(
        (simulated.introduced(ID), simulated.listing("/vm/abababab-abab-abab-abab-abababababab").len()),
        (None, 0)
    );
}

#[test]
fn a_failure_at_any_request_leaves_no_part_of_a_domain() {
    for at in 0.. {
        let simulated = Simulated::new();
        let store = simulated.connect();
        simulated.fail_at(at, Errno::ENOSPC);
        if domain().publish(&store).is_ok() {
            assert!(at > 60, "only {at} requests");
            return;
        }
        let whole = simulated.get("/local/domain/7/store/port").is_some();
        assert_eq!(simulated.listing("/local/domain/7").len(), if whole { 41 } else { 0 }, "request {at}");
        assert_eq!(simulated.introduced(ID), None);
    }
}

fn guest_answers(simulated: &Simulated, word: &'static str) -> thread::JoinHandle<()> {
    let guest = simulated.connect_as(ID);
    guest.write("control/feature-suspend", "1").unwrap();
    thread::spawn(move || {
        guest.wait_for("control/shutdown", word, LIMIT, |value| (value == Some(word)).then_some(())).unwrap();
        guest.write("control/shutdown", "").unwrap();
    })
}

#[test]
fn a_guest_is_asked_and_acknowledges() {
    let simulated = Simulated::new();
    let store = simulated.connect();
    domain().publish(&store).unwrap();
    assert!(matches!(ask(&store, ID, Ask::Suspend, LIMIT), Err(GuestError::Unable { .. })));
    let guest = guest_answers(&simulated, "suspend");
    ask(&store, ID, Ask::Suspend, LIMIT).unwrap();
    guest.join().unwrap();
    withdraw(&store, ID, &domain().uuid).unwrap();
    assert!(matches!(ask(&store, ID, Ask::Suspend, LIMIT), Err(GuestError::Gone { .. })));
}

#[test]
fn what_a_guest_does_not_acknowledge_is_taken_back() {
    let simulated = Simulated::new();
    let store = simulated.connect();
    domain().publish(&store).unwrap();
    simulated.set("/local/domain/7/control/feature-suspend", "1");
    simulated.fail_commits(2);
    let silent = ask(&store, ID, Ask::Suspend, Duration::from_millis(20));
    assert!(matches!(silent, Err(GuestError::Silent { .. })));
    assert_eq!(simulated.get("/local/domain/7/control/shutdown").as_deref(), Some(""));
}

#[test]
fn a_guest_reads_its_nodes_and_writes_only_its_own() {
    let simulated = Simulated::new();
    domain().publish(&simulated.connect()).unwrap();
    let guest = simulated.connect_as(ID);
    assert_eq!(guest.read("name").unwrap().as_deref(), Some("disp1"));
    for own in GUESTS_OWN {
        guest.write(own, "x").unwrap();
    }
    for other in
        ["name", "memory/target", "control/x", "device/vbd/1/state", "console/ring-ref", "/libxl/7/type"]
    {
        assert!(guest.write(other, "x").unwrap_err().is(Errno::EACCES), "{other}");
    }
}
