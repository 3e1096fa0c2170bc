//! Where the pages of an image are.
//!
//! Invariants of a [`PageMap`] (only [`PageMap::parse`] and [`PageMapBuilder`] make one):
//! - runs are non-empty, sorted and disjoint, and lie within the image;
//! - no two touching runs could be one: touching zero runs are merged, touching data runs whose slots follow each other
//!   too. So an image has exactly one map;
//! - a data run's slots lie within the stored pages: `slot + count <= slots`;
//! - guest memory has no gaps; in a volume's delta a gap means "as the base".
//!
//! A [`Slot`] is the number of a stored page. Slots are in the order in which pages are stored, which need not be the order of
//! the image (the working set comes first), and equal pages share one: that is all that deduplication is.

use std::fmt;
use std::mem::size_of;

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::error::Fault;
use crate::units::{PageCount, PageIndex, PageRange, IMAGE_PAGES_MAX};

const VOLUME_NAME_MAX: usize = 63;
const IMAGE_MEMORY: u32 = 1;
const IMAGE_VOLUME: u32 = 2;
const RUN_ZERO: u32 = 0;
const RUN_DATA: u32 = 1;

const _: () = assert!(size_of::<RawHead>() == 80);
const _: () = assert!(size_of::<RawRun>() == 16);

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHead {
    image: U32,
    reserved: U32,
    pages: U64,
    name: [u8; VOLUME_NAME_MAX + 1],
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawRun {
    first: U32,
    count: U32,
    content: U32,
    slot: U32,
}

/// Which image of a guest.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ImageId {
    /// Guest memory, whole.
    Memory,
    /// The delta of a volume since its base, by the volume's name.
    Volume(String),
}

/// The number of a stored page, in the order of storage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(pub u64);

/// What a run of pages holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Zeros, stored nowhere.
    Zero,
    /// Stored pages, from this slot on.
    Data(Slot),
}

/// A run of pages of one content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Which pages of the image.
    pub pages: PageRange,
    /// What they hold.
    pub content: Content,
}

/// Where the pages of an image are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageMap {
    image: ImageId,
    pages: PageCount,
    runs: Vec<Run>,
}

impl PageMap {
    /// Which image it maps.
    pub fn image(&self) -> &ImageId {
        &self.image
    }

    /// The size of the image; for a delta that of its volume.
    pub fn pages(&self) -> PageCount {
        self.pages
    }

    /// All runs, sorted by page.
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// The runs that are stored, with the slot each begins at.
    pub fn data_runs(&self) -> impl Iterator<Item = (PageRange, Slot)> + '_ {
        self.runs.iter().filter_map(|run| match run.content {
            Content::Data(slot) => Some((run.pages, slot)),
            Content::Zero => None,
        })
    }

    /// The runs that are zeros.
    pub fn zero_runs(&self) -> impl Iterator<Item = PageRange> + '_ {
        self.runs.iter().filter(|run| run.content == Content::Zero).map(|run| run.pages)
    }

    /// How many pages hold data, shared ones counted each time.
    pub fn data_pages(&self) -> PageCount {
        PageCount(self.data_runs().map(|(pages, _)| pages.count.0).sum())
    }

    /// How many pages are zeros.
    pub fn zero_pages(&self) -> PageCount {
        PageCount(self.zero_runs().map(|pages| pages.count.0).sum())
    }

    /// Reads a page map section; `slots` is the number of stored pages of the whole savefile.
    pub fn parse(section: &[u8], slots: PageCount) -> Result<PageMap, Fault> {
        let (head, runs) = RawHead::ref_from_prefix(section)
            .map_err(|_| Fault::PageMapHead("it is too short for its head"))?;
        let runs = <[RawRun]>::ref_from_bytes(runs)
            .map_err(|_| Fault::PageMapHead("its length is no whole number of runs"))?;
        let image = head.parse_image()?;
        let pages = PageCount(head.pages.get());
        if pages.0 > IMAGE_PAGES_MAX {
            return Err(Fault::PageMapHead("its image is larger than the format allows"));
        }
        let mut builder = PageMapBuilder::new(image, pages, runs.len());
        for (index, raw) in runs.iter().enumerate() {
            let fault = |why| raw.fault(builder.image(), index, why);
            let run = raw.parse().map_err(fault)?;
            builder.check(run, slots).map_err(fault)?;
            if builder.would_merge(run) {
                return Err(fault("it continues the run before it and must be one with it"));
            }
            builder.push(run);
        }
        let fault = |map: &PageMapBuilder, why| Fault::PageMap {
            image: map.image().to_string(),
            run: runs.len(),
            page: map.end(),
            why,
        };
        if let Some(why) = builder.incomplete() {
            return Err(fault(&builder, why));
        }
        Ok(builder.map)
    }

    /// The page map section's bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(size_of::<RawHead>() + self.runs.len() * size_of::<RawRun>());
        bytes.extend_from_slice(RawHead::new(&self.image, self.pages).as_bytes());
        for run in &self.runs {
            bytes.extend_from_slice(RawRun::new(run).as_bytes());
        }
        bytes
    }
}

/// Makes a [`PageMap`] from runs in page order, merging what can be one run.
#[derive(Debug)]
pub struct PageMapBuilder {
    map: PageMap,
}

impl PageMapBuilder {
    /// An empty map of an image of `pages` pages; room is made for `runs` runs.
    pub fn new(image: ImageId, pages: PageCount, runs: usize) -> PageMapBuilder {
        PageMapBuilder { map: PageMap { image, pages, runs: Vec::with_capacity(runs) } }
    }

    /// Adds a run after all others. Callers keep the order; [`PageMapBuilder::finish`] checks it.
    pub fn push(&mut self, run: Run) {
        if self.would_merge(run) {
            if let Some(last) = self.map.runs.last_mut() {
                last.pages.count.0 += run.pages.count.0;
                return;
            }
        }
        if !run.pages.is_empty() {
            self.map.runs.push(run);
        }
    }

    /// The map, once every rule holds; `slots` is the number of stored pages.
    pub fn finish(self, slots: PageCount) -> Result<PageMap, Fault> {
        let mut checked = PageMapBuilder::new(self.map.image.clone(), self.map.pages, self.map.runs.len());
        for (index, &run) in self.map.runs.iter().enumerate() {
            checked.check(run, slots).map_err(|why| RawRun::new(&run).fault(&self.map.image, index, why))?;
            checked.push(run);
        }
        match checked.incomplete() {
            Some(why) => {
                let image = self.map.image.to_string();
                Err(Fault::PageMap { image, run: self.map.runs.len(), page: checked.end(), why })
            }
            None => Ok(checked.map),
        }
    }

    fn image(&self) -> &ImageId {
        &self.map.image
    }

    fn end(&self) -> PageIndex {
        self.map.runs.last().map_or(PageIndex(0), |run| run.pages.end())
    }

    fn check(&self, run: Run, slots: PageCount) -> Result<(), &'static str> {
        if run.pages.is_empty() {
            return Err("it has no pages");
        }
        if run.pages.first < self.end() {
            return Err("it begins before the run before it ends");
        }
        if self.map.image == ImageId::Memory && run.pages.first != self.end() {
            return Err("there is a gap before it, and memory has none");
        }
        if run.pages.end().0 > self.map.pages.0 {
            return Err("it ends beyond the image");
        }
        match run.content {
            Content::Data(Slot(slot)) if slot.saturating_add(run.pages.count.0) > slots.0 => {
                Err("its slots end beyond the stored pages")
            }
            _ => Ok(()),
        }
    }

    fn would_merge(&self, run: Run) -> bool {
        let Some(last) = self.map.runs.last() else { return false };
        last.pages.end() == run.pages.first
            && match (last.content, run.content) {
                (Content::Zero, Content::Zero) => true,
                (Content::Data(Slot(before)), Content::Data(Slot(next))) => {
                    before + last.pages.count.0 == next
                }
                _ => false,
            }
    }

    fn incomplete(&self) -> Option<&'static str> {
        let short = self.map.image == ImageId::Memory && self.end().0 != self.map.pages.0;
        short.then_some("the map ends before the memory does")
    }
}

impl RawHead {
    fn new(image: &ImageId, pages: PageCount) -> RawHead {
        let mut head = RawHead {
            image: IMAGE_MEMORY.into(),
            reserved: 0.into(),
            pages: pages.0.into(),
            name: [0; VOLUME_NAME_MAX + 1],
        };
        if let ImageId::Volume(name) = image {
            head.image = IMAGE_VOLUME.into();
            let len = name.len().min(VOLUME_NAME_MAX);
            head.name[..len].copy_from_slice(&name.as_bytes()[..len]);
        }
        head
    }

    fn parse_image(&self) -> Result<ImageId, Fault> {
        let len = self.name.iter().position(|&byte| byte == 0).unwrap_or(VOLUME_NAME_MAX + 1);
        let (name, padding) = self.name.split_at(len);
        if self.reserved.get() != 0 || padding.iter().any(|&byte| byte != 0) {
            return Err(Fault::Reserved("a page map"));
        }
        match (self.image.get(), std::str::from_utf8(name)) {
            (IMAGE_MEMORY, Ok("")) => Ok(ImageId::Memory),
            (IMAGE_VOLUME, Ok(name)) if is_volume_name(name) => Ok(ImageId::Volume(name.to_owned())),
            (IMAGE_MEMORY | IMAGE_VOLUME, _) => Err(Fault::PageMapHead("its image has an impossible name")),
            _ => Err(Fault::PageMapHead("its image is neither memory nor volume")),
        }
    }
}

impl RawRun {
    /// Values are within 32 bits: the builder's limits are [`IMAGE_PAGES_MAX`] and the slot limit of the plan.
    fn new(run: &Run) -> RawRun {
        let (content, slot) = match run.content {
            Content::Zero => (RUN_ZERO, 0),
            Content::Data(Slot(slot)) => (RUN_DATA, slot as u32),
        };
        RawRun {
            first: (run.pages.first.0 as u32).into(),
            count: (run.pages.count.0 as u32).into(),
            content: content.into(),
            slot: slot.into(),
        }
    }

    fn parse(&self) -> Result<Run, &'static str> {
        let pages = PageRange::new(self.first.get().into(), self.count.get().into());
        match (self.content.get(), self.slot.get()) {
            (RUN_ZERO, 0) => Ok(Run { pages, content: Content::Zero }),
            (RUN_ZERO, _) => Err("a zero run has a slot"),
            (RUN_DATA, slot) => Ok(Run { pages, content: Content::Data(Slot(slot.into())) }),
            _ => Err("it holds neither zeros nor data"),
        }
    }

    fn fault(&self, image: &ImageId, run: usize, why: &'static str) -> Fault {
        Fault::PageMap { image: image.to_string(), run, page: PageIndex(self.first.get().into()), why }
    }
}

/// Whether a volume may be called so: 1 to 63 of `a-z A-Z 0-9 . _ -`, and no leading dot.
pub fn is_volume_name(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    (1..=VOLUME_NAME_MAX).contains(&name.len()) && !name.starts_with('.') && name.bytes().all(allowed)
}

impl fmt::Display for ImageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ImageId::Memory => write!(f, "memory"),
            ImageId::Volume(name) => write!(f, "volume {name}"),
        }
    }
}
