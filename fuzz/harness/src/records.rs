//! Records in the state folder.

use std::fmt::Debug;

use control_plane::clones::CloneRecord;
use control_plane::daemon::protocol::{
    self, Answer, Hello, HolderHears, HolderSays, KeeperHears, KeeperSays, LifelineHears, LifelineSays,
};
use control_plane::qube::{check_label, check_name, Class, Qube};
use engine::image::hot::HotIndex;
use engine::savefile::is_volume_name;
use serde::de::DeserializeOwned;
use serde::Serialize;

/// The index of a hot image.
pub fn hot_index(data: &[u8]) {
    let Ok(index) = HotIndex::parse(data) else { return };
    assert!(index.delta_files().all(is_volume_name), "a delta outside its folder");
    let bytes = index.to_bytes().expect("what was read can be written");
    assert_eq!(HotIndex::parse(&bytes), Ok(index));
}

/// A qube's record.
pub fn qube(data: &[u8]) {
    const NAME: &str = "qube";
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(qube) = Qube::parse(NAME, text) else { return };
    assert!(qube.name == NAME && check_label(&qube.label).is_ok());
    if let Class::AppVM(dvm) = &qube.class {
        assert!(check_name(&dvm.template).is_ok(), "a template outside the state folder");
    }
    let text = qube.to_text().expect("what was read can be written");
    assert_eq!(Qube::parse(NAME, &text), Ok(qube));
}

/// A living clone's record.
pub fn clone(data: &[u8]) {
    let Ok(record) = serde_json::from_slice::<CloneRecord>(data) else { return };
    let bytes = serde_json::to_vec(&record).expect("what was read can be written");
    assert_eq!(serde_json::from_slice::<CloneRecord>(&bytes).ok(), Some(record));
}

/// A message on the daemon's socket, from whichever side.
pub fn control_socket(data: &[u8]) {
    same_again::<Hello>(data);
    same_again::<Answer>(data);
    same_again::<KeeperSays>(data);
    same_again::<KeeperHears>(data);
    same_again::<LifelineSays>(data);
    same_again::<LifelineHears>(data);
    same_again::<HolderSays>(data);
    same_again::<HolderHears>(data);
}

fn same_again<T: Serialize + DeserializeOwned + PartialEq + Debug>(data: &[u8]) {
    let Ok(message) = protocol::parse::<T>(data) else { return };
    // A message may be longer written than it was read (a control character is one byte, its escape six), and then is refused.
    if let Ok(bytes) = protocol::encode(&message) {
        assert_eq!(protocol::parse(&bytes), Ok(message));
    }
}
