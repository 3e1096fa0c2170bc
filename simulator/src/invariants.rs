//! What must hold after anything has gone wrong, once one ordinary command has run: each a function that answers what it
//! found against it.
//!
//! In short: nothing is left, nothing is lost, others are unharmed.

use std::fs;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use control_plane::admin::settings::{Owner, Settings};
use control_plane::clones::{CloneRecord, Keeping, Power};
use control_plane::error::{Error, Result};
use control_plane::names::QUARANTINE;
use control_plane::qube::{Class, Qube, SavefilePin};
use control_plane::savefiles::{self, Standing};
use control_plane::state;
use engine::image::hot::HotImage;
use engine::savefile::silent;

use crate::context;
use crate::operate::{descriptors, notes};
use crate::world::{World, DVM, OTHER, TEMPLATE};

/// What was there before the operation.
pub struct Before {
    /// What the record pinned.
    pub pin: Option<SavefilePin>,
    /// The template's generation.
    pub template_generation: u64,
    /// Whether the savefile was damaged on purpose.
    pub damaged: bool,
    /// Whether the operation is there to remove the savefile.
    pub removes: bool,
    /// The clone that runs all the time, if it still does.
    pub bystander: Option<u32>,
}

impl Before {
    /// Of a world as it is now.
    pub fn of(world: &World, damaged: bool, removes: bool, bystander: Option<u32>) -> Result<Before> {
        let template_generation = Qube::load(&world.state, TEMPLATE)?.template()?.generation;
        Ok(Before { pin: world.pin(DVM)?, template_generation, damaged, removes, bystander })
    }
}

/// Checks all of them.
pub fn check(world: &World, before: &Before) -> Vec<String> {
    let checks: [(&str, Invariant); 9] = [
        ("rules", rules_were_kept),
        ("records", every_record_is_whole_and_nothing_is_lost),
        ("files", no_file_is_left),
        ("used", what_is_used_stays),
        ("clones", no_clone_s_record_is_left),
        ("locks", no_lock_is_held),
        ("savefile", the_pinned_savefile_is_whole),
        ("names", every_name_used_rests),
        ("processes", no_process_and_no_memory_is_left),
    ];
    let mut all = Vec::new();
    for (name, check) in checks {
        match check(world, before) {
            Ok(found) => all.extend(found.into_iter().map(|what| format!("{name}: {what}"))),
            Err(error) => all.push(format!("{name}: {}", control_plane::output::error_text(&error))),
        }
    }
    all
}

type Found = Result<Vec<String>>;
type Invariant = fn(&World, &Before) -> Found;

/// No simulated host, agent or process noted that something went against the order of things: a wrong or mixed image was
/// restored, a command ran in a clone that was nobody, two clones were the same, a name was used twice, a descriptor leaked.
pub fn rules_were_kept(world: &World, _: &Before) -> Found {
    let text = fs::read_to_string(context::violations(&notes(world.folder()))).unwrap_or_default();
    Ok(text.lines().map(str::to_owned).collect())
}

/// Every `qube.toml` parses; the qubes there were are there; a savefile that was pinned still is, or a later one (or none,
/// where it was to be removed); a template has its old generation or a later one.
pub fn every_record_is_whole_and_nothing_is_lost(world: &World, before: &Before) -> Found {
    let mut found = Vec::new();
    let names: Vec<String> = Qube::all(&world.state)?.into_iter().map(|qube| qube.name).collect();
    for name in [TEMPLATE, DVM, OTHER] {
        if !names.iter().any(|other| other == name) {
            found.push(format!("the record of {name} is gone"));
        }
    }
    match (&before.pin, world.pin(DVM)?) {
        // Removed and built anew, they are counted anew.
        (Some(old), Some(new)) if !before.removes && new != *old && new.generation <= old.generation => {
            found.push(format!("generation {} is pinned after {}", new.generation, old.generation));
        }
        (Some(_), None) if !before.removes => found.push("the pinned savefile is forgotten".to_owned()),
        _ => {}
    }
    for qube in Qube::all(&world.state)?.iter().filter(|qube| matches!(qube.class, Class::DispVM(_))) {
        if Settings::load(&world.state, &Owner::Qube(qube.name.clone()))?.notes != "begun" {
            found.push(format!("{} has a record without its settings", qube.name));
        }
    }
    let generation = Qube::load(&world.state, TEMPLATE)?.template()?.generation;
    if generation < before.template_generation {
        found.push(format!("the template went back to generation {generation}"));
    }
    Ok(found)
}

/// The state folder holds what its records name and its lock files, and nothing else: no temporary file, nothing aside, no
/// savefile, hot image or root generation that nothing pins and no living clone uses.
pub fn no_file_is_left(world: &World, before: &Before) -> Found {
    let mut expected: Vec<PathBuf> =
        ["use.lock", "names", "qubes", "clones", "calls", "disposables", "hot", "hot/.lock"]
            .map(PathBuf::from)
            .to_vec();
    let (mut roots, mut generations) = (Vec::new(), Vec::new());
    if let Some(pid) = before.bystander {
        for record in clone_records(world)?.into_iter().filter(|record| record.pid == pid) {
            expected.push(Path::new("clones").join(&record.name));
            let begun = format!("{}-{}.begun", record.name, record.started);
            expected.push(Path::new("disposables").join(begun));
            expected.push(Path::new("calls").join(format!("{}.sock", record.name)));
            roots.push(record.root_hash);
            generations.push(record.template.1);
        }
    }
    for qube in Qube::all(&world.state)? {
        let folder = Path::new("qubes").join(&qube.name);
        let mut expect = |names: &[String]| expected.extend(names.iter().map(|name| folder.join(name)));
        expect(&["", "qube.toml", "settings.toml", "record.lock", "start.lock"].map(String::from));
        match qube.class {
            Class::TemplateVM(template) => {
                expect(&["root".to_owned()]);
                for generation in generations.iter().chain([&template.generation]) {
                    let file = |name: &str| format!("root/{generation}{name}");
                    expect(&["", "/root.img", "/vmlinuz", "/initrd"].map(file));
                }
            }
            Class::AppVM(dvm) => {
                let files =
                    ["private", "savefile", "savefile/build.lock", "savefile/prerun", "savefile/build.log"];
                expect(&files.map(String::from));
                expect(&[format!("private/{}.img", dvm.private_generation)]);
                if let Some(pin) = dvm.savefile {
                    expect(&[format!("savefile/{}.savefile", pin.generation)]);
                    roots.push(pin.root_hash);
                }
            }
            Class::DispVM(_) => {}
        }
    }
    let mut found = Vec::new();
    let root = world.state.root();
    for path in walk(root).map_err(crate::operate::own_error("walk the state folder"))? {
        let inside = path.strip_prefix(root).unwrap_or(&path);
        let mut parts =
            inside.components().skip(1).map(|part| part.as_os_str().to_string_lossy().into_owned());
        let in_hot_set = inside.starts_with("hot")
            && parts.next().is_some_and(|set| {
                set.split_once('-').is_some_and(|(hash, _)| roots.iter().any(|root| root == hash))
            });
        if !in_hot_set && !expected.iter().any(|path| path.components().eq(inside.components())) {
            found.push(format!("{} is left", inside.display()));
        }
    }
    Ok(found)
}

/// What a record names or a living clone uses is there: root generations, private volumes, and a clone's hot image.
pub fn what_is_used_stays(world: &World, before: &Before) -> Found {
    let mut needed = Vec::new();
    for qube in Qube::all(&world.state)? {
        match qube.class {
            Class::TemplateVM(template) => {
                needed.push(world.state.root_generation(&qube.name, template.generation).join("root.img"));
            }
            Class::AppVM(dvm) => needed.push(world.state.private_image(&qube.name, dvm.private_generation)),
            Class::DispVM(_) => {}
        }
    }
    let mut found = Vec::new();
    for record in clone_records(world)?.into_iter().filter(|record| Some(record.pid) == before.bystander) {
        let (template, generation) = record.template;
        needed.push(world.state.root_generation(&template, generation).join("root.img"));
        if !record.root_hash.is_empty() {
            let root = record.root_hash.parse().map_err(Error::failed("read a root hash"))?;
            if !HotImage::find(&world.state.hot(), &root).is_ok_and(|image| image.is_some()) {
                found.push(format!("the hot image {} runs from is gone", record.name));
            }
        }
    }
    let gone = needed.into_iter().filter(|path| !path.exists());
    found.extend(gone.map(|path| format!("{} is gone", path.display())));
    Ok(found)
}

/// The only clones with a record are living ones.
pub fn no_clone_s_record_is_left(world: &World, before: &Before) -> Found {
    let records = clone_records(world)?;
    let mut found: Vec<String> = records
        .iter()
        .filter(|record| Some(record.pid) != before.bystander)
        .map(|record| format!("{} of process {} is left", record.name, record.pid))
        .collect();
    if before.bystander.is_some_and(|pid| records.iter().filter(|record| record.pid == pid).count() != 1) {
        found.push("the record of a living clone is gone".to_owned());
    }
    Ok(found)
}

/// Every lock file can be locked; that of a living clone's record cannot.
pub fn no_lock_is_held(world: &World, before: &Before) -> Found {
    let mut found = Vec::new();
    for path in walk(world.state.root()).map_err(crate::operate::own_error("walk the state folder"))? {
        let is_lock = path.extension().is_some_and(|ending| ending == "lock")
            || path.file_name().is_some_and(|name| name == "names" || name == ".lock");
        if is_lock && state::try_lock(&path)?.is_none() {
            found.push(format!("{} is held", path.display()));
        }
        let record = path.parent() == Some(&world.state.clones()) && before.bystander.is_some();
        if record && state::try_lock(&path)?.is_some() {
            found.push(format!("{} is not held by its clone", path.display()));
        }
    }
    Ok(found)
}

/// The savefile the record pins is there, and every byte of it is what its root hash says, unless it was damaged on purpose.
pub fn the_pinned_savefile_is_whole(world: &World, before: &Before) -> Found {
    let Some(pin) = world.pin(DVM)? else { return Ok(Vec::new()) };
    if before.damaged && before.pin.as_ref() == Some(&pin) {
        return Ok(Vec::new());
    }
    savefiles::verify(&world.state, DVM, &silent)?;
    Ok(match world.standing(DVM)? {
        Standing::Fresh | Standing::Stale(_) => Vec::new(),
        other => vec![format!("it is {other:?}")],
    })
}

/// Every name a guest was ever started under is stamped in the ledger, within the time a name rests: it cannot be given out
/// again. (That none was is noted by the host, [`rules_were_kept`].)
pub fn every_name_used_rests(world: &World, _: &Before) -> Found {
    let path = world.state.names();
    let io = || Error::io("read", &path);
    let ledger = fs::File::open(&path).map_err(io())?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let mut found = Vec::new();
    for slot in context::slots(&notes(world.folder())).map_err(io())? {
        let mut stamp = [0; 8];
        let read = ledger.read_exact_at(&mut stamp, u64::from(slot) * 8);
        if read.is_err() || now.abs_diff(u64::from_le_bytes(stamp)) >= QUARANTINE.as_secs() {
            found.push(format!("disp{slot} was used and does not rest"));
        }
    }
    Ok(found)
}

/// No process of this world runs but the bystander, and this process holds no guest's memory.
pub fn no_process_and_no_memory_is_left(world: &World, before: &Before) -> Found {
    let folder = world.folder().as_os_str().as_encoded_bytes();
    let io = || crate::operate::own_error("list processes");
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").map_err(io())?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let arguments = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if arguments.windows(folder.len()).any(|part| part == folder) && Some(pid) != before.bystander {
            found.push(format!("process {pid} is left"));
        }
    }
    let memory = context::memfd_name(&notes(world.folder()));
    for (fd, file) in descriptors().map_err(io())? {
        if file.to_string_lossy().contains(&memory) {
            found.push(format!("descriptor {fd} holds {}", file.display()));
        }
    }
    Ok(found)
}

/// The records of clones, whoever holds them.
fn clone_records(world: &World) -> Result<Vec<CloneRecord>> {
    let folder = world.state.clones();
    let io = || Error::io("list", &folder);
    let mut records = Vec::new();
    for entry in fs::read_dir(&folder).map_err(io())? {
        let entry = entry.map_err(io())?;
        let record = fs::read(entry.path()).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        let none = || CloneRecord {
            name: entry.file_name().to_string_lossy().into_owned(),
            dvm: String::new(),
            root_hash: String::new(),
            template: (String::new(), 0),
            pid: 0,
            keeping: Keeping::Launcher,
            started: 0,
            label: None,
            qube: None,
            power: Power::Running,
        };
        records.push(record.unwrap_or_else(none));
    }
    Ok(records)
}

/// Everything below a folder.
fn walk(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        all.push(entry.path());
        if entry.file_type()?.is_dir() {
            all.extend(walk(&entry.path())?);
        }
    }
    Ok(all)
}
