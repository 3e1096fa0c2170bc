//! Writes a stream, as xl and libxc write it.

use std::io::{self, Write};

use engine::units::PAGE_BYTES;

use super::libxc::{self, Domain};
use super::libxl::{self, write_record};
use super::pages::{PageEntry, BATCH_PAGES};
use super::records::Record;
use super::xl_header::{self, ConfigText};

/// A stream being written. What is not ended by [`StreamWriter::end`] is no stream.
pub struct StreamWriter<W> {
    out: W,
    entries: Vec<u8>,
    pages: Vec<u8>,
}

impl<W: Write> StreamWriter<W> {
    /// Writes the headers of all three formats.
    pub fn new(mut out: W, config: &ConfigText, domain: &Domain) -> io::Result<StreamWriter<W>> {
        xl_header::write(&mut out, config)?;
        libxl::write_header(&mut out)?;
        write_record(&mut out, libxl::LIBXC_CONTEXT, &[])?;
        libxc::write_headers(&mut out, domain)?;
        let (entries, pages) = (Vec::with_capacity(BATCH_PAGES * 8), Vec::new());
        Ok(StreamWriter { out, entries, pages })
    }

    /// Writes a record of the libxc stream.
    pub fn record(&mut self, record: &Record) -> io::Result<()> {
        self.flush_pages()?;
        write_record(&mut self.out, record.kind(), &[&record.body()])
    }

    /// Adds a frame to the next record of page data; `page` counts where its kind has data.
    pub fn page(&mut self, entry: PageEntry, page: &[u8; PAGE_BYTES]) -> io::Result<()> {
        self.entries.extend(entry.raw().to_le_bytes());
        if entry.kind.has_data() {
            self.pages.extend(page);
        }
        match self.entries.len() / 8 < BATCH_PAGES {
            true => Ok(()),
            false => self.flush_pages(),
        }
    }

    fn flush_pages(&mut self) -> io::Result<()> {
        if self.entries.is_empty() {
            return Ok(());
        }
        let count = (self.entries.len() / 8) as u64;
        write_record(&mut self.out, libxc::PAGE_DATA, &[&count.to_le_bytes(), &self.entries, &self.pages])?;
        self.entries.clear();
        self.pages.clear();
        Ok(())
    }

    /// Ends both streams, and gives back what was written to.
    pub fn end(mut self) -> io::Result<W> {
        self.flush_pages()?;
        write_record(&mut self.out, libxc::END, &[])?;
        write_record(&mut self.out, libxl::END, &[])?;
        self.out.flush()?;
        Ok(self.out)
    }
}
