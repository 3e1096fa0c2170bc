//! A second implementation of [`engine::host::Host`], and what it is for: every step of build, launch and close is failed
//! in turn and killed in turn, by seed, and after each the invariants are checked.
//!
//! Nothing in the product knows of it. It stands in QEMU's place ([`control_plane::machine::Machine`]); records, names,
//! savefiles, hot images, frames and sessions are the product's own code.
//!
//! Reading order: [`rng`], [`plan`], [`steps`], [`context`] (what goes wrong, and notes across processes) → [`pages`],
//! [`delta`], [`spill`], [`guest`], [`vm`], [`command`], [`agent`] (the guest) → [`domain`], [`host`], [`machine`] (the host) →
//! [`serve`] (a daemon and its runners), [`operate`], [`tracer`], [`world`] (processes that fail) → [`scenario`], [`invariants`], [`sweep`].

pub mod agent;
pub mod command;
pub mod context;
pub mod delta;
pub mod domain;
pub mod guest;
pub mod host;
pub mod invariants;
pub mod machine;
pub mod operate;
pub mod pages;
pub mod plan;
pub mod rng;
pub mod scenario;
pub mod serve;
pub mod spill;
pub mod steps;
pub mod sweep;
pub mod tracer;
pub mod vm;
pub mod world;
