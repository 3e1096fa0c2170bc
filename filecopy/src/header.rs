//! What goes over the wire: a header in front of each name and content, and one reply at the end. Numbers are little-endian, as on the
//! processors Qubes runs on (struct file_header, result_header and result_header_ext of libqubes-rpc-filecopy.h).

use std::io::{self, Read, Write};

use rustix::fs::{Timespec, Timestamps};

use crate::name::NAME_BYTES_MAX;

/// Bytes of a [`Header`].
pub const HEADER_BYTES: usize = 32;
/// Bytes of a [`Reply`] without its name.
pub const REPLY_BYTES: usize = 16;
const NANOSECONDS: u32 = 1_000_000_000;

/// What is said of a file, folder or symbolic link in front of its name and its content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Header {
    /// Bytes of the name with its NUL. Zero ends the transfer.
    pub name_bytes: u32,
    /// Kind and permissions, as in `st_mode`.
    pub mode: u32,
    /// Bytes of the content: a file's, or the target of a link.
    pub content_bytes: u64,
    /// Last access: seconds since 1970, nanoseconds.
    pub accessed: (u32, u32),
    /// Last change of the content.
    pub modified: (u32, u32),
}

impl Header {
    /// Its bytes.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let times = [self.accessed.0, self.accessed.1, self.modified.0, self.modified.1];
        let words = [self.name_bytes, self.mode].into_iter().map(u32::to_le_bytes);
        let content = self.content_bytes.to_le_bytes();
        let all = words.flatten().chain(content).chain(times.into_iter().flat_map(u32::to_le_bytes));
        bytes.iter_mut().zip(all).for_each(|(to, from)| *to = from);
        bytes
    }

    /// Reads one. Every value is possible; what may not be is the receiver's to say.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Header {
        let mut words = bytes.chunks_exact(4).map(|word| {
            u32::from_le_bytes(word.try_into().unwrap_or_default()) // always four bytes
        });
        let mut word = || words.next().unwrap_or_default();
        Header {
            name_bytes: word(),
            mode: word(),
            content_bytes: u64::from(word()) | u64::from(word()) << 32,
            accessed: (word(), word()),
            modified: (word(), word()),
        }
    }

    /// Its times, if they are any.
    pub fn times(&self) -> Option<Timestamps> {
        let time = |(seconds, nanoseconds): (u32, u32)| {
            (nanoseconds < NANOSECONDS)
                .then(|| Timespec { tv_sec: seconds.into(), tv_nsec: nanoseconds.into() })
        };
        Some(Timestamps { last_access: time(self.accessed)?, last_modification: time(self.modified)? })
    }
}

/// How it went.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Reply {
    /// An `errno`; zero if all is well.
    pub error: u32,
    /// CRC-32 of everything the receiver has got.
    pub crc32: u32,
    /// The name it was at, if it says so.
    pub last_name: Option<Vec<u8>>,
}

impl Reply {
    /// Its bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(REPLY_BYTES);
        bytes.extend(self.error.to_le_bytes());
        bytes.extend([0; 4]);
        bytes.extend(u64::from(self.crc32).to_le_bytes());
        if let Some(name) = &self.last_name {
            bytes.extend(u32::try_from(name.len()).unwrap_or(u32::MAX).to_le_bytes());
            bytes.extend(name);
        }
        bytes
    }

    /// Writes it.
    pub fn write(&self, to: &mut impl Write) -> io::Result<()> {
        to.write_all(&self.encode())?;
        to.flush()
    }

    /// Reads one, up to the end of what there is; `None` if that is less than a reply. Of a name only as much as a name may have.
    pub fn read(from: &mut impl Read) -> io::Result<Option<Reply>> {
        let longest = REPLY_BYTES + 4 + NAME_BYTES_MAX;
        let mut bytes = Vec::new();
        from.take(longest as u64).read_to_end(&mut bytes)?;
        let Some((fixed, rest)) = bytes.split_first_chunk::<REPLY_BYTES>() else { return Ok(None) };
        let [e0, e1, e2, e3, _, _, _, _, c0, c1, c2, c3, ..] = *fixed;
        let last_name = rest.split_first_chunk::<4>().and_then(|(len, name)| {
            let len = usize::try_from(u32::from_le_bytes(*len)).ok()?;
            name.get(..len.min(NAME_BYTES_MAX)).map(<[u8]>::to_vec)
        });
        Ok(Some(Reply {
            error: u32::from_le_bytes([e0, e1, e2, e3]),
            crc32: u32::from_le_bytes([c0, c1, c2, c3]),
            last_name: last_name.filter(|name| !name.is_empty()),
        }))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_header_has_the_layout_of_the_stock_struct() {
        let header = Header {
            name_bytes: 0x01020304,
            mode: 0o100644,
            content_bytes: 0x1112131415161718,
            accessed: (0x21222324, 5),
            modified: (0x31323334, 6),
        };
        let mut wanted = vec![4, 3, 2, 1, 0xa4, 0x81, 0, 0, 0x18, 0x17, 0x16, 0x15, 0x14, 0x13, 0x12, 0x11];
        wanted.extend([0x24, 0x23, 0x22, 0x21, 5, 0, 0, 0, 0x34, 0x33, 0x32, 0x31, 6, 0, 0, 0]);
        assert_eq!(header.encode().to_vec(), wanted);
    }

    #[test]
    fn a_reply_has_the_layout_of_the_stock_struct() {
        let reply = Reply { error: 17, crc32: 0xdeadbeef, last_name: Some(b"ab".to_vec()) };
        let wanted = [17, 0, 0, 0, 0, 0, 0, 0, 0xef, 0xbe, 0xad, 0xde, 0, 0, 0, 0, 2, 0, 0, 0, b'a', b'b'];
        assert_eq!(reply.encode(), wanted);
        // Agents of old send no name, and one may be cut off.
        for end in REPLY_BYTES..wanted.len() {
            let read = Reply::read(&mut &wanted[..end]).unwrap().unwrap();
            assert_eq!((read.error, read.crc32, read.last_name), (17, 0xdeadbeef, None));
        }
        assert_eq!(Reply::read(&mut &wanted[..REPLY_BYTES - 1]).unwrap(), None);
        assert_eq!(Reply::read(&mut &wanted[..]).unwrap(), Some(reply));
    }

    #[test]
    fn a_reply_that_never_ends_is_read_no_further_than_a_name() {
        let mut endless = (&[0xff; REPLY_BYTES + 4][..]).chain(io::repeat(b'x'));
        let reply = Reply::read(&mut endless).unwrap().unwrap();
        assert_eq!(reply.last_name.map(|name| name.len()), Some(NAME_BYTES_MAX));
    }

    proptest! {
        #[test]
        fn what_was_encoded_is_decoded(bytes in any::<[u8; HEADER_BYTES]>()) {
            let header = Header::decode(&bytes);
            prop_assert_eq!(header.encode(), bytes);
            let in_range = header.accessed.1 < NANOSECONDS && header.modified.1 < NANOSECONDS;
            prop_assert_eq!(header.times().is_some(), in_range);
        }

        #[test]
        fn a_reply_comes_back(error: u32, crc32: u32, name in proptest::option::of("[a-z/]{1,40}")) {
            let reply = Reply { error, crc32, last_name: name.map(String::into_bytes) };
            prop_assert_eq!(Reply::read(&mut &reply.encode()[..]).unwrap(), Some(reply));
        }
    }
}
