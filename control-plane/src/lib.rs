//! The control plane: qubes and their settings, savefiles of DVM templates, and the launch of a clone.
//!
//! Rooms: [`state`] (the state folder), [`qube`] (records), [`templates`] and [`volume`] (their files), [`run`] (a qube itself),
//! [`names`] and [`clones`] (who lives), [`inputs`] (what makes a savefile stale), [`agent_link`] and [`session`] (talking to a guest),
//! [`calls`] (qrexec calls into it and out of it), [`savefiles`] (build, list, verify, rm, gc), [`make`] (a clone, restored or booted),
//! [`launcher`] (a launch from request to exit status), [`daemon`] (spares and who keeps them), [`admin`] (Qubes' Admin API), [`cli`]
//! (what the binaries share), [`accounts`] (the machine's users), [`error`].

pub mod accounts;
pub mod admin;
pub mod agent_link;
pub mod calls;
pub mod cli;
pub mod clones;
pub mod daemon;
pub mod error;
pub mod inputs;
pub mod launcher;
pub mod machine;
pub mod make;
pub mod names;
pub mod output;
pub mod private;
pub mod qube;
pub mod run;
pub mod savefiles;
pub mod session;
pub mod state;
pub mod templates;
pub mod volume;
