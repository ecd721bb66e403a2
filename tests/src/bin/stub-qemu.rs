//! A QEMU that tests can start by the hundred: see [`stub`].

#[path = "../stub/mod.rs"]
mod stub;

fn main() -> std::process::ExitCode {
    stub::main(std::env::args().skip(1).collect())
}
