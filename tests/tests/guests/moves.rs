//! Moves of real guests, which find their own lost writes and lost pages.

use crate::PROGRAM;
use anyhow::Result;
use e2e::guest;
use e2e::scene::{self, SOON, Scene, VM};
use e2e::world::Host;
use launcher::migration::status::Outcome;
use launcher::status::Phase;
use std::path::Path;
use std::time::{Duration, Instant};

fn scene(target: &[&str]) -> Result<Scene> {
    scene::scene(Path::new(PROGRAM), target)
}

#[test]
fn there_and_back_and_there_again_loses_nothing_and_sends_only_what_changed() -> Result<()> {
    let scene = scene(&[])?;
    let Scene { world, a, b, witness, .. } = &scene;
    let sent = |host: &Host| world.bytes(host).map(|(sent, _)| sent);
    let listening = Instant::now();
    scene.moved(a, b, &[])?;
    scene.nothing_is_lost(b)?;
    assert!(witness.longest_pause_since(listening) < Duration::from_secs(30));
    let verified = world.verify(VM, a, b)?;
    assert!(verified.status.success() && verified.out.contains("disks verified"), "{verified:?}");
    assert_eq!(world.status(a, VM)?.phase, Phase::Left);

    let read = |host: &Host| -> Result<u64> {
        let progress = world.status(host, VM)?.migration.map(|m| m.progress);
        Ok(progress.map_or(0, |p| p.bytes_total))
    };
    assert!(sent(a)? > 8 << 20);
    scene.moved(b, a, &["--disk", &scene.disk_back()])?;
    scene.nothing_is_lost(a)?;
    assert!(world.verify(VM, b, a)?.status.success());
    // The region is 4 MiB: whatever was written since lies in it, round for round.
    assert!(read(b)? < 64 << 20, "a whole disk went back");

    scene.moved(a, b, &[])?;
    scene.nothing_is_lost(b)?;
    assert!(world.verify(VM, a, b)?.status.success());
    Ok(())
}

#[test]
fn a_dropped_write_is_found_by_the_oracle() -> Result<()> {
    // A block of the region, behind its seed: every later round rewrites it.
    let scene = scene(&["--inject", "drop-writes@33558528"])?;
    let mut moving = scene.stands_at(&scene.a, "source:Converging", &[])?;
    // Once more over all of it, and no further: later writes would heal what is lost.
    scene.witness.wait_written(scene.witness.written() + 1200, SOON)?;
    scene.listen(&scene.a)?.command("write stop", SOON)?;
    scene.world.run(scene.a.client(VM).release())?;
    assert!(moving.wait()?.success());
    let lost = scene.check(&scene.b)?.lost > 0;
    let verified = scene.world.verify(VM, &scene.a, &scene.b)?;
    assert!(lost || !verified.status.success(), "{verified:?}");
    Ok(())
}

#[test]
fn a_flipped_byte_is_found_by_the_verification() -> Result<()> {
    // In the FAT partition, which nobody writes.
    let scene = scene(&["--inject", "flip-byte@2097152"])?;
    scene.moved(&scene.a, &scene.b, &[])?;
    let verified = scene.world.verify(VM, &scene.a, &scene.b)?;
    assert!(!verified.status.success() && verified.out.contains("DISKS DIFFER"), "{verified:?}");
    Ok(())
}

#[test]
fn a_stale_page_is_found_by_the_oracle() -> Result<()> {
    let scene = scene(&["--inject", "stale-page@7"])?;
    scene.moved(&scene.a, &scene.b, &[])?;
    assert!(scene.check(&scene.b)?.stale > 0);
    Ok(())
}

#[test]
fn a_target_killed_while_seeding_costs_nothing_and_the_next_attempt_goes_on() -> Result<()> {
    let mut scene = scene(&[])?;
    let mut moving = scene.stands_at(&scene.a, "source:Seeded", &["--reconnect", "2"])?;
    scene.on_b.take().expect("it runs").kill();
    scene.world.run(scene.a.client(VM).release())?;
    assert!(!moving.wait()?.success());
    let outcome = scene.outcome(&scene.a)?;
    assert!(matches!(outcome, Outcome::Failed { resumable: true, .. }), "{outcome:?}");
    scene.nothing_is_lost(&scene.a)?;
    scene.on_b = Some(scene.b.receive(VM, &["--failpoints"])?);
    scene.moved(&scene.a, &scene.b, &["--resume"])?;
    scene.nothing_is_lost(&scene.b)?;
    let progress = scene.world.status(&scene.a, VM)?.migration.expect("it moved").progress;
    assert!(progress.bytes_total < 16 << 20, "it began from nothing: {progress:?}");
    assert!(scene.world.verify(VM, &scene.a, &scene.b)?.status.success());
    Ok(())
}

#[test]
fn a_gateway_that_is_killed_and_restarted_is_only_a_stall() -> Result<()> {
    for which in ["source", "target"] {
        let mut scene = scene(&[])?;
        let mut moving = scene.stands_at(&scene.a, "source:Converging", &[])?;
        let host = if which == "source" { &mut scene.a } else { &mut scene.b };
        host.kill_gateway();
        host.start_gateway()?;
        scene.world.run(scene.a.client(VM).release())?;
        assert!(moving.wait()?.success(), "the {which}'s gateway");
        scene.nothing_is_lost(&scene.b)?;
        assert!(scene.world.verify(VM, &scene.a, &scene.b)?.status.success());
    }
    Ok(())
}

#[test]
fn a_target_killed_when_loaded_leaves_the_guest_running_at_its_source() -> Result<()> {
    let mut scene = scene(&[])?;
    let mut moving = scene.stands_at(&scene.b, "target:Loaded", &["--reconnect", "2"])?;
    scene.on_b.take().expect("it runs").kill();
    assert!(!moving.wait()?.success());
    scene.nothing_is_lost(&scene.a)?;
    scene.on_b = Some(scene.b.receive(VM, &[])?);
    scene.moved(&scene.a, &scene.b, &[])?;
    scene.nothing_is_lost(&scene.b)
}

#[test]
fn a_source_killed_while_paused_leaves_its_disk_whole_and_nobody_running() -> Result<()> {
    let mut scene = scene(&[])?;
    let mut moving = scene.stands_at(&scene.a, "source:Paused", &["--reconnect", "2"])?;
    let acknowledged = scene.witness.written();
    scene.on_a.take().expect("it runs").kill();
    assert!(!moving.wait()?.success());
    let outcome = scene.outcome(&scene.b)?;
    assert!(matches!(outcome, Outcome::Failed { .. }), "{outcome:?}");
    assert_eq!(scene.world.status(&scene.b, VM)?.phase, Phase::Empty);
    // No acknowledged write is missing on the disk that is left.
    let region = oracle::protocol::Range {
        dev: scene.world.path("a/root.raw").display().to_string(),
        offset: 32 << 20,
        len: 4 << 20,
    };
    let found = oracle::image::verify(&region, 4096, 7, acknowledged, |_| {})?;
    assert_eq!(found.lost, 0);
    let spec = guest::spec(VM, &scene.world.path("a/root.raw"), 64)?;
    scene.on_a = Some(scene.a.launch(VM, &spec, &[])?);
    scene.world.wait_running(&scene.a, VM)?;
    Ok(())
}

#[test]
fn a_cancelled_move_leaves_nothing_behind() -> Result<()> {
    let scene = scene(&[])?;
    let mut moving = scene.stands_at(&scene.a, "source:Converging", &[])?;
    scene.world.run(scene.a.client(VM).cancel())?;
    scene.world.run(scene.a.client(VM).release())?;
    assert!(!moving.wait()?.success());
    assert_eq!(scene.outcome(&scene.a)?, Outcome::Cancelled);
    scene.nothing_is_lost(&scene.a)?;
    scene.outcome(&scene.b)?;
    assert!(!scene.b.folder(VM).join("root.raw").exists(), "the target's disk is left over");
    scene.moved(&scene.a, &scene.b, &[])?;
    scene.nothing_is_lost(&scene.b)
}
