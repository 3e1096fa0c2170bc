//! What each fuzz target does with its bytes: thin calls into the project's own parsers, and what must hold afterwards.
//!
//! Invariants:
//! - a target is a function of its bytes alone, and leaves nothing behind: no file with a name, no process, no thread;
//! - no bytes make it panic. What a parser refuses is fine; what it accepts must hold what its module promises;
//! - what a target allocates is bounded by the length of its input and by named limits ([`OUTPUT_PAGES_MAX`]).
//!
//! libFuzzer drives the same functions (`../fuzz_targets`) as the replay of the corpora does, an ordinary test on an
//! ordinary toolchain (`tests/replay.rs`). README.md in the folder above says how to run either, and how to add a target.

pub mod admin;
pub mod calls;
pub mod filecopy;
mod files;
pub mod policies;
pub mod qemu;
pub mod qrexec_stock;
pub mod records;
pub mod rpc_service;
pub mod savefile;
pub mod sealed;
pub mod stream;
pub mod xen;
pub mod xl;

pub use savefile::OUTPUT_PAGES_MAX;

/// A fuzz target.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// The name of its program and of its corpus's folder.
    pub name: &'static str,
    /// What it does with an input.
    pub run: fn(&[u8]),
}

/// Every target there is.
pub const TARGETS: &[Target] = &[
    Target { name: "savefile", run: savefile::whole },
    Target { name: "savefile_sealed", run: savefile::sealed },
    Target { name: "header", run: savefile::header },
    Target { name: "manifest", run: savefile::manifest },
    Target { name: "device_state", run: savefile::device_state },
    Target { name: "page_map", run: savefile::page_map },
    Target { name: "chunk_table", run: savefile::chunk_table },
    Target { name: "hot_index", run: records::hot_index },
    Target { name: "qube_record", run: records::qube },
    Target { name: "clone_record", run: records::clone },
    Target { name: "control_socket", run: records::control_socket },
    Target { name: "guest_stream", run: stream::from_guest },
    Target { name: "host_stream", run: stream::from_host },
    Target { name: "qrexec_stock", run: qrexec_stock::channel },
    Target { name: "qmp", run: qemu::qmp },
    Target { name: "qcow2", run: qemu::qcow2 },
    Target { name: "xl_stream", run: xl::stream },
    Target { name: "xl_config", run: xl::config },
    Target { name: "xen_device_state", run: xl::device_state },
    Target { name: "xen_kernel", run: xen::kernel },
    Target { name: "vchan_ring", run: xen::ring },
    Target { name: "xenstore", run: xen::xenstore },
    Target { name: "snapshot_store", run: xen::store },
    Target { name: "policy_file", run: policies::file },
    Target { name: "admin_request", run: admin::request },
    Target { name: "filecopy", run: filecopy::transfer },
    Target { name: "call_socket", run: calls::call_socket },
    Target { name: "agent_call", run: calls::agent_call },
    Target { name: "call_line", run: calls::call_line },
    Target { name: "rpc_service", run: rpc_service::files },
];

/// Splits a number off the front of an input; what is missing of it is zero.
pub(crate) fn take<const N: usize>(data: &mut &[u8]) -> [u8; N] {
    let (front, rest) = data.split_at(N.min(data.len()));
    *data = rest;
    std::array::from_fn(|at| front.get(at).copied().unwrap_or(0))
}
