//! Becoming a machine of one's own: entropy, clock, names, NIC, in this order, before anything else runs.
//!
//! Invariants: what it takes is open, mapped and parked before the capture (a [`Kit`]): a restored guest does the fewest steps that can be done. No
//! process is started, nothing is synced. Each failing step names itself.

mod etc;
mod nic;

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::time::{clock_gettime, clock_settime, ClockId};
use qrexec::{HostFrame, Identity, RawFrame, ENTROPY_BYTES, HEADER_BYTES};

use crate::failure::{Failure, Step};
use crate::port::on_xen;
use crate::sys;
use etc::Etc;
use nic::Nic;

/// Open files and sockets for a change of identity.
pub struct Kit {
    random: File,
    etc: Etc,
    nic: Option<Nic>,
}

impl Kit {
    /// Opens all that a change of identity needs.
    pub fn open() -> Result<Self, Failure> {
        let random = OpenOptions::new().write(true).open("/dev/random").step(|| "open /dev/random")?;
        Ok(Self { random, etc: Etc::open(Path::new("/etc"))?, nic: Nic::find()? })
    }

    /// Makes ready for the quickest change of identity. Legal once everything else is frozen.
    pub fn poise(&mut self) -> Result<(), Failure> {
        self.etc.poise()?;
        self.nic.as_mut().map_or(Ok(()), Nic::park)
    }

    /// Takes the identity on.
    pub fn apply(&mut self, identity: &Identity) -> Result<(), Failure> {
        self.seed(&identity.entropy, true)?;
        set_clock(identity.realtime_ns)?;
        set_hostname(&identity.hostname)?;
        self.etc.write_names(&identity.hostname, &identity.machine_id_hex())?;
        match (&self.nic, &identity.network) {
            (Some(nic), network) => {
                nic.configure(identity.mac, network.as_ref())?;
                network.as_ref().map_or(Ok(()), |network| self.etc.write_resolv_conf(&network.dns))
            }
            (None, None) => Ok(()),
            // The same identities are given to all of a Xen's guests, and some have no card.
            (None, Some(_)) if on_xen() => Ok(()),
            (None, Some(_)) => {
                Err(Failure::ours("find the network interface", libc::ENODEV, "the guest has none"))
            }
        }
    }

    /// Walks the path of [`apply`](Self::apply) without changing what the guest is, so that its code is in memory at capture.
    pub fn rehearse(&mut self) -> Result<(), Failure> {
        rehearse_codec();
        self.seed(&[0; ENTROPY_BYTES], false)?;
        let now = clock_gettime(ClockId::CLOCK_REALTIME).step(|| "read the clock")?;
        set_clock(Duration::from(now).as_nanos() as u64)?;
        let hostname = nix::unistd::gethostname().step(|| "read the hostname")?;
        set_hostname(&hostname.to_string_lossy())?;
        self.etc.rewrite()?;
        self.nic.as_ref().map_or(Ok(()), Nic::look)
    }

    /// The kernel's generator takes the entropy over at once.
    fn seed(&self, entropy: &[u8; ENTROPY_BYTES], credit: bool) -> Result<(), Failure> {
        sys::add_entropy(self.random.as_fd(), entropy, credit).step(|| "add entropy")?;
        sys::reseed(self.random.as_fd()).step(|| "reseed the kernel's generator")
    }
}

fn set_clock(realtime_ns: u64) -> Result<(), Failure> {
    let time = TimeSpec::from_duration(Duration::from_nanos(realtime_ns));
    clock_settime(ClockId::CLOCK_REALTIME, time).step(|| "set the clock")
}

fn set_hostname(hostname: &str) -> Result<(), Failure> {
    nix::unistd::sethostname(hostname).step(|| "set the hostname")
}

fn rehearse_codec() {
    let identity = Identity {
        hostname: "rehearsal".into(),
        machine_id: [1; 16],
        entropy: [0; ENTROPY_BYTES],
        realtime_ns: 0,
        mac: [2, 0, 0, 0, 0, 1],
        network: None,
    };
    let mut bytes = Vec::new();
    let encoded = HostFrame::Identify(Box::new(identity)).encode(&mut bytes);
    let payload = bytes.split_off(bytes.len().min(HEADER_BYTES));
    let parsed = HostFrame::parse(RawFrame { kind: qrexec::kind::IDENTIFY, stream: 0, payload });
    debug_assert!(encoded.is_ok() && parsed.is_ok());
}
