//! Reads a stream from front to end, item by item.

use std::io::Read;

use engine::units::{PAGE_BYTES, PAGE_SIZE};

use super::input::Input;
use super::libxc::{self, Domain};
use super::libxl::{self, EmulatorHeader, RecordHeader};
use super::order::Order;
use super::pages::{self, PageEntry};
use super::records::Record;
use super::xl_header::{self, ConfigText};
use super::{Fault, Place, Result, RECORD_BYTES_MAX};

/// The next thing in a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item {
    /// The libxc stream begins: what its headers say.
    Domain(Domain),
    /// A record of the libxc stream.
    Record(Record),
    /// A frame. What is in it, if it has data, is [`StreamReader::page`] until the next item.
    Page(PageEntry),
    /// A record nobody has to know, skipped.
    Skipped {
        /// Its type.
        kind: u32,
        /// Its length in bytes.
        length: u32,
    },
    /// The libxc stream's end.
    DomainEnd,
    /// A record about an emulator, skipped: [`libxl::EMULATOR_CONTEXT`] or [`libxl::EMULATOR_XENSTORE_DATA`].
    Emulator {
        /// Which of both.
        kind: u32,
        /// 1 qemu-traditional, 2 qemu.
        id: u32,
        /// Which one.
        index: u32,
        /// Bytes it has.
        length: u32,
    },
    /// A record of a checkpointed guest's stream, skipped.
    Checkpoint {
        /// Its type.
        kind: u32,
    },
}

/// Where in the stream the next item is.
enum State {
    Libxl,
    Libxc(Order),
    Ended,
}

/// A stream being read.
pub struct StreamReader<R> {
    input: Input<R>,
    config: ConfigText,
    state: State,
    /// How many records of the libxl and of the libxc stream have come.
    records: (u32, u32),
    pv_width: Option<u8>,
    entries: std::vec::IntoIter<PageEntry>,
    page: Box<[u8; PAGE_BYTES]>,
    seen_domain: bool,
}

impl<R: Read> StreamReader<R> {
    /// Reads the headers and the configuration.
    pub fn new(from: R) -> Result<StreamReader<R>> {
        let mut input = Input::new(from);
        let config = xl_header::read(&mut input)?;
        libxl::read_header(&mut input)?;
        Ok(StreamReader {
            input,
            config,
            state: State::Libxl,
            records: (0, 0),
            pv_width: None,
            entries: Vec::new().into_iter(),
            page: Box::new([0; PAGE_BYTES]),
            seen_domain: false,
        })
    }

    /// The guest's configuration.
    pub fn config(&self) -> &ConfigText {
        &self.config
    }

    /// How far the stream is read, in bytes.
    pub fn offset(&self) -> u64 {
        self.input.offset()
    }

    /// What is in the page that [`StreamReader::next_item`] gave last.
    pub fn page(&self) -> &[u8; PAGE_BYTES] {
        &self.page
    }

    /// The next item; `None` at the end. What may lie behind it is not looked at, nor does xl.
    pub fn next_item(&mut self) -> Result<Option<Item>> {
        if let Some(entry) = self.entries.next() {
            return self.next_page(entry).map(Some);
        }
        match self.state {
            State::Libxl => self.next_libxl(),
            State::Libxc(_) => self.next_libxc().map(Some),
            State::Ended => Ok(None),
        }
    }

    fn next_page(&mut self, entry: PageEntry) -> Result<Item> {
        if entry.kind.has_data() {
            self.input.fill(&mut self.page[..])?;
        }
        Ok(Item::Page(entry))
    }

    fn record_header(&mut self, place: fn(u32, u32) -> Place, number: u32) -> Result<(u32, u32)> {
        let at = self.input.offset();
        self.input.enter(place(number, u32::MAX));
        let header: RecordHeader = self.input.read()?;
        let (kind, length) = (header.kind.get(), header.length.get());
        self.input.enter_at(place(number, kind), at);
        match length <= RECORD_BYTES_MAX {
            true => Ok((kind, length)),
            false => Err(self.input.fault(Fault::Length { found: length.into(), wanted: "at most 128 MiB" })),
        }
    }

    fn next_libxl(&mut self) -> Result<Option<Item>> {
        self.records.0 = self.records.0.saturating_add(1);
        let (kind, length) = self.record_header(Place::Libxl, self.records.0)?;
        let none = |input: &Input<R>| match length {
            0 => Ok(()),
            found => Err(input.fault(Fault::Length { found: found.into(), wanted: "it should have none" })),
        };
        match kind {
            libxl::END => {
                none(&self.input)?;
                if !self.seen_domain {
                    return Err(self.input.fault(Fault::Misplaced("there was no domain")));
                }
                self.state = State::Ended;
                Ok(None)
            }
            libxl::LIBXC_CONTEXT => {
                none(&self.input)?;
                if self.seen_domain {
                    return Err(self.input.fault(Fault::Misplaced("there was a domain already")));
                }
                let domain = libxc::read_headers(&mut self.input)?;
                (self.state, self.seen_domain) = (State::Libxc(Order::new(domain)), true);
                Ok(Some(Item::Domain(domain)))
            }
            libxl::EMULATOR_CONTEXT | libxl::EMULATOR_XENSTORE_DATA => self.emulator(kind, length).map(Some),
            libxl::CHECKPOINT_END | libxl::CHECKPOINT_STATE => {
                self.skip(length)?;
                Ok(Some(Item::Checkpoint { kind }))
            }
            kind if kind & libxl::OPTIONAL != 0 => {
                self.skip(length)?;
                Ok(Some(Item::Skipped { kind, length }))
            }
            _ => Err(self.input.fault(Fault::UnknownRecord)),
        }
    }

    fn emulator(&mut self, kind: u32, length: u32) -> Result<Item> {
        let Some(rest) = length.checked_sub(8) else {
            return Err(self.input.fault(Fault::Length { found: length.into(), wanted: "at least 8" }));
        };
        let EmulatorHeader { id, index } = self.input.read()?;
        self.skip(rest)?;
        Ok(Item::Emulator { kind, id: id.get(), index: index.get(), length: rest })
    }

    fn skip(&mut self, length: u32) -> Result<()> {
        self.input.skip(length.into())?;
        self.input.padding(length.into())
    }

    fn next_libxc(&mut self) -> Result<Item> {
        self.records.1 = self.records.1.saturating_add(1);
        let (kind, length) = self.record_header(Place::Libxc, self.records.1)?;
        if kind & libxc::OPTIONAL != 0 {
            self.skip(length)?;
            return Ok(Item::Skipped { kind, length });
        }
        if let State::Libxc(order) = &mut self.state {
            order.admit(kind).map_err(|fault| self.input.fault(fault))?;
        }
        match kind {
            libxc::END if length == 0 => {
                self.state = State::Libxl;
                Ok(Item::DomainEnd)
            }
            libxc::END => {
                Err(self.input.fault(Fault::Length { found: length.into(), wanted: "it should have none" }))
            }
            libxc::PAGE_DATA => self.page_data(length),
            _ => self.small_record(kind, length).map(Item::Record),
        }
    }

    /// The list of frames is read at once, the pages one by one. A body is a multiple of 8 bytes: there is no padding.
    fn page_data(&mut self, length: u32) -> Result<Item> {
        let fault = |input: &Input<R>, fault| input.fault(fault);
        if length < 16 {
            let wanted = "no room for a frame";
            return Err(self.input.fault(Fault::Length { found: length.into(), wanted }));
        }
        let mut head = [0; 8];
        self.input.fill(&mut head)?;
        let list_bytes = pages::parse_list(&head, length).map_err(|found| fault(&self.input, found))?;
        let list = self.input.bytes(list_bytes)?;
        let data_bytes = u64::from(length) - 8 - list_bytes;
        let entries = pages::parse_entries(&list, data_bytes).map_err(|found| fault(&self.input, found))?;
        debug_assert!(data_bytes.is_multiple_of(PAGE_SIZE));
        self.entries = entries.into_iter();
        match self.entries.next() {
            Some(entry) => self.next_page(entry),
            None => Err(self.input.fault(Fault::Ends)),
        }
    }

    fn small_record(&mut self, kind: u32, length: u32) -> Result<Record> {
        if libxc::name(kind) == "unknown" {
            return Err(self.input.fault(Fault::UnknownRecord));
        }
        let body = self.input.bytes(length.into())?;
        self.input.padding(length.into())?;
        let record = Record::parse(kind, body, self.pv_width).map_err(|fault| self.input.fault(fault))?;
        if let Record::PvInfo { width, .. } = record {
            self.pv_width = Some(width);
        }
        Ok(record)
    }
}
