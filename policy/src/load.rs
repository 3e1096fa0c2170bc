//! Reads a policy from its folders.
//!
//! Invariants:
//! - files are read in the order of their names' bytes (the C locale's), included ones where the directive stands;
//! - relative paths start at the folder of the file that Qubes reads itself, in legacy files at the legacy folder;
//! - a file that includes itself ends at [`DEPTH_MAX`]; one that fans out, at [`READS_MAX`], [`BYTES_MAX`] or [`RULES_MAX`].

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Place, PolicyError, What};
use crate::lines::{self, Item};
use crate::rule::{invalid_characters, Call, Rule};

/// Of one file: the largest that Qubes ships is a hundredth of it.
pub const FILE_BYTES_MAX: u64 = 1 << 20;
/// Of all files as often as they are read, so that includes cannot make much of little.
pub const BYTES_MAX: u64 = 8 << 20;
/// How often a file is read, includes counted each time.
pub const READS_MAX: u64 = 4096;
/// Of rules: each call looks at all of them in the worst case.
pub const RULES_MAX: u64 = 65_536;
/// How deep files include files; Qubes' own go two deep.
pub const DEPTH_MAX: u64 = 16;
/// Of a folder, entries that are no policy files counted.
pub const ENTRIES_MAX: u64 = 4096;

/// What Qubes leaves alone in the legacy folder: what package managers and editors put there.
const LEGACY_IGNORED: [&str; 3] = [".rpmsave", ".rpmnew", ".swp"];

/// All rules, in their order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    rules: Vec<Arc<Rule>>,
}

impl Policy {
    /// Reads every `*.policy` of these folders; of files with the same name, the first folder's. `legacy` is the folder that
    /// `!compat-4.0` reads, as Qubes has it in /etc/qubes-rpc/policy.
    pub fn load(folders: &[PathBuf], legacy: &Path) -> Result<Policy, PolicyError> {
        let mut files = BTreeMap::new();
        for folder in folders {
            for (name, path) in policy_files(folder).map_err(|what| at(folder, what))? {
                files.entry(name).or_insert((folder, path));
            }
        }
        let mut loader = Loader::new(Some(legacy));
        for (folder, path) in files.into_values() {
            loader.file(&path, folder, 0)?;
        }
        Ok(loader.policy)
    }

    /// Reads a legacy folder alone, as Qubes R4.0 did: each file is about the service in its name.
    pub fn load_legacy(folder: &Path) -> Result<Policy, PolicyError> {
        let mut loader = Loader::new(None);
        let place = Place::file(folder);
        loader.legacy_folder(folder, &place)?;
        Ok(loader.policy)
    }

    /// Reads one text, which can include nothing.
    pub fn parse(path: &Path, text: &[u8]) -> Result<Policy, PolicyError> {
        let mut loader = Loader::new(None);
        loader.text(path, text, None, 0)?;
        Ok(loader.policy)
    }

    /// Reads one legacy text for a service and an argument, `*` for any; it can include nothing.
    pub fn parse_legacy(
        path: &Path,
        service: &str,
        argument: &str,
        text: &[u8],
    ) -> Result<Policy, PolicyError> {
        let mut loader = Loader::new(None);
        let call = Call::parse(service, argument).map_err(|what| at(path, what))?;
        loader.legacy_text(path, text, &call, None, 0)?;
        Ok(loader.policy)
    }

    /// All rules, in their order.
    pub fn rules(&self) -> impl DoubleEndedIterator<Item = &Arc<Rule>> {
        self.rules.iter()
    }
}

fn at(path: &Path, what: What) -> PolicyError {
    PolicyError { place: Place::file(path), what }
}

/// What has been read so far.
struct Loader<'a> {
    policy: Policy,
    legacy: Option<&'a Path>,
    bytes: u64,
    reads: u64,
}

impl<'a> Loader<'a> {
    fn new(legacy: Option<&'a Path>) -> Loader<'a> {
        Loader { policy: Policy::default(), legacy, bytes: 0, reads: 0 }
    }

    fn file(&mut self, path: &Path, folder: &Path, depth: u64) -> Result<(), PolicyError> {
        let text = self.read(path)?;
        self.text(path, &text, Some(folder), depth)
    }

    /// A file of policy.d; without a folder, nothing can be included.
    fn text(
        &mut self,
        path: &Path,
        text: &[u8],
        folder: Option<&Path>,
        depth: u64,
    ) -> Result<(), PolicyError> {
        let file = Place::file(path);
        for item in lines::items(utf8(text, &file)?, &file) {
            let (place, item) = item?;
            if let Item::Rule(rule) = item {
                self.rule(rule)?;
                continue;
            }
            let fail = |what| PolicyError { place: place.clone(), what };
            let depth = deeper(depth).map_err(fail)?;
            let folder = folder.ok_or_else(|| fail(What::NothingToInclude))?;
            match item {
                Item::Rule(_) => {}
                Item::Include(path) => {
                    self.file(&regular(&folder.join(path)).map_err(fail)?, folder, depth)?
                }
                Item::IncludeDir(path) => {
                    let files = policy_files(&folder.join(path)).map_err(fail)?;
                    for path in files.into_values() {
                        self.file(&path, folder, depth)?;
                    }
                }
                Item::IncludeService(call, path) => {
                    let path = regular(&folder.join(path)).map_err(fail)?;
                    self.legacy_file(&path, &call, folder, depth)?;
                }
                Item::Compat => {
                    let legacy = self.legacy.ok_or_else(|| fail(What::NothingToInclude))?;
                    self.legacy_folder(legacy, &place)?;
                }
            }
        }
        Ok(())
    }

    fn legacy_file(
        &mut self,
        path: &Path,
        call: &Call,
        folder: &Path,
        depth: u64,
    ) -> Result<(), PolicyError> {
        let text = self.read(path)?;
        self.legacy_text(path, &text, call, Some(folder), depth)
    }

    fn legacy_text(
        &mut self,
        path: &Path,
        text: &[u8],
        call: &Call,
        folder: Option<&Path>,
        depth: u64,
    ) -> Result<(), PolicyError> {
        let file = Place::file(path);
        for item in lines::legacy_items(utf8(text, &file)?, &file, call) {
            match item? {
                (_, Item::Rule(rule)) => self.rule(rule)?,
                (place, Item::IncludeService(call, path)) => {
                    let fail = |what| PolicyError { place: place.clone(), what };
                    let folder = folder.ok_or_else(|| fail(What::NothingToInclude))?;
                    let depth = deeper(depth).map_err(fail)?;
                    let path = regular(&folder.join(path)).map_err(fail)?;
                    self.legacy_file(&path, &call, folder, depth)?;
                }
                // A legacy file has no other directives.
                _ => {}
            }
        }
        Ok(())
    }

    /// Every file of a legacy folder: services in order, of each the arguments in order and last the file for any argument.
    /// After a file for one argument the call is denied, as the default was then; after others, rules of policy.d go on.
    fn legacy_folder(&mut self, folder: &Path, included_at: &Place) -> Result<(), PolicyError> {
        let fail = |what| PolicyError { place: included_at.clone(), what };
        for ((service, no_argument, argument), path) in legacy_files(folder).map_err(fail)? {
            let call = Call::parse(&service, if no_argument { "*" } else { &argument })
                .map_err(|what| at(&path, what))?;
            self.legacy_file(&path, &call, folder, 1)?;
            if !no_argument {
                for line in ["@anyvm @anyvm deny", "@anyvm @adminvm deny"] {
                    let rule = Rule::parse_legacy(line, &call, Place::file(&path));
                    self.rule(rule.map_err(|what| at(&path, what))?)?;
                }
            }
        }
        Ok(())
    }

    fn rule(&mut self, rule: Rule) -> Result<(), PolicyError> {
        if self.policy.rules.len() as u64 >= RULES_MAX {
            let what = What::Limit { what: "rules in all", max: RULES_MAX };
            return Err(PolicyError { place: rule.place, what });
        }
        self.policy.rules.push(Arc::new(rule));
        Ok(())
    }

    fn read(&mut self, path: &Path) -> Result<Vec<u8>, PolicyError> {
        let limit = |what, max| Err(at(path, What::Limit { what, max }));
        self.reads += 1;
        if self.reads > READS_MAX {
            return limit("files read in all", READS_MAX);
        }
        let bytes = read_at_most(path, FILE_BYTES_MAX + 1)
            .map_err(|error| at(path, What::Unreadable(error.to_string())))?;
        if bytes.len() as u64 > FILE_BYTES_MAX {
            return limit("bytes", FILE_BYTES_MAX);
        }
        self.bytes += bytes.len() as u64;
        if self.bytes > BYTES_MAX {
            return limit("bytes read in all", BYTES_MAX);
        }
        Ok(bytes)
    }
}

fn read_at_most(path: &Path, max: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(max).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn deeper(depth: u64) -> Result<u64, What> {
    match depth < DEPTH_MAX {
        true => Ok(depth + 1),
        false => Err(What::Limit { what: "files that include each other", max: DEPTH_MAX }),
    }
}

fn utf8<'t>(text: &'t [u8], file: &Place) -> Result<&'t str, PolicyError> {
    std::str::from_utf8(text).map_err(|error| {
        let line = 1 + text.iter().take(error.valid_up_to()).filter(|byte| **byte == b'\n').count();
        let line = u32::try_from(line).unwrap_or(u32::MAX);
        PolicyError { place: Place { file: file.file.clone(), line }, what: What::Encoding }
    })
}

/// A path that is to be a file, links followed.
fn regular(path: &Path) -> Result<PathBuf, What> {
    match path.is_file() {
        true => Ok(path.to_owned()),
        false => Err(What::NotAFile(path.display().to_string())),
    }
}

/// The names of a folder's files, in the order of their bytes; links are followed, names that are not UTF-8 come out lossy.
fn files_in(folder: &Path) -> Result<BTreeSet<(String, PathBuf)>, What> {
    let path = || folder.display().to_string();
    let unreadable = |error: io::Error| What::IncludeUnreadable { path: path(), cause: error.to_string() };
    if !folder.is_dir() {
        return Err(What::NotAFolder(path()));
    }
    let mut files = BTreeSet::new();
    for (entry, nth) in fs::read_dir(folder).map_err(unreadable)?.zip(1..) {
        if nth > ENTRIES_MAX {
            return Err(What::Limit { what: "entries in a folder", max: ENTRIES_MAX });
        }
        let entry = entry.map_err(unreadable)?;
        let path = entry.path();
        if path.is_file() {
            files.insert((entry.file_name().to_string_lossy().into_owned(), path));
        }
    }
    Ok(files)
}

/// The files of policy.d in a folder. One whose name Qubes does not accept spoils the policy.
fn policy_files(folder: &Path) -> Result<BTreeMap<String, PathBuf>, What> {
    let mut files = BTreeMap::new();
    for (name, path) in files_in(folder)? {
        if !name.ends_with(".policy") || name.starts_with('.') {
            continue;
        }
        let valid = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "_.-".contains(c);
        if !name.chars().all(valid) {
            return Err(What::FileName(path.display().to_string()));
        }
        files.insert(name, path);
    }
    Ok(files)
}

/// The files of a legacy folder, under service, "is for any argument" and argument. Names that no service has are ignored.
fn legacy_files(folder: &Path) -> Result<BTreeMap<(String, bool, String), PathBuf>, What> {
    let mut files = BTreeMap::new();
    for (name, path) in files_in(folder)? {
        let ignored = name.starts_with('.') || LEGACY_IGNORED.iter().any(|suffix| name.ends_with(suffix));
        if ignored || invalid_characters(&name, "+").is_some() {
            continue;
        }
        let key = match name.split_once('+') {
            Some((service, argument)) => (service.to_owned(), false, format!("+{argument}")),
            None => (name, true, String::new()),
        };
        files.insert(key, path);
    }
    Ok(files)
}
