//! Making and removing qubes: TemplateVMs from a root image and a kernel, DVM templates on them.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::clones;
use crate::error::{Error, Kind, Result};
use crate::inputs;
use crate::qube::{self, Class, Dvm, Qube, Template};
use crate::state::{self, State};

/// Copied and hashed piece by piece; a piece of zeros becomes a hole.
const PIECE: usize = 1 << 20;
/// How the folder of a qube that is being removed ends.
const REMOVED: &str = ".removed";
/// The sizes a volume may have, in MiB: room for a file system, and what the hosts' overlays can hold.
const VOLUME_MIB: std::ops::RangeInclusive<u64> = 32..=4 << 20;

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
    let before = match Qube::load(state, name) {
        Ok(qube) => Some(qube.template()?.clone()),
        Err(error) if error.kind == Kind::Usage => None,
        Err(error) => return Err(error),
    };
    let generation = before.as_ref().map_or(1, |template| template.generation + 1);
    let folder = state.root_generation(name, generation);
    let aside = folder.with_extension("tmp");
    let _ = fs::remove_dir_all(&aside);
    state::make_folder(&aside)?;
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
    let _ = fs::remove_dir_all(&folder);
    fs::rename(&aside, &folder).map_err(Error::io("rename to", &folder))?;
    sync_folder(&state.qube(name).join("root"))?;
    let class = Class::TemplateVM(template);
    Qube { name: name.to_owned(), label: label.to_owned(), class }.save(state)?;
    Ok(generation)
}

/// Makes a DVM template, or changes the settings of one that is there; its private volume and savefile stay.
pub fn add_dvm(state: &State, name: &str, label: &str, mut dvm: Dvm) -> Result<()> {
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
                .hint("its size stays as it was made"));
            }
            dvm.private_generation = before.private_generation;
            dvm.private_id = before.private_id;
            dvm.savefile = before.savefile;
        }
        Ok(_) => return Err(Error::new(Kind::Usage, format!("{name} is a TemplateVM"))),
        Err(error) if error.kind == Kind::Usage => dvm.private_id = make_private(state, name, &dvm)?,
        Err(error) => return Err(error),
    }
    Qube { name: name.to_owned(), label: label.to_owned(), class: Class::AppVM(dvm) }.save(state)
}

/// Removes a qube that nothing needs any more.
pub fn remove(state: &State, name: &str) -> Result<()> {
    let qube = Qube::load(state, name)?;
    let users: Vec<String> = Qube::all(state)?
        .into_iter()
        .filter(|other| matches!(&other.class, Class::AppVM(dvm) if dvm.template == name))
        .map(|other| other.name)
        .collect();
    if !users.is_empty() {
        return Err(Error::new(Kind::Refused, format!("{name} is the template of {}", users.join(", ")))
            .hint(format!("`dispvm-qube rm {}` first", users[0])));
    }
    let running: Vec<String> =
        clones::list(state)?.into_iter().filter(|clone| clone.dvm == name).map(|clone| clone.name).collect();
    if !running.is_empty() {
        return Err(Error::new(Kind::Refused, format!("{} made from {name} still run", running.join(", "))));
    }
    // Renamed first, so that a removal cut short leaves no half qube under its name.
    let folder = state.qube(&qube.name);
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
        let mut id = [0u8; 8];
        File::open("/dev/urandom")?.read_exact(&mut id)?;
        Ok(id.iter().map(|byte| format!("{byte:02x}")).collect())
    };
    make().map_err(Error::io("make the private volume", &path))
}

/// Copies a file, leaving holes where it is zero. Answers the blake3 of its bytes, and how many there are.
fn copy_immutable(from: &Path, to: &PathBuf) -> Result<(String, u64)> {
    let copy = || -> io::Result<(String, u64)> {
        let mut source = File::open(from)?;
        let target = File::options().write(true).create_new(true).open(to)?;
        let (mut hasher, mut at) = (blake3::Hasher::new(), 0u64);
        let mut piece = vec![0u8; PIECE];
        loop {
            let count = source.read(&mut piece)?;
            if count == 0 {
                break;
            }
            hasher.update(&piece[..count]);
            if piece[..count].iter().any(|byte| *byte != 0) {
                target.write_all_at(&piece[..count], at)?;
            }
            at += count as u64;
        }
        target.set_len(at)?;
        state::make_immutable(&target)?;
        target.sync_all()?;
        Ok((hasher.finalize().to_hex().to_string(), at))
    };
    copy().map_err(Error::io("copy", from))
}

fn sync_folder(path: &Path) -> Result<()> {
    File::open(path).and_then(|folder| folder.sync_all()).map_err(Error::io("sync", path))
}

#[cfg(test)]
mod tests {
    use super::*;

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
