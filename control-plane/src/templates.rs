//! Making and removing qubes: TemplateVMs from a root image and a kernel, AppVMs on them, disposables with a record; and the next
//! generations of what they keep.
//!
//! Invariants: a generation's files stand whole under their names before the record names it, and are never written again.
//! All of it happens under the record's lock; while a qube runs itself ([`crate::run`]), nobody else gives it a generation.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use nix::fcntl::Flock;

use crate::admin::settings::{Owner, Settings};
use crate::clones;
use crate::daemon;
use crate::error::{Error, Kind, Result};
use crate::inputs;
use crate::qube::{self, Class, Disposable, Dvm, Qube, Template};
use crate::state::{self, State};
use crate::volume::{self, copy_immutable, link_immutable, sync_folder};

/// How the folder of a qube that is being removed ends.
const REMOVED: &str = ".removed";
/// The sizes a volume may have, in MiB: room for a file system, and what the hosts' overlays can hold.
pub(crate) const VOLUME_MIB: std::ops::RangeInclusive<u64> = 32..=4 << 20;

/// The files of a template's new generation.
pub struct TemplateFiles<'a> {
    /// A raw root image, a whole number of pages.
    pub root: &'a Path,
    /// The kernel.
    pub kernel: &'a Path,
    /// The initrd.
    pub initrd: &'a Path,
    /// The kernel's command line.
    pub cmdline: String,
}

/// Makes a TemplateVM, or gives one that is there its next generation. The files are copied and never written again.
/// Answers the generation; the same files as before make none.
pub fn add_template(state: &State, name: &str, label: &str, files: &TemplateFiles<'_>) -> Result<u64> {
    qube::check_name(name)?;
    let _lock = state::lock_in(&state.qube(name), "record.lock")?;
    let _not_running = qube::hold_running(state, name)?;
    let before = match Qube::load(state, name) {
        Ok(qube) => Some(qube.template()?.clone()),
        Err(error) if error.kind == Kind::Usage => None,
        Err(error) => return Err(error),
    };
    let generation = before.as_ref().map_or(1, |template| template.generation + 1);
    let aside = make_aside(state, name, generation)?;
    let made = (|| {
        let (root_hash, root_bytes) = copy_immutable(files.root, &aside.join("root.img"))?;
        if root_bytes == 0 || root_bytes % engine::units::PAGE_SIZE != 0 {
            return Err(Error::new(Kind::Usage, format!("{} is no raw disk image", files.root.display())));
        }
        let (kernel_hash, _) = copy_immutable(files.kernel, &aside.join("vmlinuz"))?;
        let (initrd_hash, _) = copy_immutable(files.initrd, &aside.join("initrd"))?;
        Ok(Template {
            generation,
            root_hash,
            root_bytes,
            kernel_hash,
            initrd_hash,
            cmdline: files.cmdline.clone(),
        })
    })();
    let template = made.inspect_err(|_| drop(fs::remove_dir_all(&aside)))?;
    if let Some(before) = before.filter(|before| Template { generation, ..before.clone() } == template) {
        let _ = fs::remove_dir_all(&aside);
        return Ok(before.generation);
    }
    install_generation(state, name, label, &aside, template)
}

/// Makes `root`, a file without a name which a TemplateVM of generation `since` has written to, its next generation, with the
/// kernel and initrd it has. `None`: it is the root that is there already.
pub fn next_root(state: &State, name: &str, since: u64, root: &File) -> Result<Option<u64>> {
    let root_hash = volume::hash(root).map_err(Error::failed("read the root volume"))?;
    let _lock = state::lock(&state.qube(name).join("record.lock"))?;
    let qube = Qube::load(state, name)?;
    let before = qube.template()?;
    expect_generation(name, since, before.generation)?;
    if before.root_hash == root_hash {
        return Ok(None);
    }
    let template = Template { generation: since + 1, root_hash, ..before.clone() };
    let (old, aside) = (state.root_generation(name, since), make_aside(state, name, since + 1)?);
    let filled = volume::publish(root, &aside.join("root.img"))
        .and_then(|()| link_immutable(&old.join("vmlinuz"), &aside.join("vmlinuz")))
        .and_then(|()| link_immutable(&old.join("initrd"), &aside.join("initrd")));
    filled.inspect_err(|_| drop(fs::remove_dir_all(&aside)))?;
    install_generation(state, name, &qube.label, &aside, template).map(Some)
}

/// Makes `private`, a file without a name which a DVM template with the private generation `since` has written to, the next
/// generation. `None`: its bytes are those that are there already.
pub fn next_private(state: &State, name: &str, since: u64, private: &File) -> Result<Option<u64>> {
    let _lock = state::lock(&state.qube(name).join("record.lock"))?;
    let mut qube = Qube::load(state, name)?;
    let Class::AppVM(dvm) = &mut qube.class else {
        return Err(Error::new(Kind::Usage, format!("{name} is a TemplateVM")));
    };
    expect_generation(name, since, dvm.private_generation)?;
    let old = state.private_image(name, since);
    let same = File::open(&old).and_then(|old| volume::same_bytes(&old, private));
    if same.map_err(Error::io("compare with", &old))? {
        return Ok(None);
    }
    volume::publish(private, &state.private_image(name, since + 1))?;
    sync_folder(&state.qube(name).join("private"))?;
    dvm.private_generation = since + 1;
    dvm.private_id = random_id().map_err(Error::failed("draw an id"))?;
    qube.save(state)?;
    Ok(Some(since + 1))
}

fn expect_generation(name: &str, since: u64, now: u64) -> Result<()> {
    match since == now {
        true => Ok(()),
        false => Err(Error::new(
            Kind::Failed,
            format!("{name} was started from generation {since} and has got generation {now} meanwhile"),
        )),
    }
}

/// An empty folder beside that of the generation to make.
fn make_aside(state: &State, name: &str, generation: u64) -> Result<PathBuf> {
    let aside = state.root_generation(name, generation).with_extension("tmp");
    let _ = fs::remove_dir_all(&aside);
    state::make_folder(&aside)?;
    Ok(aside)
}

/// Gives a whole generation its name and has the record name it.
fn install_generation(
    state: &State,
    name: &str,
    label: &str,
    aside: &Path,
    template: Template,
) -> Result<u64> {
    let generation = template.generation;
    let folder = state.root_generation(name, generation);
    let _ = fs::remove_dir_all(&folder);
    sync_folder(aside)?;
    fs::rename(aside, &folder).map_err(Error::io("rename to", &folder))?;
    sync_folder(&state.qube(name).join("root"))?;
    if !state.qube(name).join("qube.toml").exists() {
        begin_features(state, name)?;
    }
    let class = Class::TemplateVM(template);
    Qube { name: name.to_owned(), label: label.to_owned(), class }.save(state)?;
    Ok(generation)
}

/// What Qubes' agents tell of a template once it has run, and ours can do in each: `qubes.FeaturesRequest` sets these
/// (QubesOS/qubes-core-admin `qubes/ext/core_features.py`).
fn begin_features(state: &State, name: &str) -> Result<()> {
    let owner = Owner::Qube(name.to_owned());
    let mut settings = Settings::load(state, &owner)?;
    settings.features.entry("vmexec".to_owned()).or_insert_with(|| "1".to_owned());
    settings.save(state, &owner)
}

/// Makes a DVM template, or changes the settings of one that is there; its private volume and savefile stay.
pub fn add_dvm(state: &State, name: &str, label: &str, dvm: Dvm) -> Result<()> {
    add_dvm_with(state, name, label, dvm, || Ok(()))
}

/// The same, with what stands beside the record written by `begin` before there is one: no qube is ever there without it.
pub fn add_dvm_with(
    state: &State,
    name: &str,
    label: &str,
    mut dvm: Dvm,
    begin: impl FnOnce() -> Result<()>,
) -> Result<()> {
    qube::check_name(name)?;
    Qube::load(state, &dvm.template)?.template()?;
    inputs::parse_nic(&dvm.net)?;
    qube::check_label(label)?;
    if !VOLUME_MIB.contains(&dvm.private_mib) || !VOLUME_MIB.contains(&dvm.volatile_mib) {
        return Err(Error::new(Kind::Usage, "a volume is too small or too large").hint(format!(
            "sizes are from {} to {} MiB",
            VOLUME_MIB.start(),
            VOLUME_MIB.end()
        )));
    }
    let _lock = state::lock_in(&state.qube(name), "record.lock")?;
    match Qube::load(state, name) {
        Ok(Qube { class: Class::AppVM(before), .. }) => {
            if before.private_mib != dvm.private_mib {
                return Err(Error::new(
                    Kind::Usage,
                    format!("{name} has a private volume of {} MiB", before.private_mib),
                )
                .hint(format!("`qvm-volume resize {name}:private SIZE` makes it larger")));
            }
            dvm.private_generation = before.private_generation;
            dvm.private_id = before.private_id;
            dvm.savefile = before.savefile;
        }
        Ok(_) => return Err(Error::new(Kind::Usage, format!("{name} is no AppVM"))),
        Err(error) if error.kind == Kind::Usage => dvm.private_id = make_private(state, name, &dvm)?,
        Err(error) => return Err(error),
    }
    begin()?;
    Qube { name: name.to_owned(), label: label.to_owned(), class: Class::AppVM(dvm) }.save(state)
}

/// Makes a disposable with a record of its own. What stands beside the record is written by `begin` before there is one.
pub fn add_disposable(
    state: &State,
    name: &str,
    label: &str,
    disposable: Disposable,
    begin: impl FnOnce() -> Result<()>,
) -> Result<()> {
    qube::check_name(name)?;
    qube::check_label(label)?;
    Qube::load(state, &disposable.template)?.dvm()?;
    let _lock = state::lock_in(&state.qube(name), "record.lock")?;
    match Qube::load(state, name) {
        Ok(_) => return Err(Error::new(Kind::Refused, format!("there is a qube {name} already"))),
        Err(error) if error.kind == Kind::Usage => {}
        Err(error) => return Err(error),
    }
    begin()?;
    Qube { name: name.to_owned(), label: label.to_owned(), class: Class::DispVM(disposable) }.save(state)
}

/// Removes a disposable that has ended, if it is one that does not outlive its end. `Ok` also where it is not, or runs again.
pub fn remove_ended(state: &State, name: &str) -> Result<()> {
    if !ends_with_its_record(state, name) {
        return Ok(());
    }
    match qube::hold_running(state, name) {
        Ok(not_running) => remove_ending(state, name, &not_running),
        Err(error) if matches!(error.kind, Kind::Refused | Kind::Usage) => Ok(()),
        Err(error) => Err(error),
    }
}

/// The same, by whoever holds it ([`qube::hold_running`]), before it counts as halted: nobody sees it then.
pub fn remove_ending(state: &State, name: &str, _held: &Flock<File>) -> Result<()> {
    match ends_with_its_record(state, name) {
        true => take_away(state, name),
        false => Ok(()),
    }
}

fn ends_with_its_record(state: &State, name: &str) -> bool {
    let qube = Qube::load(state, name);
    qube.is_ok_and(|qube| matches!(&qube.class, Class::DispVM(disposable) if disposable.auto_cleanup))
}

/// Removes a qube that nothing needs any more.
pub fn remove(state: &State, name: &str) -> Result<()> {
    let qube = Qube::load(state, name)?;
    let users: Vec<String> = Qube::all(state)?
        .into_iter()
        .filter(|other| other.based_on() == Some(name))
        .map(|other| other.name)
        .collect();
    if !users.is_empty() {
        return Err(Error::new(Kind::Refused, format!("{name} is the template of {}", users.join(", ")))
            .hint(format!("`dispvm-qube rm {}` first", users[0])));
    }
    let _not_running = qube::hold_running(state, name)?;
    daemon::client::let_go(state, name);
    let running: Vec<String> =
        clones::list(state)?.into_iter().filter(|clone| clone.dvm == name).map(|clone| clone.name).collect();
    if !running.is_empty() {
        return Err(Error::new(Kind::Refused, format!("{} made from {name} still run", running.join(", ")))
            .hint("a disposable ends with the command that started it"));
    }
    take_away(state, &qube.name)
}

/// Renamed first, so that a removal cut short leaves no half qube under its name.
fn take_away(state: &State, name: &str) -> Result<()> {
    let folder = state.qube(name);
    let aside = state.qubes().join(format!(".{name}{REMOVED}"));
    let _ = fs::remove_dir_all(&aside);
    fs::rename(&folder, &aside).map_err(Error::io("remove", &folder))?;
    remove_aside(&aside)
}

/// Removes what commands cut short have left: half removed qubes, half made ones, half written records.
pub fn remove_leftovers(state: &State) -> Result<()> {
    let folder = state.qubes();
    for entry in fs::read_dir(&folder).map_err(Error::io("list", &folder))?.flatten() {
        let path = entry.path();
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.ends_with(REMOVED) {
            remove_aside(&path)?;
        } else if qube::check_name(&name).is_ok() && path.is_dir() {
            engine::savefile::sweep(&path).map_err(|error| {
                Error::new(Kind::Failed, "half written records cannot be removed").because(error)
            })?;
            remove_half_made(state, &name)?;
        }
    }
    Ok(())
}

/// Removes the folder of a qube that never got its record, unless its maker is at it.
fn remove_half_made(state: &State, name: &str) -> Result<()> {
    let folder = state.qube(name);
    if folder.join("qube.toml").exists() {
        return Ok(());
    }
    let Some(_lock) = state::try_lock(&folder.join("record.lock"))? else { return Ok(()) };
    if folder.join("qube.toml").exists() {
        return Ok(());
    }
    let aside = state.qubes().join(format!(".{name}{REMOVED}"));
    let _ = fs::remove_dir_all(&aside);
    fs::rename(&folder, &aside).map_err(Error::io("remove", &folder))?;
    remove_aside(&aside)
}

/// Removes a folder that nothing names any more; somebody else may be at it, or done with it.
fn remove_aside(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", path)(error)),
        _ => Ok(()),
    }
}

/// An empty private volume: the guest makes its file system, as in Qubes.
fn make_private(state: &State, name: &str, dvm: &Dvm) -> Result<String> {
    let path = state.private_image(name, dvm.private_generation);
    state::make_folder(path.parent().unwrap_or(Path::new("/")))?;
    let make = || -> io::Result<String> {
        // One may be left of an attempt cut short.
        let _ = fs::remove_file(&path);
        let file = File::options().write(true).create_new(true).open(&path)?;
        file.set_len(dvm.private_mib << 20)?;
        state::make_immutable(&file)?;
        random_id()
    };
    make().map_err(Error::io("make the private volume", &path))
}

/// What no other generation has.
pub(crate) fn random_id() -> io::Result<String> {
    let mut id = [0u8; 8];
    File::open("/dev/urandom")?.read_exact(&mut id)?;
    Ok(id.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    fn files(folder: &Path, byte: u8) -> PathBuf {
        let path = folder.join(format!("image-{byte}"));
        let mut bytes = vec![0u8; 3 << 20];
        bytes[5000] = byte;
        fs::write(&path, bytes).unwrap();
        path
    }

    fn add(state: &State, folder: &Path, byte: u8) -> u64 {
        let image = files(folder, byte);
        let files = TemplateFiles { root: &image, kernel: &image, initrd: &image, cmdline: "quiet".into() };
        add_template(state, "t", "black", &files).unwrap()
    }

    #[test]
    fn a_changed_root_is_a_new_generation_and_the_same_root_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let state = State::open(&folder.path().join("state")).unwrap();
        assert_eq!(add(&state, folder.path(), 1), 1);
        assert_eq!(add(&state, folder.path(), 1), 1);
        assert_eq!(add(&state, folder.path(), 2), 2);
        let image = state.root_generation("t", 2).join("root.img");
        assert_eq!(fs::read(&image).unwrap()[5000], 2);
        assert!(fs::metadata(&image).unwrap().permissions().readonly());
        assert!(state.root_generation("t", 1).join("root.img").exists(), "the old one may still be needed");
        assert_eq!(fs::read_dir(state.qube("t").join("root")).unwrap().count(), 2);
    }

    /// A copy of the file at `path` in which one byte is another.
    fn written(path: &Path, byte: u8) -> File {
        let copy = volume::unnamed_copy(path, path.parent().unwrap()).unwrap();
        copy.write_all_at(&[byte], 9000).unwrap();
        copy
    }

    #[test]
    fn what_a_run_has_written_is_the_next_generation_and_nothing_written_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let state = State::open(&folder.path().join("state")).unwrap();
        add(&state, folder.path(), 1);
        let image = |generation| state.root_generation("t", generation).join("root.img");
        assert_eq!(next_root(&state, "t", 1, &written(&image(1), 0)).unwrap(), None);
        assert!(!image(2).exists());
        assert_eq!(next_root(&state, "t", 1, &written(&image(1), 7)).unwrap(), Some(2));
        let qube = Qube::load(&state, "t").unwrap();
        let template = qube.template().unwrap();
        let bytes = fs::read(image(2)).unwrap();
        assert_eq!((bytes[5000], bytes[9000], bytes.len()), (1, 7, 3 << 20));
        assert_eq!(template.root_hash, blake3::hash(&bytes).to_hex().to_string());
        assert_eq!((template.generation, &qube.label[..]), (2, "black"));
        for file in ["vmlinuz", "initrd"] {
            let of = |generation| fs::read(state.root_generation("t", generation).join(file)).unwrap();
            assert_eq!(of(1), of(2));
        }
        // The same files as the first generation's are a change again.
        assert_eq!(add(&state, folder.path(), 1), 3);
        let error = next_root(&state, "t", 2, &written(&image(2), 8)).unwrap_err();
        assert!(error.to_string().contains("meanwhile"), "{error}");
        assert_eq!(fs::read_dir(state.qube("t").join("root")).unwrap().count(), 3);
    }

    #[test]
    fn a_dvm_template_gets_a_private_generation_of_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let state = State::open(&folder.path().join("state")).unwrap();
        add(&state, folder.path(), 1);
        let mut dvm = crate::qube::tests::dvm("d").dvm().unwrap().clone();
        dvm.template = "t".into();
        add_dvm(&state, "d", "red", dvm).unwrap();
        let record = || Qube::load(&state, "d").unwrap().dvm().unwrap().clone();
        let (before, image) = (record(), state.private_image("d", 1));
        assert_eq!(next_private(&state, "d", 1, &written(&image, 0)).unwrap(), None);
        assert_eq!(record(), before);
        assert_eq!(next_private(&state, "d", 1, &written(&image, 7)).unwrap(), Some(2));
        assert_eq!(record().private_generation, 2);
        assert_ne!(record().private_id, before.private_id);
        let image = File::open(state.private_image("d", 2)).unwrap();
        let mut byte = [0];
        image.read_exact_at(&mut byte, 9000).unwrap();
        assert_eq!((byte[0], image.metadata().unwrap().len()), (7, before.private_mib << 20));
        assert!(next_private(&state, "d", 1, &image).is_err());
    }

    #[test]
    fn a_template_that_runs_is_neither_replaced_nor_removed() {
        let folder = tempfile::tempdir().unwrap();
        let state = State::open(&folder.path().join("state")).unwrap();
        add(&state, folder.path(), 1);
        let running = qube::hold_running(&state, "t").unwrap();
        let image = files(folder.path(), 2);
        let files = TemplateFiles { root: &image, kernel: &image, initrd: &image, cmdline: "quiet".into() };
        for error in [
            add_template(&state, "t", "black", &files).unwrap_err(),
            remove(&state, "t").unwrap_err(),
            qube::hold_running(&state, "t").map(drop).unwrap_err(),
        ] {
            assert_eq!((error.kind, error.to_string().as_str()), (Kind::Refused, "t is running"));
        }
        drop(running);
        assert_eq!(add_template(&state, "t", "black", &files).unwrap(), 2);
    }

    #[test]
    fn what_killed_commands_left_of_qubes_is_removed_and_what_is_being_made_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let state = State::open(&folder.path().join("state")).unwrap();
        add(&state, folder.path(), 1);
        fs::write(state.qube("t").join(".qube.toml.1.tmp"), "half").unwrap();
        for name in ["half", "busy"] {
            state::make_folder(&state.root_generation(name, 1).with_extension("tmp")).unwrap();
        }
        state::make_folder(&state.qubes().join(".gone.removed")).unwrap();
        let lock = state::lock_in(&state.qube("busy"), "record.lock").unwrap();
        remove_leftovers(&state).unwrap();
        assert!(!state.qube("half").exists() && state.qube("busy").exists());
        assert!(!state.qube("t").join(".qube.toml.1.tmp").exists());
        drop(lock);
        remove_leftovers(&state).unwrap();
        let left: Vec<_> =
            fs::read_dir(state.qubes()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["t"]);
        assert_eq!(Qube::load(&state, "t").unwrap().template().unwrap().generation, 1);
    }

    #[test]
    fn a_template_in_use_is_not_removed() {
        let folder = tempfile::tempdir().unwrap();
        let state = State::open(&folder.path().join("state")).unwrap();
        add(&state, folder.path(), 1);
        let mut dvm = crate::qube::tests::dvm("d").dvm().unwrap().clone();
        dvm.template = "t".into();
        add_dvm(&state, "d", "red", dvm).unwrap();
        assert_eq!(remove(&state, "t").unwrap_err().kind, Kind::Refused);
        remove(&state, "d").unwrap();
        remove(&state, "t").unwrap();
        assert_eq!(fs::read_dir(state.qubes()).unwrap().count(), 0);
    }
}
