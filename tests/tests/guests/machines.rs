//! A move to a QEMU that differs from the source's.

use crate::PROGRAM;
use anyhow::Result;
use e2e::guest;
use e2e::scene::VM;
use e2e::world::{Host, World};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// QEMU, after what a script does to its arguments.
fn qemu(world: &World, script: &str) -> Result<PathBuf> {
    let real = std::env::var("GODWIT_QEMU").unwrap_or_else(|_| "qemu-system-x86_64".into());
    let program = world.path("qemu");
    let script = format!("#!/bin/sh\n{script}\nexec '{real}' \"$@\"\n");
    std::fs::write(&program, script)?;
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755))?;
    Ok(program)
}

#[test]
fn a_target_that_does_not_know_the_machine_refuses_before_it_touches_a_disk() -> Result<()> {
    let mut world = World::new(Path::new(PROGRAM))?;
    let old = world.path("old");
    // It knows no machine type while that file is there.
    let refuse = "echo 'qemu: unsupported machine type' >&2; exit 1";
    let refuse = format!("if [ -e '{}' ]; then {refuse}; fi", old.display());
    world.set_env("GODWIT_QEMU", qemu(&world, &refuse)?);
    let (a, b) = (world.host("a", 2)?, world.host("b", 3)?);
    let (here, there) = (world.path("a/root.raw"), b.folder(VM).join("root.raw"));
    guest::disk(&here, 64)?;
    let _on_a = a.launch(VM, &guest::spec(VM, &here, 64)?, &[])?;
    let _on_b = b.receive(VM, &[])?;
    world.wait_running(&a, VM)?;
    let machine = |host: &Host| -> Result<String> {
        Ok(world.run(host.client(VM).spec())?.expect("it runs here").machine)
    };
    let pinned = machine(&a)?;
    assert!(pinned.starts_with("pc-i440fx-"), "{pinned}");
    let refused = |from: &Host, to: &Host, more: &[&str]| -> Result<()> {
        std::fs::write(&old, "")?;
        let ended = world.move_vm(VM, from, to, more)?;
        std::fs::remove_file(&old)?;
        assert!(!ended.status.success());
        let why = format!("does not know machine type {pinned}");
        assert!(ended.err.contains(&why), "{}", ended.err);
        world.wait_running(from, VM)?;
        Ok(())
    };

    refused(&a, &b, &[])?;
    assert!(!there.exists(), "the target's disk is left over");
    let ended = world.move_vm(VM, &a, &b, &[])?;
    assert!(ended.status.success(), "{}", ended.err);
    world.wait_running(&b, VM)?;
    assert_eq!(machine(&b)?, pinned);

    // The disk that was left is still known for what it is: only what changed goes back.
    let back = ["--disk".to_owned(), format!("root={}", here.display())];
    let back: Vec<_> = back.iter().map(String::as_str).collect();
    refused(&b, &a, &back)?;
    let ended = world.move_vm(VM, &b, &a, &back)?;
    assert!(ended.status.success(), "{}", ended.err);
    world.wait_running(&a, VM)?;
    let progress = world.status(&b, VM)?.migration.expect("it moved").progress;
    assert!(progress.bytes_total < 16 << 20, "a whole disk went back: {progress:?}");
    Ok(())
}

#[test]
fn a_target_that_cannot_load_the_guest_says_why_and_the_guest_goes_on() -> Result<()> {
    let mut world = World::new(Path::new(PROGRAM))?;
    let a = world.host("a", 2)?;
    // A target has more memory than the guest that comes.
    let more = "case \"$*\" in *-incoming*) set -- \"$@\" -m 72M;; esac";
    world.set_env("GODWIT_QEMU", qemu(&world, more)?);
    let b = world.host("b", 3)?;
    let disk = world.path("a/root.raw");
    guest::disk(&disk, 64)?;
    let _on_a = a.launch(VM, &guest::spec(VM, &disk, 64)?, &[])?;
    let _on_b = b.receive(VM, &[])?;
    world.wait_running(&a, VM)?;
    let ended = world.move_vm(VM, &a, &b, &[])?;
    assert!(!ended.status.success());
    // QEMU's own words.
    assert!(ended.err.contains("pc.ram"), "{}", ended.err);
    world.wait_running(&a, VM)?;
    Ok(())
}
