//! Every command and event of this crate, each with a sample that gives every member.

use serde_json::json;

use super::{Checker, Problem, Schema};
use crate::commands::*;

/// Holds all commands and events of this crate against what the QEMU at hand says of itself.
///
/// An empty answer means that this QEMU is fit. Members that only newer supported versions have
/// may be missing: ask [`Schema::has_argument`] before sending those.
pub fn check_all(schema: &Schema) -> Vec<Problem> {
    let mut checker = Checker::new(schema);
    machine(&mut checker);
    migration(&mut checker);
    bitmaps(&mut checker);
    block(&mut checker);
    exports(&mut checker);
    objects(&mut checker);
    events(&mut checker);
    checker.into_problems()
}

fn text() -> String {
    "text".into()
}

fn machine(c: &mut Checker<'_>) {
    c.command(QmpCapabilities { enable: vec![Capability::Oob] }, &[]);
    c.command(QueryStatus, &[]);
    c.command(QueryVersion, &[]);
    // Its optional members depend on `meta-type`: only its own reply can be told from the schema.
    c.free_command::<QueryQmpSchema>();
    c.command(Stop, &[]);
    c.command(Cont, &[]);
    c.command(SystemPowerdown, &[]);
    c.command(SystemReset, &[]);
    c.command(Quit, &[]);
    c.command(QueryKvm, &[]);
    c.command(QueryMachines, &[]);
    c.command(QueryCpuDefinitions, &[]);
    let model = CpuModel { name: text(), props: Some(json!({})) };
    c.command(QueryCpuModelExpansion { model, ..Default::default() }, &[]);
    c.command(QueryCpusFast, &[]);
    c.command(QueryChardev, &[]);
    c.command(HumanMonitorCommand { command_line: text() }, &[]);
}

fn migration(c: &mut Checker<'_>) {
    c.command(Migrate { uri: text() }, &[]);
    c.command(MigrateIncoming { uri: text() }, &[]);
    c.command(MigrateCancel, &[]);
    c.command(MigrateContinue { state: MigrationStatus::PreSwitchover }, &[]);
    let known_everywhere = [
        MigrationCapability::AutoConverge,
        MigrationCapability::Events,
        MigrationCapability::LateBlockActivate,
        MigrationCapability::Multifd,
        MigrationCapability::PauseBeforeSwitchover,
        MigrationCapability::ReturnPath,
    ];
    let capabilities = known_everywhere
        .map(|capability| MigrationCapabilityStatus { capability, state: true })
        .into();
    c.command(MigrateSetCapabilities { capabilities }, &[]);
    c.command(QueryMigrateCapabilities, &[]);
    let newer = ["avail-switchover-bandwidth", "zero-page-detection"];
    c.command(MigrateSetParameters(all_parameters()), &newer);
    c.command(QueryMigrateParameters, &newer);
    c.command(QueryMigrate, &[]);
    c.command(CalcDirtyRate { calc_time: 1 }, &[]);
    c.command(QueryDirtyRate, &[]);
    c.command(
        AnnounceSelf {
            initial: 1,
            max: 1,
            rounds: 1,
            step: 1,
            interfaces: Some(vec![text()]),
            id: Some(text()),
        },
        &[],
    );
    let instances = vec![
        YankInstance::BlockNode { node_name: text() },
        YankInstance::Chardev { id: text() },
        YankInstance::Migration,
    ];
    c.command(Yank { instances }, &[]);
}

fn all_parameters() -> MigrationParameters {
    MigrationParameters {
        announce_initial: Some(1),
        announce_max: Some(1),
        announce_rounds: Some(1),
        announce_step: Some(1),
        max_bandwidth: Some(1),
        avail_switchover_bandwidth: Some(1),
        downtime_limit: Some(1),
        multifd_channels: Some(1),
        multifd_compression: Some(MultifdCompression::Zstd),
        multifd_zstd_level: Some(1),
        zero_page_detection: Some(ZeroPageDetection::Multifd),
        cpu_throttle_initial: Some(1),
        cpu_throttle_increment: Some(1),
        max_cpu_throttle: Some(1),
        throttle_trigger_threshold: Some(1),
        max_postcopy_bandwidth: Some(1),
        xbzrle_cache_size: Some(1),
    }
}

fn bitmaps(c: &mut Checker<'_>) {
    let add = BlockDirtyBitmapAdd {
        node: text(),
        name: text(),
        granularity: Some(512),
        persistent: Some(true),
        disabled: Some(true),
    };
    let remove = BlockDirtyBitmapRemove { node: text(), name: text() };
    let clear = BlockDirtyBitmapClear { node: text(), name: text() };
    let enable = BlockDirtyBitmapEnable { node: text(), name: text() };
    let disable = BlockDirtyBitmapDisable { node: text(), name: text() };
    let bitmaps = vec![text().into(), BitmapRef::Of { node: text(), name: text() }];
    let merge = BlockDirtyBitmapMerge { node: text(), target: text(), bitmaps };
    c.command(&add, &[]);
    c.command(&remove, &[]);
    c.command(&clear, &[]);
    c.command(&enable, &[]);
    c.command(&disable, &[]);
    c.command(&merge, &[]);
    let actions =
        vec![add.into(), remove.into(), clear.into(), enable.into(), disable.into(), merge.into()];
    c.command(Transaction { actions }, &[]);
}

fn block(c: &mut Checker<'_>) {
    // Their arguments are the caller's.
    c.free_command::<BlockdevAdd>();
    c.free_command::<BlockdevReopen>();
    c.command(BlockdevDel { node_name: text() }, &[]);
    c.command(BlockResize { size: 1, node_name: Some(text()), device: Some(text()) }, &[]);
    c.command(QueryNamedBlockNodes { flat: Some(true) }, &[]);
    c.command(QueryBlock, &[]);
    c.command(QueryBlockstats { query_nodes: Some(true) }, &[]);
    c.command(
        BlockdevMirror {
            job_id: text(),
            device: text(),
            target: text(),
            sync: MirrorSync::Full,
            speed: Some(1),
            granularity: Some(1),
            buf_size: Some(1),
            copy_mode: Some(MirrorCopyMode::WriteBlocking),
            auto_finalize: Some(true),
            auto_dismiss: Some(true),
        },
        &[],
    );
    c.command(BlockJobCancel { device: text(), force: Some(true) }, &[]);
    c.command(QueryBlockJobs, &[]);
}

fn exports(c: &mut Checker<'_>) {
    let addr = NbdAddress::Unix { path: text() };
    c.command(NbdServerStart { addr, max_connections: Some(1) }, &[]);
    c.command(NbdServerStop, &[]);
    c.command(
        BlockExportAdd {
            r#type: ExportType::Nbd,
            id: text(),
            node_name: text(),
            name: Some(text()),
            writable: Some(true),
            bitmaps: Some(vec![text().into()]),
            allocation_depth: Some(true),
        },
        &[],
    );
    c.command(BlockExportDel { id: text(), mode: Some(ExportRemoveMode::Hard) }, &[]);
    c.command(QueryBlockExports, &[]);
}

fn objects(c: &mut Checker<'_>) {
    // Their arguments are the caller's.
    c.free_command::<ObjectAdd>();
    c.free_command::<DeviceAdd>();
    c.command(ObjectDel { id: text() }, &[]);
    c.command(DeviceDel { id: text() }, &[]);
    c.command(QomGet { path: text(), property: text() }, &[]);
    c.command(QomSet { path: text(), property: text(), value: json!(1) }, &[]);
}

fn events(c: &mut Checker<'_>) {
    for event in [
        "STOP",
        "RESUME",
        "SHUTDOWN",
        "RESET",
        "POWERDOWN",
        "MIGRATION",
        "MIGRATION_PASS",
        "BLOCK_IO_ERROR",
        "BLOCK_JOB_COMPLETED",
        "BLOCK_JOB_CANCELLED",
        "BLOCK_JOB_READY",
        "BLOCK_JOB_ERROR",
        "BLOCK_JOB_PENDING",
        "JOB_STATUS_CHANGE",
        "GUEST_PANICKED",
        "BLOCK_EXPORT_DELETED",
        "DEVICE_DELETED",
    ] {
        c.event(event);
    }
}
