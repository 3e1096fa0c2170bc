//! The engine: savefiles, hot images, and the life of a clone. It knows no hypervisor, no terminal and no
//! environment variable; those are its callers'.
//!
//! Reading order, by the way the data takes: [`units`] → [`savefile`] → [`image`] → [`ring`] → [`host`] and [`agent`]
//! (the two seams) → [`build`], [`rehearse`], [`launch`], [`close`] → [`identity`], [`timeline`].

pub mod agent;
pub mod build;
pub mod close;
pub mod host;
pub mod identity;
pub mod image;
pub mod launch;
pub mod rehearse;
pub mod ring;
pub mod savefile;
pub mod spare;
pub mod timeline;
pub mod units;
