//! The nodes of a PVH domain: those that its guest, xenconsoled and libxl (`xl list`, `xl destroy`) look for, as libxl 4.17
//! writes them (`tools/libs/light/libxl_create.c`, `libxl_dom.c`, `libxl_console.c`).
//!
//! Invariants:
//! - they come to be in one transaction, over whatever an earlier domain of that number left, and before xenstored knows
//!   the domain: a guest and xenconsoled never see a part of them;
//! - the guest may write below `control/shutdown`, `control/feature-*`, `control/sysrq`, `data`, `drivers`, `feature`, `attr`,
//!   `error` and `device/suspend/event-channel`, and nowhere else. So nothing read from there is believed.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use engine::units::ByteCount;

use super::client::Xenstore;
use super::nodes::{Node, Nodes, XenstoreError};
use super::wire::{Access, Perm};
use crate::hypercalls::{DomId, Uuid};

/// How much xenconsoled keeps for a reader that is not there: libxl's LIBXL_XENCONSOLE_LIMIT.
const CONSOLE_LIMIT: u32 = 1 << 20;
/// Those that the guest owns and may write to.
const GUESTS_OWN: [&str; 11] = [
    "device/suspend/event-channel",
    "control/shutdown",
    "control/feature-poweroff",
    "control/feature-reboot",
    "control/feature-suspend",
    "control/sysrq",
    "data",
    "drivers",
    "feature",
    "attr",
    "error",
];

/// A ring page of a domain and the port over which it is spoken of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ring {
    /// The frame.
    pub gfn: u64,
    /// The guest's port.
    pub port: u32,
}

/// What xenstore says of a domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DomainNodes {
    /// Its number.
    pub domid: DomId,
    /// Its handle.
    pub uuid: Uuid,
    /// Its name in `xl list`.
    pub name: String,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// The most memory it can have.
    pub memory_max: ByteCount,
    /// The memory it shall have now.
    pub memory: ByteCount,
    /// Its ring to xenstored.
    pub store: Ring,
    /// Its ring to xenconsoled.
    pub console: Ring,
}

/// Where a domain's nodes are.
pub fn home(domid: DomId) -> String {
    format!("/local/domain/{domid}")
}

fn vm(uuid: &Uuid) -> String {
    format!("/vm/{uuid}")
}

fn libxl(domid: DomId) -> String {
    format!("/libxl/{domid}")
}

fn console_backend(domid: DomId) -> String {
    format!("/local/domain/0/backend/console/{domid}/0")
}

impl DomainNodes {
    /// All nodes, parents first. `started`: when it was, for `xl list -l`.
    pub fn nodes(&self, started: Duration) -> Vec<Node> {
        let mut nodes = Vec::with_capacity(64);
        self.push_identity(&mut nodes, started);
        self.push_guests_own(&mut nodes);
        self.push_facts(&mut nodes);
        self.push_console(&mut nodes);
        nodes
    }

    fn push_identity(&self, nodes: &mut Vec<Node>, started: Duration) {
        let (home, vm, libxl) = (home(self.domid), vm(&self.uuid), libxl(self.domid));
        let readable = [Perm::new(0, Access::None), Perm::new(self.domid.0, Access::Read)];
        let started = format!("{}.{:02}", started.as_secs(), started.subsec_millis() / 10);
        nodes.extend([
            Node::new(&home, "").with(&readable),
            Node::new(&vm, "").with(&readable),
            Node::new(&libxl, "").with(&[Perm::new(0, Access::None)]),
            Node::new(format!("{libxl}/device"), ""),
            Node::new(format!("{libxl}/type"), "pvh"),
            Node::new(format!("{libxl}/dm-version"), "qemu_xen"),
            Node::new(format!("{vm}/uuid"), self.uuid),
            Node::new(format!("{vm}/name"), &self.name),
            Node::new(format!("{vm}/start_time"), started),
            Node::new(format!("{home}/vm"), &vm),
            Node::new(format!("{home}/name"), &self.name),
            Node::new(format!("{home}/domid"), self.domid),
        ]);
    }

    fn push_guests_own(&self, nodes: &mut Vec<Node>) {
        let home = home(self.domid);
        let own = [Perm::new(self.domid.0, Access::None)];
        nodes.extend(GUESTS_OWN.iter().map(|name| Node::new(format!("{home}/{name}"), "").with(&own)));
        // What this host can do: guests look here before they suspend all their vCPUs, or forget their watches on resume.
        for feature in ["multiprocessor-suspend", "xs_reset_watches"] {
            nodes.push(Node::new(format!("{home}/control/platform-feature-{feature}"), 1));
        }
    }

    fn push_facts(&self, nodes: &mut Vec<Node>) {
        let home = home(self.domid);
        let kib = |bytes: ByteCount| bytes.0 >> 10;
        nodes.extend([
            Node::new(format!("{home}/memory/static-max"), kib(self.memory_max)),
            Node::new(format!("{home}/memory/target"), kib(self.memory)),
            Node::new(format!("{home}/memory/videoram"), 0),
            Node::new(format!("{home}/store/port"), self.store.port),
            Node::new(format!("{home}/store/ring-ref"), self.store.gfn),
        ]);
        nodes
            .extend((0..self.vcpus).map(|cpu| Node::new(format!("{home}/cpu/{cpu}/availability"), "online")));
    }

    /// The console is a device whose nodes never change: its back end is a program.
    fn push_console(&self, nodes: &mut Vec<Node>) {
        let (frontend, backend) = (format!("{}/console", home(self.domid)), console_backend(self.domid));
        for (name, value) in [
            ("backend", backend.clone()),
            ("backend-id", "0".to_owned()),
            ("limit", CONSOLE_LIMIT.to_string()),
            ("type", "xenconsoled".to_owned()),
            ("output", "pty".to_owned()),
            ("tty", String::new()),
            ("port", self.console.port.to_string()),
            ("ring-ref", self.console.gfn.to_string()),
        ] {
            nodes.push(Node::new(format!("{frontend}/{name}"), value));
        }
        let readable = [Perm::new(0, Access::None), Perm::new(self.domid.0, Access::Read)];
        nodes.push(Node::new(&backend, "").with(&readable));
        for below in [backend, format!("{}/device/console/0", libxl(self.domid))] {
            for (name, value) in [
                ("frontend", frontend.clone()),
                ("backend", console_backend(self.domid)),
                ("frontend-id", self.domid.to_string()),
                ("online", "1".to_owned()),
                ("state", "1".to_owned()),
                ("protocol", "vt100".to_owned()),
            ] {
                // A back end does not say where it is; libxl's own copy does.
                if name != "backend" || below.starts_with("/libxl") {
                    nodes.push(Node::new(format!("{below}/{name}"), value));
                }
            }
        }
    }

    /// Writes all nodes, then tells xenstored of the domain: from then on its guest may ask. The ring's grant must be in
    /// place.
    pub fn publish(&self, store: &Xenstore) -> Result<(), XenstoreError> {
        let started = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let nodes = self.nodes(started);
        store.transaction("make a domain's nodes", |tx| {
            tx.rm_all(&roots(self.domid, &self.uuid))?;
            tx.write_all(&nodes)
        })?;
        store.introduce(self.domid, self.store.gfn, self.store.port)
    }
}

/// All that a domain has, whoever wrote it.
fn roots(domid: DomId, uuid: &Uuid) -> [String; 7] {
    let backend = |kind: &str| format!("/local/domain/0/backend/{kind}/{domid}");
    let [console, vbd, vif] = ["console", "vbd", "vif"].map(backend);
    [home(domid), vm(uuid), libxl(domid), console, vbd, vif, vchans(domid)]
}

/// What dom0 serves to a domain, each vchan below its port.
pub fn vchans(domid: DomId) -> String {
    format!("/local/domain/0/data/vchan/{domid}")
}

/// Has xenstored let go of a domain and removes all its nodes, those of its devices too, which must be closed. Those that are
/// not there are no error, nor is a domain that has gone.
pub fn withdraw(store: &Xenstore, domid: DomId, uuid: &Uuid) -> Result<(), XenstoreError> {
    store.release(domid)?;
    store.transaction("remove a domain's nodes", |tx| tx.rm_all(&roots(domid, uuid)))
}

/// What a guest can be asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// To suspend itself, so that it can be captured.
    Suspend,
    /// To switch itself off in order.
    PowerOff,
}

impl Ask {
    fn word(self) -> &'static str {
        match self {
            Ask::Suspend => "suspend",
            Ask::PowerOff => "poweroff",
        }
    }
}

/// A guest that did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// Its kernel has not said that it can.
    #[error("the guest of domain {domid} cannot {}: its kernel has not set control/feature-{}", ask.word(), ask.word())]
    Unable {
        /// Which domain.
        domid: DomId,
        /// What it was to do.
        ask: Ask,
    },
    /// It said nothing. What it was asked is taken back.
    #[error("the guest of domain {domid} has not answered the request to {} within {} s", ask.word(), limit.as_secs_f32())]
    Silent {
        /// Which domain.
        domid: DomId,
        /// What it was to do.
        ask: Ask,
        /// How long it was waited for.
        limit: Duration,
    },
    /// The domain's nodes are gone.
    #[error("domain {domid} is gone")]
    Gone {
        /// Which domain.
        domid: DomId,
    },
    /// Xenstore failed.
    #[error(transparent)]
    Store(#[from] XenstoreError),
}

/// Asks a guest and returns when it has acknowledged; then it is on its way. A request that is not acknowledged in time is
/// taken back, so that the guest does not follow it later.
pub fn ask(store: &Xenstore, domid: DomId, ask: Ask, limit: Duration) -> Result<(), GuestError> {
    let control = format!("{}/control", home(domid));
    let shutdown = format!("{control}/shutdown");
    let feature = store.read(&format!("{control}/feature-{}", ask.word()))?;
    match feature.as_deref() {
        Some("1") => {}
        Some(_) => return Err(GuestError::Unable { domid, ask }),
        None => return Err(GuestError::Gone { domid }),
    }
    store.write(&shutdown, ask.word())?;
    let acknowledged = |value: Option<&str>| match value {
        Some(word) if word == ask.word() => None,
        Some(_) => Some(Ok(())),
        None => Some(Err(GuestError::Gone { domid })),
    };
    match store.wait_for(&shutdown, "acknowledged", limit, acknowledged) {
        Err(XenstoreError::Timeout { .. }) => take_back(store, domid, &shutdown, ask, limit),
        waited => waited?,
    }
}

/// In a transaction, since the guest may acknowledge at the last moment.
fn take_back(
    store: &Xenstore,
    domid: DomId,
    shutdown: &str,
    ask: Ask,
    limit: Duration,
) -> Result<(), GuestError> {
    let pending = store.transaction("take back a request", |tx| {
        let pending = tx.read(shutdown)?.as_deref() == Some(ask.word());
        if pending {
            tx.write(shutdown, "")?;
        }
        Ok(pending)
    })?;
    if pending {
        Err(GuestError::Silent { domid, ask, limit })
    } else {
        Ok(())
    }
}

/// Tells the guest's balloon how much memory the domain shall have.
pub fn set_memory_target(store: &Xenstore, domid: DomId, memory: ByteCount) -> Result<(), XenstoreError> {
    store.write(&format!("{}/memory/target", home(domid)), &(memory.0 >> 10).to_string())
}

#[cfg(test)]
mod tests;
