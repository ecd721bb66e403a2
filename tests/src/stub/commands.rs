//! The commands. Their arguments have been checked against the schema.

use super::chardev;
use super::error::Error;
use super::export;
use super::guest;
use super::lock;
use super::machine::{Machine, Qemu, RunState};
use super::migration::{self, Status, source, target};
use super::qmp;
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// A command's arguments.
#[derive(Clone, Copy)]
pub struct Arguments<'a>(pub &'a Map<String, Value>);

impl Arguments<'_> {
    /// A string; empty when it is not given.
    pub fn text(&self, key: &str) -> &str {
        self.0.get(key).and_then(Value::as_str).unwrap_or_default()
    }

    /// A flag; false when it is not given.
    pub fn flag(&self, key: &str) -> bool {
        self.0.get(key).and_then(Value::as_bool).unwrap_or(false)
    }

    /// A list; empty when it is not given.
    pub fn list(&self, key: &str) -> &[Value] {
        self.0.get(key).and_then(Value::as_array).map_or(&[], Vec::as_slice)
    }
}

type Answer = Result<Value, Error>;

/// Runs one command.
///
/// # Errors
/// As QEMU.
pub fn execute(qemu: &Arc<Qemu>, name: &str, arguments: &Map<String, Value>) -> Answer {
    qemu.schema.check(name, arguments)?;
    let machine = &mut *qemu.lock();
    let args = Arguments(arguments);
    match name {
        "qmp_capabilities" => {
            Err(Error::command("Capabilities negotiation is already complete, command ignored"))
        }
        "stop" | "cont" | "system_powerdown" | "quit" => power(qemu, machine, name),
        "migrate"
        | "migrate-incoming"
        | "migrate_cancel"
        | "migrate-continue"
        | "migrate-set-capabilities"
        | "query-migrate-capabilities"
        | "migrate-set-parameters"
        | "query-migrate-parameters"
        | "query-migrate" => migrate(qemu, machine, name, args),
        "calc-dirty-rate" => {
            let seconds = args.0["calc-time"].as_i64().unwrap_or_default();
            if !(1..=60).contains(&seconds) {
                return Err(Error::generic("calc-time is out of range[1, 60].".to_owned()));
            }
            machine.counted = Some(seconds);
            done()
        }
        // A guest of the stub's is not watched: it dirties nothing, at once.
        "query-dirty-rate" => Ok(match machine.counted {
            Some(seconds) => json!({
                "dirty-rate": 0, "status": "measured", "start-time": 0, "calc-time": seconds,
                "sample-pages": 512, "mode": "page-sampling",
            }),
            None => json!({
                "status": "unstarted", "start-time": 0, "calc-time": 0, "sample-pages": 0,
                "mode": "page-sampling",
            }),
        }),
        "announce-self" => done(),
        "yank" | "query-yank" => yank(qemu, name, args),
        "transaction" => lock(&qemu.graph).transaction(args.list("actions")).and_then(|()| done()),
        "nbd-server-start" => export::start_server(qemu, args),
        "nbd-server-stop" => export::stop_server(qemu),
        "block-export-add" => export::add(qemu, args),
        "block-export-del" => export::delete(qemu, machine, args),
        "query-block-exports" => Ok(lock(&qemu.exports).query()),
        "query-named-block-nodes" => Ok(lock(&qemu.graph).query_nodes(args.flag("flat"))),
        "query-block" => Ok(lock(&qemu.graph).query_block()),
        "query-blockstats" => Ok(lock(&qemu.graph).query_stats(args.flag("query-nodes"))),
        "query-block-jobs" => Ok(json!([])),
        "blockdev-reopen" => {
            let nodes: Vec<_> =
                args.list("options").iter().filter_map(|o| o.as_object().cloned()).collect();
            lock(&qemu.graph).reopen(&nodes)?;
            done()
        }
        "block_resize" => resize(qemu, args),
        "qom-get" | "qom-set" => qom(qemu, name, args),
        "human-monitor-command" => Ok(human(qemu, args.text("command-line")).into()),
        _ if name.starts_with("block-dirty-bitmap-") => {
            lock(&qemu.graph).bitmap_command(name, arguments)?;
            done()
        }
        _ => query(qemu, machine, name),
    }
}

/// Runs one command without the big lock.
///
/// # Errors
/// As QEMU.
pub fn out_of_band(qemu: &Qemu, name: &str, arguments: &Map<String, Value>) -> Answer {
    qemu.schema.check(name, arguments)?;
    match name {
        "yank" => yank(qemu, name, Arguments(arguments)),
        _ => Err(Error::generic(format!("The command {name} does not support OOB"))),
    }
}

pub fn done() -> Answer {
    Ok(json!({}))
}

fn power(qemu: &Qemu, machine: &mut Machine, name: &str) -> Answer {
    match name {
        "cont" => qemu.cont(machine)?,
        "stop" if machine.state == RunState::Inmigrate => machine.autostart = false,
        "stop" => qemu.stop(machine, RunState::Paused),
        "quit" => machine.bottom_halves.push(Box::new(|qemu| qemu.end(0))),
        _ => {
            qemu.monitors.event("POWERDOWN", None);
            // N.B. after the answer: this guest is faster than any real one.
            let press = |qemu: &Qemu| qemu.guest.post(guest::Guest::press_power);
            machine.bottom_halves.push(Box::new(press));
        }
    }
    if name == "quit" {
        let data = json!({"guest": false, "reason": "host-qmp-quit"});
        qemu.monitors.event("SHUTDOWN", Some(data));
    }
    done()
}

fn migrate(qemu: &Arc<Qemu>, machine: &mut Machine, name: &str, args: Arguments<'_>) -> Answer {
    match name {
        "migrate" => source::begin(qemu, machine, args.text("uri"))?,
        "migrate-incoming" => target::begin(qemu, machine, args.text("uri"))?,
        "migrate_cancel" => source::cancel(qemu, machine),
        "migrate-continue" => {
            let now = machine.migration.status;
            if args.text("state") != now.name() {
                let text = format!("Migration not in expected state: {}", now.name());
                return Err(Error::generic(text));
            }
            if now == Status::Cancelling && machine.state == RunState::FinishMigrate {
                // Tried: QEMU 7.2 dies when the stuck switchover is released into this status.
                std::process::abort();
            }
            machine.migration.release();
            qemu.wake();
        }
        "migrate-set-capabilities" => {
            machine.migration.set_capabilities(args.list("capabilities"))?
        }
        "query-migrate-capabilities" => return Ok(machine.migration.capabilities()),
        "migrate-set-parameters" => {
            machine.migration.set_parameters(args.0)?;
            qemu.wake();
        }
        "query-migrate-parameters" => return Ok(machine.migration.parameters()),
        _ => return Ok(migration::query(machine)),
    }
    done()
}

fn yank(qemu: &Qemu, name: &str, args: Arguments<'_>) -> Answer {
    if name == "query-yank" {
        let migration = qemu.streams.is_open().then(|| json!({"type": "migration"}));
        return Ok(migration.into_iter().collect());
    }
    for instance in args.list("instances") {
        if instance["type"] != "migration" || !qemu.streams.is_open() {
            return Err(Error::device("Instance not found"));
        }
    }
    qemu.streams.cut();
    done()
}

fn resize(qemu: &Qemu, args: Arguments<'_>) -> Answer {
    let node = args.text("node-name");
    let mut graph = lock(&qemu.graph);
    graph.find_node(node)?;
    let Some(size) = args.0.get("size").and_then(Value::as_u64) else {
        return Err(Error::generic("Parameter 'size' expects a >0 size"));
    };
    graph.resize(node, size)?;
    done()
}

fn qom(qemu: &Qemu, name: &str, args: Arguments<'_>) -> Answer {
    let (path, property) = (args.text("path"), args.text("property"));
    let mut graph = lock(&qemu.graph);
    let Some(group) = graph.group(path.strip_prefix("/objects/").unwrap_or(path)) else {
        return Err(Error::device(format!("Device '{path}' not found")));
    };
    match (name, property) {
        ("qom-get", "limits") => Ok(group.limits()),
        ("qom-get", "type") => Ok("throttle-group".into()),
        ("qom-set", "limits") => {
            group.set(args.0.get("value").unwrap_or(&Value::Null))?;
            // The guest has a date with the old limits.
            qemu.guest.post(|guest| guest.hurry());
            done()
        }
        ("qom-set", p) if p.starts_with("x-") => {
            Err(Error::generic("Property cannot be set after initialization"))
        }
        (_, property) => {
            Err(Error::generic(format!("Property 'throttle-group.{property}' not found")))
        }
    }
}

/// `qemu-io -d DEVICE "write OFFSET LENGTH"`: a write by the guest's device, for
/// tests that run with QEMU too.
fn human(qemu: &Qemu, line: &str) -> String {
    let words: Vec<&str> = line.split([' ', '"']).filter(|word| !word.is_empty()).collect();
    let ["qemu-io", "-d", device, "write", offset, len] = words[..] else {
        return format!("unknown command: '{}'\r\n", words.first().unwrap_or(&""));
    };
    let mut graph = lock(&qemu.graph);
    let (Ok(offset), Ok(len)) = (offset.parse::<u64>(), len.parse::<usize>()) else {
        return "Error: bytes only\r\n".into();
    };
    match graph.disk_of_device(device) {
        None => format!("Error: Device '{device}' not found\r\n"),
        Some(disk) => match graph.write(disk, offset, &vec![0xcd; len]) {
            Ok(()) => format!("wrote {len}/{len} bytes at offset {offset}\r\n"),
            Err(error) => format!("write failed: {error}\r\n"),
        },
    }
}

fn query(qemu: &Qemu, machine: &Machine, name: &str) -> Answer {
    let machine_type = |name: &str, alias: &str| {
        json!({
            "name": name, "alias": alias, "cpu-max": 255, "hotpluggable-cpus": true,
            "numa-mem-supported": false, "deprecated": false, "default-ram-id": "pc.ram",
            "default-cpu-type": "qemu64-x86_64-cpu",
        })
    };
    let cpu = |index: u64| {
        json!({
            "cpu-index": index, "qom-path": format!("/machine/unattached/device[{index}]"),
            "thread-id": std::process::id(), "target": "x86_64",
            "props": {"core-id": index, "thread-id": 0, "socket-id": 0},
        })
    };
    let model = |name: &str| {
        json!({
            "name": name, "typename": format!("{name}-x86_64-cpu"), "static": false,
            "migration-safe": name != "max", "unavailable-features": [], "deprecated": false,
        })
    };
    Ok(match name {
        "query-status" => Qemu::status(machine),
        "query-version" => qmp::version(),
        "query-qmp-schema" => qemu.schema.entries(),
        "query-kvm" => json!({"enabled": false, "present": false}),
        "query-name" => json!({}),
        "query-uuid" => json!({"UUID": "00000000-0000-0000-0000-000000000000"}),
        "query-cpus-fast" => (0..qemu.cpus).map(cpu).collect(),
        "query-machines" => {
            json!([machine_type("pc-i440fx-7.2", "pc"), machine_type("pc-q35-7.2", "q35")])
        }
        "query-cpu-definitions" => ["qemu64", "max"].map(model).into_iter().collect(),
        "query-cpu-model-expansion" => json!({"model": {"name": "qemu64", "props": {}}}),
        "query-chardev" => qemu
            .chardevs
            .iter()
            .map(|(label, filename)| {
                json!({"label": label, "filename": filename, "frontend-open": true})
            })
            .collect(),
        other => return Err(Error::generic(format!("The stub does not do '{other}'"))),
    })
}

/// How `query-chardev` names what a chardev leads to.
pub fn describe(backend: &chardev::Backend) -> String {
    match backend {
        chardev::Backend::Null => "null".into(),
        chardev::Backend::Listen(path) => format!("unix:{path},server=on"),
        chardev::Backend::Connect(path) => format!("unix:{path}"),
        chardev::Backend::File(path) => format!("file:{path}"),
    }
}
