//! The programs of the guest that the agent's binary is too, by the name it is started as: whoever calls out of a guest needs no more than
//! it. Command lines, texts and exit statuses as Qubes' own have them (QubesOS/qubes-core-qrexec, agent/qrexec-client-vm.c 052fa38f and later,
//! qrexec-client-vm.rst 163597ea; QubesOS/qubes-core-agent-linux, qubes-rpc/qvm-run-vm 25b304cc and
//! qvm-copy 03e46949).

mod client;
mod files;
mod filter;
mod qrexec_client_vm;
mod qvm_run;

pub use files::receive_files;

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::ExitCode;

/// A program: its arguments in, its status out.
pub type Tool = fn(Vec<OsString>) -> ExitCode;

/// The program that goes by this name.
pub fn named(program: &OsStr) -> Option<Tool> {
    match Path::new(program).file_name()?.to_str()? {
        qrexec_client_vm::NAME => Some(qrexec_client_vm::run),
        "qvm-copy" => Some(files::copy),
        "qvm-copy-to-vm" => Some(files::copy_to_vm),
        "qvm-move" => Some(files::move_),
        "qvm-move-to-vm" => Some(files::move_to_vm),
        "qvm-run" | "qvm-run-vm" => Some(qvm_run::run),
        _ => None,
    }
}
