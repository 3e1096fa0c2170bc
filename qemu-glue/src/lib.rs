//! A [`engine::host::Host`] over QEMU and its machine protocol: the embedded default on any Linux box.
//!
//! The way of a launch through this crate: [`plan`] (what QEMU is told, no I/O) → [`process`] (fork, confinement, exec)
//! → [`qmp`] → [`domain`] (the living guest: capture, spill, end). [`qcow2`] makes overlays and deltas, [`probe`] finds out
//! what this machine and its QEMU can do, [`swap`] keeps guests out of a plaintext swap,
//! [`touched`] tells which memory a clone has touched.

pub mod domain;
pub mod host;
pub mod plan;
pub mod probe;
pub mod process;
pub mod qcow2;
pub mod qmp;
mod spill;
pub mod swap;
mod sys;
pub mod touched;
