//! From a kernel file to the ELF kernel in it: a bzImage with a payload compressed by gzip, xz, zstd or lz4, or an ELF file as it is.
//!
//! Invariant: no file makes this take more than [`IMAGE_BYTES_MAX`] for the result and [`WINDOW_BYTES_MAX`] for the decompressor.

use std::borrow::Cow;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use super::bzimage::{self, BzImageError};
use super::lz4;

/// No kernel is near it: Debian's is 48 MiB uncompressed, one with every driver built in about 200.
pub const IMAGE_BYTES_MAX: u64 = 512 << 20;
/// The largest window of the decompressors: 128 MiB is what Linux' build asks of zstd and xz (`scripts/Makefile.lib`,
/// `scripts/xz_wrap.sh`); xz' own tables come on top.
const WINDOW_BYTES_MAX: u64 = 144 << 20;

/// Why a file is no kernel this can start.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// It could not be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// It, or what is in it, is larger than [`IMAGE_BYTES_MAX`].
    #[error("the kernel or the initrd is larger than {} MiB", IMAGE_BYTES_MAX >> 20)]
    TooLarge,
    /// Neither of the two formats.
    #[error("the kernel is neither a bzImage nor an ELF file")]
    Unknown,
    /// A bzImage with something wrong in its header.
    #[error("the kernel is a bzImage, but {0}")]
    BzImage(#[from] BzImageError),
    /// Compressed in a way this does not know.
    #[error("the kernel is {0}-compressed, which this cannot decompress; gzip, xz, zstd and lz4 it can")]
    Compression(&'static str),
    /// Nobody knows what it is compressed with.
    #[error(
        "the kernel is a bzImage, but what is in it is neither compressed in a known way nor an ELF file"
    )]
    UnknownPayload,
    /// The payload is damaged.
    #[error("cannot decompress the kernel ({with}): {reason}")]
    Damaged {
        /// The compression.
        with: &'static str,
        /// The decompressor's words.
        reason: String,
    },
}

/// Reads a whole file, a kernel or an initrd: of those the same limit holds.
pub fn read(path: &Path) -> Result<Vec<u8>, KernelError> {
    let error = |source| KernelError::Read { path: path.to_owned(), source };
    bounded(File::open(path).map_err(error)?).map_err(error)?.ok_or(KernelError::TooLarge)
}

/// The ELF kernel in a kernel file; the file itself if it is one.
pub fn vmlinux(image: &[u8]) -> Result<Cow<'_, [u8]>, KernelError> {
    if image.starts_with(b"\x7fELF") {
        return Ok(Cow::Borrowed(image));
    }
    let payload = bzimage::payload(image).ok_or(KernelError::Unknown)??;
    if payload.starts_with(b"\x7fELF") {
        return Ok(Cow::Borrowed(payload));
    }
    decompress(payload).map(Cow::Owned)
}

/// Decompresses a payload, whatever it is compressed with. What follows its end is passed over: the kernel's build appends the
/// size to some of them.
fn decompress(payload: &[u8]) -> Result<Vec<u8>, KernelError> {
    let with = compression(payload).ok_or(KernelError::UnknownPayload)?;
    let out = match with {
        "gzip" => bounded(flate2::bufread::GzDecoder::new(payload)),
        "xz" => {
            let window_kib = u32::try_from(WINDOW_BYTES_MAX >> 10).unwrap_or(u32::MAX);
            bounded(lzma_rust2::XzReader::new_mem_limit(payload, false, window_kib))
        }
        "zstd" => zstd::stream::read::Decoder::with_buffer(payload)
            .and_then(|decoder| bounded(decoder.single_frame())),
        "lz4" => {
            let max = usize::try_from(IMAGE_BYTES_MAX).unwrap_or(usize::MAX);
            lz4::decompress(payload, max).map(Some).map_err(io::Error::other)
        }
        other => return Err(KernelError::Compression(other)),
    };
    out.map_err(|error| KernelError::Damaged { with, reason: error.to_string() })?
        .ok_or(KernelError::TooLarge)
}

/// What a payload is compressed with, by what it begins with (Linux `lib/decompress.c`).
fn compression(payload: &[u8]) -> Option<&'static str> {
    let known: [(&[u8], &str); 7] = [
        (&[0x1f, 0x8b], "gzip"),
        (&[0xfd, b'7', b'z', b'X', b'Z', 0], "xz"),
        (&[0x28, 0xb5, 0x2f, 0xfd], "zstd"),
        (&lz4::MAGIC, "lz4"),
        (b"BZh", "bzip2"),
        (&[0x5d, 0, 0], "lzma"),
        (&[0x89, b'L', b'Z', b'O'], "lzo"),
    ];
    known.into_iter().find(|(magic, _)| payload.starts_with(magic)).map(|(_, name)| name)
}

/// All that comes, or `None` if that is more than [`IMAGE_BYTES_MAX`].
fn bounded(from: impl Read) -> io::Result<Option<Vec<u8>>> {
    let mut out = Vec::new();
    from.take(IMAGE_BYTES_MAX + 1).read_to_end(&mut out)?;
    Ok(u64::try_from(out.len()).is_ok_and(|len| len <= IMAGE_BYTES_MAX).then_some(out))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::super::bzimage::tests::bzimage;
    use super::*;

    const ELF: &[u8] = b"\x7fELF and so on, and so on, and so on";

    #[test]
    fn each_compression_gives_the_kernel_back() {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        gzip.write_all(ELF).unwrap();
        let size = (ELF.len() as u32).to_le_bytes();
        let zstd = [zstd::bulk::compress(ELF, 19).unwrap(), size.to_vec()].concat();
        for payload in [gzip.finish().unwrap(), zstd, [XZ, &size].concat(), ELF.to_vec()] {
            assert_eq!(vmlinux(&bzimage(&payload)).unwrap(), ELF);
        }
    }

    #[test]
    fn other_compressions_are_refused_by_name() {
        let error = vmlinux(&bzimage(b"BZh91AY")).unwrap_err().to_string();
        assert!(error.starts_with("the kernel is bzip2-compressed, which"), "{error}");
        assert!(matches!(vmlinux(&bzimage(b"")), Err(KernelError::UnknownPayload)));
        assert!(matches!(vmlinux(b"#!/bin/sh"), Err(KernelError::Unknown)));
    }

    #[test]
    fn damage_is_told() {
        for cut in [1, 10, XZ.len() - 30] {
            assert!(vmlinux(&bzimage(&XZ[..XZ.len() - cut])).is_err());
        }
    }

    #[test]
    fn a_window_nobody_needs_is_refused() {
        let mut huge = XZ.to_vec();
        // The dictionary's size in the LZMA2 filter's properties: 4 GiB - 1.
        let at = huge.windows(2).position(|bytes| bytes == [0x21, 1]).unwrap() + 2;
        huge[at] = 40;
        let header = 12..12 + usize::from(huge[12]) * 4;
        let mut crc = flate2::Crc::new();
        crc.update(&huge[header.clone()]);
        huge[header.end..header.end + 4].copy_from_slice(&crc.sum().to_le_bytes());
        let error = vmlinux(&bzimage(&huge)).unwrap_err().to_string();
        assert!(error.contains("memory"), "{error}");
    }

    proptest! {
        #[test]
        fn damage_never_panics(zstd: bool, at: prop::sample::Index, bit in 0..8, cut: prop::sample::Index) {
            let mut payload = if zstd { zstd::bulk::compress(ELF, 19).unwrap() } else { XZ.to_vec() };
            let at = at.index(payload.len());
            payload[at] ^= 1u8 << bit;
            let _ = vmlinux(&bzimage(&payload));
            let _ = vmlinux(&bzimage(&payload[..cut.index(payload.len())]));
        }
    }

    /// `xz --check=crc32 --x86 --lzma2=dict=1MiB` of [`ELF`]: as the kernel is compressed.
    #[rustfmt::skip]
    const XZ: &[u8] = &[
        0xfd, 0x37, 0x7a, 0x58, 0x5a, 0x00, 0x00, 0x01, 0x69, 0x22, 0xde, 0x36, 0x02, 0x01, 0x04, 0x00, 0x21, 0x01, 0x10, 0x00,
        0x8b, 0x21, 0x6f, 0x49, 0xe0, 0x00, 0x23, 0x00, 0x16, 0x5d, 0x00, 0x3f, 0x91, 0x45, 0x84, 0x69, 0x4d, 0x5f, 0x64, 0x9b,
        0x49, 0xf4, 0x3b, 0xa4, 0x75, 0xb0, 0x67, 0x7a, 0x6f, 0xb3, 0x5b, 0x28, 0x00, 0x00, 0x00, 0x00, 0xbc, 0x59, 0xeb, 0x83,
        0x00, 0x01, 0x2e, 0x24, 0xd6, 0x58, 0x82, 0x17, 0x90, 0x42, 0x99, 0x0d, 0x01, 0x00, 0x00, 0x00, 0x00, 0x01, 0x59, 0x5a,
    ];
}
