//! Criterion benches of the savefile's parts: scan, dedup, encode, verify, decode by ring and by pread.
//!
//! `cargo bench -p engine --bench savefile`. Under `cargo test` each runs once on a tiny image, so that they cannot rot.

#![allow(missing_docs)] // criterion's macro makes public functions

mod ram;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use criterion::{criterion_group, criterion_main, BenchmarkId, Criterion, Throughput};
use engine::image::scan::{fingerprint, is_zero, scan, Scope};
use engine::savefile::{self, DeviceState, ImageId, ImageInput, ImageOutput, ReadBackend, Savefile};
use engine::units::{ByteCount, PAGE_BYTES};

/// Small under `cargo test`, which calls a bench without `--bench`.
fn size() -> ByteCount {
    let full = std::env::args().any(|arg| arg == "--bench");
    ByteCount(if full { 256 << 20 } else { 2 << 20 })
}

fn pages(criterion: &mut Criterion) {
    let page: Vec<u8> = (0..PAGE_BYTES).map(|at| at as u8).collect();
    let zeros = vec![0; PAGE_BYTES];
    let mut group = criterion.benchmark_group("page");
    group.throughput(Throughput::Bytes(PAGE_BYTES as u64));
    group.bench_function("is_zero", |bench| bench.iter(|| is_zero(std::hint::black_box(&zeros))));
    group.bench_function("fingerprint", |bench| bench.iter(|| fingerprint(std::hint::black_box(&page))));
    group.finish();
}

fn images(criterion: &mut Criterion) {
    let folder = tempfile::tempdir_in(".").expect("a folder for the image");
    let image = ram::make(&folder.path().join("ram"), size()).expect("an image like memory");
    let equal = all_equal(&folder.path().join("equal"), size());
    let savefile = folder.path().join("savefile");
    write(&savefile, &image);

    let mut group = criterion.benchmark_group("image");
    group.sample_size(10).throughput(Throughput::Bytes(size().0));
    let all = size().pages_covering();
    group.bench_function("scan", |bench| bench.iter(|| scan(&image, all, &Scope::Whole, &|_| {})));
    // One page a million times: next to nothing is compressed, so this is scanning, comparing and planning.
    group.bench_function("dedup", |bench| bench.iter(|| write(&folder.path().join("aside"), &equal)));
    group.bench_function("encode", |bench| bench.iter(|| write(&folder.path().join("aside"), &image)));
    let opened = Savefile::open(&savefile, None).expect("just written");
    for backend in [ReadBackend::Ring, ReadBackend::Pread] {
        let name = format!("{backend:?}").to_lowercase();
        group.bench_function(BenchmarkId::new("verify", &name), |bench| {
            bench.iter(|| opened.verify(backend, &savefile::silent).expect("sound"));
        });
        group.bench_function(BenchmarkId::new("decode", &name), |bench| {
            bench.iter_with_large_drop(|| decode(&opened, backend));
        });
    }
    group.finish();
}

fn all_equal(path: &Path, size: ByteCount) -> File {
    let file = File::options().read(true).write(true).create(true).truncate(true).open(path).expect("a file");
    file.write_all_at(&vec![7; size.0 as usize], 0).expect("room for it");
    file
}

fn write(path: &Path, image: &File) {
    let images = [ImageInput { id: ImageId::Memory, file: image, size: size(), scope: Scope::Whole }];
    let state = DeviceState { kind: "bench".into(), version: 1, bytes: Vec::new() };
    savefile::write(path, &ram::manifest(size()), &state, &images, &savefile::silent).expect("written");
}

fn decode(savefile: &Savefile, backend: ReadBackend) -> File {
    let file = tempfile::tempfile_in(".").expect("a file");
    file.set_len(size().0).expect("a sparse file");
    let outputs = [ImageOutput { id: &ImageId::Memory, file: &file }];
    savefile.decode(&outputs, backend, &savefile::silent).expect("decoded");
    file
}

criterion_group!(benches, pages, images);
criterion_main!(benches);
