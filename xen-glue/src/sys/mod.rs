//! What needs `unsafe`: requests to the kernel's devices. No decision is taken here.
