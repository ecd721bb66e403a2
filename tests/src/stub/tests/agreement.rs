//! One conversation with the stub and with QEMU 7.2: both answer alike.

use super::world::{Kind, LONG, Qemu, World};
use serde_json::{Value, json};
use std::path::Path;

/// What was said, line by line.
#[derive(Default)]
struct Minutes {
    lines: Vec<String>,
}

impl Minutes {
    fn say(&mut self, name: &str, qemu: &mut Qemu, command: &str, arguments: Value) -> Value {
        let answer = qemu.call(command, arguments.clone());
        let told = match answer.get("return") {
            Some(result) => format!("{:#?}", told(result)),
            None => answer["error"].to_string(),
        };
        self.lines.push(format!("{name}: {command} {arguments} -> {told}"));
        answer
    }

    fn note(&mut self, what: &str, value: impl std::fmt::Debug) {
        self.lines.push(format!("{what}: {value:?}"));
    }
}

/// What of a result both can agree on: not times and amounts.
fn told(result: &Value) -> Value {
    match result {
        Value::Object(members) => {
            let mut members = members.clone();
            for name in ["ram", "total-time", "setup-time", "expected-downtime", "downtime"] {
                if let Some(member) = members.get_mut(name) {
                    *member = "some".into();
                }
            }
            if let Some(Value::String(text)) = members.get_mut("error-desc")
                && text.starts_with("Unable to write to socket")
            {
                // A pipe is broken or reset, as it happens.
                "Unable to write to socket".clone_into(text);
            }
            members.into()
        }
        other => other.clone(),
    }
}

#[test]
fn the_stub_and_qemu_answer_alike() {
    for chapter in [bitmaps, exports, sizes_and_limits, refusals, a_move, failing_moves] {
        let mut minutes = [Minutes::default(), Minutes::default()];
        for (minutes, kind) in minutes.iter_mut().zip([Kind::Real, Kind::Stub]) {
            let world = World::new(kind);
            world.disk("a.raw", 64);
            world.disk("b.raw", 64);
            chapter(&world, minutes);
        }
        let [real, stub] = minutes;
        for (real, stub) in real.lines.iter().zip(&stub.lines) {
            assert_eq!(stub, real, "left is the stub, right is QEMU");
        }
        assert_eq!(real.lines.len(), stub.lines.len());
    }
}

fn write(qemu: &mut Qemu, offset: u64, len: u64) {
    let device = "/machine/peripheral/disk0-disk/virtio-backend";
    let line = format!("qemu-io -d {device} \"write {offset} {len}\"");
    let said = qemu.ok("human-monitor-command", json!({"command-line": line}));
    // QEMU writes to its own standard output.
    assert!(said == "" || said.as_str().is_some_and(|said| said.starts_with("wrote")), "{said}");
}

fn on(node: &str, name: &str) -> Value {
    json!({"node": node, "name": name})
}

fn add(name: &str) -> Value {
    json!({"node": "disk0-raw", "name": name, "granularity": 4096})
}

/// The bitmaps of all nodes, as they are shown.
fn shown(qemu: &mut Qemu) -> Vec<(Value, Value, Value)> {
    let nodes = qemu.ok("query-named-block-nodes", json!({"flat": true}));
    let one = |node: &Value| {
        let name = node["node-name"].clone();
        (name, node["image"]["virtual-size"].clone(), node["dirty-bitmaps"].clone())
    };
    nodes.as_array().unwrap().iter().map(one).collect()
}

/// What an export says of a bitmap, by the client that Godwit uses.
fn dirty(socket: &Path, export: &str, bitmap: &str) -> Vec<(u64, u64, u32)> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let context = nbd::dirty_bitmap(bitmap);
        let options = nbd::Options::new(export).context(&context).context(nbd::BASE_ALLOCATION);
        let client = nbd::Client::connect(socket, options, LONG).await.unwrap();
        let size = client.export().size;
        let extents = client.extents(&context, 0..size, 1000, LONG).await.unwrap();
        let all = client.extents(nbd::BASE_ALLOCATION, 0..size, 1000, LONG).await.unwrap();
        let data = client.read(1 << 20, vec![1; 8192], LONG).await.unwrap();
        client.disconnect(LONG).await.unwrap();
        let sum = data.buffer.iter().map(|byte| u64::from(*byte)).sum::<u64>();
        let mut told: Vec<_> = extents.iter().map(|e| (e.offset, e.len, e.flags)).collect();
        told.extend(all.iter().map(|e| (e.offset, e.len, e.flags)));
        told.push((0, sum, 0));
        told
    })
}

fn bitmaps(world: &World, m: &mut Minutes) {
    let a = &mut world.start("a", "a.raw", &[]);
    m.say("a", a, "block-dirty-bitmap-add", add("r1"));
    m.say("a", a, "cont", json!({}));
    write(a, 0, 512);
    write(a, (1 << 20) + 4096, 8192);
    write(a, (64 << 20) - 512, 512);
    let swap = json!({"actions": [
        {"type": "block-dirty-bitmap-add", "data": add("r2")},
        {"type": "block-dirty-bitmap-disable", "data": on("disk0-raw", "r1")},
    ]});
    m.say("a", a, "transaction", swap.clone());
    write(a, 8 << 20, 4096);
    m.note("after the swap", shown(a));
    // All or nothing.
    m.say("a", a, "transaction", swap);
    let undone = json!({"actions": [
        {"type": "block-dirty-bitmap-clear", "data": on("disk0-raw", "r2")},
        {"type": "block-dirty-bitmap-remove", "data": on("disk0-raw", "r1")},
        {"type": "block-dirty-bitmap-add", "data": add("r1")},
    ]});
    m.say("a", a, "transaction", undone);
    m.note("after two failures", shown(a));
    let merge =
        |target: &str, from: Value| json!({"node": "disk0-raw", "target": target, "bitmaps": from});
    m.say("a", a, "block-dirty-bitmap-merge", merge("r2", json!(["r1", "nope"])));
    m.say("a", a, "block-dirty-bitmap-merge", merge("r2", json!([on("disk0-raw", "r1")])));
    m.say("a", a, "block-dirty-bitmap-remove", on("disk0-raw", "r1"));
    let coarse = json!({"node": "disk0-raw", "name": "c", "disabled": true});
    m.say("a", a, "block-dirty-bitmap-add", coarse);
    m.say("a", a, "block-dirty-bitmap-merge", merge("c", json!(["r2"])));
    m.note("after the merges", shown(a));
    m.say("a", a, "block-dirty-bitmap-clear", on("disk0-raw", "r2"));
    m.say("a", a, "stop", json!({}));
    m.note("at the end", shown(a));
    m.note("events", a.until("STOP"));
}

fn exports(world: &World, m: &mut Minutes) {
    let a = &mut world.start("a", "a.raw", &[]);
    let export = |id: &str, node: &str, bitmap: &str, name: &str| json!({"type": "nbd", "id": id, "node-name": node, "bitmaps": [bitmap], "name": name});
    m.say("a", a, "block-dirty-bitmap-add", add("b"));
    m.say("a", a, "cont", json!({}));
    write(a, 1 << 20, 8192);
    m.say("a", a, "block-export-add", export("x", "disk0-raw", "b", "disk0"));
    let server = json!({"addr": {"type": "unix", "data": {"path": "a.nbd"}}, "max-connections": 1});
    m.say("a", a, "nbd-server-start", server.clone());
    m.say("a", a, "nbd-server-start", server);
    m.say("a", a, "block-export-add", export("x", "disk0-raw", "b", "disk0"));
    m.say("a", a, "block-dirty-bitmap-disable", on("disk0-raw", "b"));
    m.say("a", a, "block-export-add", export("x", "nope", "b", "disk0"));
    m.say("a", a, "block-export-add", export("x", "disk0-raw", "nope", "disk0"));
    m.say("a", a, "block-export-add", export("7", "disk0-raw", "b", "disk0"));
    // Found through the filter above its node.
    m.say("a", a, "block-export-add", export("x", "disk0", "b", "disk0"));
    m.say("a", a, "block-export-add", export("x", "disk0-raw", "b", "other"));
    m.say("a", a, "block-export-add", export("y", "disk0-raw", "b", "disk0"));
    m.note("bitmap", dirty(&world.path("a.nbd"), "disk0", "b"));
    m.note("bitmap once more", dirty(&world.path("a.nbd"), "disk0", "b"));
    for command in ["remove", "clear", "enable", "disable"] {
        m.say("a", a, &format!("block-dirty-bitmap-{command}"), on("disk0-raw", "b"));
    }
    m.say("a", a, "query-block-exports", json!({}));
    m.note("busy", shown(a));
    m.say("a", a, "block-export-del", json!({"id": "nope"}));
    m.say("a", a, "block-export-del", json!({"id": "x", "mode": "hard"}));
    m.note("events", a.until("BLOCK_EXPORT_DELETED"));
    m.say("a", a, "block-export-del", json!({"id": "x"}));
    m.say("a", a, "block-export-add", export("z", "disk0-raw", "b", "disk0"));
    m.say("a", a, "nbd-server-stop", json!({}));
    m.note("events", a.until("BLOCK_EXPORT_DELETED"));
    m.note("socket", world.path("a.nbd").exists());
    m.say("a", a, "nbd-server-stop", json!({}));
    m.say("a", a, "block-dirty-bitmap-remove", on("disk0-raw", "b"));
}

fn sizes_and_limits(world: &World, m: &mut Minutes) {
    let a = &mut world.start("a", "a.raw", &[]);
    let raw = |more: Value| {
        let mut node = json!({"driver": "raw", "node-name": "disk0-raw", "file": "disk0-file"});
        node.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        json!({ "options": [node] })
    };
    let resize = |node: &str, size: u64| json!({"node-name": node, "size": size});
    m.say("a", a, "block-dirty-bitmap-add", add("b"));
    m.say("a", a, "blockdev-reopen", raw(json!({"size": 32 << 20})));
    m.note("held", shown(a));
    m.say("a", a, "block_resize", resize("disk0", 64 << 20));
    m.say("a", a, "blockdev-reopen", raw(json!({"size": 65 << 20})));
    m.say("a", a, "blockdev-reopen", raw(json!({"node-name": "nope"})));
    m.say("a", a, "blockdev-reopen", raw(json!({"file": "nope"})));
    m.say("a", a, "blockdev-reopen", raw(json!({"colour": "red"})));
    m.say("a", a, "blockdev-reopen", raw(json!({})));
    m.note("let go", shown(a));
    m.say("a", a, "block_resize", resize("disk0", 96 << 20));
    m.say("a", a, "block_resize", resize("nope", 96 << 20));
    m.note("grown", shown(a));
    m.say("a", a, "cont", json!({}));
    write(a, (96 << 20) - 4096, 4096);
    m.note("written", shown(a));
    let set =
        |value: Value| json!({"path": "/objects/disk0-tg", "property": "limits", "value": value});
    let get = json!({"path": "/objects/disk0-tg", "property": "limits"});
    m.say("a", a, "qom-set", set(json!({"bps-write": 1_000_000})));
    m.say("a", a, "qom-set", set(json!({"bps-total": 5})));
    m.say("a", a, "qom-set", set(json!({"bps-write": -1})));
    m.say("a", a, "qom-set", set(json!({"colour": 1})));
    m.say("a", a, "qom-get", get.clone());
    m.say("a", a, "qom-set", set(json!({"bps-write": 0, "iops-write": 9})));
    m.say("a", a, "qom-get", get);
    m.say("a", a, "qom-get", json!({"path": "/objects/nope", "property": "limits"}));
}

fn refusals(world: &World, m: &mut Minutes) {
    let a = &mut world.start("a", "a.raw", &[]);
    m.say("a", a, "query-status", json!({}));
    m.say("a", a, "stop", json!({}));
    m.say("a", a, "query-status", json!({}));
    m.say("a", a, "fly", json!({}));
    m.say("a", a, "qmp_capabilities", json!({}));
    m.say("a", a, "migrate", json!({"uri": "carrier-pigeon:7"}));
    m.say("a", a, "query-migrate", json!({}));
    m.say("a", a, "migrate", json!({"uri": "unix:nobody"}));
    a.reach("failed");
    m.say("a", a, "query-migrate", json!({}));
    m.say("a", a, "migrate-incoming", json!({"uri": "unix:in"}));
    m.say("a", a, "migrate-continue", json!({"state": "pre-switchover"}));
    m.say("a", a, "migrate_cancel", json!({}));
    for bad in [
        json!({"multifd-channels": 0}),
        json!({"multifd-channels": 256}),
        json!({"downtime-limit": 2_000_001}),
        json!({"announce-rounds": 1001}),
        json!({"avail-switchover-bandwidth": 1}),
        json!({"max-bandwidth": "fast"}),
    ] {
        m.say("a", a, "migrate-set-parameters", bad);
    }
    m.say("a", a, "migrate-set-parameters", json!({"downtime-limit": 0, "max-bandwidth": 7}));
    m.say("a", a, "query-migrate-parameters", json!({}));
    m.say("a", a, "query-migrate-capabilities", json!({}));
    m.say("a", a, "query-dirty-rate", json!({}));
    m.say("a", a, "calc-dirty-rate", json!({"calc-time": 61}));
    m.say("a", a, "yank", json!({"instances": [{"type": "migration"}]}));
    // The image is taken, running or not.
    let mut second = world.spawn("second", "a.raw", &[]);
    let (code, words) = second.ended();
    m.note(
        "second",
        (
            code,
            words.contains(
                "Failed to get \"write\" lock\nIs another process using the image [a.raw]?",
            ),
        ),
    );
    let b = &mut world.start("b", "a.raw", &["-incoming", "defer"]);
    m.say("b", b, "query-status", json!({}));
    m.say("b", b, "cont", json!({}));
    m.say("b", b, "migrate", json!({"uri": "unix:in"}));
    b.quit();
    m.note("b ended", b.ended().0);
    check_schema(a, m);
}

/// What the crate `qmp` finds wrong with the schema: the same with both.
fn check_schema(qemu: &mut Qemu, m: &mut Minutes) {
    let schema = qemu.ok("query-qmp-schema", json!({}));
    let entries: Vec<qmp::schema::SchemaInfo> = serde_json::from_value(schema).unwrap();
    let schema = qmp::schema::Schema::from(entries);
    m.note("problems", qmp::schema::check_all(&schema));
}

const CAPABILITIES: [&str; 3] = ["pause-before-switchover", "late-block-activate", "events"];

/// Two ends that are ready for each other, the guest running.
fn pair(world: &World, more: &[&str]) -> (Qemu, Qemu) {
    let mut a = world.start("a", "a.raw", &[]);
    let mut b = world.start("b", "b.raw", &["-incoming", "defer"]);
    for end in [&mut a, &mut b] {
        end.enable(&CAPABILITIES);
        end.enable(more);
    }
    b.ok("migrate-incoming", json!({"uri": "unix:in"}));
    a.ok("cont", json!({}));
    (a, b)
}

fn a_move(world: &World, m: &mut Minutes) {
    for more in [&[][..], &["multifd"], &["return-path"]] {
        let (mut a, mut b) = pair(world, more);
        let (a, b) = (&mut a, &mut b);
        let state = json!({"state": "pre-switchover"});
        m.say("b", b, "migrate-incoming", json!({"uri": "unix:in"}));
        m.say("b", b, "query-migrate", json!({}));
        m.say("b", b, "block-dirty-bitmap-add", add("since"));
        m.say("a", a, "migrate", json!({"uri": "unix:in"}));
        m.say("a", a, "migrate", json!({"uri": "unix:in"}));
        a.reach("pre-switchover");
        m.say("a", a, "query-migrate", json!({}));
        m.say("a", a, "query-status", json!({}));
        m.say("a", a, "cont", json!({}));
        m.say("a", a, "stop", json!({}));
        m.say("a", a, "migrate-continue", json!({"state": "active"}));
        m.say("a", a, "migrate-set-capabilities", json!({"capabilities": []}));
        m.say("b", b, "query-migrate", json!({}));
        m.say("a", a, "migrate-continue", state);
        a.reach("completed");
        b.reach("completed");
        // QEMU says completed a moment before it is finalized.
        a.reach_state("postmigrate");
        m.say("a", a, "query-migrate", json!({}));
        m.say("b", b, "query-migrate", json!({}));
        m.say("b", b, "query-status", json!({}));
        m.say("a", a, "migrate", json!({"uri": "unix:in"}));
        m.say("b", b, "cont", json!({}));
        write(b, 4096, 4096);
        m.note("since", shown(b));
        m.note("a's events", a.until("completed"));
        m.note("b's events", b.until("RESUME"));
        // Each has its own disk here: the old one may go on.
        m.say("a", a, "cont", json!({}));
        m.say("a", a, "query-status", json!({}));
        m.note("a's events", a.until("RESUME"));
        b.kill();
        m.say("a", a, "migrate", json!({"uri": "unix:in"}));
        a.reach("failed");
        a.kill();
    }
}

fn failing_moves(world: &World, m: &mut Minutes) {
    let (mut a, mut b) = pair(world, &[]);
    let a = &mut a;
    // Cancelled before the switchover: the guest goes on here, the target ends.
    a.ok("migrate", json!({"uri": "unix:in"}));
    a.reach("pre-switchover");
    m.say("a", a, "migrate_cancel", json!({}));
    a.reach("cancelled");
    m.say("a", a, "query-status", json!({}));
    m.say("a", a, "query-migrate", json!({}));
    let mut events = a.until("cancelled");
    // QEMU's thread may get a step further before it sees that it is cancelled.
    events.retain(|event| !event.contains("device"));
    m.note("events", events);
    m.note("b ended", b.ended().0);
    // The target dies before the switchover: nobody notices until it goes on.
    b = world.start("b", "b.raw", &["-incoming", "defer"]);
    b.enable(&CAPABILITIES);
    b.ok("migrate-incoming", json!({"uri": "unix:in"}));
    a.ok("migrate", json!({"uri": "unix:in"}));
    a.reach("pre-switchover");
    b.kill();
    m.say("a", a, "query-migrate", json!({}));
    m.say("a", a, "migrate-continue", json!({"state": "pre-switchover"}));
    a.reach("failed");
    m.note("events", a.until("RESUME"));
    m.say("a", a, "query-migrate", json!({}));
    m.say("a", a, "query-status", json!({}));
    // It dies while the memory moves: the guest runs on.
    b = world.start("b", "b.raw", &["-incoming", "defer"]);
    b.enable(&CAPABILITIES);
    b.ok("migrate-incoming", json!({"uri": "unix:in"}));
    a.ok("migrate-set-parameters", json!({"max-bandwidth": 65536, "downtime-limit": 1}));
    a.ok("migrate", json!({"uri": "unix:in"}));
    a.reach("active");
    m.say("a", a, "migrate-continue", json!({"state": "pre-switchover"}));
    b.kill();
    a.reach("failed");
    m.say("a", a, "query-migrate", json!({}));
    m.say("a", a, "query-status", json!({}));
    m.note("events", a.until("failed"));
    // The source dies: the target ends.
    b = world.start("b", "b.raw", &["-incoming", "defer"]);
    b.enable(&CAPABILITIES);
    b.ok("migrate-incoming", json!({"uri": "unix:in"}));
    a.ok("migrate-set-parameters", json!({"max-bandwidth": 0}));
    a.ok("migrate", json!({"uri": "unix:in"}));
    a.reach("pre-switchover");
    a.kill();
    m.note("b ended", b.ended().0);
    // A guest that stood still stands still afterwards, at either end.
    let (mut a, mut b) = pair(world, &[]);
    m.say("a", &mut a, "stop", json!({}));
    a.ok("migrate", json!({"uri": "unix:in"}));
    a.reach("pre-switchover");
    m.say("a", &mut a, "migrate-continue", json!({"state": "pre-switchover"}));
    b.reach("completed");
    m.say("b", &mut b, "query-status", json!({}));
}
