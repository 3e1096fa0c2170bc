//! A domain's disks.
