//! What killed launchers leave on Xen, and its end: domains, their nodes in xenstore, their disks in dom0.
//!
//! Invariant: only what carries the owner's mark is touched, and of that only what belongs to a slot nobody keeps. Who keeps a
//! slot holds its lock from before the domain is made until after it is gone, so whatever is found without one is nobody's.

use std::time::Duration;

use engine::host::HostError;

use crate::error::{store_error, xen_error};
use crate::host::XenHost;
use crate::hypercalls::{DomId, Uuid};
use crate::volumes;
use crate::xenstore::domain as nodes;
use crate::xenstore::{devices, Nodes, Xenstore, XenstoreError};

/// A dead domain's back ends have nothing to wait for.
const DEVICE_LIMIT: Duration = Duration::from_secs(5);

impl XenHost {
    /// Ends what is left of the domains of slots that nobody keeps. Answers how many domains there were.
    pub fn sweep(&self, is_kept: &dyn Fn(u32) -> bool) -> Result<usize, HostError> {
        let step = "look for domains that nobody keeps";
        let is_left = |uuid: &Uuid| self.owner().slot(uuid).is_some_and(|slot| !is_kept(slot));
        let xen = self.hypercalls();
        let domains = xen.list().map_err(|error| xen_error(step, &error))?;
        let left: Vec<_> = domains.into_iter().filter(|domain| is_left(&domain.uuid)).collect();
        let store = Xenstore::open().map_err(|error| store_error(step, error))?;
        for domain in &left {
            tracing::info!("domain {} was left behind: it is taken down", domain.domid);
            // It may be dying already, or go meanwhile.
            let _ = xen.pause(domain.domid);
            close_devices(&store, domain.domid).map_err(|error| store_error(step, error))?;
            if xen.info(domain.domid).is_ok_and(|info| info.is_some_and(|info| info.uuid == domain.uuid)) {
                xen.destroy(domain.domid)
                    .map_err(|error| xen_error("destroy a domain that nobody keeps", &error))?;
            }
        }
        for (domid, uuid) in known(&store).map_err(|error| store_error(step, error))? {
            if is_left(&uuid) {
                close_devices(&store, domid)
                    .and_then(|()| nodes::withdraw(&store, domid, &uuid))
                    .map_err(|error| store_error("remove the nodes of a domain that nobody keeps", error))?;
            }
        }
        volumes::sweep(&|uuid| !is_left(uuid))?;
        Ok(left.len())
    }
}

fn close_devices(store: &Xenstore, domid: DomId) -> Result<(), XenstoreError> {
    devices::close(store, domid, &devices::in_dom0(store, domid)?, DEVICE_LIMIT)
}

/// The domains xenstore knows, with their handles.
fn known(store: &Xenstore) -> Result<Vec<(DomId, Uuid)>, XenstoreError> {
    let mut known = Vec::new();
    for name in store.list("/local/domain")? {
        let Ok(domid) = name.parse().map(DomId) else { continue };
        let vm = store.read(&format!("{}/vm", nodes::home(domid)))?;
        known.extend(
            vm.as_deref().and_then(|vm| Uuid::parse(vm.strip_prefix("/vm/")?)).map(|uuid| (domid, uuid)),
        );
    }
    Ok(known)
}
