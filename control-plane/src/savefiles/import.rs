//! A guest saved by `xl save` becomes a DVM template with a savefile.
//!
//! Invariants:
//! - the qube is new; of what an import that fails has made, nothing is left;
//! - the disks become the qube's own immutable files, hashed as those of any other: no later change of theirs goes unnoticed, and no
//!   later change of the files they were copied from makes a difference;
//! - what is pinned has been read back and admitted, as after a build.

use std::fs::{self, File};
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use engine::host::Host;
use engine::image::hot::HotImage;
use engine::savefile::{
    self, DeviceState, ImageId, ImageInput, Manifest, OnProgress, ReadBackend, Scope, Written,
};
use engine::units::{ByteCount, PageRange};
use xen_glue::device_state;
use xen_glue::stream::config::GuestConfig;
use xen_glue::stream::import::{fill, survey, ImportError, SavedGuest};

use super::binding::{bind, Binding, VOLUMES};
use super::{raw, savefile_error};
use crate::error::{Error, Kind, Result};
use crate::inputs::{self, Guest};
use crate::machine::Machine;
use crate::qube::{self, Dvm, Qube, SavefilePin};
use crate::state::{self, State};
use crate::templates::{self, TemplateFiles};
use crate::volume;

/// The generation of a first savefile.
const FIRST: u64 = 1;
/// Volumes that the guest does not have get the sizes `dispvm-qube add-dvm` gives.
const PRIVATE_MIB: u64 = 2048;
const VOLATILE_MIB: u64 = 1024;
/// Streams are read through a buffer of this size.
const READ_BYTES: usize = 1 << 20;

/// What to import, and as what.
#[derive(Debug, Clone)]
pub struct Import<'a> {
    /// The `xl save` file.
    pub file: &'a Path,
    /// The DVM template to make.
    pub dvm: &'a str,
    /// Its TemplateVM: a new one, or one whose root is the guest's. `None`: a new one, `DVM-template`.
    pub template: Option<&'a str>,
    /// The guest's disks: name and raw image.
    pub disks: &'a [(String, PathBuf)],
    /// The guest's kernel, for cold boots. `None`: the file that the guest's configuration names.
    pub kernel: Option<&'a Path>,
    /// The guest's initrd, for the same.
    pub initrd: Option<&'a Path>,
}

/// What an import has made.
pub struct Imported {
    /// The savefile.
    pub path: PathBuf,
    /// The TemplateVM, and the generation of its root.
    pub template: (String, u64),
    /// The guest, as the stream has it.
    pub guest: SavedGuest,
    /// What is in the savefile.
    pub written: Written,
    /// What of the guest will not be as it was, in sentences.
    pub notes: Vec<String>,
}

/// Imports a saved guest.
pub fn import(
    state: &State,
    machine: &dyn Machine,
    order: &Import<'_>,
    progress: OnProgress<'_>,
) -> Result<Imported> {
    qube::check_name(order.dvm)?;
    if Qube::names(state)?.iter().any(|name| name == order.dvm) {
        return Err(Error::new(Kind::Usage, format!("there is a qube {} already", order.dvm))
            .hint(format!("choose another name, or `dispvm-qube rm {}` first", order.dvm)));
    }
    let guest = survey(open(order.file)?).map_err(|error| import_error(order.file, error))?;
    let disks = bind(&guest.config.disks, order.disks)?;
    let base = Base::choose(state, order, &guest.config, &disks)?;
    let host = xen_host(state, machine, &base.kernel)?;

    let mut made = Made { state, qubes: Vec::new() };
    if let Some(initrd) = &base.initrd {
        made.qubes.push(base.name.clone());
        let cmdline = guest.config.cmdline.trim().to_owned();
        let files = TemplateFiles { root: &disks.root, kernel: &base.kernel, initrd, cmdline };
        templates::add_template(state, &base.name, "black", &files)?;
    }
    made.qubes.push(order.dvm.to_owned());
    make_dvm(state, order.dvm, &base.name, &guest, &disks)?;

    let folder = state.savefiles(order.dvm);
    state::make_folder(&folder)?;
    let _lock = state::lock(&folder.join("build.lock"))?;
    let memory = raw::unnamed(&folder)?;
    fill(open(order.file)?, &guest, &memory).map_err(|error| import_error(order.file, error))?;
    let record = Guest::load(state, order.dvm)?;
    let expected = record.manifest(host.facts());
    let pin = inputs::hash(&expected)?;
    let path = state.savefile(order.dvm, FIRST);
    let written = write(&path, expected, &guest, &memory, disks.volatile.as_deref(), progress)?;
    admit_and_pin(state, &*host, order.dvm, &path, &written, pin)?;
    made.qubes.clear();
    let notes = notes(&guest.config);
    Ok(Imported { path, template: (base.name, record.template.generation), guest, written, notes })
}

/// The qubes an import has made so far. Dropped, it removes them.
struct Made<'a> {
    state: &'a State,
    qubes: Vec<String>,
}

impl Drop for Made<'_> {
    fn drop(&mut self) {
        for name in self.qubes.iter().rev() {
            if let Err(error) = templates::remove(self.state, name) {
                tracing::warn!(name, %error, "what a failed import has made cannot be removed");
            }
        }
    }
}

fn open(path: &Path) -> Result<BufReader<File>> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    Ok(BufReader::with_capacity(READ_BYTES, file))
}

fn import_error(file: &Path, error: ImportError) -> Error {
    let kind = match &error {
        ImportError::Stream(_) => Kind::Unusable,
        ImportError::Refused(_) => Kind::Refused,
        ImportError::Image { .. } => Kind::Failed,
    };
    let error = Error::new(kind, format!("{} cannot be imported", file.display())).because(error);
    match kind {
        Kind::Refused => error.hint("only a PVH guest can be, saved by `xl save` of Xen 4.14 or later"),
        _ => error,
    }
}

/// The TemplateVM that the guest is to run on.
struct Base {
    name: String,
    kernel: PathBuf,
    /// `None`: the template is there already, with kernel and initrd of its own.
    initrd: Option<PathBuf>,
}

impl Base {
    fn choose(state: &State, order: &Import<'_>, config: &GuestConfig, disks: &Binding) -> Result<Base> {
        let name = order.template.map_or_else(|| format!("{}-template", order.dvm), str::to_owned);
        qube::check_name(&name)?;
        if Qube::names(state)?.contains(&name) {
            let generation = same_root(state, &name, &disks.root)?;
            let kernel = state.root_generation(&name, generation).join("vmlinuz");
            return Ok(Base { name, kernel, initrd: None });
        }
        let kernel = boot_file("kernel", order.kernel, config.kernel.as_deref())?;
        let initrd = boot_file("initrd", order.initrd, config.ramdisk.as_deref())?;
        Ok(Base { name, kernel, initrd: Some(initrd) })
    }
}

/// A template that is there already serves if its root is the guest's, byte for byte; its generation.
fn same_root(state: &State, name: &str, root: &Path) -> Result<u64> {
    let qube = Qube::load(state, name)?;
    let template = qube.template()?;
    let file = File::open(root).map_err(Error::io("open", root))?;
    let hash = volume::hash(&file).map_err(Error::io("read", root))?;
    match template.root_hash == hash {
        true => Ok(template.generation),
        false => Err(Error::new(
            Kind::Refused,
            format!("the root volume of {name} is not what {} has", root.display()),
        )
        .hint("--template NAME with a new name makes a template of its own")),
    }
}

/// The file given, or the one the configuration names.
fn boot_file(what: &str, given: Option<&Path>, configured: Option<&str>) -> Result<PathBuf> {
    let path = given.map(Path::to_owned).or_else(|| configured.map(PathBuf::from));
    match path {
        Some(path) if path.is_file() => Ok(path),
        Some(path) => {
            Err(Error::new(Kind::Usage, format!("the guest's {what} {} is not here", path.display()))
                .hint(format!("--{what} FILE: what the guest boots from when its savefile does not serve")))
        }
        None => Err(Error::new(Kind::Usage, format!("the guest's configuration names no {what}"))
            .hint(format!("--{what} FILE: what the guest boots from when its savefile does not serve"))),
    }
}

fn make_dvm(state: &State, name: &str, template: &str, guest: &SavedGuest, disks: &Binding) -> Result<()> {
    let mib = |file: &Option<PathBuf>, otherwise: u64| match file {
        Some(path) => Ok(fs::metadata(path).map_err(Error::io("look at", path))?.len() >> 20),
        None => Ok(otherwise),
    };
    let dvm = Dvm {
        template: template.to_owned(),
        template_for_dispvms: true,
        memory_mib: guest.memory_bytes().0 >> 20,
        vcpus: guest.config.vcpus,
        net: "none".into(),
        private_mib: mib(&disks.private, PRIVATE_MIB)?,
        private_generation: FIRST,
        private_id: String::new(),
        volatile_mib: mib(&disks.volatile, VOLATILE_MIB)?,
        spares: None,
        savefile: None,
    };
    templates::add_dvm(state, name, "red", dvm)?;
    if let Some(private) = &disks.private {
        let copy = volume::unnamed_copy(private, &state.qube(name).join("private"))?;
        templates::next_private(state, name, FIRST, &copy)?;
    }
    Ok(())
}

/// This machine's host, if it can restore the guest.
fn xen_host(state: &State, machine: &dyn Machine, kernel: &Path) -> Result<Box<dyn Host>> {
    let host = machine.host(state, kernel)?;
    match host.facts().kind == device_state::KIND {
        true => Ok(host),
        false => Err(Error::new(
            Kind::Refused,
            format!("a guest of Xen cannot be restored here: this machine has {}", host.facts().kind),
        )
        .hint("import it on a Xen host")),
    }
}

fn write(
    path: &Path,
    expected: Manifest,
    guest: &SavedGuest,
    memory: &File,
    volatile: Option<&Path>,
    progress: OnProgress<'_>,
) -> Result<Written> {
    let created = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let manifest = Manifest { generation: FIRST, created, agent_version: "unknown".into(), ..expected };
    let device_state = DeviceState {
        kind: device_state::KIND.into(),
        version: device_state::VERSION,
        bytes: guest.state.to_bytes(),
    };
    let size = guest.memory_bytes();
    let mut images = vec![ImageInput { id: ImageId::Memory, file: memory, size, scope: Scope::Whole }];
    let volatile = volatile.map(open_volatile).transpose()?;
    if let Some((file, size, runs)) = &volatile {
        let scope = Scope::Runs(runs.clone());
        images.push(ImageInput { id: ImageId::Volume("volatile".into()), file, size: *size, scope });
    }
    savefile::write(path, &manifest, &device_state, &images, progress).map_err(savefile_error)
}

/// What is on the volatile volume is a delta: its base is empty.
fn open_volatile(path: &Path) -> Result<(File, ByteCount, Vec<PageRange>)> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    let size = file.metadata().map_err(Error::io("look at", path))?.len();
    let runs = raw::data_runs(&file, size).map_err(Error::io("look for data in", path))?;
    Ok((file, ByteCount(size), runs))
}

/// Nothing is pinned that was not read back through the verifying reader.
fn admit_and_pin(
    state: &State,
    host: &dyn Host,
    dvm: &str,
    path: &Path,
    written: &Written,
    inputs: String,
) -> Result<()> {
    let _in_use = state::lock_shared(&state.use_lock())?;
    HotImage::admit(path, &written.root, &state.hot(), host, ReadBackend::Ring, &savefile::silent)
        .map_err(savefile_error)?;
    let pin = SavefilePin { generation: FIRST, root_hash: written.root.to_string(), inputs };
    qube::update_dvm(state, dvm, |dvm| dvm.savefile = Some(pin))
}

fn notes(config: &GuestConfig) -> Vec<String> {
    let mut notes = vec![
        "a launch talks to this project's agent in the guest: one that has it runs commands as from a built savefile, any other \
         comes to life with its console only, and `dispvm-launch` gives up waiting for the agent"
            .to_owned(),
    ];
    if !config.nics.is_empty() {
        notes.push("the guest's network cards are not taken over".to_owned());
    }
    let vdevs: Vec<&str> = config.disks.iter().map(|disk| disk.vdev.as_str()).collect();
    let more: Vec<&str> =
        VOLUMES.iter().map(|(_, vdev)| *vdev).filter(|vdev| !vdevs.contains(vdev)).collect();
    if !more.is_empty() {
        // Linux looks for devices when their nodes change, and these are there before it watches again.
        notes.push(format!(
            "the qube also has {}: a guest saved without them does not see them",
            more.join(", ")
        ));
    }
    notes
}
