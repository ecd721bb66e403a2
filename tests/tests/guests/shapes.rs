//! Moves of every shape: ways, disks, sizes and guests. Each ends with the
//! guest's own word that nothing was lost, and with disks that are equal.

use crate::PROGRAM;
use anyhow::{Context, Result};
use e2e::guest;
use e2e::media::Loop;
use e2e::scene::{self, SOON, Scene, VM};
use e2e::world::Host;
use launcher::migration::status::Outcome;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

fn scene() -> Result<Scene> {
    scene::scene(Path::new(PROGRAM), &[])
}

fn root(path: PathBuf) -> Result<(&'static str, PathBuf)> {
    guest::disk(&path, 64)?;
    Ok(("root", path))
}

/// Moves the guest; nothing is lost and the disks are equal.
fn moves(scene: &Scene, from: &Host, to: &Host, more: &[&str]) -> Result<()> {
    scene.moved(from, to, more)?;
    scene.nothing_is_lost(to)?;
    scene.disks_are_equal(from, to)
}

/// A second writer, on the disk `dev`.
fn writes_also(scene: &Scene, host: &Host, id: u64, place: &str) -> Result<()> {
    let command = format!("write start id={id} {place} rate=50 seed={}", 100 + id);
    scene.listen(host)?.command(&command, SOON)?;
    scene.witness.wait_written_by(id, 10, SOON)
}

#[test]
fn three_hops_and_home_send_only_what_changed_on_the_way() -> Result<()> {
    let scene = scene()?;
    let c = scene.world.host("c", 4)?;
    let _on_c = c.receive(VM, &[])?;
    moves(&scene, &scene.a, &scene.b, &[])?;
    moves(&scene, &scene.b, &c, &[])?;
    moves(&scene, &c, &scene.a, &["--disk", &scene.disk_back()])?;
    let progress = scene.world.status(&c, VM)?.migration.context("it moved")?.progress;
    assert!(progress.bytes_total < 48 * MIB, "a whole disk went home: {progress:?}");
    Ok(())
}

#[test]
fn a_hole_of_a_gibibyte_costs_nothing_and_stays_a_hole() -> Result<()> {
    let scene = scene::scene_on(Path::new(PROGRAM), &[], |world| {
        let holey = world.path("a/holey.raw");
        let file = File::create(&holey)?;
        file.set_len(GIB)?;
        for at in [0, GIB - MIB] {
            file.write_all_at(&vec![0x5a; MIB as usize], at)?;
        }
        Ok(vec![root(world.path("a/root.raw"))?, ("holey", holey)])
    })?;
    moves(&scene, &scene.a, &scene.b, &[])?;
    let (sent, _) = scene.world.bytes(&scene.a)?;
    assert!(sent < 256 * MIB, "{sent} bytes were sent");
    let there = scene.b.folder(VM).join("holey.raw").metadata()?;
    assert_eq!(there.len(), GIB);
    assert!(there.blocks() * 512 <= 3 * MIB, "{} blocks are allocated", there.blocks());
    Ok(())
}

#[test]
fn disks_go_from_files_to_devices_and_back() -> Result<()> {
    let (there, here) = (Loop::new(64 * MIB)?, Loop::new(16 * MIB)?);
    // An old user's data: a target's device may hold anything.
    there.backing().write_all_at(&vec![0xff; 4 * MIB as usize], 8 * MIB)?;
    let device = here.path().to_owned();
    let scene = scene::scene_on(Path::new(PROGRAM), &[], |world| {
        Ok(vec![root(world.path("a/root.raw"))?, ("data", device)])
    })?;
    writes_also(&scene, &scene.a, 1, "dev=/dev/vdb len=2M")?;
    let small = scene.world.path("b/small.raw");
    File::create(&small)?.set_len(15 * MIB)?;
    let disk = format!("data={}", small.display());
    scene.is_refused(&scene.b, &["--disk", &disk], "make it at least as large")?;
    assert!(!scene.b.folder(VM).join("root.raw").exists(), "half a move is left over");

    let to_device = format!("root={}", there.path().display());
    moves(&scene, &scene.a, &scene.b, &["--disk", &to_device])?;
    let to_device = format!("data={}", here.path().display());
    moves(&scene, &scene.b, &scene.a, &["--disk", &scene.disk_back(), "--disk", &to_device])
}

#[test]
fn a_smaller_target_is_refused_and_a_larger_one_grows() -> Result<()> {
    let scene = scene()?;
    let small = scene.world.path("b/small.raw");
    File::create(&small)?.set_len(63 * MIB)?;
    let disk = format!("root={}", small.display());
    scene.is_refused(&scene.b, &["--disk", &disk], "make it at least as large")?;
    assert_eq!(small.metadata()?.blocks(), 0, "something was written");

    let large = scene.world.path("b/large.raw");
    File::create(&large)?.set_len(80 * MIB)?;
    let disk = format!("root={}", large.display());
    moves(&scene, &scene.a, &scene.b, &["--disk", &disk])?;
    // The guest may use what its disk grew by, and takes it along.
    writes_also(&scene, &scene.b, 1, "dev=/dev/vda offset=70M len=1M")?;
    let c = scene.world.host("c", 4)?;
    let _on_c = c.receive(VM, &[])?;
    moves(&scene, &scene.b, &c, &[])?;
    assert_eq!(c.folder(VM).join("root.raw").metadata()?.len(), 80 * MIB);
    moves(&scene, &c, &scene.b, &["--disk", &disk])
}

#[test]
fn multifd_carries_a_busy_guest_and_an_idle_one() -> Result<()> {
    let scene = scene()?;
    moves(&scene, &scene.a, &scene.b, &["--multifd", "3"])?;
    let mut line = scene.listen(&scene.b)?;
    for command in ["write stop", "memory stop", "tick stop"] {
        line.command(command, SOON)?;
    }
    let home = ["--disk", &scene.disk_back(), "--multifd", "2"];
    for (from, to, more) in [(&scene.b, &scene.a, &home[..]), (&scene.a, &scene.b, &[])] {
        scene.moved(from, to, more)?;
        scene.world.wait_running(to, VM)?;
        let sums = scene.listen(to)?.check()?;
        assert_eq!((sums.lost, sums.stale), (0, 0));
        scene.disks_are_equal(from, to)?;
    }
    Ok(())
}

/// Bytes per second that the guest's hungry writer gets done.
fn speed(scene: &Scene) -> f64 {
    let (before, begun) = (scene.witness.written(), Instant::now());
    std::thread::sleep(Duration::from_secs(2));
    let blocks = scene.witness.written() - before;
    blocks as f64 * 65536.0 / begun.elapsed().as_secs_f64()
}

#[test]
fn a_guest_that_outruns_the_link_is_throttled_or_stays_as_the_user_likes() -> Result<()> {
    let scene = scene()?;
    let mut line = scene.listen(&scene.a)?;
    line.command("memory start mib=1 rate=100", SOON)?;
    // Over the old writer's blocks, as fast as it goes.
    line.command("write stop", SOON)?;
    line.command("write start dev=/dev/vda offset=32M len=12M block=64K batch=16 seed=8", SOON)?;
    scene.witness.wait_alive(SOON)?;
    let free = speed(&scene);
    let link = |share: f64| format!("{}", (free * share) as u64);

    let narrow = ["--no-throttle", "--bandwidth", &link(0.4)];
    scene.is_refused(&scene.b, &narrow, "faster than the link carries")?;

    let narrow = ["--bandwidth", &link(0.1)];
    let mut command = scene.world.move_command(VM, &scene.a, &scene.b, &narrow);
    let mut moving = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    scene.world.wait_status(&scene.a, VM, "throttled", |s| {
        s.migration.as_ref().is_some_and(|m| m.progress.throttle.is_some())
    })?;
    scene.world.run(scene.a.client(VM).cancel())?;
    assert!(!moving.wait()?.success());
    assert_eq!(scene.outcome(&scene.a)?, Outcome::Cancelled);
    scene.outcome(&scene.b)?;
    let again = speed(&scene);
    assert!(again > free / 6.0, "the throttle was not lifted: {again} of {free} bytes/s");

    moves(&scene, &scene.a, &scene.b, &["--bandwidth", &link(0.7)])
}
