//! Encode and admission beside `zstd` and `b3sum`, in one run, interleaved, everything synced to the same file system.
//!
//! `cargo bench -p engine --bench against_zstd [-- --image FILE] [--rounds N] [--keep FILE]`. Without an image it makes one that looks
//! like memory; with `--keep` a dated line is added to a file; under `cargo test` it runs tiny, so that it cannot rot. Where a tool is missing its column is.

mod ram;

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use engine::image::hot::{HotImage, StackDelta};
use engine::savefile::{self, DeviceState, ImageId, ImageInput, PageMap, ReadBackend, Scope, VolumeInfo};
use engine::units::ByteCount;

type Failure = Box<dyn std::error::Error>;

struct NoDeltas;

impl StackDelta for NoDeltas {
    fn stack(&self, _: &VolumeInfo, _: &PageMap, _: &File, _: &File) -> io::Result<()> {
        Ok(())
    }

    fn file_name(&self, volume: &str) -> String {
        volume.into()
    }
}

struct Options {
    image: Option<PathBuf>,
    keep: Option<PathBuf>,
    rounds: usize,
    size: ByteCount,
}

fn main() -> Result<(), Failure> {
    let options = parse();
    let folder = tempfile::tempdir_in(".")?;
    let image = options.image.clone().unwrap_or_else(|| folder.path().join("ram"));
    if options.image.is_none() {
        ram::make(&image, options.size)?;
    }
    let mut encoding = Race::default();
    let mut admission = Race::default();
    for _ in 0..options.rounds {
        encoding.add(encode(&image, folder.path())?, zstd_encode(&image, folder.path()));
        admission.add(admit(folder.path())?, zstd_decode(folder.path()));
    }
    let rows = [encoding.report("encode"), admission.report("admit"), sizes(folder.path())?];
    match options.keep {
        Some(path) => keep(&path, &rows),
        None => Ok(()),
    }
}

/// Adds a line: when, on what, and for each row ours, theirs and the ratio that the mark is set for.
fn keep(path: &Path, rows: &[Row]) -> Result<(), Failure> {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let cpu = fs::read_to_string("/proc/cpuinfo")?;
    let cpu = cpu.lines().find_map(|line| line.strip_prefix("model name\t: ")).unwrap_or("unknown");
    let rows: Vec<String> = rows
        .iter()
        .map(|row| {
            let number = |value: Option<f64>| value.map_or("null".to_owned(), |value| format!("{value:.4}"));
            let (ours, theirs) = (number(Some(row.ours)), number(row.theirs));
            format!(r#"{{"measure":"{}","unit":"{}","ours":{ours},"theirs":{theirs}}}"#, row.what, row.unit)
        })
        .collect();
    let line = format!(r#"{{"unix_seconds":{seconds},"cpu":"{cpu}","rows":[{}]}}"#, rows.join(","));
    let mut file = File::options().append(true).create(true).open(path)?;
    Ok(writeln!(file, "{line}")?)
}

/// One thing measured on both sides.
struct Row {
    what: &'static str,
    unit: &'static str,
    ours: f64,
    theirs: Option<f64>,
}

/// Times of both sides.
#[derive(Default)]
struct Race {
    ours: Vec<Duration>,
    theirs: Vec<Option<Duration>>,
}

fn parse() -> Options {
    let args: Vec<String> = std::env::args().collect();
    let value = |name: &str| args.iter().position(|arg| arg == name).and_then(|at| args.get(at + 1));
    let full = args.iter().any(|arg| arg == "--bench");
    Options {
        image: value("--image").map(PathBuf::from),
        keep: value("--keep").map(PathBuf::from),
        rounds: value("--rounds").and_then(|rounds| rounds.parse().ok()).unwrap_or(if full { 5 } else { 1 }),
        size: ByteCount(if full { 1 << 30 } else { 4 << 20 }),
    }
}

fn encode(image: &Path, folder: &Path) -> Result<Duration, Failure> {
    let file = File::open(image)?;
    let size = ByteCount(file.metadata()?.len());
    let images = [ImageInput { id: ImageId::Memory, file: &file, size, scope: Scope::Whole }];
    let state = DeviceState { kind: "bench".into(), version: 1, bytes: Vec::new() };
    timed(|| {
        savefile::write(&folder.join("ours"), &ram::manifest(size), &state, &images, &savefile::silent)?;
        Ok(())
    })
}

fn admit(folder: &Path) -> Result<Duration, Failure> {
    let (savefile, hot) = (folder.join("ours"), folder.join("hot"));
    let root = savefile::peek(&savefile, None)?.root;
    let took = timed(|| {
        let image = HotImage::admit(&savefile, &root, &hot, &NoDeltas, ReadBackend::Ring, &savefile::silent)?;
        // The engine does not sync a hot image, as it does not outlive the boot; its peer does, so it is synced here.
        Ok(image.files.memory.sync_all()?)
    });
    HotImage::evict(&hot, &root)?;
    took
}

fn zstd_encode(image: &Path, folder: &Path) -> Option<Duration> {
    let zst = folder.join("theirs.zst");
    fs::remove_file(&zst).ok();
    let start = Instant::now();
    run(Command::new("zstd").args(["-q", "-3", "-T0", "-o"]).arg(&zst).arg(image))?;
    run(Command::new("b3sum").arg(&zst))?;
    File::open(&zst).ok()?.sync_all().ok()?;
    Some(start.elapsed())
}

fn zstd_decode(folder: &Path) -> Option<Duration> {
    let (zst, raw) = (folder.join("theirs.zst"), folder.join("theirs"));
    fs::remove_file(&raw).ok();
    let start = Instant::now();
    run(Command::new("zstd").args(["-q", "-d", "-T0", "-o"]).arg(&raw).arg(&zst))?;
    run(Command::new("b3sum").arg(&raw))?;
    File::open(&raw).ok()?.sync_all().ok()?;
    Some(start.elapsed())
}

fn run(command: &mut Command) -> Option<()> {
    let status = command.stdout(Stdio::null()).stderr(Stdio::null()).status().ok()?;
    status.success().then_some(())
}

fn timed(work: impl FnOnce() -> Result<(), Failure>) -> Result<Duration, Failure> {
    let start = Instant::now();
    work()?;
    Ok(start.elapsed())
}

impl Race {
    fn add(&mut self, ours: Duration, theirs: Option<Duration>) {
        self.ours.push(ours);
        self.theirs.push(theirs);
    }

    fn report(mut self, what: &'static str) -> Row {
        let ours = median(&mut self.ours);
        let theirs =
            self.theirs.into_iter().collect::<Option<Vec<_>>>().map(|mut theirs| median(&mut theirs));
        match theirs {
            Some(theirs) => println!(
                "{what}: ours {ours:.3} s, zstd and b3sum {theirs:.3} s, {:.2} times as fast",
                theirs / ours
            ),
            None => println!("{what}: ours {ours:.3} s; zstd or b3sum is missing"),
        }
        Row { what, unit: "s", ours, theirs }
    }
}

fn median(times: &mut [Duration]) -> f64 {
    times.sort();
    times.get(times.len() / 2).map_or(0.0, Duration::as_secs_f64)
}

fn sizes(folder: &Path) -> Result<Row, Failure> {
    let ours = fs::metadata(folder.join("ours"))?.len() as f64;
    let theirs = fs::metadata(folder.join("theirs.zst")).map(|meta| meta.len() as f64).ok();
    match theirs {
        Some(theirs) => println!("size: ours {ours}, zstd's {theirs}, {:.3} of it", ours / theirs),
        None => println!("size: ours {ours}"),
    }
    Ok(Row { what: "size", unit: "bytes", ours, theirs })
}
