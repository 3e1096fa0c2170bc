//! The nodes of a domain's disks and network card, and how they come and go, without hotplug scripts.
//!
//! A device is two folders of nodes that point at each other: the front end's, which the guest owns, and the back end's, which
//! dom0's driver (blkback, netback) or another domain's owns; `/libxl/N/device` has a copy of the latter, by which `xl` finds it.
//! Both sides say how far they are in `state` (`xen/include/public/io/xenbus.h`): 1 initialising, 2 waiting, 3 initialised,
//! 4 connected, 5 closing, 6 closed.
//!
//! Invariants:
//! - both folders and the copy come to be in one transaction, so no driver sees a half;
//! - what would be left to a script is done already (`hotplug-status` = connected, `physical-device`), so a back end connects
//!   as soon as its front end is there;
//! - a front end's nodes are the guest's to write: nothing here depends on them.

use std::time::{Duration, Instant};

use super::client::Xenstore;
use super::domain::home;
use super::nodes::{Node, Nodes, XenstoreError};
use super::wire::{Access, Perm};
use crate::hypercalls::DomId;
use crate::volumes::Disk;

/// No script has anything to do here, but netback does not start without the name of one, and `xl destroy` runs it.
const NO_SCRIPT: &str = "/bin/true";
const DOM0: DomId = DomId(0);
const INITIALISING: &str = "1";
const CONNECTED: &str = "4";
const CLOSING: &str = "5";
const CLOSED: &str = "6";

/// What a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A disk.
    Vbd,
    /// A network card.
    Vif,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Vbd => "vbd",
            Kind::Vif => "vif",
        }
    }
}

/// Which device of a domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DeviceId {
    /// What it is.
    pub kind: Kind,
    /// Its number: 51712 for xvda, 0 for the first card.
    pub number: u32,
    /// The domain that has its back end.
    pub backend: DomId,
}

impl DeviceId {
    /// The front end's folder.
    pub fn frontend(&self, domid: DomId) -> String {
        format!("{}/device/{}/{}", home(domid), self.kind.name(), self.number)
    }

    /// The back end's.
    pub fn backend(&self, domid: DomId) -> String {
        format!("{}/backend/{}/{domid}/{}", home(self.backend), self.kind.name(), self.number)
    }

    fn copy(&self, domid: DomId) -> String {
        format!("/libxl/{domid}/device/{}/{}", self.kind.name(), self.number)
    }

    /// Where the back end's driver writes what went wrong.
    fn complaint(&self, domid: DomId) -> String {
        format!("{}/error/backend/{}/{domid}/{}/error", home(self.backend), self.kind.name(), self.number)
    }
}

/// A network card.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vif {
    /// Which of the guest's cards.
    pub number: u32,
    /// Its address.
    pub mac: [u8; 6],
    /// The domain that carries its packets. What it does with them is its own affair: there is no bridge here.
    pub backend: DomId,
}

/// A device as it is described in xenstore.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Which one.
    pub id: DeviceId,
    frontend: Vec<(&'static str, String)>,
    backend: Vec<(&'static str, String)>,
}

impl Device {
    /// A disk.
    pub fn vbd(disk: &Disk) -> Device {
        let flag = |flag: bool| u8::from(flag).to_string();
        let device = disk.device;
        let mode = if disk.read_only { "r" } else { "w" };
        let frontend = vec![
            ("virtual-device", disk.vdev.to_string()),
            ("device-type", "disk".into()),
            ("trusted", "1".into()),
        ];
        let backend = vec![
            // For people and for xl; blkback goes by the number.
            ("script", NO_SCRIPT.into()),
            ("params", format!("/dev/block/{device}")),
            ("removable", "0".into()),
            ("bootable", "1".into()),
            ("dev", crate::volumes::plan::vdev_name(disk.vdev)),
            ("type", "phy".into()),
            ("mode", mode.into()),
            ("device-type", "disk".into()),
            ("discard-enable", flag(disk.discard)),
            ("specification", "xen".into()),
            ("physical-device", format!("{:x}:{:x}", device.major, device.minor)),
            ("hotplug-status", "connected".into()),
        ];
        let id = DeviceId { kind: Kind::Vbd, number: disk.vdev, backend: DOM0 };
        Device { id, frontend, backend }
    }

    /// A network card. netfront reads its address each time it connects, that of a restored guest too.
    pub fn vif(vif: &Vif) -> Device {
        let bytes: Vec<String> = vif.mac.iter().map(|byte| format!("{byte:02x}")).collect();
        let mac = bytes.join(":");
        let frontend = vec![
            ("handle", vif.number.to_string()),
            ("mac", mac.clone()),
            ("trusted", "1".into()),
            ("mtu", "1500".into()),
        ];
        let mut backend = vec![
            ("script", NO_SCRIPT.into()),
            ("mac", mac),
            ("bridge", String::new()),
            ("handle", vif.number.to_string()),
            ("type", "vif".into()),
        ];
        if vif.backend == DOM0 {
            backend.push(("hotplug-status", "connected".into()));
        }
        let id = DeviceId { kind: Kind::Vif, number: vif.number, backend: vif.backend };
        Device { id, frontend, backend }
    }

    /// All its nodes, parents first. The folders' permissions are libxl's: each side may read the other's.
    pub fn nodes(&self, domid: DomId) -> Vec<Node> {
        let (frontend, backend) = (self.id.frontend(domid), self.id.backend(domid));
        let readable = |owner: DomId, reader: DomId| {
            [Perm::new(owner.0, Access::None), Perm::new(reader.0, Access::Read)]
        };
        let said = |folder: &str, name: &str, value: &str| Node::new(format!("{folder}/{name}"), value);
        let mut nodes = vec![Node::new(&frontend, "").with(&readable(domid, self.id.backend))];
        let backend_id = self.id.backend.to_string();
        let both = [("backend", &backend), ("backend-id", &backend_id), ("state", &INITIALISING.to_owned())]
            .map(|(name, value)| said(&frontend, name, value));
        nodes.extend(both);
        nodes.extend(self.frontend.iter().map(|(name, value)| said(&frontend, name, value)));
        nodes.push(Node::new(&backend, "").with(&readable(self.id.backend, domid)));
        let copy = self.id.copy(domid);
        for folder in [&backend, &copy] {
            nodes.push(said(folder, "frontend", &frontend));
            nodes.push(said(folder, "frontend-id", &domid.to_string()));
            nodes.push(said(folder, "online", "1"));
            nodes.push(said(folder, "state", INITIALISING));
            nodes.extend(self.backend.iter().map(|(name, value)| said(folder, name, value)));
        }
        nodes.push(said(&copy, "backend", &backend));
        nodes
    }
}

/// A device that is not what it should be.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// Its back end has given up.
    #[error("the back end {backend} has gone to state {state}{complaint}")]
    Failed {
        /// Its folder.
        backend: String,
        /// The state it is in, or `none`.
        state: String,
        /// What its driver says, with a leading `: `.
        complaint: String,
    },
    /// Xenstore failed, or time ran out.
    #[error(transparent)]
    Store(#[from] XenstoreError),
}

/// Gives devices to a domain. Their back ends wait for the guest.
pub fn attach(store: &Xenstore, domid: DomId, devices: &[Device]) -> Result<(), XenstoreError> {
    let nodes: Vec<Node> = devices.iter().flat_map(|device| device.nodes(domid)).collect();
    store.transaction("give a domain its devices", |tx| tx.write_all(&nodes))
}

/// Waits until the back ends of all these devices are connected: the guest can use them.
pub fn wait_connected(
    store: &Xenstore,
    domid: DomId,
    devices: &[DeviceId],
    limit: Duration,
) -> Result<(), DeviceError> {
    let deadline = Instant::now() + limit;
    for id in devices {
        let backend = id.backend(domid);
        let left = deadline.saturating_duration_since(Instant::now());
        let state = store.wait_for(&format!("{backend}/state"), "connected", left, |state| match state {
            Some(CONNECTED) => Some(None),
            None => Some(Some("none".to_owned())),
            Some(over @ (CLOSING | CLOSED)) => Some(Some(over.to_owned())),
            Some(_) => None,
        })?;
        if let Some(state) = state {
            let complaint = store.read(&id.complaint(domid))?;
            let complaint = complaint.map_or(String::new(), |complaint| format!(": {complaint}"));
            return Err(DeviceError::Failed { backend, state, complaint });
        }
    }
    Ok(())
}

/// Takes devices from a domain whose guest is not to use them any more, or is gone: their front ends go at once, at which their
/// back ends do what is still to be done and close. Returns when they have, and removes what is left; whoever has not after
/// `limit` is the result, and all others are removed.
pub fn close(
    store: &Xenstore,
    domid: DomId,
    devices: &[DeviceId],
    limit: Duration,
) -> Result<(), XenstoreError> {
    let deadline = Instant::now() + limit;
    store.transaction("close a domain's devices", |tx| {
        for id in devices {
            let backend = id.backend(domid);
            let state = tx.read(&format!("{backend}/state"))?;
            tx.rm(&id.frontend(domid))?;
            if state.is_some_and(|state| state != CLOSED) {
                tx.write(&format!("{backend}/online"), "0")?;
                tx.write(&format!("{backend}/state"), CLOSING)?;
            }
        }
        Ok(())
    })?;
    let mut result = Ok(());
    for id in devices {
        let backend = id.backend(domid);
        let left = deadline.saturating_duration_since(Instant::now());
        let is_closed = |state: Option<&str>| state.is_none_or(|state| state == CLOSED).then_some(());
        let closed = store.wait_for(&format!("{backend}/state"), "closed", left, is_closed);
        let removed = store.rm_all(&[backend, id.copy(domid)]);
        result = result.and(closed).and(removed);
    }
    result
}

/// The devices of a domain whose back ends are in dom0: those that a dead domain left, too.
pub fn in_dom0(store: &Xenstore, domid: DomId) -> Result<Vec<DeviceId>, XenstoreError> {
    let mut found = Vec::new();
    for kind in [Kind::Vbd, Kind::Vif] {
        let numbers = store.list(&format!("{}/backend/{}/{domid}", home(DOM0), kind.name()))?;
        let numbers = numbers.iter().filter_map(|number| number.parse().ok());
        found.extend(numbers.map(|number| DeviceId { kind, number, backend: DOM0 }));
    }
    Ok(found)
}

#[cfg(test)]
mod tests;
