//! What only the stub can do: moves with a guest that finds its own losses, and
//! the proof that two instances never run.

use super::world::{Kind, Line, Qemu, World};
use oracle::protocol::{Check, Range, Report};
use serde_json::{Value, json};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

const WRITE: &str = "write start dev=/dev/vda offset=1M len=2M seed=7 rate=500";

fn world() -> World {
    let mut world = World::new(Kind::Stub);
    let lock = world.path("run").to_string_lossy().into_owned();
    world.set("STUB_QEMU_RUN_LOCK", &lock);
    world.disk("a.raw", 16);
    world.disk("b.raw", 16);
    world
}

fn ready(qemu: &mut Qemu, more: &[&str]) {
    qemu.enable(&["pause-before-switchover", "late-block-activate", "events"]);
    qemu.enable(more);
}

fn check(line: &mut Line) -> Check {
    loop {
        match line.ask("check") {
            Report::Check(sums) => return sums,
            Report::LostWrite { .. } | Report::LostPage { .. } => {}
            other => panic!("{other}"),
        }
    }
}

/// Copies a range as the mover does: from file to file.
fn copy(world: &World, from: &str, to: &str, range: std::ops::Range<u64>) {
    let mut bytes = vec![0; (range.end - range.start) as usize];
    std::fs::File::open(world.path(from)).unwrap().read_exact_at(&mut bytes, range.start).unwrap();
    let to = std::fs::OpenOptions::new().write(true).open(world.path(to)).unwrap();
    to.write_all_at(&bytes, range.start).unwrap();
}

/// What a round's bitmap says, and a new one in its place.
fn swap(qemu: &mut Qemu, socket: &Path, old: &str, new: &str) -> Vec<(u64, u64)> {
    let on = |name: &str| json!({"node": "disk0-raw", "name": name, "granularity": 4096});
    let off = json!({"node": "disk0-raw", "name": old});
    let actions = json!([
        {"type": "block-dirty-bitmap-add", "data": on(new)},
        {"type": "block-dirty-bitmap-disable", "data": off},
    ]);
    qemu.ok("transaction", json!({ "actions": actions }));
    let name = socket.file_name().unwrap().to_str().unwrap();
    qemu.ok("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": name}}}));
    let export = json!({"type": "nbd", "id": "x", "node-name": "disk0-raw", "bitmaps": [old]});
    qemu.ok("block-export-add", export);
    let extents = read_bitmap(socket, old);
    qemu.ok("nbd-server-stop", json!({}));
    qemu.ok("block-dirty-bitmap-remove", off);
    extents
}

fn read_bitmap(socket: &Path, name: &str) -> Vec<(u64, u64)> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let context = nbd::dirty_bitmap(name);
        let options = nbd::Options::new("disk0-raw").context(&context);
        let client = nbd::Client::connect(socket, options, super::world::LONG).await.unwrap();
        let size = client.export().size;
        let extents = client.extents(&context, 0..size, 100_000, super::world::LONG).await.unwrap();
        let dirty = extents.iter().filter(|extent| extent.flags & nbd::DIRTY != 0);
        dirty.map(|extent| (extent.offset, extent.offset + extent.len)).collect()
    })
}

/// Moves a guest that writes, counts and ticks; the last delta only if `whole`.
/// The target, its line, and how many writes were acknowledged before.
fn moved(world: &World, more: &[&str], whole: bool) -> (Qemu, Line, u64) {
    let mut a = world.start("a", "a.raw", &[]);
    let mut b = world.start("b", "b.raw", &["-incoming", "defer"]);
    ready(&mut a, more);
    ready(&mut b, more);
    b.ok("migrate-incoming", json!({"uri": "unix:in"}));
    let mut line = a.line();
    a.ok("cont", json!({}));
    for command in ["tick start us=500", WRITE, "memory start mib=2", "dirty memory mib=1 mibps=4"]
    {
        assert!(matches!(line.ask(command), Report::Ok(_)), "{command}");
    }
    line.fresh(50);
    a.ok("block-dirty-bitmap-add", json!({"node": "disk0-raw", "name": "r0", "granularity": 4096}));
    copy(world, "a.raw", "b.raw", 0..16 << 20);
    let socket = world.path("nbd.sock");
    for round in 0..3 {
        line.fresh(20);
        let dirty = swap(&mut a, &socket, &format!("r{round}"), &format!("r{}", round + 1));
        assert!(!dirty.is_empty());
        dirty.into_iter().for_each(|(from, to)| copy(world, "a.raw", "b.raw", from..to));
    }
    line.fresh(20);
    a.ok("migrate", json!({"uri": "unix:in"}));
    let paused = a.reach("pre-switchover");
    assert!(paused["ram"]["normal"].as_u64() > Some(512), "{paused}");
    let last = swap(&mut a, &socket, "r3", "r4");
    if whole {
        last.into_iter().for_each(|(from, to)| copy(world, "a.raw", "b.raw", from..to));
    }
    let mut arrived = b.line();
    a.ok("migrate-continue", json!({"state": "pre-switchover"}));
    a.reach("completed");
    b.reach("completed");
    arrived.written = line.written;
    b.ok("cont", json!({}));
    (b, arrived, line.written)
}

#[test]
fn a_moved_guest_misses_nothing_and_a_lost_delta_is_found() {
    for more in [&[][..], &["multifd"]] {
        let world = world();
        let (mut b, mut line, before) = moved(&world, more, true);
        line.more(20);
        let sums = check(&mut line);
        assert!(sums.writes > before && sums.slots > 0 && sums.pages == 512, "{sums:?}");
        assert_eq!((sums.lost, sums.stale), (0, 0));
        assert!(line.ticks > 0);
        assert!(matches!(line.ask("write stop"), Report::Ok(_)));
        b.ok("stop", json!({}));
        let dev = world.path("b.raw").to_string_lossy().into_owned();
        let range = Range { dev, offset: 1 << 20, len: 2 << 20 };
        let found = oracle::image::verify(&range, 4096, 7, line.written, |_| {}).unwrap();
        assert_eq!((found.lost, found.newest >= line.written), (0, true));
        assert!(!world.path("run.violation").exists());
    }
    let world = world();
    let (_b, mut line, _) = moved(&world, &[], false);
    assert!(check(&mut line).lost > 0, "the last delta was not copied");
}

#[test]
fn two_instances_that_run_are_told_of() {
    let world = world();
    let (mut a, mut b) = (world.start("a", "a.raw", &[]), world.start("b", "b.raw", &[]));
    let told = world.path("run.violation");
    a.ok("cont", json!({}));
    a.ok("stop", json!({}));
    b.ok("cont", json!({}));
    assert!(!told.exists());
    a.ok("cont", json!({}));
    assert_eq!(std::fs::read_to_string(told).unwrap().lines().count(), 1);
}

#[test]
fn a_shared_disk_is_its_owners_until_the_switchover_and_cont_asks_for_it() {
    let world = world();
    let mut a = world.start("a", "a.raw", &[]);
    let mut b = world.start("b", "a.raw", &["-incoming", "defer"]);
    ready(&mut a, &[]);
    ready(&mut b, &[]);
    b.ok("migrate-incoming", json!({"uri": "unix:in"}));
    a.ok("cont", json!({}));
    assert_eq!(b.refusal("cont", json!({})), "Failed to get \"write\" lock");
    a.ok("migrate", json!({"uri": "unix:in"}));
    a.reach("pre-switchover");
    a.ok("migrate-continue", json!({"state": "pre-switchover"}));
    b.reach("completed");
    a.reach_state("postmigrate");
    a.ok("cont", json!({}));
    assert_eq!(b.refusal("cont", json!({})), "Failed to get \"write\" lock");
    assert_eq!(b.ok("query-status", json!({}))["status"], "paused");
    a.quit();
    assert_eq!(a.ended().0, Some(0));
    b.ok("cont", json!({}));
    assert!(!world.path("run.violation").exists());
}

#[test]
fn the_stuck_switchover_is_released_only_by_its_own_state() {
    let mut world = world();
    world.set("STUB_QEMU_MULTIFD_STUCK", "1");
    let mut a = world.start("a", "a.raw", &[]);
    let mut b = world.start("b", "b.raw", &["-incoming", "defer"]);
    ready(&mut a, &["multifd"]);
    ready(&mut b, &["multifd"]);
    b.ok("migrate-incoming", json!({"uri": "unix:in"}));
    a.ok("cont", json!({}));
    a.ok("migrate", json!({"uri": "unix:in"}));
    a.reach("pre-switchover");
    b.kill();
    a.reach("failed");
    a.ok("migrate_cancel", json!({}));
    assert_eq!(a.ok("query-status", json!({}))["status"], "finish-migrate");
    assert_eq!(a.refusal("cont", json!({})), "Migration is not finalized yet");
    let state = |state: &str| json!({ "state": state });
    let refused = a.refusal("migrate-continue", state("pre-switchover"));
    assert_eq!(refused, "Migration not in expected state: failed");
    a.ok("migrate-continue", state("failed"));
    a.reach_state("running");
    // Once more, and this time a new attempt makes it worse, as in QEMU.
    b = world.start("b", "b.raw", &["-incoming", "defer"]);
    ready(&mut b, &["multifd"]);
    b.ok("migrate-incoming", json!({"uri": "unix:in"}));
    a.ok("migrate", json!({"uri": "unix:in"}));
    a.reach("pre-switchover");
    b.kill();
    a.reach("failed");
    assert_eq!(a.refusal("migrate", json!({"uri": "unix:in"})), "duplicate yank instance");
    let refused = a.refusal("migrate-continue", state("failed"));
    assert_eq!(refused, "Migration not in expected state: setup");
}

#[test]
fn a_limit_slows_the_guests_writes_and_its_end_is_felt_at_once() {
    let world = world();
    let mut a = world.start("a", "a.raw", &[]);
    let mut line = a.line();
    a.ok("cont", json!({}));
    let limit = |bytes: u64| {
        let value: Value = json!({ "bps-write": bytes });
        json!({"path": "/objects/disk0-tg", "property": "limits", "value": value})
    };
    a.ok("qom-set", limit(10 * 4096));
    assert!(matches!(line.ask(WRITE), Report::Ok(_)));
    let begin = Instant::now();
    line.more(5);
    let most = begin.elapsed().as_secs_f64() * 10.0 + 3.0;
    assert!(line.written as f64 <= most, "{} writes, {most} allowed", line.written);
    // One write in an hour; then none is held back.
    a.ok("qom-set", limit(1));
    a.ok("qom-set", limit(0));
    line.more(200);
}

#[test]
fn a_guest_shuts_itself_down_and_its_process_ends() {
    let world = world();
    let mut a = world.start("a", "a.raw", &[]);
    a.ok("cont", json!({}));
    a.ok("system_powerdown", json!({}));
    assert_eq!(a.ended().0, Some(0));
    let mut b = world.start("b", "b.raw", &["-no-shutdown"]);
    b.ok("system_powerdown", json!({}));
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(b.ok("query-status", json!({}))["status"], "prelaunch", "it does not run");
    b.ok("cont", json!({}));
    let events = b.until("STOP");
    assert!(events.iter().any(|event| event.contains("guest-shutdown")), "{events:?}");
    assert_eq!(b.refusal("cont", json!({})), "Resetting the Virtual Machine is required");
}
