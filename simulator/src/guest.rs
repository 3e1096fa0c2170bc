//! A simulated guest: memory, volumes, and what it knows of itself.
//!
//! Invariants:
//! - a guest booted for capture writes pages that name its boot, and its device state tells exactly which, with their
//!   hashes: a restore checks memory, deltas and device state against each other, so a wrong or mixed image is found out;
//! - a restored guest never writes to what it was restored from: its pages go to a map of its own (copy on write), and it
//!   can check at any time that it sees its own writes and, everywhere else, what was captured.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use engine::host::{Base, BootPurpose, Capture, CapturedDelta, GuestSpec, HostError};
use engine::image::hot::HotFiles;
use engine::units::{ByteCount, PageRange, PAGE_BYTES, PAGE_SIZE};
use serde::{Deserialize, Serialize};

use crate::delta::{self, Changes};
use crate::pages::{self, data_pages, describe, hash_pages, is_zero, memfd, page_of, read_page, Page};
use crate::rng::{mix, Rng};
use crate::spill::Spill;

/// Pages of memory a boot writes.
const SYSTEM_PAGES: u64 = 40;
/// Pages it frees again, with something still in them.
const FREE_PAGES: u64 = 12;
/// Pages a clone writes as soon as it is somebody: half of them over captured ones.
const CLONE_PAGES: u64 = 8;

/// What a guest was started for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Life {
    /// Booted, for this.
    Booted(BootPurpose),
    /// Restored from a hot image.
    Restored,
}

fn open_base(path: &Path, base: &Base) -> io::Result<File> {
    File::options().read(true).write(base.is_persistent()).open(path)
}

/// An image that is not what was captured.
fn wrong<T>(what: String) -> io::Result<T> {
    Err(io::Error::new(io::ErrorKind::InvalidData, what))
}

/// What the host saves of the machine beside memory and volumes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct DeviceState {
    magic: String,
    boot: u64,
    frozen: bool,
    warmed: bool,
    hook: Option<String>,
    /// Pages of memory that hold something.
    memory: Vec<u64>,
    memory_hash: String,
    /// By volume: pages that differ from the base, and the hash of them.
    volumes: BTreeMap<String, (Vec<u64>, String)>,
}

const MAGIC: &str = "dispvm simulator 1";
/// The version given to the savefile.
pub const DEVICE_STATE_VERSION: u32 = 1;

enum Memory {
    /// A file of its own.
    Own(File),
    /// A hot image, and what was written since.
    Shared(File, BTreeMap<u64, Page>),
}

struct Volume {
    name: String,
    size: ByteCount,
    base: Option<File>,
    /// Whether what is saved goes to the base itself.
    persistent: bool,
    /// What was captured.
    under: Changes,
    /// What was written since.
    own: Changes,
    /// Where pages went when `own` was full.
    spill: Option<Spill>,
}

/// A guest.
pub struct Guest {
    life: Life,
    boot: u64,
    memory: Memory,
    memory_size: ByteCount,
    volumes: Vec<Volume>,
    captured: Vec<u64>,
    own_seed: u64,
    free: Vec<u64>,
    /// Whether everything but the agent is frozen.
    pub frozen: bool,
    /// Whether what a launch runs was run once.
    pub warmed: bool,
    /// Host name and machine-id, once it is somebody.
    pub identity: Option<(String, [u8; 16])>,
    hook: Option<String>,
    /// Pages a volume may hold in memory.
    volume_pages_max: usize,
}

impl Guest {
    /// Boots: writes pages of `boot` to memory and volumes.
    pub fn boot(spec: &GuestSpec, purpose: BootPurpose, boot: u64, memfd_name: &str) -> io::Result<Guest> {
        for path in [&spec.kernel, &spec.initrd] {
            if File::open(path)?.metadata()?.len() == 0 {
                return Err(io::Error::other(format!("{} is empty", path.display())));
            }
        }
        let volume = |volume: &engine::host::VolumeSpec| {
            Ok(Volume {
                name: volume.name.clone(),
                size: volume.size,
                base: volume.base.path().map(|path| open_base(path, &volume.base)).transpose()?,
                persistent: volume.base.is_persistent(),
                under: Changes::new(),
                own: Changes::new(),
                spill: None,
            })
        };
        let mut guest = Guest {
            life: Life::Booted(purpose),
            boot,
            memory: Memory::Own(memfd(memfd_name, spec.memory)?),
            memory_size: spec.memory,
            volumes: spec.volumes.iter().map(volume).collect::<io::Result<_>>()?,
            captured: Vec::new(),
            own_seed: mix(boot, 1),
            free: Vec::new(),
            frozen: false,
            warmed: false,
            identity: None,
            hook: None,
            volume_pages_max: usize::MAX,
        };
        guest.start_up()?;
        Ok(guest)
    }

    fn start_up(&mut self) -> io::Result<()> {
        let mut rng = Rng::new(self.boot);
        let pages = self.memory_size.0 / PAGE_SIZE;
        let mut places = vec![0];
        while places.len() as u64 <= SYSTEM_PAGES + FREE_PAGES {
            let place = rng.below(pages);
            if !places.contains(&place) {
                places.push(place);
            }
        }
        for place in &places {
            self.write_memory(*place, page_of(self.boot, "memory", *place))?;
        }
        self.free = places.split_off(SYSTEM_PAGES as usize);
        for volume in &mut self.volumes {
            let pages = volume.size.0 / PAGE_SIZE;
            // One page becomes zero, over whatever the base has there; the volatile volume stays as it is.
            let count = if volume.base.is_some() { 5 } else { 0 };
            for at in 0..count {
                let place = (rng.below(pages / 8) + at * pages / 8).min(pages - 1);
                let page = (at > 0).then(|| page_of(self.boot, &volume.name, place));
                volume.own.insert(place, page);
            }
        }
        Ok(())
    }

    /// Restores from a hot image, if memory, deltas and device state are what was captured together. An error of
    /// kind `InvalidData` says what is wrong with them.
    pub fn restore(spec: &GuestSpec, image: HotFiles, own_seed: u64) -> io::Result<Guest> {
        let mut bytes = vec![0; image.device_state.metadata()?.len() as usize];
        image.device_state.read_exact_at(&mut bytes, 0)?;
        let state: DeviceState = serde_json::from_slice(&bytes)
            .or_else(|error| wrong(format!("the device state is none: {error}")))?;
        if state.magic != MAGIC || !state.frozen || !state.warmed {
            return wrong("the device state is not that of a warm, frozen guest".to_owned());
        }
        let memory = data_pages(&image.memory)?;
        for (place, page) in &memory {
            if *page != page_of(state.boot, "memory", *place) {
                return wrong(format!(
                    "memory of boot {:x} has, at {place:#x}, {}",
                    state.boot,
                    describe(page)
                ));
            }
        }
        let hash = hash_pages(memory.iter().map(|(place, page)| (*place, &page[..])));
        let places: Vec<u64> = memory.iter().map(|(place, _)| *place).collect();
        if places != state.memory || hash != state.memory_hash {
            return wrong(format!("memory of boot {:x} is not what was captured", state.boot));
        }
        let mut deltas = BTreeMap::new();
        for (name, file) in &image.deltas {
            let (volume, size, changes) = delta::read(file)?;
            if volume != *name {
                return wrong(format!("the delta given for {name} is one of {volume}"));
            }
            deltas.insert(volume, (size, changes));
        }
        let mut volumes = Vec::new();
        for volume in &spec.volumes {
            let (size, under) = deltas.remove(&volume.name).unwrap_or((volume.size.0, Changes::new()));
            let (places, hash) = state
                .volumes
                .get(&volume.name)
                .map_or_else(|| wrong(format!("it knows no volume {}", volume.name)), Ok)?;
            if size != volume.size.0 || *hash != hash_changes(&under) || !under.keys().eq(places) {
                return wrong(format!("the delta of {} is not what boot {:x} has", volume.name, state.boot));
            }
            let base = volume.base.path().map(File::open).transpose()?;
            volumes.push(Volume {
                persistent: false,
                name: volume.name.clone(),
                size: volume.size,
                base,
                under,
                own: Changes::new(),
                spill: None,
            });
        }
        Ok(Guest {
            life: Life::Restored,
            boot: state.boot,
            memory_size: spec.memory,
            memory: Memory::Shared(image.memory, BTreeMap::new()),
            volumes,
            captured: state.memory,
            own_seed: mix(own_seed, state.boot),
            free: Vec::new(),
            frozen: state.frozen,
            warmed: state.warmed,
            identity: None,
            hook: state.hook,
            volume_pages_max: usize::MAX,
        })
    }

    /// What it was started for.
    pub fn life(&self) -> Life {
        self.life
    }

    /// Whether it is to be captured.
    pub fn is_for_capture(&self) -> bool {
        self.life == Life::Booted(BootPurpose::Capture)
    }

    /// Bytes nothing in it uses.
    pub fn free_bytes(&self) -> ByteCount {
        ByteCount(self.free.len() as u64 * PAGE_SIZE)
    }

    /// The pages of what it was restored from that it has needed: all its programs' pages, in a guest so small.
    pub fn touched(&self) -> Vec<PageRange> {
        self.captured.iter().map(|place| PageRange::new(*place, 1)).collect()
    }

    /// The host takes the free memory and gives it back as zeros.
    pub fn reclaim(&mut self) -> io::Result<()> {
        for place in std::mem::take(&mut self.free) {
            self.write_memory(place, vec![0; PAGE_BYTES])?;
        }
        Ok(())
    }

    /// Runs a hook: it leaves its hash in the device state, and pages in memory and in the private volume.
    pub fn run_hook(&mut self, hook: &[u8]) -> io::Result<()> {
        self.hook = Some(blake3::hash(hook).to_hex().to_string());
        let place = self.memory_size.0 / PAGE_SIZE - 1;
        self.write_memory(place, page_of(self.boot, "memory", place))?;
        if let Some(volume) = self.volumes.iter_mut().find(|volume| volume.name == "private") {
            let place = volume.size.0 / PAGE_SIZE - 1;
            volume.own.insert(place, Some(page_of(self.boot, "private", place)));
        }
        Ok(())
    }

    /// What a clone's programs do as soon as they run: they write, to memory and to every volume.
    pub fn write_as_clone(&mut self) -> io::Result<()> {
        for place in self.clone_places() {
            self.write_memory(place, page_of(self.own_seed, "memory", place))?;
        }
        let seed = self.own_seed;
        for volume in &mut self.volumes {
            let captured: Vec<u64> = volume.under.keys().copied().take(2).collect();
            for place in captured.into_iter().chain([volume.size.0 / PAGE_SIZE / 2]) {
                volume.own.insert(place, Some(page_of(seed, &volume.name, place)));
            }
        }
        Ok(())
    }

    fn clone_places(&self) -> Vec<u64> {
        let mut rng = Rng::new(self.own_seed);
        let over = self.captured.iter().copied().take(CLONE_PAGES as usize / 2);
        over.chain((0..CLONE_PAGES / 2).map(|_| rng.below(self.memory_size.0 / PAGE_SIZE))).collect()
    }

    /// Limits what each volume holds in memory.
    pub fn limit_volumes(&mut self, bytes: ByteCount) {
        self.volume_pages_max = (bytes.0 / PAGE_SIZE) as usize;
    }

    /// A program writes a page to the root volume.
    pub fn fill(&mut self, at: u64) {
        let (seed, volume) = (self.own_seed, &mut self.volumes[0]);
        let place = at % (volume.size.0 / PAGE_SIZE);
        volume.own.insert(place, Some(page_of(seed, &volume.name, place)));
    }

    /// Writes a page to every volume that is kept, straight to its file. Answers to how many.
    pub fn save(&self, at: u64) -> io::Result<usize> {
        let kept = self.volumes.iter().filter(|volume| volume.persistent);
        let kept: Vec<_> = kept.filter_map(|volume| Some((volume, volume.base.as_ref()?))).collect();
        for (volume, file) in &kept {
            let place = at % (volume.size.0 / PAGE_SIZE);
            file.write_all_at(&page_of(self.own_seed, &volume.name, place), place * PAGE_SIZE)?;
        }
        Ok(kept.len())
    }

    /// Whether a volume waits for the host to make room.
    pub fn must_spill(&self) -> bool {
        self.volumes.iter().any(|volume| volume.own.len() > self.volume_pages_max)
    }

    /// The host makes room: pages go, encrypted, to an unlinked file in `folder`.
    pub fn spill(&mut self, folder: &Path) -> io::Result<()> {
        for volume in self.volumes.iter_mut().filter(|volume| volume.own.len() > self.volume_pages_max) {
            let spill = match volume.spill.take() {
                Some(spill) => spill,
                None => Spill::new(folder)?,
            };
            let spill = volume.spill.insert(spill);
            for (place, page) in std::mem::take(&mut volume.own) {
                spill.put(place, page.unwrap_or_else(|| vec![0; PAGE_BYTES]))?;
            }
        }
        Ok(())
    }

    /// Whether a clone that has written sees its own pages and, everywhere else, the captured ones.
    pub fn check(&self) -> Result<(), String> {
        let text = |error: io::Error| error.to_string();
        let own = self.clone_places();
        for place in &own {
            self.check_page("memory", *place, self.own_seed, &self.read_memory(*place).map_err(text)?)?;
        }
        for place in self.captured.iter().filter(|place| !own.contains(place)) {
            self.check_page("memory", *place, self.boot, &self.read_memory(*place).map_err(text)?)?;
        }
        for volume in &self.volumes {
            for place in volume.under.keys().chain(volume.own.keys()) {
                let page = volume.read(*place).map_err(text)?;
                match volume.has_own(*place) && self.life == Life::Restored {
                    true => self.check_page(&volume.name, *place, self.own_seed, &page)?,
                    false if is_zero(&page) => {}
                    false => self.check_page(&volume.name, *place, self.boot, &page)?,
                }
            }
        }
        Ok(())
    }

    fn check_page(&self, image: &str, place: u64, writer: u64, page: &[u8]) -> Result<(), String> {
        // A guest booted cold wrote as one boot and as one clone; who wrote last is checked where it is known.
        let booted = matches!(self.life, Life::Booted(_)) && page == page_of(self.own_seed, image, place);
        match page == page_of(writer, image, place) || booted {
            true => Ok(()),
            false => Err(format!("{image} at {place:#x}: {}, not one of {writer:x}", describe(page))),
        }
    }

    /// Takes memory, device state and deltas. The guest is stopped.
    pub fn capture(&mut self, memfd_name: &str) -> Result<Capture, HostError> {
        let step = "capture";
        let Memory::Own(memory) = &self.memory else {
            let reason = "the guest was not started to be captured".to_owned();
            return Err(HostError::Refused { step, reason });
        };
        let memory = memory.try_clone().map_err(HostError::io(step))?;
        let pages = data_pages(&memory).map_err(HostError::io(step))?;
        let volumes = self.volumes.iter().map(|volume| {
            let places = volume.own.keys().copied().collect();
            (volume.name.clone(), (places, hash_changes(&volume.own)))
        });
        let state = DeviceState {
            magic: MAGIC.to_owned(),
            boot: self.boot,
            frozen: self.frozen,
            warmed: self.warmed,
            hook: self.hook.clone(),
            memory: pages.iter().map(|(place, _)| *place).collect(),
            memory_hash: hash_pages(pages.iter().map(|(place, page)| (*place, &page[..]))),
            volumes: volumes.collect(),
        };
        let message = |error: serde_json::Error| HostError::Hypervisor { step, message: error.to_string() };
        let deltas = self.volumes.iter().map(|volume| volume.captured(memfd_name));
        Ok(Capture {
            memory,
            memory_size: self.memory_size,
            device_state: serde_json::to_vec(&state).map_err(message)?,
            device_state_version: DEVICE_STATE_VERSION,
            deltas: deltas.collect::<io::Result<_>>().map_err(HostError::io(step))?,
        })
    }

    fn write_memory(&mut self, place: u64, page: Page) -> io::Result<()> {
        match &mut self.memory {
            Memory::Own(file) => file.write_all_at(&page, place * PAGE_SIZE),
            Memory::Shared(_, own) => {
                own.insert(place, page);
                Ok(())
            }
        }
    }

    fn read_memory(&self, place: u64) -> io::Result<Page> {
        match &self.memory {
            Memory::Own(file) => read_page(file, place),
            Memory::Shared(file, own) => own.get(&place).cloned().map_or_else(|| read_page(file, place), Ok),
        }
    }
}

impl Volume {
    fn read(&self, place: u64) -> io::Result<Page> {
        let spilled = self.spill.as_ref().filter(|_| !self.own.contains_key(&place));
        if let Some(page) = spilled.and_then(|spill| spill.get(place)) {
            return page;
        }
        match (self.own.get(&place).or(self.under.get(&place)), &self.base) {
            (Some(page), _) => Ok(page.clone().unwrap_or_else(|| vec![0; PAGE_BYTES])),
            (None, Some(base)) => read_page(base, place),
            (None, None) => Ok(vec![0; PAGE_BYTES]),
        }
    }

    fn has_own(&self, place: u64) -> bool {
        self.own.contains_key(&place)
            || self.spill.as_ref().is_some_and(|spill| spill.places.contains_key(&place))
    }

    fn captured(&self, memfd_name: &str) -> io::Result<CapturedDelta> {
        let raw = memfd(memfd_name, self.size)?;
        for (place, page) in &self.own {
            if let Some(page) = page {
                raw.write_all_at(page, place * PAGE_SIZE)?;
            }
        }
        let mut changed: Vec<PageRange> = Vec::new();
        for place in self.own.keys() {
            match changed.last_mut() {
                Some(last) if last.end().0 == *place => last.count.0 += 1,
                _ => changed.push(PageRange::new(*place, 1)),
            }
        }
        Ok(CapturedDelta { volume: self.name.clone(), size: self.size, raw, changed })
    }
}

fn hash_changes(changes: &Changes) -> String {
    let zeros = vec![0; PAGE_BYTES];
    hash_pages(changes.iter().map(|(place, page)| (*place, page.as_deref().unwrap_or(&zeros))))
}

/// A raw image with data on every fourth page, for a template's root.
pub fn root_image(seed: u64, pages: u64) -> Vec<u8> {
    let page = |place: u64| match place % 4 {
        0 => pages::page_of(seed, "base", place),
        _ => vec![0; PAGE_BYTES],
    };
    (0..pages).flat_map(page).collect()
}
