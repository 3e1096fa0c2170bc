//! The front ends against a server on a real socket, byte for byte.

mod run;
mod server;
mod tools;
