//! A host over Xen: domains made, filled, captured and destroyed by hypercall, without libxenctrl, libxl or scripts.
//!
//! | room | what is in it |
//! |---|---|
//! | `sys/` | the only `unsafe`: privcmd, event channels, grants, loop and device-mapper ioctls |
//! | `abi/` | the layouts and numbers of Xen's public headers |
//! | [`hypercalls`] | the seam: what is asked of Xen, implemented by `sys` and by `simulated` |
//! | `xenstore/` | wire codec, client, and the nodes of a domain and its devices |
//! | `volumes/` | a domain's disks: loop, dm-crypt, dm-snapshot |
//! | `boot/` | from a kernel image to the first instruction of a PVH guest |
//! | `stream/` | `xl save` files: read, checked, written |
//! | `life/` | create, fill, capture, restore, destroy |
//! | `channel/` | the vchans of agents |
//! | [`calls`] | what calls that have a vchan each need: the agent's channel, nodes |
//! | [`host`], [`domain`] | the engine's `Host` and `Domain` |

mod abi;
pub mod boot;
pub mod calls;
pub mod channel;
pub mod device_state;
pub mod doctor;
pub mod domain;
mod error;
pub mod host;
pub mod hypercalls;
pub mod layout;
pub mod life;
pub mod owner;
pub mod simulated;
mod steps;
pub mod stream;
mod sweep;
pub mod sys;
mod threads;
pub mod volumes;
pub mod xenstore;
