//! The hot image: what hypervisors map. Verified, uncompressed, sparse, one set per savefile, shared by all its clones.
//!
//! Invariants:
//! - a set that [`HotImage::find`] finds is whole: it was decoded from a savefile with exactly this root hash, every chunk verified,
//!   and got its name by a rename when it was complete;
//! - it is of this boot. Its name carries the kernel's boot id, because it is not synced: after a crash its pages may be
//!   anything, so a set of another boot is never found, and is swept by the next admission;
//! - its files are read-only (0444) in a folder only its owner enters, and are never written again: a new savefile is a new set;
//! - admission, eviction and sweep hold one lock on the folder, and the kernel drops it when its holder dies. So what lies aside while
//!   the lock is held was left by a killed admission, and is removed;
//! - eviction takes away names only: clones that have the files open keep them.
//!
//! Layout: `<hot root>/<root hash>-<boot id>/` with `memory.img`, `device-state`, one file per delta, and `hot.json`, which says
//! what the others are.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use nix::fcntl::{Flock, FlockArg};
use nix::sys::memfd::{memfd_create, MemFdCreateFlag};
use serde::{Deserialize, Serialize};

use super::working_set;
use crate::savefile::{
    is_volume_name, DeviceState, Error, ImageId, ImageOutput, Manifest, OnProgress, PageMap, ReadBackend,
    RootHash, Savefile, VolumeInfo, MANIFEST_MAX,
};
use crate::units::{ByteCount, PageRange};

const MEMORY: &str = "memory.img";
const DEVICE_STATE: &str = "device-state";
const INDEX: &str = "hot.json";
/// A manifest and some names; what is longer is cut, and is then no JSON.
const INDEX_MAX: ByteCount = ByteCount(2 * MANIFEST_MAX.0);
const LOCK: &str = ".lock";
const ASIDE: &str = ".aside";

/// Turns a decoded delta into the file that the host stacks on the volume's base.
pub trait StackDelta {
    /// Writes to `out` (empty, readable and writable) what the host opens as the volume's overlay.
    ///
    /// `raw` is as long as the volume and holds the delta's data pages at their places. `map` tells a zero page from one
    /// that is as the base: in `raw` both are holes.
    fn stack(&self, volume: &VolumeInfo, map: &PageMap, raw: &File, out: &File) -> io::Result<()>;

    /// The name of that file for a volume: "root.qcow2".
    fn file_name(&self, volume: &str) -> String;
}

/// An admitted set of images.
#[derive(Debug)]
pub struct HotImage {
    /// The folder it lies in.
    pub dir: PathBuf,
    /// The root hash of its savefile.
    pub root: RootHash,
    /// The savefile's manifest.
    pub manifest: Manifest,
    /// As in [`DeviceState::kind`].
    pub device_state_kind: String,
    /// As in [`DeviceState::version`].
    pub device_state_version: u32,
    /// Its files.
    pub files: HotFiles,
}

/// The files of a hot image, opened read-only: what a host restores a clone from.
#[derive(Debug)]
pub struct HotFiles {
    /// Guest memory, raw and sparse.
    pub memory: File,
    /// The host's device state, as it gave it.
    pub device_state: File,
    /// Volume name and the file that the host stacks on its base, one per volume that has a delta.
    pub deltas: Vec<(String, File)>,
    /// The pages of memory to be read ahead when they are not in the page cache: sorted, disjoint, within memory.
    pub working_set: Vec<PageRange>,
}

/// `hot.json`: what the files of a set are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HotIndex {
    manifest: Manifest,
    device_state_kind: String,
    device_state_version: u32,
    /// Volume name and file name.
    deltas: Vec<(String, String)>,
}

impl HotIndex {
    /// Reads the index. Error: what is wrong with it. The files it names lie in the set's own folder.
    pub fn parse(bytes: &[u8]) -> Result<HotIndex, String> {
        let index: HotIndex = serde_json::from_slice(bytes).map_err(|err| err.to_string())?;
        match index.deltas.iter().find(|(_, file)| !is_volume_name(file)) {
            Some((volume, file)) => Err(format!("the delta of volume {volume} cannot be called {file:?}")),
            None => Ok(index),
        }
    }

    /// The names of the deltas' files.
    pub fn delta_files(&self) -> impl Iterator<Item = &str> {
        self.deltas.iter().map(|(_, file)| file.as_str())
    }

    /// The index's bytes.
    pub fn to_bytes(&self) -> Result<Vec<u8>, String> {
        serde_json::to_vec(self).map_err(|err| err.to_string())
    }
}

impl HotImage {
    /// Opens the admitted set of a savefile, or answers `None` when there is none. No hashing: a few opens and one small read.
    ///
    /// Errors: the set is there and cannot be opened. Whoever gets one may evict the set and admit it again.
    pub fn find(hot_root: &Path, root: &RootHash) -> Result<Option<HotImage>, Error> {
        let dir = hot_root.join(set_name(root)?);
        let index = match File::open(dir.join(INDEX)) {
            Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened.map_err(Error::io("open the index of the hot image", &dir))?,
        };
        open_set(dir, *root, index).map(Some)
    }

    /// Finds the set, or makes it: reads the savefile, verifies it against the pinned root, decodes it, stacks its deltas.
    ///
    /// Of several at once one does the work, the others wait and find it. Killed at any instant, it leaves nothing that
    /// `find` would find and the next admission would not remove. Errors: those of [`Savefile::open`] and
    /// [`Savefile::decode`]; those of `stack` and of the file system. After any, nothing is left behind.
    pub fn admit(
        savefile: &Path,
        expected: &RootHash,
        hot_root: &Path,
        stack: &dyn StackDelta,
        backend: ReadBackend,
        progress: OnProgress,
    ) -> Result<HotImage, Error> {
        if let Some(found) = HotImage::find(hot_root, expected)? {
            return Ok(found);
        }
        let locked = lock_folder(hot_root)?;
        sweep_locked(&locked, hot_root)?;
        if let Some(found) = HotImage::find(hot_root, expected)? {
            return Ok(found);
        }
        let savefile = Savefile::open(savefile, Some(expected))?;
        let aside = AsideFolder::create(hot_root)?;
        fill(&aside.path, &savefile, stack, backend, progress)?;
        aside.commit(&hot_root.join(set_name(expected)?))?;
        let gone = io::Error::from(io::ErrorKind::NotFound);
        HotImage::find(hot_root, expected)?
            .ok_or_else(|| Error::io("find the hot image just made in", hot_root)(gone))
    }

    /// Removes the set of a savefile; answers whether there was one. Clones that run from it are not disturbed.
    pub fn evict(hot_root: &Path, root: &RootHash) -> Result<bool, Error> {
        let locked = lock_folder(hot_root)?;
        sweep_locked(&locked, hot_root)?;
        evict_locked(&locked, hot_root, &set_name(root)?)
    }

    /// Removes every set but those to keep; answers how many went.
    pub fn evict_all_but(hot_root: &Path, keep: &[RootHash]) -> Result<usize, Error> {
        let locked = lock_folder(hot_root)?;
        sweep_locked(&locked, hot_root)?;
        let mut evicted = 0;
        for (name, root) in sets(hot_root)? {
            if !keep.contains(&root) && evict_locked(&locked, hot_root, &name)? {
                evicted += 1;
            }
        }
        Ok(evicted)
    }

    /// The root hashes of all admitted sets of this boot.
    pub fn list(hot_root: &Path) -> Result<Vec<RootHash>, Error> {
        let boot = boot_id()?;
        let all = match sets(hot_root) {
            Err(err) if err.is_missing() => return Ok(Vec::new()),
            all => all?,
        };
        Ok(all.into_iter().filter(|(name, _)| name.ends_with(boot)).map(|(_, root)| root).collect())
    }
}

fn open_set(dir: PathBuf, root: RootHash, index: File) -> Result<HotImage, Error> {
    let mut json = Vec::new();
    let step = "read the index of the hot image";
    index.take(INDEX_MAX.0).read_to_end(&mut json).map_err(Error::io(step, &dir))?;
    let index = HotIndex::parse(&json).map_err(|why| Error::io(step, &dir)(io::Error::other(why)))?;
    let open = |name: &str| {
        let path = dir.join(name);
        File::open(&path).map_err(Error::io("open the hot image's", &path))
    };
    let memory = open(MEMORY)?;
    let found = memory.metadata().map_err(Error::io("look at the memory of the hot image", &dir))?.len();
    if found != index.manifest.memory_bytes {
        let what = format!("its {MEMORY} has {found} bytes, the guest has {}", index.manifest.memory_bytes);
        return Err(Error::Mismatch { path: dir, what });
    }
    let deltas = index.deltas.into_iter().map(|(volume, name)| Ok((volume, open(&name)?)));
    let deltas = deltas.collect::<Result<_, Error>>()?;
    let pages = ByteCount(found).pages_covering();
    let working_set = working_set::bounded(index.manifest.working_set().collect(), pages);
    let files = HotFiles { memory, device_state: open(DEVICE_STATE)?, deltas, working_set };
    let (device_state_kind, device_state_version) = (index.device_state_kind, index.device_state_version);
    Ok(HotImage { root, manifest: index.manifest, device_state_kind, device_state_version, files, dir })
}

/// Makes all files of a set in a folder aside.
fn fill(
    dir: &Path,
    savefile: &Savefile,
    stack: &dyn StackDelta,
    backend: ReadBackend,
    progress: OnProgress,
) -> Result<(), Error> {
    let manifest = savefile.manifest();
    let maps = savefile.page_maps();
    let outputs =
        maps.iter().map(|map| create_output(dir, savefile, map)).collect::<Result<Vec<_>, Error>>()?;
    let decoded: Vec<ImageOutput> =
        maps.iter().zip(&outputs).map(|(map, file)| ImageOutput { id: map.image(), file }).collect();
    savefile.decode(&decoded, backend, progress)?;

    let DeviceState { kind, version, bytes } = savefile.device_state()?;
    write_new(&dir.join(DEVICE_STATE), &bytes)?;
    let mut deltas = Vec::new();
    for (map, raw) in maps.iter().zip(&outputs) {
        match map.image() {
            ImageId::Memory => make_read_only(raw, &dir.join(MEMORY))?,
            ImageId::Volume(name) => {
                let file_name = stack.file_name(name);
                stack_delta(&dir.join(&file_name), volume_of(savefile, name)?, map, raw, stack)?;
                deltas.push((name.clone(), file_name));
            }
        }
    }
    let index = HotIndex {
        manifest: manifest.clone(),
        device_state_kind: kind,
        device_state_version: version,
        deltas,
    };
    let json = index.to_bytes().map_err(|why| Error::io("make the index of", dir)(io::Error::other(why)))?;
    write_new(&dir.join(INDEX), &json)
}

/// The file an image is decoded to: memory in its place, a delta in memory only until it is stacked.
fn create_output(dir: &Path, savefile: &Savefile, map: &PageMap) -> Result<File, Error> {
    let path = dir.join(MEMORY);
    let len = map.pages().bytes().0;
    let file = match map.image() {
        ImageId::Memory if len != savefile.manifest().memory_bytes => {
            let what =
                format!("its memory has {len} bytes, its manifest says {}", savefile.manifest().memory_bytes);
            return Err(Error::Mismatch { path: savefile.path().to_owned(), what });
        }
        ImageId::Memory => create_new(&path)?,
        ImageId::Volume(name) => {
            let name = std::ffi::CString::new(name.as_str()).unwrap_or_default();
            let memfd = memfd_create(&name, MemFdCreateFlag::MFD_CLOEXEC);
            File::from(
                memfd.map_err(|errno| {
                    Error::io("make room in memory to decode", savefile.path())(errno.into())
                })?,
            )
        }
    };
    file.set_len(len).map_err(Error::io(format!("make room for {} of", map.image()), savefile.path()))?;
    Ok(file)
}

fn volume_of<'a>(savefile: &'a Savefile, name: &str) -> Result<&'a VolumeInfo, Error> {
    let missing = || Error::Mismatch {
        path: savefile.path().to_owned(),
        what: format!("it has a delta of volume {name}, which its manifest does not know"),
    };
    savefile.manifest().volume(name).ok_or_else(missing)
}

fn stack_delta(
    path: &Path,
    volume: &VolumeInfo,
    map: &PageMap,
    raw: &File,
    stack: &dyn StackDelta,
) -> Result<(), Error> {
    let valid = path.file_name().and_then(|name| name.to_str()).is_some_and(is_volume_name);
    if !valid || path.exists() {
        return Err(Error::io("name a delta", path)(io::ErrorKind::AlreadyExists.into()));
    }
    let out = create_new(path)?;
    stack
        .stack(volume, map, raw, &out)
        .map_err(Error::io(format!("stack volume {} into", volume.name), path))?;
    make_read_only(&out, path)
}

fn write_new(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let mut file = create_new(path)?;
    file.write_all(bytes).map_err(Error::io("write", path))?;
    make_read_only(&file, path)
}

fn create_new(path: &Path) -> Result<File, Error> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true).mode(0o600).open(path).map_err(Error::io("create", path))
}

fn make_read_only(file: &File, path: &Path) -> Result<(), Error> {
    file.set_permissions(Permissions::from_mode(0o444)).map_err(Error::io("make read-only", path))
}

/// A folder being filled; dropped without a commit, it is removed.
struct AsideFolder {
    path: PathBuf,
    committed: bool,
}

impl AsideFolder {
    fn create(hot_root: &Path) -> Result<AsideFolder, Error> {
        let path = hot_root.join(ASIDE);
        DirBuilder::new().mode(0o700).create(&path).map_err(Error::io("create", &path))?;
        Ok(AsideFolder { path, committed: false })
    }

    fn commit(mut self, target: &Path) -> Result<(), Error> {
        fs::rename(&self.path, target).map_err(Error::io("rename to its final name", &self.path))?;
        self.committed = true;
        Ok(())
    }
}

impl Drop for AsideFolder {
    fn drop(&mut self) {
        if !self.committed {
            if let Err(err) = fs::remove_dir_all(&self.path) {
                tracing::warn!(path = %self.path.display(), %err, "cannot remove a half-made hot image");
            }
        }
    }
}

/// The folder's lock, held until it is dropped.
struct FolderLock(#[allow(dead_code)] Flock<File>);

fn lock_folder(hot_root: &Path) -> Result<FolderLock, Error> {
    DirBuilder::new().recursive(true).mode(0o700).create(hot_root).map_err(Error::io("create", hot_root))?;
    let path = hot_root.join(LOCK);
    let mut options = OpenOptions::new();
    let file = options.write(true).create(true).truncate(false).mode(0o600).open(&path);
    let mut file = file.map_err(Error::io("open", &path))?;
    loop {
        match Flock::lock(file, FlockArg::LockExclusive) {
            Ok(locked) => return Ok(FolderLock(locked)),
            Err((unlocked, nix::errno::Errno::EINTR)) => file = unlocked,
            Err((_, errno)) => return Err(Error::io("lock", &path)(errno.into())),
        }
    }
}

/// Removes what a killed admission or eviction left, and the sets of other boots.
fn sweep_locked(locked: &FolderLock, hot_root: &Path) -> Result<(), Error> {
    remove_aside(locked, hot_root)?;
    let boot = boot_id()?;
    for (name, _) in sets(hot_root)? {
        if !name.ends_with(boot) {
            evict_locked(locked, hot_root, &name)?;
        }
    }
    Ok(())
}

/// Takes a set's name away in one step, then removes its files.
fn evict_locked(locked: &FolderLock, hot_root: &Path, name: &str) -> Result<bool, Error> {
    let set = hot_root.join(name);
    match fs::rename(&set, hot_root.join(ASIDE)) {
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(false),
        renamed => renamed.map_err(Error::io("evict", &set))?,
    }
    remove_aside(locked, hot_root)?;
    Ok(true)
}

fn remove_aside(_: &FolderLock, hot_root: &Path) -> Result<(), Error> {
    let path = hot_root.join(ASIDE);
    match fs::remove_dir_all(&path) {
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed.map_err(Error::io("remove", &path)),
    }
}

/// Name and root hash of every set in the folder, of any boot.
fn sets(hot_root: &Path) -> Result<Vec<(String, RootHash)>, Error> {
    let mut sets = Vec::new();
    for entry in fs::read_dir(hot_root).map_err(Error::io("list", hot_root))? {
        let entry = entry.map_err(Error::io("list", hot_root))?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        let root = name.split_once('-').and_then(|(root, _)| root.parse().ok());
        sets.extend(root.map(|root| (name, root)));
    }
    Ok(sets)
}

fn set_name(root: &RootHash) -> Result<String, Error> {
    Ok(format!("{root}-{}", boot_id()?))
}

/// What the kernel calls this boot; asked once per process.
fn boot_id() -> Result<&'static str, Error> {
    static BOOT_ID: OnceLock<String> = OnceLock::new();
    const SOURCE: &str = "/proc/sys/kernel/random/boot_id";
    if let Some(id) = BOOT_ID.get() {
        return Ok(id);
    }
    let id = fs::read_to_string(SOURCE).map_err(Error::io("read", Path::new(SOURCE)))?;
    Ok(BOOT_ID.get_or_init(|| id.trim().to_owned()))
}
