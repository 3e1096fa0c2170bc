//! The Linux bzImage: a boot sector, a real-mode stub, and a decompressor around the compressed ELF kernel. A PVH guest
//! starts in the ELF kernel itself, so that is what is taken out.
//!
//! Source: Linux `Documentation/arch/x86/boot.rst`, "The Real-Mode Kernel Header". The file comes from a template a user
//! added: every offset in it is checked before it is used.

/// End of a boot sector: the two bytes every one has.
const BOOT_FLAG: (usize, [u8; 2]) = (0x1fe, [0x55, 0xaa]);
/// The header's own mark.
const HEADER_MAGIC: (usize, [u8; 4]) = (0x202, *b"HdrS");
/// How many sectors of 512 bytes the real-mode stub has after the boot sector.
const SETUP_SECTS: usize = 0x1f1;
/// What `setup_sects` means when it is zero.
const SETUP_SECTS_DEFAULT: usize = 4;
const VERSION: usize = 0x206;
/// Where the payload begins, counted from the end of the real-mode stub.
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
/// Boot protocol 2.08 was the first to say where the payload is.
const VERSION_MIN: u16 = 0x208;

/// Why there is no payload to be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BzImageError {
    /// The header's version is too old.
    #[error("its boot protocol is {}.{:02}; 2.08 (Linux 2.6.26) is the oldest that says where the kernel is", .0 >> 8, .0 & 0xff)]
    Old(u16),
    /// The file ends before the payload does.
    #[error("its payload of {length} bytes at {offset} is not inside the file of {file} bytes")]
    Outside {
        /// From the end of the real-mode stub.
        offset: u32,
        /// In bytes.
        length: u32,
        /// The file's size in bytes.
        file: usize,
    },
}

/// The compressed kernel in a bzImage; `None` where the file is none.
pub fn payload(image: &[u8]) -> Option<Result<&[u8], BzImageError>> {
    let has = |(at, mark): (usize, &[u8])| image.get(at..).is_some_and(|rest| rest.starts_with(mark));
    if !has((BOOT_FLAG.0, &BOOT_FLAG.1)) || !has((HEADER_MAGIC.0, &HEADER_MAGIC.1)) {
        return None;
    }
    let version = u16::from_le_bytes(bytes(image, VERSION)?);
    if version < VERSION_MIN {
        return Some(Err(BzImageError::Old(version)));
    }
    let setup_sects = match usize::from(*image.get(SETUP_SECTS)?) {
        0 => SETUP_SECTS_DEFAULT,
        sectors => sectors,
    };
    let offset = u32::from_le_bytes(bytes(image, PAYLOAD_OFFSET)?);
    let length = u32::from_le_bytes(bytes(image, PAYLOAD_LENGTH)?);
    let inside = || {
        let first = (setup_sects + 1).checked_mul(512)?.checked_add(usize::try_from(offset).ok()?)?;
        image.get(first..first.checked_add(usize::try_from(length).ok()?)?)
    };
    Some(inside().ok_or(BzImageError::Outside { offset, length, file: image.len() }))
}

fn bytes<const N: usize>(image: &[u8], at: usize) -> Option<[u8; N]> {
    image.get(at..)?.first_chunk().copied()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A bzImage around a payload.
    pub fn bzimage(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 0x400];
        image[SETUP_SECTS] = 1;
        image[0x1fe..0x200].copy_from_slice(&BOOT_FLAG.1);
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[VERSION..VERSION + 2].copy_from_slice(&0x20fu16.to_le_bytes());
        image[PAYLOAD_OFFSET..PAYLOAD_OFFSET + 4].copy_from_slice(&16u32.to_le_bytes());
        image[PAYLOAD_LENGTH..PAYLOAD_LENGTH + 4].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        image.extend([0; 16]);
        image.extend(payload);
        image
    }

    #[test]
    fn the_payload_is_where_the_header_says() {
        assert_eq!(payload(&bzimage(b"kernel")), Some(Ok(&b"kernel"[..])));
        assert_eq!(payload(b"\x7fELF"), None);
        assert_eq!(payload(&[]), None);
    }

    #[test]
    fn a_payload_outside_the_file_is_refused() {
        let mut image = bzimage(b"kernel");
        image[PAYLOAD_LENGTH] = 7;
        assert!(matches!(payload(&image), Some(Err(BzImageError::Outside { offset: 16, length: 7, .. }))));
        image[PAYLOAD_OFFSET..PAYLOAD_OFFSET + 8].fill(0xff);
        assert!(matches!(payload(&image), Some(Err(BzImageError::Outside { .. }))));
    }

    #[test]
    fn an_old_protocol_is_refused() {
        let mut image = bzimage(b"kernel");
        image[VERSION] = 7;
        let error = payload(&image).unwrap().unwrap_err();
        assert!(error.to_string().starts_with("its boot protocol is 2.07;"), "{error}");
    }
}
