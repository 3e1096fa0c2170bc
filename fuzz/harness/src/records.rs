//! Records in the state folder.

use control_plane::clones::CloneRecord;
use control_plane::qube::{check_label, check_name, Class, Qube};
use engine::image::hot::HotIndex;
use engine::savefile::is_volume_name;

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
