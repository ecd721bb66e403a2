//! What is confined stays within its bounds.

mod common;

use std::process::{Command, Output};

use common::{Bench, shim};

/// Runs a script through the shim, for a disk of a MiB.
fn confined(script: &str, bytes: Option<&str>) -> Output {
    let mut command = Command::new(&shim()[0]);
    command.args(["sh", "-c", script]).env("SECRET", "of the parent");
    match bytes {
        Some(bytes) => command.env("IMAGES_BYTES", bytes),
        None => command.env_remove("IMAGES_BYTES"),
    };
    command.output().unwrap()
}

fn says(script: &str) -> String {
    let output = confined(script, Some("1048576"));
    assert!(output.status.success(), "{script}: {output:?}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

#[test]
fn a_confined_command_has_bounds_and_nothing_else() {
    assert_eq!(says("ulimit -v"), (1 << 20).to_string(), "KiB of memory");
    assert_eq!(says("ulimit -c"), "0", "core dumps");
    assert_ne!(says("ulimit -t"), "unlimited", "processor time");
    assert_eq!(says("echo ${SECRET-none} ${IMAGES_BYTES-none}"), "none none");
    assert_eq!(says("grep NoNewPrivs /proc/self/status | cut -f 2"), "1");
}

#[test]
fn a_confined_command_cannot_write_more_than_the_disk() {
    let bench = Bench::new();
    let path = bench.path("file");
    let write = |kib| format!("head -c {kib}K /dev/zero > {}", path.display());
    assert!(confined(&write(1024), Some("1048576")).status.success());
    assert!(!confined(&write(1025), Some("1048576")).status.success());
    assert_eq!(path.metadata().unwrap().len(), 1 << 20);
}

#[test]
fn without_a_size_nothing_runs() {
    let output = confined("echo ran", None);
    assert!(!output.status.success() && output.stdout.is_empty());
}
