//! The ring of Xen's libxenvchan, for either end: its layout in shared pages and the arithmetic of its counters.
//!
//! Source: Xen's `xen/include/public/io/libxenvchan.h` and `tools/libs/vchan/`.
