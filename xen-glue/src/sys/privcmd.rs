//! The Xen under us, asked through /dev/xen/privcmd.
//!
//! Invariants:
//! - a pointer handed to Xen is that of a [`Buffer`] which this call alone holds until Xen has answered;
//! - the interface versions of domctl and sysctl are those that Xen answered to when the device was opened, and fit its own
//!   version: one that we do not know is refused, never guessed.

use std::fs::File;
use std::io;
use std::mem::size_of;
use std::os::fd::AsFd;

use nix::errno::Errno;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::buffer::{Buffer, Buffers};
use super::ioctl;
use crate::abi::{domctl, hypercall, privcmd, sysctl, version, Operation};
use crate::hypercalls::{CallError, DomId, Hypercalls, Result, XenVersion};

const DEVICE: &str = "/dev/xen/privcmd";
/// The most bytes of an HVM context or an array of a policy that we take: 128 vCPUs make less than a MiB.
const ANSWER_MAX: usize = 16 << 20;

/// Why there is a Xen that we cannot use.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The device is there and may not be opened.
    #[error("open {DEVICE}")]
    Device(#[source] io::Error),
    /// Xen does not let this domain control others.
    #[error("this domain may not control others: {0}")]
    NotAllowed(#[source] CallError),
    /// A Xen with an interface we do not know.
    #[error("Xen {major}.{minor} has an interface we do not know: {what}")]
    Unknown {
        /// Its version.
        major: u32,
        /// Its version.
        minor: u32,
        /// Which, and what was tried.
        what: String,
    },
    /// Neither hardware-assisted paging nor shadow page tables.
    #[error("this Xen cannot run PVH guests: {0}")]
    NoHvm(&'static str),
}

/// The Xen under us.
pub struct Privcmd {
    pub(super) device: File,
    pub(super) buffers: Buffers,
    pub(super) version: XenVersion,
    sysctl_version: u32,
    pub(super) hap: bool,
}

impl Privcmd {
    /// Opens the device and looks which Xen it is; `None` where there is none.
    pub fn open() -> std::result::Result<Option<Privcmd>, OpenError> {
        let device = match File::options().read(true).write(true).open(DEVICE) {
            Ok(device) => device,
            Err(error) if is_absent(&error) => return Ok(None),
            Err(error) => return Err(OpenError::Device(error)),
        };
        let version = XenVersion {
            major: 0,
            minor: 0,
            extra: String::new(),
            domctl: 0,
            capabilities: String::new(),
            command_line: String::new(),
        };
        let mut xen = Privcmd { device, buffers: Buffers::open(), version, sysctl_version: 0, hap: false };
        let Ok(number) = xen.hypercall(hypercall::XEN_VERSION, [version::VERSION, 0, 0, 0, 0]) else {
            // The device is there on kernels that can be a Xen guest, and answers only on Xen.
            return Ok(None);
        };
        (xen.version.major, xen.version.minor) = ((number >> 16) as u32, number as u32 & 0xffff);
        xen.version.extra = xen.text(version::EXTRAVERSION, version::EXTRAVERSION_BYTES)?;
        xen.version.capabilities = xen.text(version::CAPABILITIES, version::CAPABILITIES_BYTES)?;
        xen.version.command_line = xen.text(version::COMMAND_LINE, version::COMMAND_LINE_BYTES)?;
        xen.version.domctl = xen.probe_domctl()?;
        xen.sysctl_version = xen.probe_sysctl()?;
        let machine = xen.physinfo().map_err(OpenError::NotAllowed)?;
        if !machine.hvm {
            return Err(OpenError::NoHvm("it has no hardware virtualisation"));
        }
        xen.hap = machine.hap;
        Ok(Some(xen))
    }

    /// Which version of domctl it answers to. It refuses every other with EACCES.
    fn probe_domctl(&mut self) -> std::result::Result<u32, OpenError> {
        let (major, minor) = (self.version.major, self.version.minor);
        let expected = domctl::version_of(major, minor);
        for version in domctl::VERSIONS {
            self.version.domctl = version;
            match self.info(DomId(0)) {
                Err(CallError::Refused { errno: Errno::EACCES, .. }) => continue,
                Err(error) => return Err(OpenError::NotAllowed(error)),
                Ok(_) if expected == Some(version) => return Ok(version),
                Ok(_) => {
                    let what = format!("it answers to domctl version {version:#x}");
                    return Err(OpenError::Unknown { major, minor, what });
                }
            }
        }
        let what = format!("it answers to none of the domctl versions {:#x?}", domctl::VERSIONS);
        Err(OpenError::Unknown { major, minor, what })
    }

    fn probe_sysctl(&mut self) -> std::result::Result<u32, OpenError> {
        for version in sysctl::VERSIONS {
            self.sysctl_version = version;
            match self.physinfo() {
                Err(CallError::Refused { errno: Errno::EACCES, .. }) => continue,
                Err(error) => return Err(OpenError::NotAllowed(error)),
                Ok(_) => return Ok(version),
            }
        }
        let (major, minor) = (self.version.major, self.version.minor);
        let what = format!("it answers to none of the sysctl versions {:#x?}", sysctl::VERSIONS);
        Err(OpenError::Unknown { major, minor, what })
    }

    /// A text of XENVER_*.
    fn text(&self, what: u64, bytes: usize) -> std::result::Result<String, OpenError> {
        let refused = |errno| {
            OpenError::NotAllowed(CallError::Refused { call: "HYPERVISOR_xen_version", domid: None, errno })
        };
        let mut buffer = self.buffers.take(bytes).map_err(refused)?;
        self.hypercall(hypercall::XEN_VERSION, [what, buffer.address(), 0, 0, 0]).map_err(refused)?;
        let text = &buffer.bytes()[..bytes];
        let end = text.iter().position(|byte| *byte == 0).unwrap_or(bytes);
        let text = String::from_utf8_lossy(&text[..end]).trim_end().to_owned();
        self.buffers.give_back(buffer);
        Ok(text)
    }

    /// Calls Xen, again as long as it or the kernel says that the call was only interrupted.
    ///
    /// Every address among `args`, and in what they point to, must be of a live [`Buffer`] of the caller's: all callers are
    /// in this file and in `calls`.
    fn hypercall(&self, op: u64, args: [u64; 5]) -> std::result::Result<u64, Errno> {
        let mut call = privcmd::Hypercall { op, arg: args };
        loop {
            // SAFETY: `call` is live and laid out as the request reads it. What its arguments point to is live and nobody
            // else's, by this function's contract.
            match unsafe { ioctl(self.device.as_fd(), privcmd::HYPERCALL, &mut call) } {
                Err(Errno::EINTR | Errno::ERESTART) => continue,
                other => return other,
            }
        }
    }

    /// A domctl; `argument` is read and written, also when it fails.
    pub(super) fn domctl<T>(&self, operation: Operation, domid: DomId, argument: &mut T) -> Result<()>
    where
        T: IntoBytes + FromBytes + Immutable,
    {
        self.raw_domctl(operation, domid, argument).map_err(|errno| refused(operation, Some(domid), errno))
    }

    pub(super) fn raw_domctl<T>(
        &self,
        operation: Operation,
        domid: DomId,
        argument: &mut T,
    ) -> std::result::Result<(), Errno>
    where
        T: IntoBytes + FromBytes + Immutable,
    {
        const { assert!(size_of::<T>() <= domctl::ARGUMENT_BYTES) };
        let mut call = domctl::Domctl {
            cmd: operation.number,
            interface_version: self.version.domctl,
            domain: domid.0,
            pad: [0; 3],
            argument: [0; domctl::ARGUMENT_BYTES],
        };
        call.argument[..size_of::<T>()].copy_from_slice(argument.as_bytes());
        let result = self.with_argument(hypercall::DOMCTL, None, &mut call);
        if let Ok((answer, _)) = T::read_from_prefix(&call.argument) {
            *argument = answer;
        }
        result.map(drop)
    }

    pub(super) fn sysctl<T>(&self, operation: Operation, argument: &mut T) -> Result<()>
    where
        T: IntoBytes + FromBytes + Immutable,
    {
        const { assert!(size_of::<T>() <= sysctl::ARGUMENT_BYTES) };
        let mut call = sysctl::Sysctl {
            cmd: operation.number,
            interface_version: self.sysctl_version,
            argument: [0; sysctl::ARGUMENT_BYTES],
        };
        call.argument[..size_of::<T>()].copy_from_slice(argument.as_bytes());
        self.with_argument(hypercall::SYSCTL, None, &mut call)
            .map_err(|errno| refused(operation, None, errno))?;
        if let Ok((answer, _)) = T::read_from_prefix(&call.argument) {
            *argument = answer;
        }
        Ok(())
    }

    /// A hypercall with an operation's number before its struct.
    pub(super) fn operation<T>(
        &self,
        op: u64,
        operation: Operation,
        domid: DomId,
        argument: &mut T,
    ) -> Result<u64>
    where
        T: IntoBytes + FromBytes + Immutable,
    {
        let number = Some(operation.number.into());
        self.with_argument(op, number, argument).map_err(|errno| refused(operation, Some(domid), errno))
    }

    /// A hypercall with a struct, which it may write, as its argument, or as its second one after a number.
    pub(super) fn with_argument<T>(
        &self,
        op: u64,
        number: Option<u64>,
        argument: &mut T,
    ) -> std::result::Result<u64, Errno>
    where
        T: IntoBytes + FromBytes + Immutable,
    {
        let mut buffer = self.buffers.take(size_of::<T>())?;
        buffer.bytes()[..size_of::<T>()].copy_from_slice(argument.as_bytes());
        let address = buffer.address();
        let args = number.map_or([address, 0, 0, 0, 0], |number| [number, address, 0, 0, 0]);
        let result = self.hypercall(op, args);
        if let Ok((answer, _)) = T::read_from_prefix(buffer.bytes()) {
            *argument = answer;
        }
        self.buffers.give_back(buffer);
        result
    }

    /// A buffer for `call`, with `bytes` at its start.
    pub(super) fn buffer(&self, operation: Operation, domid: Option<DomId>, bytes: &[u8]) -> Result<Buffer> {
        let mut buffer = self.buffers.take(bytes.len()).map_err(|errno| refused(operation, domid, errno))?;
        buffer.bytes()[..bytes.len()].copy_from_slice(bytes);
        Ok(buffer)
    }

    /// A zeroed buffer for an answer of `bytes` bytes.
    pub(super) fn answer(&self, operation: Operation, domid: Option<DomId>, bytes: usize) -> Result<Buffer> {
        if bytes > ANSWER_MAX {
            return Err(refused(operation, domid, Errno::E2BIG));
        }
        self.buffers.take(bytes).map_err(|errno| refused(operation, domid, errno))
    }
}

/// Whether a device that could not be opened is simply not there.
fn is_absent(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR | libc::ENODEV | libc::ENXIO))
}

pub(super) fn refused(operation: Operation, domid: Option<DomId>, errno: Errno) -> CallError {
    CallError::Refused { call: operation.name, domid, errno }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_there_is_no_device_there_is_no_xen() {
        if !std::path::Path::new(DEVICE).exists() {
            assert!(matches!(Privcmd::open(), Ok(None)));
        }
    }

    #[test]
    fn each_known_xen_has_one_interface_and_others_have_none() {
        assert_eq!(domctl::version_of(4, 17), Some(0x15));
        assert_eq!(domctl::version_of(4, 21), Some(0x17));
        assert_eq!(
            [(4, 16), (4, 23), (5, 0)].map(|(major, minor)| domctl::version_of(major, minor)),
            [None; 3]
        );
        for minor in 17..=22 {
            assert!(domctl::version_of(4, minor).is_some_and(|version| domctl::VERSIONS.contains(&version)));
        }
    }
}
