//! A QEMU that tests can start by the hundred: see [`stub`].

#![expect(clippy::disallowed_methods, reason = "like QEMU it ends at once, whatever it was doing")]

#[path = "../stub/mod.rs"]
mod stub;

fn main() -> std::process::ExitCode {
    stub::main(std::env::args().skip(1).collect())
}
