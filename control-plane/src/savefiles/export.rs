//! A savefile becomes a stream that `xl restore` takes, with its disks beside it.
//!
//! Invariants:
//! - nothing that is there is written to: neither the savefile nor the bases, nor a file that has one of the names to give;
//! - the disks have their names before the stream has its own, so where the stream is, all is; of an export that fails nothing is
//!   left.

use std::fs::{self, File};
use std::io::{BufWriter, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use engine::host;
use engine::savefile::{ImageId, ImageOutput, OnProgress, ReadBackend, Savefile};
use engine::units::ByteCount;
use nix::fcntl::AtFlags;
use xen_glue::device_state::{self, DeviceState};
use xen_glue::hypercalls::Uuid;
use xen_glue::stream::config::{DiskConfig, GuestConfig};
use xen_glue::stream::export;

use super::binding::VOLUMES;
use super::{no_savefile, parse_root, raw, unusable};
use crate::error::{Error, Kind, Result};
use crate::inputs::{self, Guest};
use crate::state::{self, State};
use crate::volume;

/// The stream is written through a buffer of this size.
const WRITE_BYTES: usize = 1 << 20;

/// What an export has made.
pub struct Exported {
    /// The stream.
    pub file: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// The disks: what the guest calls them, and their files.
    pub disks: Vec<(String, PathBuf)>,
}

/// Exports the savefile of `dvm` to `file`, and its volumes to `file.root.img`, `file.private.img`, `file.volatile.img`.
pub fn export(state: &State, dvm: &str, file: &Path, progress: OnProgress<'_>) -> Result<Exported> {
    let file = std::path::absolute(file).map_err(Error::io("name", file))?;
    let folder = file.parent().unwrap_or(Path::new("/"));
    let taken = VOLUMES.iter().map(|(name, _)| disk_path(&file, name)).chain([file.clone()]);
    if let Some(taken) = taken.into_iter().find(|path| path.exists()) {
        return Err(Error::new(Kind::Usage, format!("{} is there already", taken.display()))
            .hint("export to another name, or remove it"));
    }
    let source = Source::open(state, dvm)?;
    let images = source.decode(folder, progress)?;
    let mut named = Named { paths: Vec::new() };
    let mut disks = Vec::new();
    for (at, (name, vdev)) in VOLUMES.iter().enumerate() {
        let Some(spec) = source.guest.spec.volumes.get(at).filter(|spec| spec.name == *name) else {
            continue;
        };
        let path = disk_path(&file, name);
        let disk = source.volume(spec, folder, &images)?;
        named.give(&disk, &path)?;
        disks.push((vdev.to_string(), path));
    }
    let config = source.config(&disks)?;
    let stream = write_stream(folder, &config, &source.state, images.of(&ImageId::Memory)?)?;
    let bytes = stream.metadata().map_err(Error::io("look at", &file))?.len();
    named.give(&stream, &file)?;
    volume::sync_folder(folder)?;
    named.paths.clear();
    Ok(Exported { file, bytes, disks })
}

fn disk_path(file: &Path, name: &str) -> PathBuf {
    let mut path = file.as_os_str().to_owned();
    path.push(format!(".{name}.img"));
    path.into()
}

/// A savefile to export, open together with what it stands on.
struct Source {
    guest: Guest,
    savefile: Savefile,
    state: DeviceState,
    /// A writable copy of each volume's base, in the volumes' order; taken while nobody removes one.
    bases: Vec<Option<File>>,
}

/// Decoded images, by what they are of.
struct Images(Vec<(ImageId, File)>);

impl Images {
    fn of(&self, id: &ImageId) -> Result<&File> {
        let found = self.0.iter().find(|(image, _)| image == id);
        found
            .map(|(_, file)| file)
            .ok_or_else(|| Error::new(Kind::Unusable, format!("there is no image of {id}")))
    }
}

impl Source {
    fn open(state: &State, dvm: &str) -> Result<Source> {
        // Until everything is open: a collection may take names away afterwards.
        let _in_use = state::lock_shared(&state.use_lock())?;
        let guest = Guest::load(state, dvm)?;
        let pin = guest.dvm.savefile.as_ref().ok_or_else(|| no_savefile(dvm))?;
        let path = state.savefile(dvm, pin.generation);
        let savefile =
            Savefile::open(&path, Some(&parse_root(pin)?)).map_err(|error| unusable(dvm, error))?;
        let state_bytes = savefile.device_state().map_err(|error| unusable(dvm, error))?;
        if (state_bytes.kind.as_str(), state_bytes.version) != (device_state::KIND, device_state::VERSION) {
            return Err(Error::new(Kind::Refused, format!("the savefile of {dvm} is not of a Xen guest"))
                .hint(format!(
                    "it is of kind {} {}: only Xen's can be restored by xl",
                    state_bytes.kind, state_bytes.version
                )));
        }
        let device_state = DeviceState::parse(&state_bytes.bytes).map_err(|error| {
            Error::new(Kind::Unusable, format!("the device state of {dvm} cannot be read")).because(error)
        })?;
        same_bases(dvm, &guest, &savefile)?;
        let open_base = |spec: &host::VolumeSpec| {
            spec.base.path().map(|path| File::open(path).map_err(Error::io("open", path))).transpose()
        };
        let bases = guest.spec.volumes.iter().map(open_base).collect::<Result<_>>()?;
        Ok(Source { guest, savefile, state: device_state, bases })
    }

    /// Memory and deltas, as files without a name in `folder`.
    fn decode(&self, folder: &Path, progress: OnProgress<'_>) -> Result<Images> {
        let mut images = Vec::new();
        for map in self.savefile.page_maps() {
            let file = raw::unnamed(folder)?;
            file.set_len(map.pages().bytes().0).map_err(Error::io("make room in", folder))?;
            images.push((map.image().clone(), file));
        }
        let outputs: Vec<ImageOutput> = images.iter().map(|(id, file)| ImageOutput { id, file }).collect();
        let decoded = self.savefile.decode(&outputs, ReadBackend::Ring, progress);
        decoded.map_err(|error| unusable(&self.guest.dvm_name, error))?;
        Ok(Images(images))
    }

    /// What the guest had on a volume: its base, with its delta over it.
    fn volume(&self, spec: &host::VolumeSpec, folder: &Path, images: &Images) -> Result<File> {
        let base = self.guest.spec.volumes.iter().zip(&self.bases).find(|(other, _)| other.name == spec.name);
        let disk = match base.and_then(|(_, base)| base.as_ref()) {
            Some(base) => volume::unnamed_copy(&volume::path_of(base), folder)?,
            None => raw::unnamed(folder)?,
        };
        let failed = || Error::failed("write a disk");
        disk.set_len(spec.size.0).map_err(failed())?;
        let id = ImageId::Volume(spec.name.clone());
        if let Ok(map) = self.savefile.page_map(&id) {
            raw::lay_over(map, images.of(&id)?, &disk).map_err(failed())?;
        }
        disk.set_permissions(fs::Permissions::from_mode(0o600))
            .and_then(|()| disk.sync_all())
            .map_err(failed())?;
        Ok(disk)
    }

    fn config(&self, disks: &[(String, PathBuf)]) -> Result<GuestConfig> {
        let text = |path: &Path| {
            path.to_str().map(str::to_owned).ok_or_else(|| {
                Error::new(Kind::Usage, format!("{} is not UTF-8, which a configuration is", path.display()))
            })
        };
        let disk = |(vdev, path): &(String, PathBuf)| {
            Ok(DiskConfig { path: text(path)?, vdev: vdev.clone(), format: "raw".into(), writable: true })
        };
        let memory = ByteCount(self.savefile.manifest().memory_bytes);
        Ok(GuestConfig {
            name: self.guest.dvm_name.clone(),
            uuid: random_uuid()?,
            kind: "pvh".into(),
            memory_max: memory,
            memory_target: memory,
            vcpus: self.state.vcpus,
            kernel: Some(text(&self.guest.spec.kernel)?),
            ramdisk: Some(text(&self.guest.spec.initrd)?),
            cmdline: self.guest.spec.cmdline.clone(),
            disks: disks.iter().map(disk).collect::<Result<_>>()?,
            nics: Vec::new(),
        })
    }
}

/// Deltas stand on the bases that were there at the capture, and on no others.
fn same_bases(dvm: &str, guest: &Guest, savefile: &Savefile) -> Result<()> {
    let (expected, actual) = (guest.manifest(&savefile.manifest().host), savefile.manifest());
    match expected.volumes == actual.volumes {
        true => Ok(()),
        false => {
            let what = inputs::differences(&expected, actual).join("; ");
            Err(Error::new(Kind::Unusable, format!("the savefile of {dvm} is stale ({what})"))
                .hint(format!("`dispvm-savefile build {dvm}` makes one of what is there now")))
        }
    }
}

fn write_stream(folder: &Path, config: &GuestConfig, state: &DeviceState, memory: &File) -> Result<File> {
    let failed = || Error::failed("write the stream");
    let out = BufWriter::with_capacity(WRITE_BYTES, raw::unnamed(folder)?);
    let out = export::write(out, config, state, memory).map_err(failed())?;
    let stream = out.into_inner().map_err(|error| failed()(error.into_error()))?;
    stream.sync_all().map_err(failed())?;
    Ok(stream)
}

/// RFC 4122, version 4.
fn random_uuid() -> Result<Uuid> {
    let mut bytes = [0; 16];
    let random = Path::new("/dev/urandom");
    File::open(random).and_then(|mut file| file.read_exact(&mut bytes)).map_err(Error::io("read", random))?;
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    Ok(Uuid(bytes))
}

/// The names an export has given so far. Dropped, it takes them away.
struct Named {
    paths: Vec<PathBuf>,
}

impl Named {
    /// Gives a file without a name one that nobody has.
    fn give(&mut self, file: &File, path: &Path) -> Result<()> {
        nix::unistd::linkat(None, volume::path_of(file).as_path(), None, path, AtFlags::AT_SYMLINK_FOLLOW)
            .map_err(|errno| Error::io("make", path)(errno.into()))?;
        self.paths.push(path.to_owned());
        Ok(())
    }
}

impl Drop for Named {
    fn drop(&mut self) {
        for path in &self.paths {
            let _ = fs::remove_file(path);
        }
    }
}
