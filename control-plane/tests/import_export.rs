//! Guests of Xen come from `xl save` files and go into them; what is in between is a savefile like any other.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use control_plane::agent_link::Limits;
use control_plane::calls::wire::Finder;
use control_plane::error::{Kind, Result};
use control_plane::inputs::{self, Guest};
use control_plane::machine::{Budget, Machine};
use control_plane::qube::{self, Qube, SavefilePin};
use control_plane::savefiles::{self, Import, Standing};
use control_plane::state::State;
use control_plane::templates::{self, TemplateFiles};
use engine::host::{BootPurpose, Confinement, Domain, GuestSpec, Host, HostError, HostFacts};
use engine::image::hot::{HotFiles, HotImage, StackDelta};
use engine::savefile::{
    silent, DeviceState as StateBytes, ImageId, ImageInput, Manifest, PageMap, Savefile, Scope, VolumeInfo,
};
use engine::units::{ByteCount, PageRange};
use xen_glue::device_state::{DeviceState, TscInfo, KIND, VERSION};
use xen_glue::hypercalls::Uuid;
use xen_glue::layout::{Layout, SPECIAL_FIRST};
use xen_glue::stream::config::{DiskConfig, GuestConfig, NicConfig};
use xen_glue::stream::export;
use xen_glue::stream::import::{fill, survey};

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;

/// A machine of which only is asked what it is: imports and exports start no guest.
struct OnlyFacts(&'static str);

impl Machine for OnlyFacts {
    fn host(&self, _: &State, _: &Path) -> Result<Box<dyn Host>> {
        let text = String::from("x");
        let [version, machine, cpu_model] = [text.clone(), text.clone(), text];
        let facts = HostFacts { kind: self.0.into(), version, machine, cpu_model, accel: "pvh".into() };
        Ok(Box::new(NoGuests(facts)))
    }
    fn sweep(&self, _: &State, _: &dyn Fn(u32) -> bool) -> Result<()> {
        Ok(())
    }

    fn budget(&self, _: &State, spec: &GuestSpec, confinement: &Confinement) -> Budget {
        Budget::of_processes(spec, confinement)
    }
    fn volume_memory_max(&self) -> ByteCount {
        ByteCount(MIB)
    }
    fn settings(&self) -> String {
        String::new()
    }
    fn agent_limits(&self) -> Limits {
        Limits::default()
    }
    fn call_channels(&self, _: &State, _: u32) -> Option<Finder> {
        None
    }
}

struct NoGuests(HostFacts);

impl StackDelta for NoGuests {
    fn stack(&self, _: &VolumeInfo, _: &PageMap, _: &File, _: &File) -> io::Result<()> {
        Ok(())
    }
    fn file_name(&self, volume: &str) -> String {
        format!("{volume}.delta")
    }
}

impl Host for NoGuests {
    fn facts(&self) -> &HostFacts {
        &self.0
    }
    fn boot(
        &self,
        _: &GuestSpec,
        _: BootPurpose,
        _: &Confinement,
    ) -> std::result::Result<Box<dyn Domain>, HostError> {
        Err(HostError::Refused { step: "boot", reason: "this host has no guests".into() })
    }
    fn restore(
        &self,
        _: &GuestSpec,
        _: HotFiles,
        _: &Confinement,
    ) -> std::result::Result<Box<dyn Domain>, HostError> {
        Err(HostError::Refused { step: "restore", reason: "this host has no guests".into() })
    }
}

struct World {
    folder: tempfile::TempDir,
    state: State,
}

impl World {
    fn new() -> World {
        let folder = tempfile::tempdir().unwrap();
        let state = State::open(&folder.path().join("state")).unwrap();
        let world = World { folder, state };
        fs::write(world.path("vmlinuz"), "kernel").unwrap();
        fs::write(world.path("initrd"), "initrd").unwrap();
        world
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A sparse image with `byte` in a page here and there.
    fn disk(&self, name: &str, mib: u64, byte: u8) -> PathBuf {
        let path = self.path(name);
        let file = File::create(&path).unwrap();
        file.set_len(mib * MIB).unwrap();
        for page in [0, 7, 8, mib * 256 - 1] {
            file.write_all_at(&[byte; PAGE as usize], page * PAGE).unwrap();
        }
        path
    }

    fn config(&self) -> GuestConfig {
        let text = |name: &str| self.path(name).to_str().unwrap().to_owned();
        let disk = |vdev: &str| DiskConfig {
            path: format!("/old/{vdev}"),
            vdev: vdev.into(),
            format: "raw".into(),
            writable: true,
        };
        GuestConfig {
            name: "saved".into(),
            uuid: Uuid([3; 16]),
            kind: "pvh".into(),
            memory_max: ByteCount(64 * MIB),
            memory_target: ByteCount(64 * MIB),
            vcpus: 2,
            kernel: Some(text("vmlinuz")),
            ramdisk: Some(text("initrd")),
            cmdline: "console=hvc0 quiet ".into(),
            disks: vec![disk("xvda"), disk("xvdb")],
            nics: vec![NicConfig { devid: 0, mac: None, bridge: None, script: None }],
        }
    }

    /// A saved guest, in a file.
    fn save(&self, config: &GuestConfig) -> PathBuf {
        let path = self.path("guest.xlsave");
        let memory = tempfile::tempfile().unwrap();
        memory.set_len(state().layout.pages().bytes().0).unwrap();
        for page in (0..state().layout.pages().0).filter(|page| page % 3 != 0) {
            memory.write_all_at(&[page as u8 | 1; PAGE as usize], page * PAGE).unwrap();
        }
        export::write(File::create(&path).unwrap(), config, &state(), &memory).unwrap();
        path
    }

    fn import(
        &self,
        machine: &str,
        config: &GuestConfig,
        disks: &[(String, PathBuf)],
    ) -> Result<savefiles::Imported> {
        let machine = OnlyFacts(if machine == KIND { KIND } else { "qemu" });
        let file = self.save(config);
        let order = Import { file: &file, dvm: "dvm", template: None, disks, kernel: None, initrd: None };
        savefiles::import(&self.state, &machine, &order, &silent)
    }

    fn standing(&self) -> Standing {
        let guest = Guest::load(&self.state, "dvm").unwrap();
        let host = OnlyFacts(KIND).host(&self.state, Path::new("")).unwrap();
        savefiles::standing(&self.state, &guest, &*host).unwrap()
    }
}

fn state() -> DeviceState {
    DeviceState {
        xen: (4, 17),
        vcpus: 2,
        layout: Layout::new(vec![PageRange::new(0, 16), PageRange::new(17, 600), PageRange::new(0xfc000, 9)])
            .unwrap(),
        tsc: TscInfo { mode: 0, khz: 2_600_000, nsec: 77, incarnation: 1 },
        hvm_context: vec![5; 999],
        hvm_params: vec![(1, SPECIAL_FIRST + 4), (17, SPECIAL_FIRST + 7), (12, (SPECIAL_FIRST + 6) * PAGE)],
        cpuid_policy: vec![6; 48],
        msr_policy: vec![7; 32],
    }
}

fn given(disks: &[(&str, &PathBuf)]) -> Vec<(String, PathBuf)> {
    disks.iter().map(|(name, path)| (name.to_string(), path.to_path_buf())).collect()
}

#[test]
fn a_guest_is_imported_and_exported_with_its_disks() {
    let world = World::new();
    let (root, private, volatile) =
        (world.disk("root", 33, 1), world.disk("private", 40, 2), world.disk("volatile", 48, 3));
    let disks = given(&[("root", &root), ("xvdb", &private), ("volatile", &volatile)]);
    let config = world.config();
    let imported = world.import(KIND, &config, &disks).unwrap();
    assert_eq!(imported.template, ("dvm-template".to_owned(), 1));
    assert!(imported.notes.iter().any(|note| note.contains("xvdc")), "{:?}", imported.notes);
    assert!(imported.notes.iter().any(|note| note.contains("network")));
    assert_eq!(world.standing(), Standing::Fresh);

    let guest = Guest::load(&world.state, "dvm").unwrap();
    assert_eq!((guest.dvm.memory_mib, guest.dvm.vcpus, guest.dvm.volatile_mib), (64, 2, 48));
    assert_eq!(guest.template.cmdline, "console=hvc0 quiet");
    assert_eq!(guest.template.root_hash, blake3::hash(&fs::read(&root).unwrap()).to_hex().to_string());
    let hot = HotImage::find(&world.state.hot(), &imported.written.root).unwrap().expect("admitted");
    let bytes =
        fs::read(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&hot.files.device_state)));
    assert_eq!(DeviceState::parse(&bytes.unwrap()), Ok(state()));
    assert_eq!(hot.files.memory.metadata().unwrap().len(), 64 * MIB);

    // The files it came from are needed no more.
    let originals: Vec<Vec<u8>> = [&root, &private, &volatile].map(|path| fs::read(path).unwrap()).into();
    for path in [&root, &private, &volatile] {
        fs::remove_file(path).unwrap();
    }
    let file = world.path("out.xlsave");
    let exported = savefiles::export(&world.state, "dvm", &file, &silent).unwrap();
    assert_eq!(exported.bytes, fs::metadata(&file).unwrap().len());
    let saved = survey(File::open(&file).unwrap()).unwrap();
    assert_eq!(saved.state, state());
    assert_eq!((saved.config.name.as_str(), saved.config.memory_target), ("dvm", ByteCount(64 * MIB)));
    assert_ne!(saved.config.uuid, config.uuid);
    let vdevs: Vec<&str> = saved.config.disks.iter().map(|disk| disk.vdev.as_str()).collect();
    assert_eq!(vdevs, ["xvda", "xvdb", "xvdc"]);
    for (disk, original) in saved.config.disks.iter().zip(&originals) {
        assert!(disk.writable && fs::read(&disk.path).unwrap() == *original, "{}", disk.path);
        let meta = fs::metadata(&disk.path).unwrap();
        assert_eq!(meta.mode() & 0o777, 0o600);
        assert!(meta.blocks() * 512 <= 3 * MIB, "{} is sparse", disk.path);
    }
    let (before, after) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
    let original = survey(File::open(world.path("guest.xlsave")).unwrap()).unwrap();
    fill(File::open(world.path("guest.xlsave")).unwrap(), &original, &before).unwrap();
    fill(File::open(&file).unwrap(), &saved, &after).unwrap();
    let read = |file: &File| {
        let mut bytes = vec![0; (64 * MIB) as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    };
    assert!(read(&before) == read(&after));

    let again = savefiles::export(&world.state, "dvm", &file, &silent).err().unwrap();
    assert_eq!(again.kind, Kind::Usage, "{again}");
}

/// A savefile as a build leaves it: deltas with data and with zeros over the bases.
#[test]
fn deltas_are_merged_into_the_exported_disks() {
    let world = World::new();
    let disks = given(&[("root", &world.disk("root", 3, 1)), ("private", &world.disk("private", 40, 2))]);
    world.import(KIND, &world.config(), &disks).unwrap();
    let guest = Guest::load(&world.state, "dvm").unwrap();
    let facts = OnlyFacts(KIND).host(&world.state, Path::new("")).unwrap().facts().clone();
    let expected = guest.manifest(&facts);
    let (memory, delta) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
    memory.set_len(64 * MIB).unwrap();
    delta.set_len(3 * MIB).unwrap();
    delta.write_all_at(&[9; PAGE as usize], 5 * PAGE).unwrap();
    let runs = vec![PageRange::new(5, 1), PageRange::new(7, 1)];
    let images = [
        ImageInput { id: ImageId::Memory, file: &memory, size: ByteCount(64 * MIB), scope: Scope::Whole },
        ImageInput {
            id: ImageId::Volume("root".into()),
            file: &delta,
            size: ByteCount(3 * MIB),
            scope: Scope::Runs(runs),
        },
    ];
    let bytes = StateBytes { kind: KIND.into(), version: VERSION, bytes: state().to_bytes() };
    let path = world.state.savefile("dvm", 2);
    let manifest = Manifest { generation: 2, ..expected.clone() };
    let written = engine::savefile::write(&path, &manifest, &bytes, &images, &silent).unwrap();
    let inputs = inputs::hash(&expected).unwrap();
    let pin = SavefilePin { generation: 2, root_hash: written.root.to_string(), inputs };
    qube::update_dvm(&world.state, "dvm", |dvm| dvm.savefile = Some(pin)).unwrap();

    savefiles::export(&world.state, "dvm", &world.path("out"), &silent).unwrap();
    let disk = File::open(world.path("out.root.img")).unwrap();
    let byte = |page: u64| {
        let mut byte = [0];
        disk.read_exact_at(&mut byte, page * PAGE + 77).unwrap();
        byte[0]
    };
    assert_eq!([0, 5, 6, 7, 8, 767].map(byte), [1, 9, 0, 0, 1, 1]);
    assert!(Savefile::open(&path, None).is_ok());
}

#[test]
fn a_changed_root_makes_the_savefile_stale_and_it_is_not_exported() {
    let world = World::new();
    let disks = given(&[("root", &world.disk("root", 3, 1)), ("private", &world.disk("private", 40, 2))]);
    world.import(KIND, &world.config(), &disks).unwrap();
    let (root, kernel, initrd) = (world.disk("root", 3, 4), world.path("vmlinuz"), world.path("initrd"));
    let files =
        TemplateFiles { root: &root, kernel: &kernel, initrd: &initrd, cmdline: "console=hvc0 quiet".into() };
    templates::add_template(&world.state, "dvm-template", "black", &files).unwrap();
    assert!(matches!(world.standing(), Standing::Stale(why) if why.iter().any(|why| why.contains("root"))));
    let error = savefiles::export(&world.state, "dvm", &world.path("out"), &silent).err().unwrap();
    assert_eq!(error.kind, Kind::Unusable, "{error}");
    assert!(error.to_string().contains("stale"), "{error}");
    assert!(!world.path("out").exists() && !world.path("out.root.img").exists());
}

#[test]
fn an_import_that_fails_leaves_nothing() {
    let world = World::new();
    let (root, private) = (world.disk("root", 3, 1), world.disk("private", 40, 2));
    let both = given(&[("root", &root), ("private", &private)]);
    let config = world.config();
    type Change = fn(&mut GuestConfig);
    type Case<'a> = (&'a str, Change, &'a [(String, PathBuf)], Kind, &'a str);
    let cases: &[Case] = &[
        (KIND, |_| {}, &both[..1], Kind::Usage, "disk xvdb"),
        ("qemu", |_| {}, &both, Kind::Refused, "this machine has qemu"),
        (KIND, |config| config.kernel = None, &both, Kind::Usage, "names no kernel"),
        (KIND, |config| config.ramdisk = Some("/nowhere".into()), &both, Kind::Usage, "/nowhere"),
        (KIND, |config| config.kind = "hvm".into(), &both, Kind::Refused, "cannot be imported"),
        // Found out only when both qubes are there.
        (KIND, |config| config.memory_target = ByteCount(2 << 40), &both, Kind::Usage, "2097152 MiB"),
    ];
    for (machine, change, disks, kind, said) in cases {
        let mut config = config.clone();
        change(&mut config);
        let error = world.import(machine, &config, disks).err().unwrap();
        assert_eq!(error.kind, *kind, "{error}");
        assert!(error.to_string().contains(said), "{error}, not {said}");
        assert_eq!(Qube::names(&world.state).unwrap(), Vec::<String>::new(), "{said}");
        assert_eq!(fs::read_dir(world.state.qubes()).unwrap().count(), 0, "{said}");
    }
    fs::write(world.path("guest.xlsave"), b"Xen saved domain, xl format\n \0 \r").unwrap();
    let file = world.path("guest.xlsave");
    let order = Import { file: &file, dvm: "dvm", template: None, disks: &both, kernel: None, initrd: None };
    let error = savefiles::import(&world.state, &OnlyFacts(KIND), &order, &silent).err().unwrap();
    assert_eq!(error.kind, Kind::Unusable, "{error}");
}

/// Two guests on one root: the template is made once.
#[test]
fn a_template_that_has_the_root_serves() {
    let world = World::new();
    let (root, private) = (world.disk("root", 3, 1), world.disk("private", 40, 2));
    let disks = given(&[("root", &root), ("private", &private)]);
    world.import(KIND, &world.config(), &disks).unwrap();
    let file = world.path("guest.xlsave");
    let order = |disks| Import {
        file: &file,
        dvm: "other",
        template: Some("dvm-template"),
        disks,
        kernel: None,
        initrd: None,
    };
    let imported = savefiles::import(&world.state, &OnlyFacts(KIND), &order(&disks), &silent).unwrap();
    assert_eq!(imported.template, ("dvm-template".to_owned(), 1));
    templates::remove(&world.state, "other").unwrap();
    let other_root = given(&[("root", &world.disk("other", 3, 8)), ("private", &private)]);
    let error =
        savefiles::import(&world.state, &OnlyFacts(KIND), &order(&other_root), &silent).err().unwrap();
    assert_eq!(error.kind, Kind::Refused, "{error}");
    assert_eq!(Qube::names(&world.state).unwrap(), ["dvm", "dvm-template"]);
}
