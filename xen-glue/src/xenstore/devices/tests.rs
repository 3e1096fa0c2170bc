use std::thread::{self, JoinHandle};

use super::super::simulated::Simulated;
use super::*;
use crate::volumes::plan;

const ID: DomId = DomId(7);
const LIMIT: Duration = Duration::from_secs(10);

fn root() -> Device {
    Device::vbd(&Disk {
        name: "root".into(),
        vdev: 51712,
        device: plan::Device { major: 253, minor: 10 },
        read_only: false,
        discard: false,
    })
}

fn card() -> Device {
    Device::vif(&Vif { number: 0, mac: [0, 0x16, 0x3e, 0x11, 0x22, 0x33], backend: DomId(0) })
}

#[test]
fn a_disk_is_described_as_libxl_does() {
    let simulated = Simulated::new();
    let store = simulated.connect();
    simulated.fail_commits(1);
    attach(&store, ID, &[root()]).unwrap();
    let frontend = [
        r#"/local/domain/7/device/vbd/51712 = ""   (n7,r0)"#,
        r#"/local/domain/7/device/vbd/51712/backend = "/local/domain/0/backend/vbd/7/51712"   (n7,r0)"#,
        r#"/local/domain/7/device/vbd/51712/backend-id = "0"   (n7,r0)"#,
        r#"/local/domain/7/device/vbd/51712/device-type = "disk"   (n7,r0)"#,
        r#"/local/domain/7/device/vbd/51712/state = "1"   (n7,r0)"#,
        r#"/local/domain/7/device/vbd/51712/trusted = "1"   (n7,r0)"#,
        r#"/local/domain/7/device/vbd/51712/virtual-device = "51712"   (n7,r0)"#,
    ];
    assert_eq!(simulated.listing("/local/domain/7/device/vbd/51712"), frontend);
    let backend = simulated.listing("/local/domain/0/backend/vbd/7/51712");
    assert!(backend.iter().all(|line| line.ends_with("(n0,r7)")), "{backend:?}");
    for (name, value) in
        [("physical-device", "fd:a"), ("mode", "w"), ("hotplug-status", "connected"), ("dev", "xvda")]
    {
        let path = format!("/local/domain/0/backend/vbd/7/51712/{name}");
        assert_eq!(simulated.get(&path).as_deref(), Some(value), "{name}");
    }
    let copy = simulated.listing("/libxl/7/device/vbd/51712");
    assert_eq!(copy.len(), backend.len() + 1);
    assert_eq!(
        simulated.get("/libxl/7/device/vbd/51712/backend").as_deref(),
        Some("/local/domain/0/backend/vbd/7/51712")
    );
}

#[test]
fn a_card_may_be_carried_by_another_domain() {
    let simulated = Simulated::new();
    let store = simulated.connect();
    let vif = Device::vif(&Vif { number: 0, mac: [0, 0x16, 0x3e, 1, 2, 3], backend: DomId(3) });
    attach(&store, ID, &[vif.clone()]).unwrap();
    assert_eq!(simulated.get("/local/domain/7/device/vif/0/mac").as_deref(), Some("00:16:3e:01:02:03"));
    assert_eq!(simulated.get("/local/domain/7/device/vif/0/backend-id").as_deref(), Some("3"));
    let backend = simulated.listing("/local/domain/3/backend/vif/7/0");
    assert!(backend.iter().all(|line| line.ends_with("(n3,r7)")), "{backend:?}");
    assert_eq!(simulated.get("/local/domain/3/backend/vif/7/0/hotplug-status"), None);
}

/// A back end's driver: connects, and closes when it is told to and its front end has gone.
fn driver(simulated: &Simulated, id: DeviceId, end: &'static str) -> JoinHandle<()> {
    let store = simulated.connect();
    thread::spawn(move || {
        let state = format!("{}/state", id.backend(ID));
        store.write(&state, "2").unwrap();
        store.write(&state, CONNECTED).unwrap();
        store.wait_for(&state, "closing", LIMIT, |state| (state == Some(CLOSING)).then_some(())).unwrap();
        assert_eq!(store.read(&id.frontend(ID)).unwrap(), None);
        store.write(&state, end).unwrap();
    })
}

#[test]
fn devices_connect_and_close() {
    let simulated = Simulated::new();
    let store = simulated.connect();
    let devices = [root(), card()];
    let ids = devices.clone().map(|device| device.id);
    attach(&store, ID, &devices).unwrap();
    let drivers = ids.map(|id| driver(&simulated, id, CLOSED));
    wait_connected(&store, ID, &ids, LIMIT).unwrap();
    assert_eq!(in_dom0(&store, ID).unwrap(), ids);
    close(&store, ID, &ids, LIMIT).unwrap();
    drivers.into_iter().for_each(|driver| driver.join().unwrap());
    assert_eq!(in_dom0(&store, ID).unwrap(), []);
    for id in ids {
        for folder in [id.frontend(ID), id.backend(ID), id.copy(ID)] {
            assert_eq!(simulated.listing(&folder), Vec::<String>::new());
        }
    }
    close(&store, ID, &ids, LIMIT).unwrap();
}

#[test]
fn a_back_end_that_does_not_close_is_told_of_and_its_nodes_go() {
    let simulated = Simulated::new();
    let store = simulated.connect();
    let devices = [root(), card()];
    let ids = devices.clone().map(|device| device.id);
    attach(&store, ID, &devices).unwrap();
    let drivers = [driver(&simulated, ids[0], "5"), driver(&simulated, ids[1], CLOSED)];
    wait_connected(&store, ID, &ids, LIMIT).unwrap();
    let late = close(&store, ID, &ids, Duration::from_millis(300)).unwrap_err();
    assert!(matches!(&late, XenstoreError::Timeout { path, .. } if path.contains("vbd")), "{late}");
    drivers.into_iter().for_each(|driver| driver.join().unwrap());
    assert_eq!(simulated.listing("/local/domain/0/backend/vif/7/0"), Vec::<String>::new());
}

#[test]
fn a_back_end_that_gives_up_says_why() {
    let simulated = Simulated::new();
    let store = simulated.connect();
    attach(&store, ID, &[root()]).unwrap();
    simulated.set("/local/domain/0/error/backend/vbd/7/51712/error", "6 creating vbd structure");
    simulated.set("/local/domain/0/backend/vbd/7/51712/state", "5");
    let failed = wait_connected(&store, ID, &[root().id], LIMIT).unwrap_err().to_string();
    assert!(failed.ends_with("state 5: 6 creating vbd structure"), "{failed}");
    let never = wait_connected(&store, ID, &[card().id], LIMIT).unwrap_err().to_string();
    assert!(never.ends_with("state none"), "{never}");
}
