//! What the benches share: the guests they measure, medians, and the table.

pub mod guests;
pub mod results;
pub mod stats;
pub mod table;
