//! All that is shown with real guests, hosts and clusters. One program, so that the machine is never idle while
//! a long test waits: `cargo test --workspace --test guests -- kills::` runs the tests of one file.

mod across;
mod clusters;
mod evictions;
mod faults;
mod hindrances;
mod kills;
mod kills_across;
mod linked;
mod machines;
mod migrations;
mod moves;
mod parity;
mod refusals;
mod roles;
mod segments;
mod shapes;
mod types;
mod uefi;
mod vms;
mod volumes;

/// Godwit, as these tests run it.
const PROGRAM: &str = env!("CARGO_BIN_EXE_godwit-under-test");
