//! A captured PVH guest into a stream that `xl restore` takes.
//!
//! Records come as libxc writes them: static data, memory by frame number, TSC, HVM context, HVM parameters. Frames a guest does
//! not have are left out rather than listed: for a PVH guest they would be a million of them.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;

use engine::units::{PageIndex, PageRange, PAGE_BYTES, PAGE_SIZE};

use super::config::GuestConfig;
use super::libxc::{Domain, GuestKind};
use super::pages::{PageEntry, PageKind};
use super::records::Record;
use super::writer::StreamWriter;
use crate::abi::hvm::param;
use crate::device_state::DeviceState;
use crate::layout::{SPECIAL_COUNT, SPECIAL_FIRST};
use crate::life::restore::identity_page_table;

/// Memory is read in pieces of so many pages.
const PIECE_PAGES: u64 = 256;
/// Writes a guest: its configuration, its state, and its memory image as [`DeviceState::layout`] lays it out. Answers `out`.
///
/// Pages of zeros are written too. To have them allocated only would make the file smaller, and a guest's memory whatever a Xen
/// that scrubs with something else (a debug build) puts there.
pub fn write<W: Write>(out: W, config: &GuestConfig, state: &DeviceState, memory: &File) -> io::Result<W> {
    let domain = Domain { version: 3, kind: GuestKind::Hvm, xen: state.xen };
    let mut stream = StreamWriter::new(out, &config.to_text(), &domain)?;
    stream.record(&Record::CpuidPolicy(state.cpuid_policy.clone()))?;
    stream.record(&Record::MsrPolicy(state.msr_policy.clone()))?;
    stream.record(&Record::StaticDataEnd)?;
    write_memory(&mut stream, state, memory)?;
    stream.record(&Record::Tsc(state.tsc))?;
    stream.record(&Record::HvmContext(state.hvm_context.clone()))?;
    stream.record(&Record::HvmParams(state.hvm_params.clone()))?;
    stream.end()
}

/// Frames in their order, the special pages among them.
fn write_memory<W: Write>(
    stream: &mut StreamWriter<W>,
    state: &DeviceState,
    memory: &File,
) -> io::Result<()> {
    let mut place = PageIndex(0);
    let mut special_to_come = true;
    for run in state.layout.runs() {
        if special_to_come && run.first.0 > SPECIAL_FIRST {
            write_special(stream, state)?;
            special_to_come = false;
        }
        write_run(stream, *run, memory, place)?;
        place.0 += run.count.0;
    }
    match special_to_come {
        true => write_special(stream, state),
        false => Ok(()),
    }
}

fn write_run<W: Write>(
    stream: &mut StreamWriter<W>,
    run: PageRange,
    memory: &File,
    place: PageIndex,
) -> io::Result<()> {
    let mut piece = vec![0; run.count.0.min(PIECE_PAGES) as usize * PAGE_BYTES];
    let mut done = 0;
    while done < run.count.0 {
        let count = (run.count.0 - done).min(PIECE_PAGES);
        let bytes = &mut piece[..(count * PAGE_SIZE) as usize];
        memory.read_exact_at(bytes, PageIndex(place.0 + done).offset().0)?;
        for (gfn, page) in (run.first.0 + done..).zip(bytes.as_chunks::<PAGE_BYTES>().0) {
            stream.page(PageEntry { pfn: gfn, kind: PageKind::Normal }, page)?;
        }
        done += count;
    }
    Ok(())
}

/// Rings are empty; the identity page table maps 4 GiB onto themselves.
fn write_special<W: Write>(stream: &mut StreamWriter<W>, state: &DeviceState) -> io::Result<()> {
    let ident_pt =
        state.hvm_params.iter().find(|(index, _)| *index == param::IDENT_PT).map(|(_, value)| *value);
    for gfn in SPECIAL_FIRST..SPECIAL_FIRST + SPECIAL_COUNT {
        let mut page = [0; PAGE_BYTES];
        if ident_pt == Some(PageIndex(gfn).offset().0) {
            page = identity_page_table();
        }
        stream.page(PageEntry { pfn: gfn, kind: PageKind::Normal }, &page)?;
    }
    Ok(())
}
