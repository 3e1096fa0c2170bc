//! The front ends against a server on a real socket, byte for byte.

mod records;
mod run;
mod server;
mod tools;
