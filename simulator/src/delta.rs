//! The simulated host's file format for a volume's delta: a line of JSON (which pages), zeros to the next page, then the
//! data pages in that order.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;

use engine::savefile::{Content, PageMap, VolumeInfo};
use engine::units::PAGE_SIZE;
use serde::{Deserialize, Serialize};

use crate::pages::{read_page, Page};

/// The first line.
#[derive(Serialize, Deserialize)]
struct Head {
    volume: String,
    base: String,
    virtual_bytes: u64,
    /// Page, and whether it has data (else it is zero).
    pages: Vec<(u64, bool)>,
}

/// A volume's changes since its base: by page, what it holds now; `None` for zeros.
pub type Changes = BTreeMap<u64, Option<Page>>;

/// Writes the delta that `map` and `raw` describe.
pub fn write(volume: &VolumeInfo, map: &PageMap, raw: &File, mut out: &File) -> io::Result<()> {
    let pages = map.runs().iter().flat_map(|run| {
        let data = matches!(run.content, Content::Data(_));
        run.pages.pages().map(move |page| (page.0, data))
    });
    let pages: Vec<(u64, bool)> = pages.collect();
    let head = Head {
        volume: volume.name.clone(),
        base: volume.base.clone(),
        virtual_bytes: volume.virtual_bytes,
        pages: pages.clone(),
    };
    let mut bytes = serde_json::to_vec(&head)?;
    bytes.push(b'\n');
    bytes.resize(bytes.len().next_multiple_of(PAGE_SIZE as usize), 0);
    out.write_all(&bytes)?;
    for (page, _) in pages.into_iter().filter(|(_, data)| *data) {
        out.write_all(&read_page(raw, page)?)?;
    }
    Ok(())
}

/// Reads one back: the volume's name, its size, its changes.
pub fn read(file: &File) -> io::Result<(String, u64, Changes)> {
    let mut line = Vec::new();
    BufReader::new(Whole { file, at: 0 }).read_until(b'\n', &mut line)?;
    let head: Head = serde_json::from_slice(&line)?;
    let mut place = (line.len() as u64).div_ceil(PAGE_SIZE);
    let mut changes = Changes::new();
    for (page, data) in head.pages {
        let content = data.then(|| read_page(file, place)).transpose()?;
        place += u64::from(data);
        changes.insert(page, content);
    }
    Ok((head.volume, head.virtual_bytes, changes))
}

/// A file read from its start, whatever others who share it have read.
struct Whole<'a> {
    file: &'a File,
    at: u64,
}

impl io::Read for Whole<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read_at(buffer, self.at)?;
        self.at += count as u64;
        Ok(count)
    }
}
