//! A launcher as a process of its own, with real QEMU in it.

mod api;
mod console;
mod folder;
mod guest;
mod lifecycle;
mod world;

/// What this binary does when a test runs it once more; nothing otherwise.
#[test]
fn child() {
    world::child();
}
