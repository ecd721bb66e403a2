//! The stub as a process, and QEMU beside it.

mod agreement;
mod moves;
mod world;
