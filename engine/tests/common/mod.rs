//! What the savefile tests share: small guests, and their savefiles.
#![allow(dead_code)] // each test binary uses its part

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

use engine::image::hot::StackDelta;
use engine::savefile::{
    self, DeviceState, Error, HostIdentity, ImageId, ImageInput, ImageOutput, Manifest, PageMap, ReadBackend,
    Savefile, Scope, VolumeInfo, Written,
};
use engine::units::{ByteCount, PageCount, PageIndex, PageRange, PAGE_BYTES};

/// What a page of a test image holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Page {
    /// Nothing was ever written to it.
    Hole,
    /// Zeros were written to it.
    Zeros,
    /// The same byte throughout: compresses to nothing.
    Fill(u8),
    /// Bytes that do not compress.
    Noise(u64),
}

impl Page {
    pub fn bytes(self) -> Vec<u8> {
        match self {
            Page::Hole | Page::Zeros => vec![0; PAGE_BYTES],
            Page::Fill(byte) => vec![byte; PAGE_BYTES],
            Page::Noise(seed) => noise(seed, PAGE_BYTES),
        }
    }
}

/// xorshift, good enough not to compress.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.flatten().take(len).collect()
}

/// A sparse file with these pages.
pub fn image(pages: &[Page]) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len((pages.len() * PAGE_BYTES) as u64).unwrap();
    for (index, page) in pages.iter().enumerate() {
        if *page != Page::Hole {
            file.write_all_at(&page.bytes(), (index * PAGE_BYTES) as u64).unwrap();
        }
    }
    file
}

pub fn content(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

pub fn holes(pages: usize) -> File {
    image(&vec![Page::Hole; pages])
}

/// A guest small enough to flip every bit of its savefile.
#[derive(Clone, Debug)]
pub struct Guest {
    pub memory: Vec<Page>,
    pub root: Vec<Page>,
    pub changed: Vec<PageRange>,
    pub working_set: Vec<(u64, u64)>,
}

impl Guest {
    /// The golden savefile holds it: it is never changed.
    pub fn small() -> Guest {
        use Page::{Fill, Hole, Zeros};
        let mut memory = vec![Hole; 16];
        memory[1] = Fill(1);
        memory[2] = Zeros;
        memory[5] = Fill(2);
        memory[9] = Fill(1);
        let mut root = vec![Hole; 8];
        root[3] = Fill(2);
        root[4] = Fill(3);
        let changed = vec![PageRange::new(2, 3)];
        Guest { memory, root, changed, working_set: vec![] }
    }

    /// A guest of so many pages that do not compress.
    pub fn incompressible(pages: u64) -> Guest {
        Guest { memory: (0..pages).map(Page::Noise).collect(), ..Guest::small() }
    }

    pub fn manifest(&self) -> Manifest {
        Manifest {
            schema: savefile::SCHEMA,
            template: "debian-12".into(),
            template_generation: 1,
            template_root: "ab".into(),
            dvm: "dvm".into(),
            generation: 1,
            kernel_hash: "00".into(),
            initrd_hash: "01".into(),
            host: HostIdentity {
                kind: "qemu".into(),
                version: "7.2".into(),
                machine: "pc-q35-7.2".into(),
                cpu_model: "max".into(),
                accel: "tcg".into(),
            },
            memory_bytes: (self.memory.len() * PAGE_BYTES) as u64,
            vcpus: 1,
            volumes: vec![VolumeInfo {
                name: "root".into(),
                base: "ab".into(),
                virtual_bytes: (self.root.len() * PAGE_BYTES) as u64,
            }],
            settings_hash: "02".into(),
            agent_version: "0.1.0".into(),
            created: 1_700_000_000,
            working_set: self.working_set.clone(),
        }
    }

    pub fn write(&self, path: &Path) -> Result<Written, Error> {
        let (memory, root) = (image(&self.memory), image(&self.root));
        let size = |pages: &[Page]| ByteCount((pages.len() * PAGE_BYTES) as u64);
        let images = [
            ImageInput { id: ImageId::Memory, file: &memory, size: size(&self.memory), scope: Scope::Whole },
            ImageInput {
                id: ImageId::Volume("root".into()),
                file: &root,
                size: size(&self.root),
                scope: Scope::Runs(self.changed.clone()),
            },
        ];
        savefile::write(path, &self.manifest(), &device_state(), &images, &savefile::silent)
    }

    /// Memory as it must come back.
    pub fn memory_bytes(&self) -> Vec<u8> {
        self.memory.iter().flat_map(|page| page.bytes()).collect()
    }

    /// The delta as it must come back: zeros where it is as the base.
    pub fn delta_bytes(&self) -> Vec<u8> {
        let changed = |index: usize| {
            let page = PageRange { first: PageIndex(index as u64), count: PageCount(1) };
            self.changed.iter().any(|run| run.intersection(page).is_some())
        };
        let page =
            |(index, page): (usize, &Page)| if changed(index) { page.bytes() } else { vec![0; PAGE_BYTES] };
        self.root.iter().enumerate().flat_map(page).collect()
    }
}

pub fn device_state() -> DeviceState {
    DeviceState { kind: "test".into(), version: 3, bytes: b"registers".to_vec() }
}

/// Memory and the delta of the root, decoded.
pub fn decode(savefile: &Savefile, backend: ReadBackend) -> Result<(Vec<u8>, Vec<u8>), Error> {
    let root = ImageId::Volume("root".into());
    let pages = |id| savefile.page_map(id).map(|map| map.pages().0 as usize);
    let (memory_file, root_file) = (holes(pages(&ImageId::Memory)?), holes(pages(&root)?));
    let outputs = [
        ImageOutput { id: &ImageId::Memory, file: &memory_file },
        ImageOutput { id: &root, file: &root_file },
    ];
    savefile.decode(&outputs, backend, &savefile::silent)?;
    Ok((content(&memory_file), content(&root_file)))
}

/// This program again, to run one of its ignored tests alone. Without a test of that name it would run none, and succeed.
pub fn child(test: &str) -> Command {
    let again = || {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--ignored", "--exact", test]);
        command
    };
    let listed = again().arg("--list").output().unwrap().stdout;
    assert!(listed.starts_with(format!("{test}: test\n").as_bytes()), "there is no ignored test {test}");
    let mut command = again();
    command.stdout(Stdio::null());
    command
}

/// A host whose overlays are plain copies.
#[derive(Debug, Default)]
pub struct StackRaw {
    pub fails: bool,
    pub calls: AtomicUsize,
}

impl StackDelta for StackRaw {
    fn stack(&self, volume: &VolumeInfo, map: &PageMap, raw: &File, mut out: &File) -> io::Result<()> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        assert_eq!(*map.image(), ImageId::Volume(volume.name.clone()));
        if self.fails {
            return Err(io::Error::other("the host cannot"));
        }
        out.write_all(&content(raw))
    }

    fn file_name(&self, volume: &str) -> String {
        format!("{volume}.raw")
    }
}
