//! What a PVH guest's loader needs of an ELF64 kernel: its segments by physical address, and the entry point the note
//! XEN_ELFNOTE_PHYS32_ENTRY names.
//!
//! Invariants: segments are sorted by address, disjoint and below 4 GiB; the entry point lies in one of them.
//!
//! Sources: System V ABI (ELF64 header, program header, notes); `xen/include/public/elfnote.h`.

use std::ops::Range;

const HEADER_BYTES: usize = 64;
const PROGRAM_HEADER_BYTES: usize = 56;
/// ELFCLASS64, ELFDATA2LSB behind the magic.
const IDENT: [u8; 6] = [0x7f, b'E', b'L', b'F', 2, 1];
const EM_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// Linux has five or six.
const PROGRAM_HEADERS_MAX: u16 = 64;
/// XEN_ELFNOTE_PHYS32_ENTRY.
const PHYS32_ENTRY: u32 = 18;
const NOTE_NAME: &[u8] = b"Xen\0";

/// Why an ELF file is not a kernel to be booted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ElfError {
    /// It is something else.
    #[error("the kernel is not an ELF file for x86-64")]
    NotX86,
    /// It is cut off or damaged.
    #[error("the kernel's ELF file is damaged: {0}")]
    Damaged(&'static str),
    /// It cannot be started as a PVH guest.
    #[error("the kernel has no PVH entry point: it was built without CONFIG_PVH")]
    NoEntry,
    /// The note points nowhere.
    #[error("the kernel's PVH entry point {0:#x} is in none of its segments")]
    EntryOutside(u64),
    /// Two segments want the same memory.
    #[error("the kernel's segments overlap at {0:#x}")]
    Overlap(u64),
}

/// A part of the kernel and where it goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment<'a> {
    /// The guest physical address, in bytes.
    pub address: u64,
    /// What is in the file of it.
    pub bytes: &'a [u8],
    /// How many zero bytes follow.
    pub zeros: u64,
}

impl Segment<'_> {
    /// The guest physical addresses it takes.
    pub fn range(&self) -> Range<u64> {
        self.address..self.address + self.bytes.len() as u64 + self.zeros
    }
}

/// A kernel, read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernel<'a> {
    /// Never empty.
    pub segments: Vec<Segment<'a>>,
    /// The guest physical address of its first instruction.
    pub entry: u32,
}

impl<'a> Kernel<'a> {
    /// Reads an ELF file.
    pub fn parse(file: &'a [u8]) -> Result<Kernel<'a>, ElfError> {
        let mut segments = Vec::new();
        let mut entry = None;
        for header in program_headers(file)? {
            match header.kind {
                PT_LOAD if header.memory_bytes > 0 => segments.push(segment(file, &header)?),
                PT_NOTE => entry = entry.or(note(file_part(file, &header)?)),
                _ => {}
            }
        }
        segments.sort_by_key(|segment| segment.address);
        if let Some(pair) = segments.windows(2).find(|pair| pair[0].range().end > pair[1].address) {
            return Err(ElfError::Overlap(pair[1].address));
        }
        let entry = entry.ok_or(ElfError::NoEntry)?;
        let inside = segments.iter().any(|segment| segment.range().contains(&entry));
        let entry = u32::try_from(entry).ok().filter(|_| inside).ok_or(ElfError::EntryOutside(entry))?;
        Ok(Kernel { segments, entry })
    }
}

struct ProgramHeader {
    kind: u32,
    offset: u64,
    address: u64,
    file_bytes: u64,
    memory_bytes: u64,
}

fn program_headers(file: &[u8]) -> Result<Vec<ProgramHeader>, ElfError> {
    const CUT_OFF: ElfError = ElfError::Damaged("its program headers are cut off");
    let header =
        file.get(..HEADER_BYTES).filter(|header| header.starts_with(&IDENT)).ok_or(ElfError::NotX86)?;
    if u16_at(header, 18) != Some(EM_X86_64) {
        return Err(ElfError::NotX86);
    }
    let (offset, size, count) = u64_at(header, 32)
        .zip(u16_at(header, 54))
        .zip(u16_at(header, 56))
        .map(|((a, b), c)| (a, b, c))
        .ok_or(CUT_OFF)?;
    if usize::from(size) != PROGRAM_HEADER_BYTES || count > PROGRAM_HEADERS_MAX {
        return Err(ElfError::Damaged("its program headers are of a strange size or number"));
    }
    let table = usize::try_from(offset).ok().and_then(|offset| file.get(offset..)).ok_or(CUT_OFF)?;
    let table = table.get(..usize::from(count) * PROGRAM_HEADER_BYTES).ok_or(CUT_OFF)?;
    table
        .chunks_exact(PROGRAM_HEADER_BYTES)
        .map(|raw| {
            Some(ProgramHeader {
                kind: u32_at(raw, 0)?,
                offset: u64_at(raw, 8)?,
                address: u64_at(raw, 24)?,
                file_bytes: u64_at(raw, 32)?,
                memory_bytes: u64_at(raw, 40)?,
            })
        })
        .collect::<Option<_>>()
        .ok_or(CUT_OFF)
}

fn segment<'a>(file: &'a [u8], header: &ProgramHeader) -> Result<Segment<'a>, ElfError> {
    let bytes = file_part(file, header)?;
    let zeros = header.memory_bytes.checked_sub(header.file_bytes);
    let zeros = zeros.ok_or(ElfError::Damaged("a segment is smaller in memory than in the file"))?;
    let end = header.address.checked_add(header.memory_bytes);
    if end.is_none_or(|end| end > 1 << 32) {
        return Err(ElfError::Damaged("a segment ends above 4 GiB, where a PVH guest cannot begin"));
    }
    Ok(Segment { address: header.address, bytes, zeros })
}

fn file_part<'a>(file: &'a [u8], header: &ProgramHeader) -> Result<&'a [u8], ElfError> {
    let range = || {
        let start = usize::try_from(header.offset).ok()?;
        file.get(start..start.checked_add(usize::try_from(header.file_bytes).ok()?)?)
    };
    range().ok_or(ElfError::Damaged("a segment is cut off"))
}

/// The entry point, if these notes have it. The rest of a note that is cut off says nothing.
fn note(mut notes: &[u8]) -> Option<u64> {
    loop {
        let name_bytes = usize::try_from(u32_at(notes, 0)?).ok()?;
        let value_bytes = usize::try_from(u32_at(notes, 4)?).ok()?;
        let kind = u32_at(notes, 8)?;
        let (name, rest) = notes.get(12..)?.split_at_checked(name_bytes.checked_next_multiple_of(4)?)?;
        let value = rest.get(..value_bytes)?;
        if kind == PHYS32_ENTRY && name == NOTE_NAME {
            return match value_bytes {
                4 => u32_at(value, 0).map(u64::from),
                8 => u64_at(value, 0),
                _ => None,
            };
        }
        notes = rest.get(value_bytes.checked_next_multiple_of(4)?..)?;
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().copied().map(u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().copied().map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().copied().map(u64::from_le_bytes)
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// An ELF kernel of these segments (address, bytes in the file, bytes in memory) with these notes.
    pub fn elf(segments: &[(u64, &[u8], u64)], notes: &[u8]) -> Vec<u8> {
        let loads = segments.iter().map(|(address, bytes, memory)| (PT_LOAD, *address, *bytes, *memory));
        let parts: Vec<_> = loads.chain([(PT_NOTE, 0, notes, notes.len() as u64)]).collect();
        let mut file = vec![0; HEADER_BYTES];
        file[..6].copy_from_slice(&IDENT);
        file[18..20].copy_from_slice(&EM_X86_64.to_le_bytes());
        file[32..40].copy_from_slice(&64u64.to_le_bytes());
        file[54..56].copy_from_slice(&56u16.to_le_bytes());
        file[56..58].copy_from_slice(&(parts.len() as u16).to_le_bytes());
        let mut offset = (HEADER_BYTES + parts.len() * PROGRAM_HEADER_BYTES) as u64;
        for (kind, address, bytes, memory) in &parts {
            file.extend(kind.to_le_bytes());
            file.extend(0u32.to_le_bytes());
            for field in [offset, 0, *address, bytes.len() as u64, *memory, 4096] {
                file.extend(field.to_le_bytes());
            }
            offset += bytes.len() as u64;
        }
        parts.iter().for_each(|(_, _, bytes, _)| file.extend(*bytes));
        file
    }

    /// The note, behind another one of the same owner.
    pub fn notes(entry: u64) -> Vec<u8> {
        let mut notes = Vec::new();
        for (kind, value) in [(6u32, b"linux\0".to_vec()), (PHYS32_ENTRY, entry.to_le_bytes().to_vec())] {
            for word in [4, value.len() as u32, kind] {
                notes.extend(word.to_le_bytes());
            }
            notes.extend(NOTE_NAME);
            notes.extend(&value);
            notes.resize(notes.len().next_multiple_of(4), 0);
        }
        notes
    }

    #[test]
    fn segments_and_entry_are_found() {
        let file = elf(&[(0x2000, b"data", 0x1000), (0x1000, b"code", 4)], &notes(0x1002));
        let kernel = Kernel::parse(&file).unwrap();
        assert_eq!(kernel.entry, 0x1002);
        let code = Segment { address: 0x1000, bytes: b"code", zeros: 0 };
        assert_eq!(kernel.segments, [code, Segment { address: 0x2000, bytes: b"data", zeros: 0xffc }]);
    }

    #[test]
    fn what_cannot_be_booted_is_told_apart() {
        let parse = |file: Vec<u8>| Kernel::parse(&file).map(|_| ()).unwrap_err();
        assert_eq!(parse(b"\x7fELF".to_vec()), ElfError::NotX86);
        assert_eq!(parse(elf(&[(0x1000, b"code", 4)], &[])), ElfError::NoEntry);
        assert_eq!(parse(elf(&[(0x1000, b"code", 4)], &notes(0x1004))), ElfError::EntryOutside(0x1004));
        assert_eq!(
            parse(elf(&[(0x1000, b"code", 5), (0x1004, b"", 9)], &notes(0x1000))),
            ElfError::Overlap(0x1004)
        );
        for end in [u64::MAX, 1 << 32] {
            assert!(matches!(parse(elf(&[(end - 3, b"code", 4)], &notes(0))), ElfError::Damaged(_)));
        }
        assert!(matches!(parse(elf(&[(0, b"code", 3)], &notes(0))), ElfError::Damaged(_)));
    }

    proptest! {
        #[test]
        fn damage_never_panics(at in 0usize..240, value: u8, cut in 0usize..240) {
            let mut file = elf(&[(0x1000, b"code", 0x1000)], &notes(0x1002));
            let at = at.min(file.len() - 1);
            file[at] = value;
            let _ = Kernel::parse(&file);
            let _ = Kernel::parse(&file[..cut.min(file.len())]);
        }
    }
}
