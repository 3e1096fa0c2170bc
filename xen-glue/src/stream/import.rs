//! A PVH guest out of a stream: its device state, where its memory lies, and the memory image.
//!
//! The stream is read twice. Where the memory lies is known at its end only, and a page's place in the image depends on all the
//! frames below it; the first pass ([`survey`]) keeps frame numbers, the second ([`fill`]) writes pages.
//!
//! What a guest's special pages hold is not taken over: rings are set up anew by whoever restores it, and the identity page
//! table is the same for every guest.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

use engine::units::{ByteCount, PageIndex, PageRange, PAGE_BYTES};

use super::config::GuestConfig;
use super::libxc::{Domain, GuestKind};
use super::pages::{PageEntry, PageKind};
use super::reader::{Item, StreamReader};
use super::records::Record;
use super::StreamError;
use crate::abi::hvm::param;
use crate::device_state::{DeviceState, TscInfo};
use crate::layout::{Layout, GFN_MAX};
use crate::life::{self, restore::is_special};

/// More HVM parameters than Xen has (HVM_NR_PARAMS is 39 in 4.17).
const PARAMS_MAX: usize = 64;
/// Guests have their memory in whole MiB; an image is rounded up to that.
const MIB: u64 = 1 << 20;

/// Why a stream's guest is not taken over.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The stream is none, or cannot be read.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// The guest in it is none that can be taken over.
    #[error("{0}")]
    Refused(String),
    /// The memory image cannot be written.
    #[error("cannot write frame {gfn:#x} to the memory image")]
    Image {
        /// The guest's frame.
        gfn: u64,
        /// The system's error.
        source: io::Error,
    },
}

/// A guest in a stream: all but what is in its memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedGuest {
    /// Its configuration.
    pub config: GuestConfig,
    /// Its state, and where its memory lies.
    pub state: DeviceState,
}

/// What [`fill`] has written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Filled {
    /// Pages with something in them.
    pub data_pages: u64,
    /// Pages of zeros: holes of the image.
    pub zero_pages: u64,
}

impl SavedGuest {
    /// The size of the memory image: room for every frame, and at least what the guest was to have; whole MiB.
    pub fn memory_bytes(&self) -> ByteCount {
        let bytes = self.config.memory_target.0.max(self.state.layout.pages().bytes().0);
        ByteCount(bytes.next_multiple_of(MIB))
    }
}

/// Reads a stream for everything but the contents of memory, and refuses a guest that cannot be taken over.
pub fn survey(from: impl Read) -> Result<SavedGuest, ImportError> {
    let mut stream = StreamReader::new(from)?;
    let config = GuestConfig::parse(stream.config()).map_err(|fault| StreamError {
        offset: 48,
        place: super::Place::Config,
        fault,
    })?;
    check_kind(&config)?;
    let mut found = Found::default();
    while let Some(item) = stream.next_item()? {
        found.take(item)?;
    }
    let guest = SavedGuest { state: found.into_state(config.vcpus)?, config };
    // What a restore would refuse is better refused now.
    life::shell_plan(guest.config.uuid, &guest.state, guest.memory_bytes())
        .map_err(|error| refused(error.to_string()))?;
    Ok(guest)
}

/// Writes the memory image of a surveyed guest, from the same stream, into `image`: empty, or of holes only.
pub fn fill(from: impl Read, guest: &SavedGuest, image: &File) -> Result<Filled, ImportError> {
    let mut stream = StreamReader::new(from)?;
    let resize = |source| ImportError::Image { gfn: 0, source };
    image.set_len(guest.memory_bytes().0).map_err(resize)?;
    let mut places = Places::new(&guest.state.layout);
    let mut filled = Filled::default();
    while let Some(item) = stream.next_item()? {
        let Item::Page(PageEntry { pfn, kind }) = item else { continue };
        if is_special(pfn) || !kind.is_memory() {
            continue;
        }
        let place = places.of(pfn).ok_or_else(changed)?;
        if !kind.has_data() || stream.page() == &[0; PAGE_BYTES] {
            filled.zero_pages += 1;
            // A guest saved while it ran has sent some pages more than once: an earlier form may stand there.
            clear(image, place)
        } else {
            filled.data_pages += 1;
            image.write_all_at(stream.page(), place.offset().0)
        }
        .map_err(|source| ImportError::Image { gfn: pfn, source })?;
    }
    match filled.data_pages + filled.zero_pages < guest.state.layout.pages().0 {
        true => Err(changed()),
        false => Ok(filled),
    }
}

fn changed() -> ImportError {
    refused("the file has changed while it was read")
}

/// Makes a page zero without making it data where it is a hole.
fn clear(image: &File, place: PageIndex) -> io::Result<()> {
    let mut page = [0; PAGE_BYTES];
    image.read_exact_at(&mut page, place.offset().0)?;
    match page == [0; PAGE_BYTES] {
        true => Ok(()),
        false => image.write_all_at(&[0; PAGE_BYTES], place.offset().0),
    }
}

fn refused(why: impl Into<String>) -> ImportError {
    ImportError::Refused(why.into())
}

fn check_kind(config: &GuestConfig) -> Result<(), ImportError> {
    match config.kind.as_str() {
        "pvh" if (1..=64).contains(&config.vcpus) => Ok(()),
        "pvh" => Err(refused(format!("the guest has {} vCPUs, from 1 to 64 are possible", config.vcpus))),
        "pv" => Err(refused("it is a PV guest: its page tables name the frames of the machine it ran on")),
        "hvm" => Err(refused("it is an HVM guest: it needs the emulator that it was saved with")),
        other => Err(refused(format!("it is a guest of the unknown type {other:?}"))),
    }
}

/// What a survey has found so far.
#[derive(Default)]
struct Found {
    domain: Option<Domain>,
    runs: Vec<PageRange>,
    cpuid_policy: Option<Vec<u8>>,
    msr_policy: Option<Vec<u8>>,
    tsc: Option<TscInfo>,
    hvm_context: Option<Vec<u8>>,
    hvm_params: Option<Vec<(u64, u64)>>,
}

impl Found {
    fn take(&mut self, item: Item) -> Result<(), ImportError> {
        match item {
            Item::Domain(domain) if domain.kind == GuestKind::Pv => {
                Err(refused("the guest is a PV one, whatever its configuration says"))
            }
            Item::Domain(domain) => set(&mut self.domain, domain, "libxc streams"),
            Item::Page(entry) => self.take_page(entry),
            Item::Record(Record::CpuidPolicy(leaves)) => {
                set(&mut self.cpuid_policy, leaves, "CPUID policies")
            }
            Item::Record(Record::MsrPolicy(msrs)) => set(&mut self.msr_policy, msrs, "MSR policies"),
            Item::Record(Record::Tsc(tsc)) => set(&mut self.tsc, tsc, "TSC records"),
            Item::Record(Record::HvmContext(context)) => set(&mut self.hvm_context, context, "HVM contexts"),
            Item::Record(Record::HvmParams(params)) => {
                set(&mut self.hvm_params, params, "lists of HVM parameters")
            }
            Item::Record(Record::StaticDataEnd) | Item::Skipped { .. } | Item::DomainEnd => Ok(()),
            Item::Record(Record::Checkpoint) | Item::Checkpoint { .. } => {
                Err(refused("it is the stream of a checkpointed guest, not a saved one"))
            }
            Item::Record(Record::Verify) => Err(refused("it was saved with verification, a debugging aid")),
            Item::Record(record) => {
                Err(refused(format!("a PVH guest has no {}", super::libxc::name(record.kind()))))
            }
            Item::Emulator { .. } => Err(refused("the guest has an emulator: it is HVM, not PVH")),
        }
    }

    fn take_page(&mut self, PageEntry { pfn, kind }: PageEntry) -> Result<(), ImportError> {
        if let PageKind::Table(..) | PageKind::Broken = kind {
            return Err(refused(format!("frame {pfn:#x} is {kind:?}, which no PVH guest can have")));
        }
        if !kind.is_memory() || is_special(pfn) {
            return Ok(());
        }
        if pfn >= GFN_MAX {
            return Err(refused(format!("frame {pfn:#x} is beyond 16 TiB")));
        }
        match self.runs.last_mut().filter(|run| run.end().0 == pfn) {
            Some(run) => run.count.0 += 1,
            None => self.runs.push(PageRange::new(pfn, 1)),
        }
        Ok(())
    }

    fn into_state(self, vcpus: u32) -> Result<DeviceState, ImportError> {
        let missing = |what: &str| refused(format!("the stream has no {what}"));
        let too_old = || refused("the stream has no CPUID or MSR policy: it was saved by a Xen before 4.14");
        let hvm_params = self.hvm_params.unwrap_or_default();
        check_params(&hvm_params)?;
        Ok(DeviceState {
            xen: self.domain.ok_or_else(|| missing("domain"))?.xen,
            vcpus,
            layout: layout(self.runs)?,
            tsc: self.tsc.ok_or_else(|| missing("X86_TSC_INFO"))?,
            hvm_context: self.hvm_context.ok_or_else(|| missing("HVM_CONTEXT"))?,
            hvm_params,
            cpuid_policy: self.cpuid_policy.ok_or_else(too_old)?,
            msr_policy: self.msr_policy.ok_or_else(too_old)?,
        })
    }
}

fn set<T>(slot: &mut Option<T>, value: T, plural: &str) -> Result<(), ImportError> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(refused(format!("the stream has two {plural}"))),
    }
}

/// Runs in the order in which they were found, some perhaps more than once.
fn layout(mut runs: Vec<PageRange>) -> Result<Layout, ImportError> {
    runs.sort_unstable_by_key(|run| run.first);
    let mut merged: Vec<PageRange> = Vec::new();
    for run in runs {
        match merged.last_mut().filter(|last| run.first <= last.end()) {
            Some(last) => last.count.0 = last.end().max(run.end()).0 - last.first.0,
            None => merged.push(run),
        }
    }
    Layout::new(merged).map_err(refused)
}

/// Whoever restores a guest makes the special pages, so what a parameter points to must be among them.
fn check_params(params: &[(u64, u64)]) -> Result<(), ImportError> {
    if params.len() > PARAMS_MAX {
        return Err(refused(format!("the guest has {} HVM parameters", params.len())));
    }
    for (name, index) in [("xenstore", param::STORE_PFN), ("console", param::CONSOLE_PFN)] {
        let mut values = params.iter().filter(|param| param.0 == index).map(|param| param.1);
        match (values.next(), values.next()) {
            (Some(gfn), None) if is_special(gfn) => {}
            (Some(gfn), None) => {
                return Err(refused(format!("the {name} page is frame {gfn:#x}, none of the special pages")))
            }
            _ => return Err(refused(format!("the guest has no {name} page, or two"))),
        }
    }
    Ok(())
}

/// Where each frame is in a memory image.
struct Places {
    /// First frame, frame after the last, page of the image.
    runs: Vec<(u64, u64, u64)>,
    last: usize,
}

impl Places {
    fn new(layout: &Layout) -> Places {
        let mut at = 0;
        let place = |run: &PageRange| {
            let page = at;
            at += run.count.0;
            (run.first.0, run.end().0, page)
        };
        Places { runs: layout.runs().iter().map(place).collect(), last: 0 }
    }

    /// Frames come in order mostly, so the run of the one before is looked at first.
    fn of(&mut self, gfn: u64) -> Option<PageIndex> {
        let holds = |run: &&(u64, u64, u64)| (run.0..run.1).contains(&gfn);
        if self.runs.get(self.last).filter(holds).is_none() {
            self.last = self.runs.partition_point(|run| run.1 <= gfn);
        }
        self.runs.get(self.last).filter(holds).map(|run| PageIndex(run.2 + gfn - run.0))
    }
}
