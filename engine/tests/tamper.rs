//! No savefile but the one that was written is accepted: not with one bit changed, not shorter, not longer, not of another
//! format. Nothing here may panic.

mod common;

use std::fs::{self, File};
use std::io::Write;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use common::Guest;
use engine::savefile::{self, Error, Fault, ReadBackend, RootHash, Savefile, HEADER_LEN, ROOT_CONTEXT};

/// A small savefile and a place in memory to damage it in.
struct Sample {
    bytes: Vec<u8>,
    root: RootHash,
    copy: PathBuf,
    _folder: tempfile::TempDir,
}

impl Sample {
    fn new() -> Sample {
        // Thousands of files are opened; where there is a file system in memory, there.
        let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        let path = folder.path().join("guest.save");
        let root = Guest::small().write(&path).unwrap().root;
        Sample { bytes: fs::read(&path).unwrap(), root, copy: folder.path().join("copy"), _folder: folder }
    }

    /// What opening and verifying says to these bytes.
    fn check(&self, bytes: &[u8]) -> Result<(), Error> {
        fs::write(&self.copy, bytes).unwrap();
        open_and_verify(&self.copy, None)
    }

    /// Changes the header and seals it again: a file that somebody made, not one that broke.
    fn resealed(&self, change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        change(&mut bytes);
        let len = bytes.len() as u64;
        bytes[16..24].copy_from_slice(&len.to_le_bytes());
        reseal(&mut bytes);
        bytes
    }
}

fn reseal(bytes: &mut [u8]) {
    bytes[32..64].fill(0);
    let mut hasher = blake3::Hasher::new_derive_key(ROOT_CONTEXT);
    hasher.update(&bytes[..HEADER_LEN]);
    bytes[32..64].copy_from_slice(hasher.finalize().as_bytes());
}

fn open_and_verify(path: &Path, root: Option<&RootHash>) -> Result<(), Error> {
    Savefile::open(path, root)?.verify(ReadBackend::Pread, &savefile::silent)
}

#[test]
fn every_single_flipped_bit_is_refused() {
    let sample = Sample::new();
    assert!(sample.check(&sample.bytes).is_ok());
    assert!(sample.bytes.len() < 8 << 10, "small enough to flip every bit: {}", sample.bytes.len());
    let half = sample.bytes.len() / 2;
    std::thread::scope(|scope| {
        for (name, places) in [("first", 0..half), ("second", half..sample.bytes.len())] {
            let (copy, sample) = (sample.copy.with_extension(name), &sample);
            scope.spawn(move || flip_every_bit(sample, &copy, places));
        }
    });
}

fn flip_every_bit(sample: &Sample, copy: &Path, places: Range<usize>) {
    fs::write(copy, &sample.bytes).unwrap();
    let file = File::options().write(true).open(copy).unwrap();
    for place in places {
        let byte = sample.bytes[place];
        for bit in 0..8 {
            file.write_all_at(&[byte ^ (1 << bit)], place as u64).unwrap();
            let err = open_and_verify(copy, None).expect_err("a flipped bit passed");
            assert!(err.is_bad_savefile(), "bit {bit} of byte {place:#x}: {err}");
        }
        file.write_all_at(&[byte], place as u64).unwrap();
    }
    open_and_verify(copy, Some(&sample.root)).expect("it is whole again");
}

#[test]
fn a_flipped_bit_in_a_chunk_is_seen_by_either_reader_before_it_is_decoded() {
    let sample = Sample::new();
    let mut bytes = sample.bytes.clone();
    let place = bytes.len() - 10;
    bytes[place] ^= 4;
    fs::write(&sample.copy, &bytes).unwrap();
    let savefile = Savefile::open(&sample.copy, Some(&sample.root)).expect("the tables are whole");
    for backend in [ReadBackend::Ring, ReadBackend::Pread] {
        let err = common::decode(&savefile, backend).unwrap_err();
        assert!(matches!(&err, Error::Damaged { fault: Fault::ChunkHash { chunk: 0, .. }, .. }), "{err}");
    }
}

#[test]
fn truncation_at_every_length_is_refused() {
    let sample = Sample::new();
    fs::write(&sample.copy, &sample.bytes).unwrap();
    let file = File::options().write(true).open(&sample.copy).unwrap();
    for len in (0..sample.bytes.len()).rev() {
        file.set_len(len as u64).unwrap();
        let err = open_and_verify(&sample.copy, None).expect_err("a truncated file passed");
        assert!(err.is_bad_savefile(), "at {len}: {err}");
    }
}

#[test]
fn a_file_cut_after_it_was_opened_is_an_error_and_not_a_signal() {
    let sample = Sample::new();
    fs::write(&sample.copy, &sample.bytes).unwrap();
    let savefile = Savefile::open(&sample.copy, None).unwrap();
    File::options().write(true).open(&sample.copy).unwrap().set_len(HEADER_LEN as u64 + 10).unwrap();
    assert!(savefile.verify(ReadBackend::Ring, &savefile::silent).is_err());
    for backend in [ReadBackend::Ring, ReadBackend::Pread] {
        assert!(common::decode(&savefile, backend).is_err());
    }
}

#[test]
fn trailing_bytes_are_refused() {
    let sample = Sample::new();
    for tail in [&[0][..], &[1], &[0; 4096]] {
        let err = sample.check(&[&sample.bytes, tail].concat()).unwrap_err();
        assert!(matches!(&err, Error::Damaged { fault: Fault::Length { .. }, .. }), "{err}");
    }
}

#[test]
fn a_foreign_file_and_another_version_are_told_apart() {
    let sample = Sample::new();
    let foreign = [b"\x89PNG\r\n\x1a\n".to_vec(), vec![0; 5000]].concat();
    assert!(matches!(sample.check(&foreign), Err(Error::NotASavefile { .. })));
    let mut later = sample.bytes.clone();
    later[8..12].copy_from_slice(&2u32.to_le_bytes());
    assert!(matches!(sample.check(&later), Err(Error::UnknownVersion { found: 2, .. })));
    let missing = Savefile::open(&sample.copy.with_extension("not-there"), None).unwrap_err();
    assert!(missing.is_missing() && !missing.is_bad_savefile());
}

#[test]
fn a_replaced_savefile_is_not_the_pinned_one() {
    let sample = Sample::new();
    let mut other = Guest::small();
    other.memory[3] = common::Page::Fill(200);
    other.write(&sample.copy).unwrap();
    let err = Savefile::open(&sample.copy, Some(&sample.root)).unwrap_err();
    assert!(matches!(&err, Error::NotThePinned { pinned, .. } if *pinned == sample.root), "{err}");
}

/// Appends a section of this kind and these flags to a sample, with the right hash of its bytes.
fn with_section(sample: &Sample, kind: u32, flags: u32, content: &[u8]) -> Vec<u8> {
    sample.resealed(|bytes| {
        let count = u32::from_le_bytes(bytes[12..16].try_into().unwrap());
        let entry = 128 + 64 * count as usize;
        bytes[12..16].copy_from_slice(&(count + 1).to_le_bytes());
        bytes[entry..entry + 4].copy_from_slice(&kind.to_le_bytes());
        bytes[entry + 4..entry + 8].copy_from_slice(&flags.to_le_bytes());
        let offset = bytes.len() as u64;
        bytes[entry + 8..entry + 16].copy_from_slice(&offset.to_le_bytes());
        bytes[entry + 16..entry + 24].copy_from_slice(&(content.len() as u64).to_le_bytes());
        bytes[entry + 32..entry + 64].copy_from_slice(blake3::hash(content).as_bytes());
        bytes.extend_from_slice(content);
    })
}

#[test]
fn an_unknown_section_is_skipped_when_optional_and_refused_when_mandatory() {
    let sample = Sample::new();
    let optional = with_section(&sample, 77, 0, b"a later engine's");
    sample.check(&optional).expect("an optional section is skipped");
    let err = sample.check(&with_section(&sample, 77, 1, b"a later engine's")).unwrap_err();
    assert!(matches!(&err, Error::Damaged { fault: Fault::UnknownSection { kind: 77, .. }, .. }), "{err}");
}

#[test]
fn the_bytes_of_a_skipped_section_are_verified_all_the_same() {
    let sample = Sample::new();
    let mut bytes = with_section(&sample, 77, 0, b"a later engine's");
    *bytes.last_mut().unwrap() ^= 1;
    let err = sample.check(&bytes).unwrap_err();
    assert!(matches!(&err, Error::Damaged { fault: Fault::SectionHash { .. }, .. }), "{err}");
}

#[test]
fn a_second_manifest_is_refused() {
    let sample = Sample::new();
    assert!(matches!(
        sample.check(&with_section(&sample, 1, 1, b"{}")),
        Err(Error::Damaged { fault: Fault::SectionCount { found: 2, .. }, .. })
    ));
}

/// Well sealed nonsense: every field of the header in turn is given values that a broken or hostile writer might.
#[test]
fn a_well_sealed_header_with_wild_fields_is_refused_without_a_panic_or_a_large_allocation() {
    let sample = Sample::new();
    let wild = [1, 2, 63, 4095, 4096, 1 << 20, u32::MAX as u64, 1 << 40, u64::MAX - 4096, u64::MAX];
    let sections = 6;
    for place in
        (12..HEADER_LEN.min(128 + 64 * (sections + 1))).step_by(4).filter(|at| !(32..64).contains(at))
    {
        for value in wild {
            let mut bytes = sample.bytes.clone();
            let width = if place % 8 == 0 { 8 } else { 4 };
            let before = bytes[place..place + width].to_vec();
            bytes[place..place + width].copy_from_slice(&value.to_le_bytes()[..width]);
            if bytes[place..place + width] == before[..] {
                continue;
            }
            reseal(&mut bytes);
            let err = sample.check(&bytes).expect_err("a wild header passed");
            assert!(err.is_bad_savefile(), "{value:#x} at {place:#x}: {err}");
        }
    }
}

/// The same for the tables: each 32-bit word in turn, with section hash and root made right again.
#[test]
fn well_sealed_tables_with_wild_fields_are_refused_or_decode_without_a_panic() {
    let sample = Sample::new();
    let savefile = {
        fs::write(&sample.copy, &sample.bytes).unwrap();
        Savefile::open(&sample.copy, None).unwrap()
    };
    for (index, section) in savefile.header().sections().iter().enumerate().take(5) {
        let (start, len) = (section.offset.0 as usize, section.length.0 as usize);
        for place in (start..start + len - 3).step_by(4) {
            for value in [0, 1, 64, 1 << 20, u32::MAX - 1, u32::MAX] {
                let mut bytes = sample.bytes.clone();
                bytes[place..place + 4].copy_from_slice(&value.to_le_bytes());
                let hash = *blake3::hash(&bytes[start..start + len]).as_bytes();
                bytes[128 + 64 * index + 32..][..32].copy_from_slice(&hash);
                reseal(&mut bytes);
                fs::write(&sample.copy, &bytes).unwrap();
                // Some of it is a valid file that says something else (another device state); most is not.
                if let Err(err) = open_and_verify(&sample.copy, None) {
                    assert!(err.is_bad_savefile(), "{value:#x} at {place:#x}: {err}");
                }
            }
        }
    }
}

#[test]
fn a_savefile_of_random_bytes_behind_a_right_magic_is_refused() {
    let sample = Sample::new();
    for seed in 0..200 {
        let mut bytes = common::noise(seed, 4096 + seed as usize * 37);
        bytes[..12].copy_from_slice(&sample.bytes[..12]);
        let mut file = File::create(&sample.copy).unwrap();
        file.write_all(&bytes).unwrap();
        assert!(open_and_verify(&sample.copy, None).unwrap_err().is_bad_savefile());
    }
}
