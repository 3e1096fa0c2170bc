//! The front ends against a server on a real socket, byte for byte.

mod help;
mod legacy;
mod records;
mod run;
mod server;
mod tools;
