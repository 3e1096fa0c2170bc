//! What is wrong with a stream, and where.

use std::fmt;
use std::io;

use super::{libxc, libxl};

/// A stream that cannot be read, or is none.
#[derive(Debug, thiserror::Error)]
#[error("{place} at byte {offset:#x}: {fault}")]
pub struct StreamError {
    /// Where in the file, in bytes: where the part begins that is wrong.
    pub offset: u64,
    /// In which part of it.
    pub place: Place,
    /// What.
    #[source]
    pub fault: Fault,
}

/// A part of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The file's header.
    XlHeader,
    /// The guest's configuration.
    Config,
    /// The libxl stream's header.
    LibxlHeader,
    /// A record of the libxl stream: which one, from 1 on, and its type.
    Libxl(u32, u32),
    /// The libxc stream's first header.
    ImageHeader,
    /// Its second.
    DomainHeader,
    /// A record of the libxc stream: which one, from 1 on, and its type.
    Libxc(u32, u32),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::XlHeader => f.write_str("xl header"),
            Place::Config => f.write_str("configuration"),
            Place::LibxlHeader => f.write_str("libxl header"),
            Place::Libxl(number, kind) => write!(f, "libxl record {number} ({})", libxl::name(*kind)),
            Place::ImageHeader => f.write_str("libxc image header"),
            Place::DomainHeader => f.write_str("libxc domain header"),
            Place::Libxc(number, kind) => write!(f, "libxc record {number} ({})", libxc::name(*kind)),
        }
    }
}

/// What is wrong.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The system cannot read it.
    #[error("it cannot be read")]
    Io(#[from] io::Error),
    /// It ends here.
    #[error("the file ends in the middle of it")]
    Ends,
    /// It does not begin as such a thing does.
    #[error("it is none: it begins otherwise")]
    Magic,
    /// It is of a machine with another byte order.
    #[error("it was written in big-endian byte order")]
    ByteOrder,
    /// It is of an older or later format.
    #[error("it is of version {0}, which is not known")]
    Version(u32),
    /// It is of the format before Xen 4.6.
    #[error("it is of the format before Xen 4.6")]
    Legacy,
    /// It has flags that must be understood and are not.
    #[error("it has the unknown mandatory flags {0:#x}")]
    Flags(u32),
    /// A field that is reserved is not zero.
    #[error("a reserved field is not zero")]
    Reserved,
    /// Its length is none it can have.
    #[error("it has {found} bytes, {wanted}")]
    Length {
        /// The length it gives.
        found: u64,
        /// What it should be, in words.
        wanted: &'static str,
    },
    /// A record nobody knows and that must be understood.
    #[error("it is of a type that is not known, and may not be skipped")]
    UnknownRecord,
    /// A record where it may not be.
    #[error("it may not stand here: {0}")]
    Misplaced(&'static str),
    /// A number in it is none it can have.
    #[error("its {what} is {value:#x}")]
    Value {
        /// Which number.
        what: &'static str,
        /// What it is.
        value: u64,
    },
    /// Its text is not what it should be.
    #[error("its text is not understood: {0}")]
    Text(String),
}
