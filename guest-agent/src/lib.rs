//! The static binary inside every guest: it captures nothing and launches nothing, but everything that happens in the guest for it
//! happens here.
//!
//! Invariants: one thread and one poll loop; no bytes of the host panic it or make it hang; it is alone in its cgroup, so it can
//! freeze everything else and go on itself.
//!
//! Files in reading order: `main` (the lives of the binary), `session`, `place`, `account` and `services` (where commands run, and what),
//! `cgroup` (the freezer), `port` (the byte stream to the host), `agent` (the loop) with `agent/clone`, `commands`, `command`, `flow`,
//! `outbox` (what runs), `calls` (what programs here want of others), `errand` (prerun and rehearsal), `identity`, `power`, `sys` (all
//! unsafe code); and beside the agent, `tools` (the programs that call).

#[cfg(not(all(target_arch = "x86_64", target_pointer_width = "64")))]
compile_error!("sys.rs starts processes by x86-64 assembly, and its structures are those of 64-bit kernels");

pub mod account;
pub mod agent;
pub mod calls;
pub mod cgroup;
mod command;
mod commands;
mod errand;
pub mod failure;
mod flow;
mod identity;
mod outbox;
pub mod place;
pub mod port;
mod power;
pub mod services;
pub mod session;
pub mod stock;
pub mod sys;
pub mod tools;
