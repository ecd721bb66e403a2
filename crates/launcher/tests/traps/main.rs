//! What QEMU does that nobody would expect, each tried on a real one: a QEMU that behaves
//! differently is noticed here, before a guest notices it. And that our code copes.
//!
//! Both sides are QEMUs with the product's command line, driven by the product's functions
//! ([`launcher::migration::memory`]). Set `GODWIT_QEMU` to try another QEMU.

mod disks;
mod incoming;
mod network;
mod side;
mod streams;
mod switchover;

/// What this binary does when a test runs it once more, as QEMU's shim; nothing otherwise.
#[test]
fn child() {
    side::child();
}
