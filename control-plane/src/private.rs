//! The private volume of a halted AppVM made another one: grown, filled, taken over from another qube or from an earlier generation.
//!
//! Invariants: it is always the next generation, so what stands on the one before (disposables, savefiles, clones of it) is untouched; nothing is
//! left of an attempt cut short; while the qube runs itself, nobody gives it a generation.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::fcntl::Flock;

use crate::error::{Error, Kind, Result};
use crate::qube::{self, Class, Dvm, Qube};
use crate::state::{self, State};
use crate::templates::{self, VOLUME_MIB};
use crate::volume::{self, link_immutable, sync_folder};

/// Read and written piece by piece; a piece of zeros becomes a hole.
const PIECE: usize = 1 << 20;
const MIB: u64 = 1 << 20;

/// The size of a volume of at least so many bytes, in MiB.
pub fn mib_for(bytes: u64) -> Result<u64> {
    let mib = bytes.div_ceil(MIB);
    match VOLUME_MIB.contains(&mib) {
        true => Ok(mib),
        false => Err(Error::new(Kind::Usage, format!("a volume of {mib} MiB is too small or too large"))
            .hint(format!("sizes are from {} to {} MiB", VOLUME_MIB.start(), VOLUME_MIB.end()))),
    }
}

/// Grows it to at least so many bytes. Its file system is the guest's, which grows it.
pub fn grow(state: &State, name: &str, bytes: u64) -> Result<()> {
    let mib = mib_for(bytes)?;
    if mib == app(Qube::load(state, name)?)?.private_mib {
        return Ok(());
    }
    next(state, name, |dvm, to| {
        if mib < dvm.private_mib {
            let why =
                format!("the private volume of {name} has {} MiB: volumes do not shrink", dvm.private_mib);
            return Err(Error::new(Kind::Refused, why));
        }
        let copy =
            volume::unnamed_copy(&state.private_image(name, dvm.private_generation), &folder(state, name))?;
        copy.set_len(mib * MIB).map_err(Error::failed("grow the private volume"))?;
        volume::publish(&copy, to)?;
        Ok(mib)
    })
}

/// Makes it what that of `source` is, its size too.
pub fn take_over(state: &State, name: &str, source: &str) -> Result<()> {
    let from = app(Qube::load(state, source)?)?;
    link(state, name, &state.private_image(source, from.private_generation))
}

/// Makes it what it was in an earlier generation that is still there.
pub fn revert(state: &State, name: &str, generation: u64) -> Result<()> {
    link(state, name, &state.private_image(name, generation))
}

fn link(state: &State, name: &str, from: &Path) -> Result<()> {
    next(state, name, |_, to| {
        let bytes = fs::metadata(from).map_err(Error::io("look at", from))?.len();
        // One may be left of an attempt cut short.
        let _ = fs::remove_file(to);
        link_immutable(from, to).inspect_err(|_| drop(fs::remove_file(to)))?;
        Ok(bytes / MIB)
    })
}

/// Fills it with what `data` gives, and zeros behind that; more than fits is an error. With `bytes`, it gets that size.
///
/// No lock but the qube's own is held while data comes: whoever gives it may take long.
pub fn fill(state: &State, name: &str, data: &mut impl Read, bytes: Option<u64>) -> Result<()> {
    let given = bytes.map(mib_for).transpose()?;
    let not_running = qube::hold_running(state, name)?;
    let mib = given.unwrap_or(app(Qube::load(state, name)?)?.private_mib);
    let file = volume::unnamed(&folder(state, name))?;
    file.set_len(mib * MIB).map_err(Error::failed("make a volume"))?;
    let count = copy(data, &file, bytes.unwrap_or(mib * MIB))?;
    if bytes.is_some_and(|bytes| count < bytes) {
        return Err(Error::new(Kind::Refused, format!("the data ended after {count} bytes")));
    }
    next_held(state, name, &not_running, |_, to| volume::publish(&file, to).map(|()| mib))
}

/// Copies what `data` gives, which is at most `bytes_max`. Answers how much it was.
fn copy(data: &mut impl Read, file: &File, bytes_max: u64) -> Result<u64> {
    let (mut piece, mut at) = (vec![0u8; PIECE], 0u64);
    loop {
        let count = data.read(&mut piece).map_err(Error::failed("read the volume's data"))?;
        let read = piece.get(..count).unwrap_or_default();
        if read.is_empty() {
            return Ok(at);
        }
        if at + count as u64 > bytes_max {
            return Err(Error::new(Kind::Refused, "there is more data than the volume has room for"));
        }
        if read.iter().any(|byte| *byte != 0) {
            file.write_all_at(read, at).map_err(Error::failed("write the volume"))?;
        }
        at += count as u64;
    }
}

/// The generations before the current one that are there, oldest first.
pub fn earlier(state: &State, name: &str, current: u64) -> Result<Vec<u64>> {
    let folder = folder(state, name);
    let entries = fs::read_dir(&folder).map_err(Error::io("list", &folder))?;
    let number = |entry: fs::DirEntry| entry.file_name().to_str()?.strip_suffix(".img")?.parse::<u64>().ok();
    let mut all: Vec<u64> =
        entries.flatten().filter_map(number).filter(|generation| *generation < current).collect();
    all.sort_unstable();
    Ok(all)
}

fn folder(state: &State, name: &str) -> PathBuf {
    state.qube(name).join("private")
}

fn app(qube: Qube) -> Result<Dvm> {
    match qube.class {
        Class::AppVM(dvm) => Ok(dvm),
        _ => Err(Error::new(Kind::Usage, format!("{} is no AppVM", qube.name))),
    }
}

/// Has `make` put the next generation under its name, and the record name it; `make` answers its size in MiB.
fn next(state: &State, name: &str, make: impl FnOnce(&Dvm, &Path) -> Result<u64>) -> Result<()> {
    let not_running = qube::hold_running(state, name)?;
    next_held(state, name, &not_running, make)
}

fn next_held(
    state: &State,
    name: &str,
    _not_running: &Flock<File>,
    make: impl FnOnce(&Dvm, &Path) -> Result<u64>,
) -> Result<()> {
    // Neither what it is made from nor what no record names yet is collected meanwhile.
    let _in_use = state::lock_shared(&state.use_lock())?;
    let before = app(Qube::load(state, name)?)?;
    let generation = before.private_generation + 1;
    let mib = make(&before, &state.private_image(name, generation))?;
    sync_folder(&folder(state, name))?;
    let private_id = templates::random_id().map_err(Error::failed("draw an id"))?;
    qube::update_dvm(state, name, |dvm| {
        dvm.private_mib = mib;
        dvm.private_generation = generation;
        dvm.private_id = private_id;
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::repeat;

    /// Two AppVMs on one template, with private volumes of 32 MiB.
    fn two() -> (tempfile::TempDir, State) {
        let folder = tempfile::tempdir().unwrap();
        let state = State::open(&folder.path().join("state")).unwrap();
        let image = folder.path().join("image");
        fs::write(&image, [1; 4096]).unwrap();
        let files =
            templates::TemplateFiles { root: &image, kernel: &image, initrd: &image, cmdline: String::new() };
        templates::add_template(&state, "t", "black", &files).unwrap();
        for name in ["one", "two"] {
            let dvm = qube::tests::dvm(name).dvm().unwrap().clone();
            templates::add_dvm(&state, name, "red", Dvm { template: "t".into(), private_mib: 32, ..dvm })
                .unwrap();
        }
        (folder, state)
    }

    fn dvm(state: &State, name: &str) -> Dvm {
        Qube::load(state, name).unwrap().dvm().unwrap().clone()
    }

    fn byte(state: &State, name: &str, at: u64) -> u8 {
        let mut byte = [0];
        let path = state.private_image(name, dvm(state, name).private_generation);
        File::open(path).unwrap().read_exact_at(&mut byte, at).unwrap();
        byte[0]
    }

    #[test]
    fn a_volume_is_filled_grown_taken_over_and_reverted_as_generations_of_its_own() {
        let (_folder, state) = two();
        let before = dvm(&state, "one");
        fill(&state, "one", &mut repeat(7).take(9000), None).unwrap();
        assert_eq!((byte(&state, "one", 8999), byte(&state, "one", 9000)), (7, 0));
        grow(&state, "one", (40 << 20) - 5).unwrap();
        assert_eq!((byte(&state, "one", 8999), dvm(&state, "one").private_mib), (7, 40));
        take_over(&state, "two", "one").unwrap();
        let (one, two) = (dvm(&state, "one"), dvm(&state, "two"));
        assert_eq!((byte(&state, "two", 8999), two.private_mib, two.private_generation), (7, 40, 2));
        assert!(one.private_id != before.private_id && one.private_id != two.private_id);
        fill(&state, "one", &mut repeat(9).take(33 << 20), Some(33 << 20)).unwrap();
        assert_eq!((byte(&state, "one", 8999), byte(&state, "two", 8999)), (9, 7), "they share nothing");
        assert_eq!(dvm(&state, "one").private_mib, 33);
        assert_eq!(earlier(&state, "one", 4).unwrap(), [1, 2, 3]);
        revert(&state, "one", 2).unwrap();
        assert_eq!((byte(&state, "one", 8999), dvm(&state, "one").private_mib), (7, 32));
        assert_eq!(dvm(&state, "one").private_generation, 5);
    }

    #[test]
    fn what_cannot_be_leaves_it_as_it_was() {
        let (_folder, state) = two();
        let before = dvm(&state, "one");
        let refused = [
            grow(&state, "one", 1 << 20),
            grow(&state, "one", 31 << 20),
            grow(&state, "one", u64::MAX),
            fill(&state, "one", &mut repeat(1).take((32 << 20) + 1), None),
            fill(&state, "one", &mut repeat(1).take(1), Some(40 << 20)),
            fill(&state, "one", &mut repeat(1).take((40 << 20) + 1), Some(40 << 20)),
            take_over(&state, "one", "t"),
            revert(&state, "one", 9),
            grow(&state, "t", 1 << 30),
        ];
        assert!(refused.iter().all(Result::is_err), "{refused:?}");
        let running = qube::hold_running(&state, "one").unwrap();
        assert_eq!(grow(&state, "one", 40 << 20).unwrap_err().kind, Kind::Refused);
        drop(running);
        assert_eq!(dvm(&state, "one"), before);
        assert_eq!(fs::read_dir(state.qube("one").join("private")).unwrap().count(), 1);
    }
}
