//! x
use std::collections::HashSet;
use zstd::zstd_safe::{CParameter as P, Strategy as S};
fn cpu() -> f64 { let t = nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap(); t.tv_sec() as f64 + t.tv_nsec() as f64 / 1e9 }
fn main() {
    for path in std::env::args().skip(1) {
        let bytes = std::fs::read(&path).unwrap();
        let mut seen = HashSet::new();
        let mut unique = Vec::new();
        for page in bytes.chunks_exact(4096) {
            if engine::image::scan::is_zero(page) { continue }
            if seen.insert(*blake3::hash(page).as_bytes()) { unique.extend_from_slice(page) }
        }
        let mb = unique.len() as f64 / 1e6;
        let run = |name: String, kib: usize, params: &[P]| {
            let mut c = zstd::bulk::Compressor::new(1).unwrap();
            for p in params { c.set_parameter(*p).unwrap() }
            let mut out = vec![0; 4 << 20];
            let mut best = f64::MAX; let mut stored = 0; let mut frames = vec![];
            for _ in 0..2 {
                let t = cpu();
                frames = unique.chunks(kib << 10).map(|r| { let n = c.compress_to_buffer(r, &mut out).unwrap(); out[..n].to_vec() }).collect::<Vec<_>>();
                best = best.min(cpu() - t);
                stored = frames.iter().map(Vec::len).sum();
            }
            let mut d = zstd::bulk::Decompressor::new().unwrap();
            let t = cpu();
            for f in &frames { d.decompress_to_buffer(f, &mut out).unwrap(); }
            println!("{name} {kib:4} KiB: {stored:9} B  enc {:4.0} MB/s dec {:4.0} MB/s", mb / best, mb / (cpu() - t));
        };
        println!("{path} {mb} MB");
        for level in [1, 2, 3] { for kib in [128, 256, 512, 1024] { run(format!("level {level}"), kib, &[P::CompressionLevel(level)]); } }
        for kib in [256, 512, 1024] {
            for (h, c) in [(14, 14), (15, 15), (16, 15), (16, 16), (17, 16), (17,17)] {
                for m in [4, 5, 6] {
                    run(format!("dfast h{h} c{c} m{m}"), kib, &[P::WindowLog(if kib == 256 { 18 } else if kib == 512 { 19 } else { 20 }), P::HashLog(h), P::ChainLog(c), P::MinMatch(m), P::SearchLog(1), P::TargetLength(0), P::Strategy(S::ZSTD_dfast)]);
                }
            }
        }
        for kib in [256, 512, 1024] {
            for h in [14, 15, 16, 17] { for m in [4, 5, 6] { for t in [0, 1] {
                    run(format!("fast h{h} m{m} t{t}"), kib, &[P::WindowLog(if kib == 256 { 18 } else if kib == 512 { 19 } else { 20 }), P::HashLog(h), P::ChainLog(12), P::MinMatch(m), P::SearchLog(1), P::TargetLength(t), P::Strategy(S::ZSTD_fast)]);
            } } }
        }
    }
}
