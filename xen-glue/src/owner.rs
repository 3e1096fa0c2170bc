//! Whose a domain is: its handle says so from the hypercall on that makes it.
//!
//! A launcher can be killed between any two steps, and the first one is to create the domain. So there is no moment at which a
//! domain of ours could not be told from everybody else's: the handle (UUID) carries a tag of the state folder and the clone's
//! slot. It is a UUID of version 8 (RFC 9562 §5.8: what is in it is its maker's):
//!
//! | bytes | |
//! |---|---|
//! | 0–5 | tag: hash of the state folder's path |
//! | 6, 8 | version 8 and variant 10 in the upper bits, random below |
//! | 7, 9, 14, 15 | random: a later domain of the same slot is another one |
//! | 10–13 | slot, big-endian |

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::hypercalls::Uuid;

/// One state folder's mark on its domains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    tag: [u8; 6],
}

impl Owner {
    /// That of a state folder, by its canonical path.
    pub fn of(root: &Path) -> Owner {
        let hash =
            blake3::derive_key("dispvm state folder, tag of its Xen domains", root.as_os_str().as_bytes());
        let mut tag = [0; 6];
        tag.copy_from_slice(&hash[..6]);
        Owner { tag }
    }

    /// A fresh handle for the domain of `slot`.
    pub fn uuid(&self, slot: u32) -> io::Result<Uuid> {
        let mut bytes = [0; 16];
        io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut bytes)?;
        bytes[..6].copy_from_slice(&self.tag);
        bytes[6] = bytes[6] & 0x0f | 0x80;
        bytes[8] = bytes[8] & 0x3f | 0x80;
        bytes[10..14].copy_from_slice(&slot.to_be_bytes());
        Ok(Uuid(bytes))
    }

    /// The slot of a domain, if it is ours.
    pub fn slot(&self, uuid: &Uuid) -> Option<u32> {
        let bytes = uuid.0;
        let ours = bytes[..6] == self.tag && bytes[6] >> 4 == 8 && bytes[8] >> 6 == 2;
        ours.then(|| u32::from_be_bytes([bytes[10], bytes[11], bytes[12], bytes[13]]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_domain_is_known_by_its_folder_and_slot_and_by_no_other() {
        let (ours, theirs) =
            (Owner::of(Path::new("/var/lib/dispvm")), Owner::of(Path::new("/home/user/dispvm")));
        let (a, b) = (ours.uuid(4711).unwrap(), ours.uuid(4711).unwrap());
        assert_ne!(a, b);
        assert_eq!((ours.slot(&a), theirs.slot(&a)), (Some(4711), None));
        assert_eq!(ours.slot(&Uuid([0x41; 16])), None);
        assert_eq!(a.to_string().len(), 36);
        assert_eq!(a.to_string().as_bytes()[14], b'8');
    }
}
