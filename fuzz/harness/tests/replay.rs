//! Every committed corpus file through its target, on an ordinary toolchain; and random damage to each, where libFuzzer does
//! not run.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use fuzz_harness::TARGETS;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

/// All committed corpora together: they are to stay seeds and regressions.
const CORPORA_BYTES_MAX: u64 = 300 << 10;

fn folder() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

fn corpus(target: &str) -> Vec<PathBuf> {
    let folder = folder().join("corpus").join(target);
    let entries = fs::read_dir(&folder).unwrap_or_else(|err| panic!("{}: {err}", folder.display()));
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

#[test]
fn every_corpus_file_passes_its_target() {
    for target in TARGETS {
        let files = corpus(target.name);
        assert!(!files.is_empty(), "{} has no seed", target.name);
        for file in files {
            println!("{}", file.display()); // shown when it panics
            (target.run)(&fs::read(&file).unwrap());
        }
    }
}

fn damage(bytes: &mut Vec<u8>, at: prop::sample::Index, how: usize, byte: u8) {
    if bytes.is_empty() {
        return;
    }
    let at = at.index(bytes.len());
    let piece = |len: u8| at..bytes.len().min(at + usize::from(len));
    match how {
        0 => bytes[at] = byte,
        1 => bytes[at] ^= 1 << (byte & 7),
        2 => drop(bytes.drain(piece(byte & 15))),
        _ => {
            let doubled = bytes[piece(byte & 63)].to_vec();
            bytes.splice(at..at, doubled);
        }
    }
}

/// A few bytes of a seed changed, taken out or doubled.
#[test]
fn damaged_seeds_do_no_harm() {
    for target in TARGETS {
        let seeds: Vec<Vec<u8>> = corpus(target.name).iter().map(|file| fs::read(file).unwrap()).collect();
        let edits = prop::collection::vec((any::<prop::sample::Index>(), 0..4usize, any::<u8>()), 1..6);
        let input = (prop::sample::select(seeds), edits).prop_map(|(mut bytes, edits)| {
            for (at, how, byte) in edits {
                damage(&mut bytes, at, how, byte);
            }
            bytes
        });
        let mut runner =
            TestRunner::new(Config { cases: 1000, failure_persistence: None, ..Config::default() });
        runner
            .run(&input, |bytes| {
                (target.run)(&bytes);
                Ok(())
            })
            .unwrap_or_else(|err| panic!("{}: {err}", target.name));
    }
}

/// A target is in four places; this says which one was forgotten.
#[test]
fn every_target_has_its_program_its_entry_and_its_corpus() {
    let named: BTreeSet<String> = TARGETS.iter().map(|target| target.name.to_owned()).collect();
    let in_folder = |name: &str| -> BTreeSet<String> {
        let entries = fs::read_dir(folder().join(name)).unwrap().map(|entry| entry.unwrap().path());
        entries.map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned()).collect()
    };
    assert_eq!(in_folder("fuzz_targets"), named);
    assert_eq!(in_folder("corpus"), named);
    let manifest = fs::read_to_string(folder().join("Cargo.toml")).unwrap();
    let programs = manifest.lines().filter_map(|line| line.strip_prefix("path = \"fuzz_targets/"));
    assert_eq!(
        programs.map(|rest| rest.trim_end_matches(".rs\"").to_owned()).collect::<BTreeSet<_>>(),
        named
    );
}

#[test]
fn the_corpora_stay_small() {
    let len = |file: PathBuf| fs::metadata(file).unwrap().len();
    let total: u64 = TARGETS.iter().flat_map(|target| corpus(target.name)).map(len).sum();
    assert!(total <= CORPORA_BYTES_MAX, "{total} bytes");
}
