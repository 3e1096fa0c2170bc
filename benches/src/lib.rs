//! What the benches share: the guests they measure, clocks, medians, the table, and where runs are kept.

pub mod clock;
pub mod daemon;
pub mod guests;
pub mod results;
pub mod run;
pub mod stats;
pub mod table;
