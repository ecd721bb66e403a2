//! The client against the NBD server inside QEMU: the bitmaps of a disk that is written to.

mod common;

use std::path::PathBuf;

use common::{LONG, PLENTY, Process, raw_image};
use nbd::{DIRTY, Extent, Options, connect};
use qmp::{Events, Typed, commands::*};
use serde_json::json;

const MIB: u64 = 1 << 20;

/// A QEMU without a machine, its folder below a path that no socket address holds.
struct Qemu {
    _process: Process,
    _folder: tempfile::TempDir,
    home: PathBuf,
    qmp: qmp::Client,
}

impl Qemu {
    async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let home = folder.path().join("a-folder-with-a-long-name/".repeat(6));
        std::fs::create_dir_all(&home).unwrap();
        let program = std::env::var("GODWIT_QEMU").unwrap_or("qemu-system-x86_64".into());
        let arguments = ["-machine", "none", "-nodefaults", "-display", "none"];
        let monitor = ["-qmp", "unix:qmp.sock,server=on,wait=off"];
        let process = Process::start(&program, &[&arguments[..], &monitor].concat(), &home);
        let qmp = qmp::Client::connect(home.join("qmp.sock"), LONG).await.unwrap();
        // Relative to its folder: QEMU itself has no way around the length of an address.
        let addr = NbdAddress::Unix { path: "nbd.sock".into() };
        qmp.execute(NbdServerStart { addr, max_connections: None }, LONG).await.unwrap();
        Self { _process: process, _folder: folder, home, qmp }
    }

    async fn add_disk(&self, name: &str) {
        let file = json!({"driver": "file", "filename": name});
        let disk = json!({"driver": "raw", "node-name": name, "file": file});
        self.qmp.execute(BlockdevAdd(disk), LONG).await.unwrap();
    }

    /// Writes like a guest: through the block layer, in front of the bitmaps.
    async fn write(&self, disk: &str, offset: u64, len: u64) {
        let command_line = format!("qemu-io {disk} \"write -P 0xaa {offset} {len}\"");
        // It says how it went on QEMU's own output only.
        self.qmp.execute(HumanMonitorCommand { command_line }, LONG).await.unwrap();
    }

    async fn export(&self, disk: &str, bitmap: &str) -> Result<(), qmp::Error> {
        let export = BlockExportAdd {
            id: format!("export-{disk}"),
            node_name: disk.into(),
            bitmaps: Some(vec![bitmap.into()]),
            ..Default::default()
        };
        self.qmp.execute(export, LONG).await.map(drop)
    }

    async fn client(&self, options: Options) -> Result<nbd::Client, connect::Error> {
        nbd::Client::connect(self.home.join("nbd.sock"), options, LONG).await
    }
}

fn add(disk: &str, bitmap: &str) -> BlockDirtyBitmapAdd {
    BlockDirtyBitmapAdd {
        node: disk.into(),
        name: bitmap.into(),
        granularity: Some(4096),
        ..Default::default()
    }
}

fn dirty(extents: &[Extent]) -> Vec<(u64, u64)> {
    let dirty = extents.iter().filter(|extent| extent.flags & DIRTY != 0);
    dirty.map(|extent| (extent.offset, extent.len)).collect()
}

async fn until_deleted(events: &mut Events, id: &str) {
    let deleted = async {
        loop {
            if let Typed::BlockExportDeleted(export) = events.next().await.unwrap().typed().unwrap()
                && export.id == id
            {
                return;
            }
        }
    };
    tokio::time::timeout(LONG, deleted).await.expect("the export is deleted");
}

#[tokio::test]
async fn a_round_reads_exactly_what_was_written_before_its_swap() {
    let qemu = Qemu::start().await;
    for disk in ["one", "two"] {
        raw_image(&qemu.home.join(disk), 16 * MIB, &[]);
        qemu.add_disk(disk).await;
        qemu.qmp.execute(add(disk, "round-1"), LONG).await.unwrap();
    }
    let mut events = qemu.qmp.events();
    qemu.write("one", MIB, 4096).await;
    qemu.write("one", 2 * MIB + 512, 8192).await;
    qemu.write("two", 7 * MIB, MIB).await;

    let recording = qemu.export("one", "round-1").await.unwrap_err();
    assert!(recording.class().is_some(), "an enabled bitmap cannot be exported: {recording}");

    let swap = ["one", "two"].into_iter().flat_map(|disk| {
        let disable = BlockDirtyBitmapDisable { node: disk.into(), name: "round-1".into() };
        [TransactionAction::from(add(disk, "round-2")), disable.into()]
    });
    qemu.qmp.execute(Transaction { actions: swap.collect() }, LONG).await.unwrap();
    qemu.write("one", 9 * MIB, 4096).await;

    let bitmap = nbd::dirty_bitmap("round-1");
    let written = [("one", vec![(MIB, 4096), (2 * MIB, 12288)]), ("two", vec![(7 * MIB, MIB)])];
    for (disk, expected) in written {
        qemu.export(disk, "round-1").await.unwrap();
        let client = qemu.client(Options::new(disk).context(&bitmap)).await.unwrap();
        let extents = client.extents(&bitmap, 0..16 * MIB, PLENTY, LONG).await.unwrap();
        assert_eq!(dirty(&extents), expected);
        let (offset, len) = expected[0];
        let filled = client.read(offset, vec![0; len as usize], LONG).await.unwrap();
        assert!(filled.buffer.iter().all(|byte| *byte == 0xaa));

        client.disconnect(LONG).await.unwrap();
        let id = format!("export-{disk}");
        let delete = BlockExportDel { id: id.clone(), mode: Some(ExportRemoveMode::Hard) };
        qemu.qmp.execute(delete, LONG).await.unwrap();
        until_deleted(&mut events, &id).await;
        let remove = BlockDirtyBitmapRemove { node: disk.into(), name: "round-1".into() };
        qemu.qmp.execute(remove, LONG).await.unwrap();
    }

    let disable = BlockDirtyBitmapDisable { node: "one".into(), name: "round-2".into() };
    qemu.qmp.execute(disable, LONG).await.unwrap();
    qemu.export("one", "round-2").await.unwrap();
    let bitmap = nbd::dirty_bitmap("round-2");
    let client = qemu.client(Options::new("one").context(&bitmap)).await.unwrap();
    let extents = client.extents(&bitmap, 0..16 * MIB, PLENTY, LONG).await.unwrap();
    assert_eq!(dirty(&extents), [(9 * MIB, 4096)]);
}

#[tokio::test]
async fn a_deleted_export_ends_its_connections_and_no_others() {
    let qemu = Qemu::start().await;
    for disk in ["one", "two"] {
        raw_image(&qemu.home.join(disk), MIB, &[]);
        qemu.add_disk(disk).await;
        let bitmap = BlockDirtyBitmapAdd { disabled: Some(true), ..add(disk, "still") };
        qemu.qmp.execute(bitmap, LONG).await.unwrap();
        qemu.export(disk, "still").await.unwrap();
    }
    let one = qemu.client(Options::new("one")).await.unwrap();
    let two = qemu.client(Options::new("two")).await.unwrap();

    let id = "export-one".to_owned();
    let safe = BlockExportDel { id: id.clone(), mode: None };
    qemu.qmp.execute(safe, LONG).await.unwrap_err();
    let hard = BlockExportDel { id, mode: Some(ExportRemoveMode::Hard) };
    qemu.qmp.execute(hard, LONG).await.unwrap();

    one.closed().await;
    two.read(0, vec![0; 4096], LONG).await.unwrap();
    let gone = qemu.client(Options::new("one")).await.unwrap_err();
    assert!(matches!(gone, connect::Error::Refused { .. }), "{gone:?}");
}
