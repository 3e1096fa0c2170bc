//! A small system: two AppVMs, a halted one, two templates for disposables, and what surrounds them.

use policy::System;

/// What a test calls from and to.
pub fn system() -> System {
    System::parse(include_bytes!("../data/system.json")).unwrap()
}
