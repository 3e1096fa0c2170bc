//! What needs `unsafe`: requests to the kernel's devices. No decision is taken here.

pub mod device_mapper;
pub mod loop_device;
