//! The client against a real QEMU.

mod common;

use std::{path::PathBuf, time::Duration};

use common::{LONG, Qemu};
use qmp::{
    Client, Closed, Error, ErrorClass, Events, Typed,
    commands::*,
    connect,
    event::{self, ShutdownCause},
};
use serde_json::json;

const NO_MACHINE: &[&str] = &["-machine", "none"];
/// A machine that can run, and waits with nothing to run.
const PC: &[&str] = &["-machine", "q35", "-accel", "tcg", "-m", "16"];
const BRIEF: Duration = Duration::from_millis(50);

/// The next event that `wanted` finds something in.
async fn event<T>(events: &mut Events, mut wanted: impl FnMut(&Typed) -> Option<T>) -> T {
    let find = async {
        loop {
            let event = events.next().await.unwrap();
            if let Some(found) = wanted(&event.typed().unwrap()) {
                return found;
            }
        }
    };
    tokio::time::timeout(LONG, find).await.expect("the event comes")
}

#[tokio::test]
async fn a_client_is_ready_once_connected() {
    let qemu = Qemu::start(NO_MACHINE);
    let client = qemu.client().await;

    let status = client.execute(QueryStatus, LONG).await.unwrap();
    assert!(!status.running);
    assert_eq!(status.status, RunState::Prelaunch);
    let version = client.execute(QueryVersion, LONG).await.unwrap();
    assert_eq!(&version, client.version());
    assert!(version.qemu.major >= 7);
    assert!(client.out_of_band());
    client.execute_out_of_band(Yank { instances: vec![] }, LONG).await.unwrap();
}

#[tokio::test]
async fn a_socket_path_may_have_any_length() {
    let below: PathBuf = std::iter::repeat_n("a-folder-with-a-long-name", 10).collect();
    let qemu = Qemu::start_below(&below, NO_MACHINE);
    assert!(qemu.socket.as_os_str().len() > 200);

    let client = qemu.client().await;
    client.execute(QueryStatus, LONG).await.unwrap();
}

#[tokio::test]
async fn a_missing_or_taken_socket_is_said() {
    let nowhere = Client::connect("/nowhere/qmp.sock", BRIEF).await.unwrap_err();
    assert!(matches!(nowhere, connect::Error::Socket { .. }), "{nowhere:?}");
    assert!(nowhere.to_string().contains("/nowhere/qmp.sock"));

    let qemu = Qemu::start(NO_MACHINE);
    let _first = qemu.client().await;
    let second = Client::connect(&qemu.socket, BRIEF).await.unwrap_err();
    assert!(matches!(second, connect::Error::NoGreeting { .. }), "{second:?}");
}

#[tokio::test]
async fn each_subscriber_sees_each_event_in_order() {
    let qemu = Qemu::start(PC);
    let client = qemu.client().await;
    let subscribers = [client.events(), client.events()];

    client.execute(Cont, LONG).await.unwrap();
    client.execute(Stop, LONG).await.unwrap();
    client.execute(SystemReset, LONG).await.unwrap();
    client.execute(SystemPowerdown, LONG).await.unwrap();

    for mut events in subscribers {
        event(&mut events, |e| (*e == Typed::Resume).then_some(())).await;
        event(&mut events, |e| (*e == Typed::Stop).then_some(())).await;
        let reset = event(&mut events, |e| match e {
            Typed::Reset(reset) => Some(reset.clone()),
            _ => None,
        });
        assert_eq!(reset.await.reason, ShutdownCause::HostQmpSystemReset);
        event(&mut events, |e| (*e == Typed::Powerdown).then_some(())).await;
    }
}

#[tokio::test]
async fn a_refusal_keeps_class_and_text_and_names_command_and_socket() {
    let qemu = Qemu::start(NO_MACHINE);
    let client = qemu.client().await;

    let error = client.execute(DeviceDel { id: "ghost".into() }, LONG).await.unwrap_err();

    assert_eq!(error.class(), Some(&ErrorClass::DeviceNotFound));
    assert!(!error.is_outcome_unknown());
    let text = error.to_string();
    for part in ["device_del", "ghost", "qmp.sock"] {
        assert!(text.contains(part), "{text}");
    }
}

#[tokio::test]
async fn a_late_reply_is_dropped_and_the_connection_lives_on() {
    let qemu = Qemu::start(NO_MACHINE);
    let client = qemu.client().await;

    qemu.signal("STOP");
    let late = client.execute(QueryVersion, BRIEF).await.unwrap_err();
    assert!(matches!(late, Error::Deadline { command: "query-version", .. }), "{late:?}");
    assert!(late.is_outcome_unknown());
    let dropped = tokio::time::timeout(BRIEF, client.execute(QueryMachines, LONG)).await;
    assert!(dropped.is_err());
    qemu.signal("CONT");

    let status = client.execute(QueryStatus, LONG).await.unwrap();
    assert_eq!(status.status, RunState::Prelaunch);
}

#[tokio::test]
async fn the_end_of_qemu_reaches_waiters_subscribers_and_handles() {
    let qemu = Qemu::start(NO_MACHINE);
    let client = qemu.client().await;
    let mut events = client.events();

    qemu.signal("STOP");
    let waiting = tokio::spawn({
        let client = client.clone();
        async move { client.execute(QueryStatus, LONG).await }
    });
    let closed = tokio::spawn({
        let client = client.clone();
        async move { client.closed().await }
    });
    let subscribed = tokio::spawn(async move { events.next().await });
    tokio::task::yield_now().await;
    drop(qemu);

    let waiting = waiting.await.unwrap().unwrap_err();
    assert!(matches!(waiting, Error::Closed { command: "query-status", .. }), "{waiting:?}");
    // A socket closed with data unread is reset: both ends are right.
    assert!(matches!(closed.await.unwrap(), Closed::Eof | Closed::Io(_)));
    assert!(matches!(subscribed.await.unwrap(), Err(event::Error::Closed(_))));
    let later = client.execute(QueryStatus, LONG).await.unwrap_err();
    assert!(matches!(later, Error::Closed { .. }));
    assert!(matches!(client.events().next().await, Err(event::Error::Closed(_))));
}

#[tokio::test]
async fn the_last_events_come_before_the_end() {
    let qemu = Qemu::start(NO_MACHINE);
    let client = qemu.client().await;
    let mut events = client.events();

    client.execute(Quit, LONG).await.unwrap();
    client.closed().await;

    let shutdown = event(&mut events, |e| match e {
        Typed::Shutdown(shutdown) => Some(shutdown.clone()),
        _ => None,
    });
    assert_eq!(shutdown.await.reason, ShutdownCause::HostQmpQuit);
    assert!(matches!(events.next().await, Err(event::Error::Closed(_))));
}

#[tokio::test]
async fn a_machine_describes_itself() {
    let mut arguments = PC.to_vec();
    arguments.extend([
        "-chardev",
        "null,id=console",
        "-smp",
        "2",
        "-device",
        "virtio-blk-pci,id=disk,drive=node",
    ]);
    arguments.extend(["-blockdev", "driver=null-co,node-name=node,size=1048576,read-zeroes=on"]);
    let qemu = Qemu::start(&arguments);
    let client = qemu.client().await;

    assert!(!client.execute(QueryKvm, LONG).await.unwrap().enabled);
    let machines = client.execute(QueryMachines, LONG).await.unwrap();
    assert!(machines.iter().any(|machine| machine.alias.as_deref() == Some("q35")));
    let cpus = client.execute(QueryCpuDefinitions, LONG).await.unwrap();
    assert!(cpus.iter().any(|cpu| cpu.name == "qemu64"));
    let model = CpuModel { name: "qemu64".into(), props: None };
    let expand = QueryCpuModelExpansion { r#type: CpuModelExpansionType::Full, model };
    let expanded = client.execute(expand, LONG).await.unwrap();
    assert_eq!(expanded.model.props.unwrap()["sse2"], true);
    assert_eq!(client.execute(QueryCpusFast, LONG).await.unwrap().len(), 2);
    let chardevs = client.execute(QueryChardev, LONG).await.unwrap();
    assert!(chardevs.iter().any(|chardev| chardev.label == "console"));

    let disks = client.execute(QueryBlock, LONG).await.unwrap();
    let inserted = disks[0].inserted.as_ref().unwrap();
    assert_eq!(inserted.node_name.as_deref(), Some("node"));
    assert_eq!(inserted.image.virtual_size, 1 << 20);
    let nodes = client.execute(QueryBlockstats { query_nodes: Some(true) }, LONG).await.unwrap();
    assert_eq!(nodes[0].stats.wr_bytes, 0);
    let text = HumanMonitorCommand { command_line: "info block".into() };
    assert!(client.execute(text, LONG).await.unwrap().contains("node"));

    let limits = json!({"qom-type": "throttle-group", "id": "limits"});
    client.execute(ObjectAdd(limits), LONG).await.unwrap();
    let (path, property) = ("/objects/limits".to_owned(), "limits".to_owned());
    let value = json!({"bps-write": 4096});
    let set = QomSet { path: path.clone(), property: property.clone(), value };
    client.execute(set, LONG).await.unwrap();
    let limits = client.execute(QomGet { path, property }, LONG).await.unwrap();
    assert_eq!(limits["bps-write"], 4096);
    client.execute(ObjectDel { id: "limits".into() }, LONG).await.unwrap();
}

async fn bitmap(client: &Client, name: &str) -> Option<DirtyBitmap> {
    let nodes = client.execute(QueryNamedBlockNodes { flat: Some(true) }, LONG).await.unwrap();
    let node = nodes.into_iter().find(|node| node.node_name.as_deref() == Some("disk")).unwrap();
    node.dirty_bitmaps.into_iter().find(|bitmap| bitmap.name.as_deref() == Some(name))
}

#[tokio::test]
async fn a_transaction_swaps_the_recording_bitmap_and_an_export_keeps_it_busy() {
    let qemu = Qemu::start(NO_MACHINE);
    let client = qemu.client().await;
    let mut events = client.events();
    let node = || "disk".to_owned();
    let image = json!({"driver": "null-co", "node-name": "disk", "size": 1 << 20});
    client.execute(BlockdevAdd(image), LONG).await.unwrap();
    let add = |name: &str| BlockDirtyBitmapAdd {
        node: node(),
        name: name.into(),
        granularity: Some(4096),
        ..Default::default()
    };
    client.execute(add("round-1"), LONG).await.unwrap();

    let disable = BlockDirtyBitmapDisable { node: node(), name: "round-1".into() };
    let actions = vec![add("round-2").into(), disable.into()];
    client.execute(Transaction { actions }, LONG).await.unwrap();
    assert!(!bitmap(&client, "round-1").await.unwrap().recording);
    assert!(bitmap(&client, "round-2").await.unwrap().recording);

    let listen = NbdAddress::Unix { path: "nbd.sock".into() };
    client.execute(NbdServerStart { addr: listen, max_connections: None }, LONG).await.unwrap();
    let export = BlockExportAdd {
        id: "export".into(),
        node_name: node(),
        bitmaps: Some(vec!["round-1".into()]),
        ..Default::default()
    };
    client.execute(export, LONG).await.unwrap();
    assert_eq!(client.execute(QueryBlockExports, LONG).await.unwrap()[0].id, "export");
    assert!(bitmap(&client, "round-1").await.unwrap().busy);
    let delete = BlockExportDel { id: "export".into(), mode: Some(ExportRemoveMode::Hard) };
    client.execute(delete, LONG).await.unwrap();
    event(&mut events, |e| matches!(e, Typed::BlockExportDeleted(_)).then_some(())).await;
    client.execute(NbdServerStop, LONG).await.unwrap();

    let merge = BlockDirtyBitmapMerge {
        node: node(),
        target: "round-2".into(),
        bitmaps: vec!["round-1".into()],
    };
    client.execute(merge, LONG).await.unwrap();
    let remove = BlockDirtyBitmapRemove { node: node(), name: "round-1".into() };
    client.execute(remove, LONG).await.unwrap();
    assert!(bitmap(&client, "round-1").await.is_none());
}

#[tokio::test]
async fn a_disk_held_at_a_size_grows_after_a_reopen_without_it() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("disk.raw");
    std::fs::File::create(&file).unwrap().set_len(4 << 20).unwrap();
    let qemu = Qemu::start(NO_MACHINE);
    let client = qemu.client().await;
    let file = json!({"driver": "file", "filename": file, "node-name": "file"});
    client.execute(BlockdevAdd(file), LONG).await.unwrap();
    let held = json!({"driver": "raw", "file": "file", "node-name": "disk", "size": 2 << 20});
    client.execute(BlockdevAdd(held), LONG).await.unwrap();
    let grow = BlockResize { size: 4 << 20, node_name: Some("disk".into()), ..Default::default() };

    client.execute(&grow, LONG).await.unwrap_err();
    let free = json!({"driver": "raw", "file": "file", "node-name": "disk"});
    client.execute(BlockdevReopen { options: vec![free] }, LONG).await.unwrap();
    client.execute(&grow, LONG).await.unwrap();

    let nodes = client.execute(QueryNamedBlockNodes { flat: Some(true) }, LONG).await.unwrap();
    let disk = nodes.iter().find(|node| node.node_name.as_deref() == Some("disk")).unwrap();
    assert_eq!(disk.image.virtual_size, 4 << 20);
    client.execute(BlockdevDel { node_name: "disk".into() }, LONG).await.unwrap();
}

#[tokio::test]
async fn a_mirror_job_is_seen_from_begin_to_end() {
    let qemu = Qemu::start(NO_MACHINE);
    let client = qemu.client().await;
    let mut events = client.events();
    for name in ["from", "to"] {
        let node = json!({"driver": "null-co", "node-name": name, "size": 1 << 20});
        client.execute(BlockdevAdd(node), LONG).await.unwrap();
    }
    let mirror = BlockdevMirror {
        job_id: "copy".into(),
        device: "from".into(),
        target: "to".into(),
        ..Default::default()
    };
    client.execute(mirror, LONG).await.unwrap();
    event(&mut events, |e| matches!(e, Typed::BlockJobReady(_)).then_some(())).await;
    let job = &client.execute(QueryBlockJobs, LONG).await.unwrap()[0];
    assert!(job.ready && job.status == JobStatus::Ready, "{job:?}");
    client.execute(BlockJobCancel { device: "copy".into(), force: None }, LONG).await.unwrap();
    let done = event(&mut events, |e| match e {
        Typed::BlockJobCompleted(job) => Some(job.clone()),
        _ => None,
    });
    assert_eq!(done.await.error, None);
}

/// Turns on what a move needs.
async fn prepare(client: &Client) {
    let capabilities = [
        MigrationCapability::Events,
        MigrationCapability::PauseBeforeSwitchover,
        MigrationCapability::LateBlockActivate,
    ]
    .map(|capability| MigrationCapabilityStatus { capability, state: true })
    .into();
    client.execute(MigrateSetCapabilities { capabilities }, LONG).await.unwrap();
    let quiet = MigrationParameters { announce_rounds: Some(0), ..Default::default() };
    client.execute(MigrateSetParameters(quiet), LONG).await.unwrap();
    let parameters = client.execute(QueryMigrateParameters, LONG).await.unwrap();
    assert_eq!(parameters.announce_rounds, Some(0));
    let capabilities = client.execute(QueryMigrateCapabilities, LONG).await.unwrap();
    assert!(capabilities.iter().any(|c| c.capability == MigrationCapability::Events && c.state));
}

async fn reach(events: &mut Events, status: MigrationStatus) {
    event(events, |e| match e {
        Typed::Migration(migration) => (migration.status == status).then_some(()),
        _ => None,
    })
    .await;
}

#[tokio::test]
async fn a_migration_waits_before_the_switchover_can_be_cancelled_and_done_again() {
    let folder = tempfile::tempdir().unwrap();
    let uri = format!("unix:{}", folder.path().join("in.sock").display());
    let mut incoming = PC.to_vec();
    incoming.extend(["-incoming", "defer"]);
    let (source, target) = (Qemu::start(PC), Qemu::start(&incoming));
    let (from, to) = (source.client().await, target.client().await);
    let (mut leaving, mut arriving) = (from.events(), to.events());
    prepare(&from).await;
    prepare(&to).await;
    from.execute(Cont, LONG).await.unwrap();

    // Into a pipe that nobody minds, and back.
    from.execute(Migrate { uri: "exec:cat >/dev/null".into() }, LONG).await.unwrap();
    reach(&mut leaving, MigrationStatus::PreSwitchover).await;
    assert!(!from.execute(QueryStatus, LONG).await.unwrap().running);
    from.execute(MigrateCancel, LONG).await.unwrap();
    let (mut cancelled, mut resumed) = (false, false);
    event(&mut leaving, |e| {
        cancelled |= matches!(e, Typed::Migration(m) if m.status == MigrationStatus::Cancelled);
        resumed |= *e == Typed::Resume;
        (cancelled && resumed).then_some(())
    })
    .await;

    to.execute(MigrateIncoming { uri: uri.clone() }, LONG).await.unwrap();
    from.execute(Migrate { uri }, LONG).await.unwrap();
    reach(&mut leaving, MigrationStatus::PreSwitchover).await;
    let info = from.execute(QueryMigrate, LONG).await.unwrap();
    assert_eq!(info.status, Some(MigrationStatus::PreSwitchover));
    let ram = info.ram.unwrap();
    assert_eq!(ram.page_size, 4096);
    assert!(ram.total >= 16 << 20 && ram.transferred > 0);
    let go_on = MigrateContinue { state: MigrationStatus::PreSwitchover };
    from.execute(go_on, LONG).await.unwrap();
    reach(&mut leaving, MigrationStatus::Completed).await;
    reach(&mut arriving, MigrationStatus::Completed).await;

    let info = from.execute(QueryMigrate, LONG).await.unwrap();
    assert!(info.downtime.is_some() && info.total_time.is_some());
    // `postmigrate`, but not yet when the event comes.
    assert!(!from.execute(QueryStatus, LONG).await.unwrap().running);
    to.execute(Cont, LONG).await.unwrap();
    let announce = AnnounceSelf { initial: 1, max: 1, rounds: 1, step: 1, ..Default::default() };
    to.execute(announce, LONG).await.unwrap();
    assert!(to.execute(QueryStatus, LONG).await.unwrap().running);
}
